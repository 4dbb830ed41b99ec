"""A context length of any size: the last block of a request may end behind it."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.host.conftest import TINY, compare, decode_one, held_out_prompts
from tests.host.serving import serving

pytestmark = pytest.mark.host

CONTEXT, NEW_TOKENS = 1000, 80  # 31 blocks and a quarter


@pytest.mark.slow
def test_answers_up_to_the_edge_are_the_references(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where the length is config.json's own: --context-length comes to the same."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    lengths = [900, 911, 912, 913, 928, 929, 940, 959, 960, 961, 962, 963, 991, 992, 993, 998, 999, 1000]
    prompts = list(held_out_prompts(tokenizer, lengths))
    random.Random(0).shuffle(prompts)
    with serving(folder, tmp_path / "log") as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda ids: server.post("/generate", body(ids)), prompts))
        server.flush()
    fit = [(ids, reply.json()) for ids, reply in zip(prompts, replies, strict=True) if reply.ok]
    refused = [(len(ids), reply) for ids, reply in zip(prompts, replies, strict=True) if not reply.ok]
    assert all(reply.status_code == 400 and "ength" in reply.text for _, reply in refused), refused
    assert min(length for length, _ in refused) > max(len(ids) for ids, _ in fit) == 961  # a block, and what it keeps
    # Two positions of the context the host keeps to itself.
    cases = [decode_one(folder, min(NEW_TOKENS, CONTEXT - 2 - len(ids)), True, ids) for ids, _ in fit]
    compare(cases, [answer for _, answer in fit], "at the edge")
    assert sum(len(case.prompt) + len(case.want.token_ids) == CONTEXT - 2 for case in cases) > 3


def body(ids: list[int]) -> dict[str, Any]:
    """As many tokens as may be asked for beside a prompt."""
    asked = max(min(NEW_TOKENS, CONTEXT - len(ids)), 0)
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": asked, "ignore_eos": True}}
