"""The inserting and deleting step of LLaDA2.2 against its rules written as a loop, and its bound on steps."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import levenshtein
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut, Tokens
from sglang_llada.llada2 import editing
from sglang_llada.llada2.editing import LevenshteinBlock
from tests.sizes import size

T, VOCAB = 8, 9
TOKENS = Tokens(mask=6, delete=7, split=8)
K = levenshtein.CANDIDATES


def start(blocks: list[LevenshteinBlock]) -> tuple[BlockRows, State]:
    """The first step's arguments."""
    ids = torch.tensor([b.ids for b in blocks])
    given = torch.arange(T) < torch.tensor([[b.given] for b in blocks])
    rows, none = len(blocks), torch.zeros(len(blocks), dtype=torch.int64)
    memory = torch.full((rows, levenshtein.memory_size(T)), -1)
    return BlockRows(ids, (ids == TOKENS.mask) & ~given, torch.zeros_like(given)), State(none, none, memory)


def after(out: StepOut, given: Tensor) -> BlockRows:
    return BlockRows(out.ids, out.open, ~out.open & ~given)


def numbers(blocks: list[LevenshteinBlock]) -> Params:
    return Params(
        threshold=torch.tensor([b.threshold for b in blocks]),
        steps=torch.tensor([b.steps for b in blocks]),
        edit_threshold=torch.tensor([b.edit_threshold for b in blocks]),
        max_post_edit_steps=torch.tensor([b.budget for b in blocks]),
        cumulative_budget=torch.tensor([b.cumulative for b in blocks]),
        tokens=TOKENS,
    )


def scored(tokens: Tensor, chances: Tensor) -> Scores:
    return Scores(tokens[..., 0], chances[..., 0], tokens, chances)


def random_candidates(rows: int, love: Tensor) -> tuple[Tensor, Tensor]:
    """K distinct tokens per position and falling probabilities with many ties; `love` [V] makes some come first."""
    tokens = (torch.rand(rows, T, VOCAB) + love).argsort(-1, descending=True)[..., :K]
    chances = (torch.randint(0, 20, (rows, T, K)) / 40).float().sort(-1, descending=True).values
    return tokens, chances


def test_the_reference_remembers_as_much_as_the_step() -> None:
    assert (editing.CANDIDATES, editing.TRIED, editing.SEEN) == (K, levenshtein.TRIED, levenshtein.SEEN)


def test_random_blocks_equal_the_reference_step_by_step() -> None:
    """4,000 blocks, or 12,000, from their first step to their last, prompts and literal mask tokens inside."""
    rng = random.Random(0)
    torch.manual_seed(0)
    met: Counter[str] = Counter()
    for _ in range(size(4, 12)):
        blocks = []
        for _ in range(1000):
            given = [rng.choice([0, 1, TOKENS.mask]) for _ in range(rng.choice([0, 0, 0, rng.randint(1, T - 1)]))]
            blocks.append(
                LevenshteinBlock(
                    given, T, TOKENS.mask, TOKENS.delete, TOKENS.split,
                    threshold=rng.choice([0.0, 10 / 40, 1.0]),
                    edit_threshold=rng.choice([0.0, 10 / 40, 1.0]),
                    steps=rng.choice([1, 3, T]),
                    max_post_edit_steps=rng.choice([0, 1, 5]),
                    cumulative_budget=rng.random() < 0.5,
                )
            )  # fmt: skip
        love = torch.zeros(1000, 1, VOCAB)
        love[::2, 0, 6:] -= 0.5  # every other row meets the three special tokens less often
        # Few sets of scores that come again and again, so that blocks go round.
        sets = [random_candidates(1000, love) for _ in range(rng.choice([1, 2, 50]))]
        block, state = start(blocks)
        params, fixed = numbers(blocks), ~block.open
        running = torch.ones(1000, dtype=torch.bool)
        for at in range(T + 5 + 1):
            tokens, chances = sets[at % len(sets)]
            before = [x.clone() for x in (block.ids, block.open, state.step, state.edits, state.memory)]  # type: ignore[union-attr]
            out = levenshtein.step(block, scored(tokens, chances), state, params)
            assert all(map(torch.equal, before, (block.ids, block.open, state.step, state.edits, state.memory)))
            lists = [
                [list(zip(t, c, strict=True)) for t, c in zip(*row, strict=True)]
                for row in zip(tokens.tolist(), chances.tolist(), strict=True)
            ]
            for r in running.nonzero().flatten().tolist():
                seen = blocks[r].ids in blocks[r].seen
                done = blocks[r].step(lists[r])
                assert out.ids[r].tolist() == blocks[r].ids, f"step {at} of row {r}"
                assert bool(out.done[r]) == done
                holes = [i >= blocks[r].given and t == TOKENS.mask for i, t in enumerate(blocks[r].ids)]
                assert out.open[r].tolist() == holes
                met["seen"] += seen
                met["done by itself"] += done and at < T + blocks[r].budget
                met["done at the cap"] += done and at == T + blocks[r].budget
            running &= ~out.done
            block, state = after(out, fixed), out.state
        assert not running.any()
    assert all(met[kind] > 100 for kind in ("seen", "done by itself", "done at the cap")), met


def test_rows_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(1)
    blocks = [LevenshteinBlock([], T, *(TOKENS.mask, TOKENS.delete, TOKENS.split)) for _ in range(50)]
    (block, state), params = start(blocks), numbers(blocks)
    tokens, chances = random_candidates(50, torch.zeros(VOCAB))
    order = torch.randperm(50)
    out = levenshtein.step(block, scored(tokens, chances), state, params)
    rows = BlockRows(block.ids[order], block.open[order], block.editable[order])
    other = levenshtein.step(rows, scored(tokens[order], chances[order]), state, params)
    assert torch.equal(other.ids, out.ids[order]) and torch.equal(other.done, out.done[order])


def loving(*first: int) -> Any:
    order = [*first, *(t for t in range(VOCAB) if t not in first)][:K]
    return lambda step: torch.tensor(order).expand(1, T, K)


ADVERSARIES = {
    "constant": loving(0),
    "mask-loving": loving(TOKENS.mask),
    "delete-loving": loving(TOKENS.delete),
    "split-loving": loving(TOKENS.split),
    "oscillating": lambda step: loving(step % 2)(step),
    "reopening": lambda step: loving(TOKENS.mask if step % 2 else 1)(step),
    "splitting and deleting": lambda step: loving(TOKENS.split if step % 2 else TOKENS.delete)(step),
}


@pytest.mark.parametrize("scores", ADVERSARIES)
@pytest.mark.parametrize("budget", [0, 1, 16])
@pytest.mark.parametrize("cumulative", [False, True])
def test_a_block_ends_within_its_bound(scores: str, budget: int, cumulative: bool) -> None:
    config = DecodeConfig.defaults(T, "levenshtein", indel=True).replaced(
        {"max_post_edit_steps": budget, "cumulative_budget": cumulative, "threshold": 1.0}
    )
    given = LevenshteinBlock(
        [0], T, TOKENS.mask, TOKENS.delete, TOKENS.split,
        threshold=1.0, max_post_edit_steps=budget, cumulative_budget=cumulative,
    )  # fmt: skip
    (block, state), params = start([given]), numbers([given])
    fixed = ~block.open
    for step in range(config.most_steps):
        out = levenshtein.step(block, scored(ADVERSARIES[scores](step), torch.full((1, T, K), 0.5)), state, params)
        if out.done:
            break
        block, state = after(out, fixed), out.state
    assert out.done and not out.open.any()
    assert out.ids[0, 0] == 0
    assert not torch.isin(out.ids, torch.tensor([TOKENS.mask, TOKENS.delete, TOKENS.split])).any()


def test_both_rules_of_the_budget_differ_where_a_hole_comes_back() -> None:
    """One position is decided, reopened and decided again; only the cumulative rule counts on."""
    ends = []
    for cumulative in (False, True):
        one = LevenshteinBlock([0] * (T - 1), T, *(TOKENS.mask, TOKENS.delete, TOKENS.split), max_post_edit_steps=2)
        (block, state), params = start([one]), numbers([one])
        params, fixed = replace(params, cumulative_budget=torch.tensor([cumulative])), ~block.open
        for step in range(20):
            tokens = ADVERSARIES["reopening"](step).clone()
            tokens[..., 1] = 2 + step % 3  # so that no token was tried before
            out = levenshtein.step(block, scored(tokens, torch.full((1, T, K), 0.5)), state, params)
            if out.done:
                break
            block, state = after(out, fixed), out.state
        ends.append(step)
    assert ends[0] > ends[1]
