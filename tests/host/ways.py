"""Every way to decode, on the checkpoint that knows them all, and what the reference answers to each."""

from __future__ import annotations

import functools
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sglang_llada.config import DecodeConfig, Sampling
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.llada2.editing import Wishes, generate_as
from tests.host.conftest import NEW_TOKENS, Case, loaded

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-llada2.2"
# Decides rashly, so that there is something to edit.
RASH = {"algorithm": "joint_threshold", "threshold": 0.0, "edit_threshold": 0.0, "max_post_edit_steps": 40}
WAYS: dict[str, dict[str, Any]] = {  # custom_params
    "threshold": {"algorithm": "threshold"},
    "no early exit": {"algorithm": "threshold", "early_exit": False},
    "few steps": {"algorithm": "threshold", "max_nfe": 2},
    "live blocks": {"algorithm": "threshold", "live_blocks": 3, "next_block_share": 0.9},
    "quality": {"algorithm": "joint_threshold"},
    "rash": RASH,
    "few steps of editing": {"algorithm": "joint_threshold", "threshold": 0.9, "max_nfe": 3},
    "mbe": {"algorithm": "mbe", "mode": "speed"},
    "rash mbe": {**RASH, "algorithm": "mbe", "window": 3},
    "live blocks of mbe": {"algorithm": "mbe", "threshold": 0.9, "live_blocks": 2, "next_block_share": 1.0},
    "repetitions": {**RASH, "algorithm": "mbe", "max_post_edit_steps": 2, "penalty_lambda": 30.0},
    "edits on the way": {"algorithm": "mbe", "threshold": 0.5, "edit_threshold": 0.0, "max_post_edit_steps": 0},
    "levenshtein": {},
    "rash levenshtein": {"threshold": 0.0, "max_post_edit_steps": 40, "cumulative_budget": True},
    "live blocks of levenshtein": {"live_blocks": 2, "next_block_share": 1.0},
}
WARM = {"temperature": 5.0}  # where even this model is of many minds
SAMPLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sampling parameters, custom_params
    "temperature": (WARM, {"algorithm": "threshold"}),
    "at once": (WARM, {"algorithm": "threshold", "threshold": 0.0}),
    "cut": ({"temperature": 5.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"algorithm": "threshold", "steps": 4}),
    "edits": (WARM, {**RASH, "max_post_edit_steps": 3}),
    "levenshtein": (WARM, {"threshold": 0.0, "max_post_edit_steps": 3}),
    "repetitions": (WARM, {**RASH, "max_post_edit_steps": 3, "penalty_lambda": 2.0}),
    "live blocks": (WARM, {**WAYS["rash mbe"], "live_blocks": 2, "max_post_edit_steps": 3}),
}
# Edits whatever it has just drawn, for as long as it may.
RESTLESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "restless": (WARM, RASH),
    "restless levenshtein": (WARM, WAYS["rash levenshtein"]),
}
# Sampling parameters that change logits, as the host and as the reference call them, and custom_params.
SHAPED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "repetition": ({"repetition_penalty": 1.9}, {"repetition": 1.9}, {"algorithm": "threshold"}),
    "frequency": ({"frequency_penalty": 1.5}, {"frequency": 1.5}, {"threshold": 0.9}),
    "presence": ({"presence_penalty": 2.0}, {"presence": 2.0}, {"algorithm": "mbe", "threshold": 0.9}),
    "bias": ({"logit_bias": {"22": 4, "70": -9.5}}, {"bias": {22: 4.0, 70: -9.5}}, {}),
    "no end": ({"min_new_tokens": 35}, {"min_new_tokens": 35}, {"algorithm": "threshold"}),
    "all": (
        {"repetition_penalty": 0.8, "frequency_penalty": 0.6, "presence_penalty": -0.5, "min_new_tokens": 9},
        {"repetition": 0.8, "frequency": 0.6, "presence": -0.5, "min_new_tokens": 9},
        {**RASH, "max_post_edit_steps": 3},
    ),
    "repetitions": (
        {"presence_penalty": 2.0},
        {"presence": 2.0},
        {**RASH, "max_post_edit_steps": 3, "penalty_lambda": 20.0},
    ),
    "sampled": (
        {**WARM, "presence_penalty": 1.0, "sampling_seed": 5},
        {"presence": 1.0},
        {"algorithm": "threshold", "threshold": 0.4},
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: the way it is decoded, what Server.generate() is given beside the prompt, and the right answer."""

    way: str
    options: dict[str, Any]
    new_tokens: int
    case: Case


def ask(way: str, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, *, ignore_eos: bool = False) -> list[Asked]:
    """Requests of one of WAYS."""
    options = {"custom_params": WAYS[way], "ignore_eos": ignore_eos}
    cases = answers([Question(prompt, new_tokens, **options) for prompt in prompts])
    return [Asked(way, options, new_tokens, case) for case in cases]


def ask_sampled(
    prompts: list[list[int]], ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = SAMPLED
) -> list[Asked]:
    """A request for each prompt, in these ways in turn, with a seed of its own."""
    questions, named = [], []
    for seed, prompt in enumerate(prompts):
        way = list(ways)[seed % len(ways)]
        numbers, custom_params = ways[way]
        sampling = Sampling(**{"top_k": 1 << 30, "top_p": 1.0, "min_p": 0.0, **numbers}, seed=seed)
        common: dict[str, Any] = {"custom_params": custom_params, "ignore_eos": True}
        questions.append(Question(prompt, NEW_TOKENS, **common, sampling=sampling))
        named.append((way, {**common, **numbers, "sampling_seed": seed}))
    return [Asked(*name, NEW_TOKENS, case) for name, case in zip(named, answers(questions), strict=True)]


def ask_shaped(way: str, prompts: list[list[int]], facts: CheckpointFacts) -> list[Asked]:
    """Requests of one of SHAPED."""
    options, values, custom_params = SHAPED[way]
    wishes, sampling = Wishes(**values, ends=facts.stop_ids), None
    if "temperature" in options:
        sampling = Sampling(options["temperature"], 1 << 30, 1.0, 0.0, options["sampling_seed"])
    how: dict[str, Any] = {"custom_params": custom_params, "sampling": sampling, "wishes": wishes}
    cases = answers([Question(prompt, NEW_TOKENS, **how) for prompt in prompts])
    return [Asked(way, {"custom_params": custom_params, **options}, NEW_TOKENS, case) for case in cases]


@dataclass(frozen=True, slots=True)
class Question:
    """What the reference is asked."""

    prompt: list[int]
    new_tokens: int
    custom_params: dict[str, Any]
    ignore_eos: bool = False
    sampling: Sampling | None = None
    wishes: Wishes | None = None
    canvas: tuple[int | None, ...] = ()


def answers(questions: list[Question]) -> list[Case]:
    """What the reference answers, worked out on two cores, and once where several tests ask the same."""
    new = [question for question in questions if repr(question) not in ANSWERED]
    ANSWERED.update(zip(map(repr, new), workers().map(answer, new, chunksize=2), strict=True))
    return [ANSWERED[repr(question)] for question in questions]


ANSWERED: dict[str, Case] = {}


@functools.cache
def workers() -> ProcessPoolExecutor:
    """Processes that keep the reference."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def answer(question: Question) -> Case:
    """What the reference answers to one."""
    torch.set_num_threads(1)
    model, facts = loaded(CHECKPOINT)
    params = DecodeConfig.defaults(facts.block_size, "levenshtein", indel=True).replaced(question.custom_params)
    params = replace(params, sampling=question.sampling)
    facts = replace(facts, stop_ids=frozenset()) if question.ignore_eos else facts
    wanted = (question.new_tokens, facts, question.wishes, question.canvas)
    said = generate_as(params, model, question.prompt, *wanted)
    return Case(question.prompt, said)


def babble(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, to which answers are long and odd."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(300) for _ in range(rng.choice([1, 5, 20, 33, 60]))] for _ in range(count)]
    mask = read_facts(CHECKPOINT).mask_id  # which is no text
    return [[token if token != mask else mask + 1 for token in prompt] for prompt in prompts]
