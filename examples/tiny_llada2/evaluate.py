"""Exact match and tokens per forward on held-out prompts: `python -m examples.tiny_llada2.evaluate [--url URL]`.

Without --url the reference decode answers, in this process and without SGLang; with it, a running server does, through
its chat template and /generate. How it is decoded is said by --threshold, and by --params as a request's custom_params
say it: `--params '{"algorithm": "joint_threshold", "mode": "speed"}' ...`. One line per way and task, then one JSON
record.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import requests
import torch
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import TASKS, Example, examples
from sglang_llada.config import DecodeConfig
from sglang_llada.llada2.checkpoint import read_facts
from sglang_llada.llada2.editing import generate_as
from sglang_llada.llada2.weights import load_reference
from sglang_llada.progress import watched

CHECKPOINT = Path(__file__).parents[1] / "tiny-llada2"
NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids (a stop token included) and the forwards that decided them."""

    token_ids: list[int]
    forwards: int


@dataclass(frozen=True, slots=True)
class Score:
    """Of one task in one way of decoding: examples, exact matches, returned tokens and forwards."""

    examples: int
    exact: int
    tokens: int
    forwards: int


Params = dict[str, Any]
Answerer = Callable[[list[int], Params], Answer]


def by_reference(checkpoint: Path) -> Answerer:
    """Answers of the reference decode."""
    model, facts = load_reference(checkpoint), read_facts(checkpoint)

    defaults = DecodeConfig.defaults(facts.block_size, indel=facts.indel)

    def answer(prompt: list[int], params: Params) -> Answer:
        out = generate_as(defaults.replaced(params), model, prompt, NEW_TOKENS, facts)
        return Answer(out.token_ids, out.forwards)

    return answer


def by_server(url: str) -> Answerer:
    """Answers of a running server; one that is not ours reports no forward counts, which then count as 0."""

    def answer(prompt: list[int], params: Params) -> Answer:
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": NEW_TOKENS,
                "custom_params": params,
            },
        }
        reply = requests.post(url + "/generate", json=body, timeout=300)
        reply.raise_for_status()
        out = reply.json()
        return Answer(out["output_ids"], out["meta_info"].get("dllm_steps", 0))

    return answer


def evaluate(
    answer: Answerer, tokenizer: PreTrainedTokenizerFast, chosen: list[Example], params: Params, at_once: int
) -> dict[str, Score]:
    """Scores per task."""

    def one(example: Example) -> tuple[bool, Answer]:
        prompt = tokenizer.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        out = answer(prompt, params)
        return tokenizer.decode(out.token_ids, skip_special_tokens=True) == example.answer, out

    with ThreadPoolExecutor(at_once) as pool:
        results = list(watched(pool.map(one, chosen), json.dumps(params), len(chosen)))
    grouped: dict[str, list[tuple[bool, Answer]]] = defaultdict(list)
    for example, result in zip(chosen, results, strict=True):
        grouped[example.task].append(result)
    return {
        task: Score(
            len(rs), sum(ok for ok, _ in rs), sum(len(a.token_ids) for _, a in rs), sum(a.forwards for _, a in rs)
        )
        for task, rs in grouped.items()
    }


def total(scores: dict[str, Score]) -> Score:
    """All tasks together."""
    return Score(*(sum(getattr(s, f) for s in scores.values()) for f in ("examples", "exact", "tokens", "forwards")))


def line(name: str, score: Score) -> str:
    """A row of the table."""
    per_forward = f"{score.tokens / score.forwards:6.2f}" if score.forwards else "     -"
    return f"  {name:<12} {score.exact / score.examples:7.1%} of {score.examples:<5} tokens per forward {per_forward}"


def main() -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--url", help="a running server, say http://127.0.0.1:30000")
    parser.add_argument("--threshold", type=float, nargs="*", default=[0.95, 0.85, 0.7, 0.5])
    parser.add_argument("--params", type=json.loads, nargs="*", default=[], help="custom_params, as JSON")
    parser.add_argument("--n", type=int, default=50 * len(TASKS), help="held-out examples over all tasks")
    parser.add_argument("--hard", action="store_true", help="the tasks for checkpoints that repair, too")
    parser.add_argument("--at-once", type=int, default=1, help="requests in flight")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.checkpoint)
    answer = by_server(args.url) if args.url else by_reference(args.checkpoint)
    chosen = list(islice(examples(args.seed, held_out=True, hard=args.hard), args.n))
    record: dict[str, object] = {"schema": 1, "source": args.url or "reference", "examples": args.n, "ways": {}}
    ways: list[Params] = [{"algorithm": "threshold", "threshold": threshold} for threshold in args.threshold]
    for params in ways + args.params:
        begin = time.perf_counter()
        scores = evaluate(answer, tokenizer, chosen, params, args.at_once)
        everything = total(scores)
        print(f"{json.dumps(params)}, {time.perf_counter() - begin:.0f} s")
        for task, score in scores.items():
            print(line(task, score))
        print(line("all", everything))
        record["ways"][json.dumps(params)] = {  # type: ignore[index]
            "exact_match": everything.exact / everything.examples,
            "tokens_per_forward": everything.tokens / everything.forwards if everything.forwards else None,
            "tasks": {task: score.exact / score.examples for task, score in scores.items()},
        }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
