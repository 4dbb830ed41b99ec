"""What is right: the reference decode's answers, and questions whose answers floating point does not decide."""

from __future__ import annotations

import functools
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench.compare_stock.sides import TINY, Seen, Target
from bench.serve import chats
from sglang_llada.config import DecodeConfig
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.llada2.editing import Wishes, generate_as
from sglang_llada.llada2.reference import Generation, Llada2ForDiffusion
from sglang_llada.llada2.weights import load_reference

COUNTING = "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>"
CLOSE = 1e-4  # a decision this near to another one may go either way in floating point

Asked = list[tuple[list[int], Generation]]  # prompts with their right answers


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TINY)


@functools.cache
def reference(folder: Path = TINY) -> tuple[Llada2ForDiffusion, CheckpointFacts]:
    """The reference network of a checkpoint, and what it says of itself."""
    torch.set_num_threads(1)
    return load_reference(folder), read_facts(folder)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def right(
    prompt: list[int], new_tokens: int, folder: Path = TINY, wishes: dict[str, Any] | None = None, **custom_params: Any
) -> Generation:
    """The reference decode's answer."""
    model, facts = reference(folder)
    params = DecodeConfig.defaults(facts.block_size, custom_params.pop("algorithm", "threshold"), indel=facts.indel)
    params = params.replaced(custom_params)
    with torch.inference_mode():
        return generate_as(params, model, prompt, new_tokens, facts, Wishes(**wishes) if wishes else None)


@functools.cache
def questions(count: int = 24, folder: Path = TINY, algorithm: str = "threshold", seed: int = 3) -> Asked:
    """Held-out chats with the reference's answers of 40 tokens, but for those that floating point may decide."""
    asks = islice(chats(tokenizer(), seed=seed), count)
    return clear([(ask.input_ids, right(ask.input_ids, 40, folder, algorithm=algorithm)) for ask in asks])


def clear(asked: Asked) -> Asked:
    """Those in which no decision was too near to call."""
    return [(prompt, want) for prompt, want in asked if min(want.margins) >= CLOSE]


def exact(target: Target, asked: Asked, at_once: int = 8, **options: Any) -> Seen:
    """How many of these answers are the reference's."""
    answers = target.together([(prompt, 40, options) for prompt, _ in asked], at_once)
    good = sum(got["output_ids"] == want.token_ids for got, (_, want) in zip(answers, asked, strict=True))
    return Seen(f"{good} of {len(asked)} are the reference's", good == len(asked))
