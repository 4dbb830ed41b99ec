"""Every algorithm, chosen per request: served output equals its reference decode, alone and in one mixed batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sglang_llada.config import DecodeConfig
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.llada2.editing import generate_as
from sglang_llada.llada2.reference import Llada2ForDiffusion
from sglang_llada.llada2.weights import load_reference
from tests.host.conftest import NEW_TOKENS, Case, compare, held_out_prompts
from tests.host.serving import Server, serving

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-llada2.2"  # which knows them all
WAYS: dict[str, dict[str, Any]] = {
    "threshold": {"algorithm": "threshold"},
    "quality": {"algorithm": "joint_threshold"},
    # Decides rashly, so that there is something to edit.
    "rash": {"algorithm": "joint_threshold", "threshold": 0.0, "edit_threshold": 0.0, "max_post_edit_steps": 2},
    "levenshtein": {},
    "no early exit": {"algorithm": "threshold", "early_exit": False},
    "few steps": {"algorithm": "threshold", "max_nfe": 2},
    "few steps of editing": {"algorithm": "joint_threshold", "threshold": 0.9, "max_nfe": 3},
    "mbe": {"algorithm": "mbe", "mode": "speed"},
    "rash mbe": {"algorithm": "mbe", "window": 3, "threshold": 0.0, "edit_threshold": 0.0},
    "live blocks": {"algorithm": "threshold", "live_blocks": 3, "next_block_share": 0.9},
    "live blocks of mbe": {"algorithm": "mbe", "threshold": 0.9, "live_blocks": 2, "next_block_share": 1.0},
    "live blocks of levenshtein": {"live_blocks": 2, "next_block_share": 1.0},
    "rash levenshtein": {"threshold": 0.0, "max_post_edit_steps": 5, "cumulative_budget": True},
}
COUNT = 100


@pytest.fixture(scope="module")
def facts() -> CheckpointFacts:
    return read_facts(CHECKPOINT)


@pytest.fixture(scope="module")
def reference() -> Llada2ForDiffusion:
    return load_reference(CHECKPOINT)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    return list(held_out_prompts(tokenizer, [1, 2, 31, 32, 33, 63, 64, 65, *range(30, 30 + COUNT - 8)]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The plain host command: the checkpoint says how it is decoded."""
    with serving(CHECKPOINT, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def decoded(
    model: Llada2ForDiffusion, facts: CheckpointFacts, prompts: list[list[int]], custom_params: dict[str, Any]
) -> list[Case]:
    torch.set_num_threads(1)
    params = DecodeConfig.defaults(facts.block_size, "levenshtein", indel=True).replaced(custom_params)
    return [Case(prompt, generate_as(params, model, prompt, NEW_TOKENS, facts)) for prompt in prompts]


def test_mixed_algorithms_in_one_batch_equal_their_references(
    server: Server, prompts: list[list[int]], reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    wanted = {way: decoded(reference, facts, prompts, params) for way, params in WAYS.items()}
    asked = [(way, case) for way in WAYS for case in wanted[way]]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()

    def ask(i: int) -> dict[str, Any]:
        way, case = asked[i]
        return server.generate(case.prompt, NEW_TOKENS, custom_params=WAYS[way])

    for at_once in (1, 16):
        server.flush()
        with ThreadPoolExecutor(at_once) as pool:
            answers = dict(zip(order, pool.map(ask, order), strict=True))
        for kind in WAYS:
            mine = [i for i, (way, _) in enumerate(asked) if way == kind]
            compare([asked[i][1] for i in mine], [answers[i] for i in mine], f"{kind}, {at_once} at once, mixed")
    hasty = decoded(reference, facts, prompts, {**WAYS["rash"], "edit_threshold": 1.0})
    for way in ("rash", "rash levenshtein"):
        changed = sum(a.want.token_ids != b.want.token_ids for a, b in zip(wanted[way], hasty, strict=True))
        print(f"{way}: edits changed {changed} of {COUNT} answers")
        assert changed > 0


@pytest.mark.parametrize(
    ("custom_params", "message"),
    [
        ({"algorithm": "threshold", "edit_threshold": 0.5}, "unknown key 'edit_threshold'"),
        ({"algorithm": "joint_threshold", "mode": "best"}, "mode is 'best'; allowed: quality, speed"),
        ({"cumulative_budget": 1}, "cumulative_budget is 1; allowed: true or false"),
    ],
)
def test_what_an_algorithm_does_not_take_is_refused(
    server: Server, custom_params: dict[str, Any], message: str
) -> None:
    body = {"input_ids": [4, 5], "sampling_params": {"temperature": 0, "custom_params": custom_params}}
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert message in reply.text
