"""A context length of any size: the last block of a request may end behind it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.host.conftest import TINY, compare, decode_one, held_out_prompts
from tests.host.serving import serving

pytestmark = pytest.mark.host

CONTEXT, NEW_TOKENS = 1000, 8  # 31 blocks and a quarter


@pytest.mark.slow
def test_answers_up_to_the_edge_are_the_references(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where the length is config.json's own: --context-length comes to the same."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    lengths = [*range(930, 1001, 7), 958, 959, 960, 961, 980, 991, 992, 993, 997, 998, 999]
    prompts = list(held_out_prompts(tokenizer, lengths))
    random.Random(0).shuffle(prompts)
    with serving(folder, tmp_path / "log") as server:
        fit = [ids for ids in prompts if server.post("/generate", body(ids)).ok]
        answers = server.generate_all(fit, NEW_TOKENS, 8)
        for ids in prompts:
            reply = server.post("/generate", body(ids))
            assert reply.ok or (reply.status_code == 400 and "ength" in reply.text), (len(ids), reply.text)
        server.flush()
    # As many tokens as the host leaves room for.
    cases = [decode_one(folder, min(NEW_TOKENS, CONTEXT - 2 - len(ids)), False, ids) for ids in fit]
    compare(cases, answers, "at the edge")
    assert max(len(ids) for ids in fit) > CONTEXT // 32 * 32 - 32


def body(ids: list[int]) -> dict[str, object]:
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
