"""Every algorithm, chosen per request: served output equals its reference decode, alone and in one mixed batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.editing import generate_joint
from sglang_llada.llada2.reference import Llada2ForDiffusion
from tests.host.conftest import NEW_TOKENS, Case, compare
from tests.host.serving import Server

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

EDITING: dict[str, dict[str, Any]] = {
    "quality": {"algorithm": "joint_threshold"},
    # Decides rashly, so that there is something to edit.
    "rash": {"algorithm": "joint_threshold", "threshold": 0.0, "edit_threshold": 0.0, "max_post_edit_steps": 2},
}
COUNT = 100


def by_editing(model: Llada2ForDiffusion, facts: CheckpointFacts, prompt: list[int], params: dict[str, Any]) -> Case:
    torch.set_num_threads(1)
    options = {name: value for name, value in params.items() if name != "algorithm"}
    ids = {"mask_id": facts.mask_id, "stop_ids": facts.stop_ids}
    return Case(prompt, generate_joint(model, prompt, NEW_TOKENS, **ids, **options))


def test_mixed_algorithms_in_one_batch_equal_their_references(
    server: Server, cases: list[Case], reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    some = sorted(cases, key=lambda case: len(case.prompt))[:COUNT]
    wanted = {how: [by_editing(reference, facts, c.prompt, params) for c in some] for how, params in EDITING.items()}
    asked = [(how, {"algorithm": "threshold"}, c) for how in ["threshold"] for c in some]
    asked += [(how, params, c) for how, params in EDITING.items() for c in wanted[how]]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()

    def ask(i: int) -> dict[str, Any]:
        _, params, case = asked[i]
        return server.generate(case.prompt, NEW_TOKENS, custom_params=params)

    for at_once in (1, 16):
        server.flush()
        with ThreadPoolExecutor(at_once) as pool:
            answers = dict(zip(order, pool.map(ask, order), strict=True))
        for kind in ("threshold", *EDITING):
            mine = [i for i, (how, _, _) in enumerate(asked) if how == kind]
            compare([asked[i][2] for i in mine], [answers[i] for i in mine], f"{kind}, {at_once} at once, mixed")
    hasty = [by_editing(reference, facts, c.prompt, {**EDITING["rash"], "edit_threshold": 1.0}) for c in some]
    edited = sum(a.want.token_ids != b.want.token_ids for a, b in zip(wanted["rash"], hasty, strict=True))
    print(f"rash: edits changed {edited} of {COUNT} answers")
    assert edited > 0


def test_a_mode_the_server_cannot_do_is_refused(server: Server) -> None:
    body = {"input_ids": [4, 5], "sampling_params": {"temperature": 0, "custom_params": {"mode": "speed"}}}
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert "unknown key 'mode'" in reply.text
