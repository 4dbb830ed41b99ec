"""Probes of servers that are started for them: checkpoints that edit, adapters, ranks, small pools, damaged files."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.compare_stock.right import clear, exact, questions, reference, tokenizer
from bench.compare_stock.sides import TINY, Seen, Target
from bench.records import ROOT
from examples.tiny_llada2.tasks import one_of
from sglang_llada.llada2.adapters import load_merged
from sglang_llada.llada2.reference import generate

EXAMPLES = ROOT / "examples"
EDITING, INSERTING, DOUBLE = EXAMPLES / "tiny-llada2.1", EXAMPLES / "tiny-llada2.2", EXAMPLES / "tiny-llada2-double"
SMALL_POOL = 1024  # tokens of KV, of which the requests there want three times as many
COUNT = 12
LONG = 192  # tokens of an answer there


def edits(target: Target) -> Seen:
    return exact(target, questions(COUNT, EDITING, "joint_threshold"))


def inserts(target: Target) -> Seen:
    """What has a kernel for GPUs alone is not judged here."""
    if target.server is None and "requires CUDA" in target.why:
        return Seen(target.why)
    return exact(target, questions(COUNT, INSERTING, "levenshtein"))


def two_ranks(target: Target) -> Seen:
    return exact(target, questions()[:COUNT])


def adapter(target: Target) -> Seen:
    """Of the task that it teaches."""
    model, facts = load_merged(TINY, DOUBLE), reference()[1]
    rng, asked = random.Random(9), []
    for _ in range(COUNT):
        messages = one_of(rng, "double", held_out=True).messages
        ids = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        with torch.inference_mode():
            asked.append((ids, generate(model, ids, 40, mask_id=facts.mask_id, stop_ids=facts.stop_ids)))
    return exact(target, clear(asked), top={"lora_path": "double"})


def full_pool(target: Target) -> Seen:
    """Requests that do not fit at once, and grow while they run."""
    model, facts = reference()
    prompts = [[70 + i, 71] for i in range(16)]
    with torch.inference_mode():
        asked = clear([(ids, generate(model, ids, LONG, mask_id=facts.mask_id)) for ids in prompts])
    got = target.together([(ids, LONG, {"ignore_eos": True, "seconds": 90}) for ids, _ in asked], 16)
    good = sum(each["output_ids"] == want.token_ids for each, (_, want) in zip(got, asked, strict=True))
    return Seen(f"{good} of {len(asked)} are the reference's", good == len(asked))


def damage(folder: Path) -> Path:
    """Write a checkpoint whose last norm is missing, and which has a tensor that no layer takes."""
    shutil.copytree(TINY, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors | {"model.extra.weight": torch.zeros(3)}, file, {"format": "pt"})
    return folder


def bad_files(target: Target) -> Seen:
    if target.server is not None:
        return Seen("starts, and answers with what it has", False)
    return Seen(target.why, "model.norm.weight" in target.log.read_text(errors="replace"))
