"""The reference: who sees whom, and its decode loop on scripted logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_llada.llada2.editing import JointBlock, ThresholdBlock, generate_blocks
from sglang_llada.llada2.reference import block_causal_mask, generate, quota
from tests.toy import make_config, make_model

VOCABULARY, MASK, STOP = 8, 7, 6
T = 4  # block size of the scripts


class Scripted:
    """A network that says `tokens[p]` at position p with probability `sure[p]`, whatever it is shown."""

    def __init__(self, tokens: list[int], sure: list[float], block_size: int = T) -> None:
        self.config = SimpleNamespace(block_size=block_size)
        self.tokens, self.sure = tokens, sure
        self.shown: list[list[int]] = []

    def block_causal(self, ids: list[int]) -> Tensor:
        self.shown.append(list(ids))
        rows = [[(1 - p) / (VOCABULARY - 1)] * VOCABULARY for p in self.sure[: len(ids)]]
        for row, token, p in zip(rows, self.tokens, self.sure, strict=False):
            row[token] = p
        return torch.tensor(rows).log()


def decode(network: Any, prompt: list[int], new: int, **options: Any) -> Any:
    return generate(network, prompt, new, mask_id=MASK, stop_ids=[STOP], **options)


def test_mask_is_bidirectional_in_a_block_and_causal_across() -> None:
    assert block_causal_mask(5, 2).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_a_token_changes_its_own_block_and_later_ones_only() -> None:
    model = make_model(make_config(block_size=4))
    ids = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
    before, after = model.block_causal(ids), model.block_causal([*ids[:7], 81, *ids[8:]])
    changed = ((before - after).abs().amax(-1) > 1e-4).tolist()  # shapes equal, summation order may not be
    assert changed == [False] * 4 + [True] * 8


def test_all_sure_is_one_forward_a_block() -> None:
    out = decode(Scripted([1, 2, 3, 4, 5, 1, 2, 3], [0.99] * 8), [1, 2], 6)
    assert (out.token_ids, out.forwards, out.finish) == ([3, 4, 5, 1, 2, 3], 2, "length")
    assert out.step_map == [1] * 6


def test_unsure_positions_come_one_a_step_the_most_confident_first() -> None:
    network = Scripted([1, 2, 3, 4], [0.2, 0.5, 0.3, 0.4])
    out = decode(network, [], 4, threshold=0.9, steps=4)
    assert (out.token_ids, out.step_map, out.forwards) == ([1, 2, 3, 4], [4, 1, 3, 2], 4)
    assert network.shown[:2] == [[MASK] * 4, [MASK, 2, MASK, MASK]]


def test_of_equal_confidences_the_earliest_position_is_first() -> None:
    assert decode(Scripted([1, 2, 3, 4], [0.5] * 4), [], 4, threshold=0.9, steps=4).step_map == [1, 2, 3, 4]


def test_quota_gives_the_first_steps_the_remainder() -> None:
    assert [quota(step, 32, 5) for step in range(5)] == [7, 7, 6, 6, 6]
    out = decode(Scripted([1, 2, 3, 4], [0.2, 0.5, 0.3, 0.4]), [], 4, threshold=0.9, steps=3)
    assert (out.step_map, out.forwards) == ([3, 1, 2, 1], 3)


def test_too_few_sure_positions_are_filled_up_to_the_quota() -> None:
    out = decode(Scripted([1, 2, 3, 4], [0.95, 0.5, 0.3, 0.4]), [], 4, threshold=0.9, steps=2)
    assert out.step_map == [1, 1, 2, 2]


def test_threshold_is_strict() -> None:
    sure = [0.5, 0.5, 0.5, 0.25]
    exact = Scripted([1, 2, 3, 4], sure).block_causal([0])[0].softmax(-1)[1].item()
    assert decode(Scripted([1, 2, 3, 4], sure), [], 4, threshold=exact).step_map == [1, 2, 3, 4]
    assert decode(Scripted([1, 2, 3, 4], sure), [], 4, threshold=exact - 1e-6).step_map == [1, 1, 1, 2]


def test_the_mask_is_never_the_answer() -> None:
    assert decode(Scripted([MASK] * 4, [0.9] * 4), [], 4).token_ids == [0] * 4


def test_a_mask_token_in_the_prompt_is_text() -> None:
    network = Scripted([1, 2, 3, 4], [0.99] * 4)
    assert decode(network, [5, MASK], 2).token_ids == [3, 4]
    assert decode(Scripted([1, 2, 3, 4], [0.3, 0.3, 0.3, 0.2]), [5, MASK], 2).forwards == 2


def test_a_stop_ends_the_answer_when_nothing_before_it_is_open() -> None:
    network = Scripted([1, 2, STOP, 4], [0.99, 0.5, 0.99, 0.3])
    out = decode(network, [], 8, threshold=0.9)
    assert (out.token_ids, out.finish, out.forwards) == ([1, 2, STOP], "stop", 2)  # position 3 was never decided
    assert out.step_map == [1, 2, 1]


def test_a_stop_in_the_prompt_does_not_end_the_answer() -> None:
    assert decode(Scripted([1, 2, 3, 4], [0.99] * 4), [STOP], 3).token_ids == [2, 3, 4]


def test_the_last_allowed_token_ends_inside_its_block() -> None:
    out = decode(Scripted([1, 2, 3, 4], [0.99, 0.99, 0.3, 0.2]), [5], 1)
    assert (out.token_ids, out.finish, out.forwards) == ([2], "length", 1)


@pytest.mark.parametrize("prompt", [[], [1], [1, 2, 3, 4], [1, 2, 3, 4, 5]])
def test_exactly_max_new_tokens_whatever_the_prompts_edge(prompt: list[int]) -> None:
    out = decode(Scripted([1] * 16, [0.99] * 16), prompt, 5)
    assert out.token_ids == [1] * 5
    assert len(out.margins) == out.forwards == (len(prompt) + 4) // T - len(prompt) // T + 1


def test_after_max_nfe_steps_the_answer_ends_before_the_first_open_position() -> None:
    network = Scripted([1, 2, 3, 4], [0.9, 0.2, 0.8, 0.7])
    out = decode(network, [], 8, threshold=0.95, steps=4, max_nfe=3)
    assert (out.token_ids, out.forwards, out.finish) == ([1], 3, "length")


def test_without_early_exit_the_block_of_a_stop_is_finished() -> None:
    network = Scripted([1, STOP, 3, 4], [0.99, 0.99, 0.3, 0.2])
    out = decode(network, [], 8, threshold=0.9, early_exit=False)
    assert (out.token_ids, out.finish, out.forwards) == ([1, STOP], "stop", 3)


def in_blocks(network: Any, prompt: list[int], new: int, **window: Any) -> Any:
    def fresh(given: list[int]) -> ThresholdBlock:
        return ThresholdBlock(given, T, MASK, threshold=0.9, steps=T)

    return generate_blocks(network, prompt, new, fresh, stop_ids=[STOP], whole_blocks=False, **window)


@pytest.mark.parametrize("prompt", [[], [5], [5, MASK], [1, 2, 3, 4], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("new", [0, 1, 5, 11])
def test_one_live_block_is_the_plain_decode(prompt: list[int], new: int) -> None:
    generator = torch.Generator().manual_seed(len(prompt) + new)
    tokens = torch.randint(0, VOCABULARY, (20,), generator=generator).tolist()
    network = Scripted(tokens, torch.rand(20, generator=generator).tolist())
    one, other = decode(network, prompt, new, threshold=0.9, steps=T), in_blocks(network, prompt, new)
    assert (one.token_ids, one.forwards, one.finish, one.step_map) == (
        other.token_ids, other.forwards, other.finish, other.step_map,
    )  # fmt: skip
    assert one.margins == pytest.approx(other.margins, abs=1e-5)


def test_live_blocks_are_decided_at_once_and_shown_together() -> None:
    network = Scripted([1, 2, 3, 4, 5, 1, 2, 3], [0.99, 0.2, 0.3, 0.99, 0.99, 0.99, 0.2, 0.99])
    out = in_blocks(network, [], 8, live_blocks=2, next_block_share=1.0)
    assert (out.token_ids, out.forwards) == ([1, 2, 3, 4, 5, 1, 2, 3], 3)
    assert network.shown == [[MASK] * 4, [1, MASK, MASK, 4] + [MASK] * 4, [1, MASK, 3, 4, 5, 1, MASK, 3]]
    assert in_blocks(network, [], 8, live_blocks=2, next_block_share=0.5).forwards == 4


def test_a_block_in_the_window_is_edited_while_the_next_one_is_decided() -> None:
    """A network that says 1 everywhere until it sees five of them, then 2 in the first block."""

    class Fickle(Scripted):
        def block_causal(self, ids: list[int]) -> Tensor:
            self.tokens = [2 if ids.count(1) > T else 1] * T + [1] * T
            return super().block_causal(ids)

    def fresh(given: list[int]) -> JointBlock:
        return JointBlock(given, T, MASK, threshold=0.5, edit_threshold=0.5, max_post_edit_steps=3)

    texts = [
        generate_blocks(Fickle([], [0.9] * 8), [], 8, fresh, whole_blocks=True, window=window).token_ids
        for window in (1, 2)
    ]
    assert texts == [[1] * 8, [2] * 4 + [1] * 4]
