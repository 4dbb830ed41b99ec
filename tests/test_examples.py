"""The example without SGLang says what the reference says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from examples.decode_by_hand import OPEN
from sglang_llada.llada2.checkpoint import read_facts
from sglang_llada.llada2.reference import generate
from sglang_llada.llada2.weights import load_reference

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "tiny-llada2"
QUESTION = "Spell KLMN."


@pytest.mark.slow
def test_decode_by_hand_ends_with_the_answer_of_the_reference() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.decode_by_hand", QUESTION],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1] == f"answer: {reference_answer()}"
    steps = [line for line in lines if line.startswith("step ")]
    assert steps and OPEN not in steps[-1]
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if f"    {line}" not in page] == []


def reference_answer() -> str:
    """The part of the reference's answer that lies in the block where the prompt ends."""
    facts, tokenizer = read_facts(CHECKPOINT), PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    rest_of_block = facts.block_size - len(prompt) % facts.block_size
    out = generate(load_reference(CHECKPOINT), prompt, rest_of_block, mask_id=facts.mask_id, stop_ids=facts.stop_ids)
    return tokenizer.decode(out.token_ids, skip_special_tokens=True)
