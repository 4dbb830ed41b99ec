"""Serving, side by side with the host's own code in one run: `python -m bench.serve [--only chat ...]`.

Three servers with the small checkpoint stand beside each other: ours; the host's scheduler and model on our platform's
attention and expert kernels ("like for like"); and the host's on its own torch_native attention ("as it comes"). Each
workload runs on them in turn, several times, each time from an empty prefix cache. Tables of medians and spreads over
the runs, then one JSON record. "extra MiB" is the peak of the scheduler's process over what it held when its server
was ready.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

import requests
from transformers import PreTrainedTokenizerFast

from bench.load import Ask, Reply, closed_loop, open_loop
from bench.memory import MIB, forget_peak, peak, resident, scheduler_of
from bench.records import ROOT, new_record
from bench.timed_server import VARIABLE, totals
from examples.tiny_llada2.tasks import examples
from sglang_llada.progress import watched
from tests.host.conftest import decoded
from tests.host.serving import serving

CHECKPOINT = ROOT / "examples" / "tiny-llada2"
DRAWN = {"temperature": 1.0, "top_p": 0.9}
SIDES: dict[str, tuple[dict[str, str], list[str]]] = {
    "ours": ({}, []),
    "like for like": ({"SGLANG_LLADA": "off"}, []),
    "as it comes": ({"SGLANG_LLADA": "off"}, ["--attention-backend", "torch_native"]),
}
NEW_TOKENS = 128
LONG = 1500  # tokens of the long prompts that arrive into running decodes


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and how they are sent: to a server at this address, from an empty cache.

    patient: whether the host takes minutes for it on its own attention, which is then left out.
    drawn: whether tokens are drawn, which the in-tree code does not do.
    """

    name: str
    asks: list[Ask]
    send: Callable[[str, list[Ask]], list[Reply]]
    patient: bool = False
    drawn: bool = False


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="workloads whose names begin so; all of them otherwise")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", action="store_true", help="hold our answers against the reference decode's")
    args = parser.parse_args(argv)
    chosen = [w for w in workloads() if not args.only or w.name.startswith(tuple(args.only))]
    results: dict[str, dict[str, list[dict[str, float]]]] = {w.name: {side: [] for side in args.sides} for w in chosen}
    compared: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {side: Side(side, log, stack) for side in args.sides}
        started = {side: server.started for side, server in servers.items()}
        print("seconds from the command to readiness:", ", ".join(f"{side} {s:.1f}" for side, s in started.items()))
        for workload in chosen:
            for repeat in watched(range(1 + args.repeats), workload.name, 1 + args.repeats):  # first to warm up
                for side, server in servers.items():
                    if (workload.patient and side == "as it comes") or (workload.drawn and side != "ours"):
                        continue
                    figures = server.run(workload)
                    if repeat:
                        results[workload.name][side].append(figures)
            show(workload.name, results[workload.name])
            if args.reference and not workload.drawn:
                compared[workload.name] = against_reference(workload.asks, servers["ours"].replies)
                print("  the reference's tokens and steps:", compared[workload.name], flush=True)
    print(json.dumps({**new_record(), "started": started, "workloads": results, "reference": compared}))


class Side:
    """A server of one side, which counts and times its forwards.

    Attributes:
        scheduler: the process that runs the model.
        started: seconds from the command to readiness.
        idle: bytes that the scheduler held then.
        replies: those of the last run.
    """

    def __init__(self, name: str, folder: Path, stack: ExitStack, *more_flags: str) -> None:
        env, flags = SIDES[name]
        file = folder / f"{name}.forwards"
        self.forwards = totals(file, fresh=True)
        env = {**env, VARIABLE: str(file)}
        starting = serving(CHECKPOINT, folder / name, *flags, *more_flags, env=env, module="bench.timed_server")
        begin = time.perf_counter()
        server = stack.enter_context(starting)
        self.started = time.perf_counter() - begin
        self.url, self.scheduler = server.url, scheduler_of(server.process)
        self.idle = resident(self.scheduler)
        self.replies: list[Reply] = []

    def run(self, workload: Workload) -> dict[str, float]:
        """Figures of one run from an empty cache."""
        requests.post(self.url + "/flush_cache", timeout=60).raise_for_status()
        forget_peak(self.scheduler)
        self.forwards[:] = 0
        self.replies = workload.send(self.url, workload.asks)
        extra = (peak(self.scheduler) - self.idle) / MIB
        return {**summary(workload.asks, self.replies), **self.steps(), "extra MiB": extra}

    def steps(self) -> dict[str, float]:
        """Figures of the forwards, from where the first one began to where the last one ended."""
        forwards, rows, seconds, begin, end = self.forwards.tolist()
        return {
            "forwards": forwards,
            "rows/forward": rows / forwards,
            "in forward %": 100 * seconds / (end - begin),
            "host ms/step": 1e3 * (end - begin - seconds) / forwards,
        }


# --- workloads --------------------------------------------------------------------------------------------------------


def workloads() -> Iterator[Workload]:
    """Everything that is measured; requests differ from workload to workload and not from run to run."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    for at_once, count in ((1, 40), (8, 160), (32, 640)):
        asks = some_chats(tokenizer, at_once, count)
        yield Workload(f"chat, {at_once} at once", asks, lambda url, asks, n=at_once: closed_loop(url, asks, n))
    drawn = enumerate(some_chats(tokenizer, 8, 160))  # those of "chat, 8 at once"
    asks = [replace(ask, sampling={**DRAWN, "sampling_seed": i}) for i, ask in drawn]
    yield Workload("sampled chat, 8 at once", asks, lambda url, asks: closed_loop(url, asks, 8), drawn=True)
    for rate, count in ((1, 8), (8, 64), (32, 160)):
        asks = list(islice(chats(tokenizer, seed=100 + rate), count))
        yield Workload(f"chat, {rate} a second", asks, lambda url, asks, r=rate: open_loop(url, asks, r))
    for length in (256, 2016):
        asks = [Ask(after(tokenizer, length, seed=i), 8, ignore_eos=True) for i in range(3)]
        yield Workload(f"prompt of {length}", asks, lambda url, asks: closed_loop(url, asks, 1))
    shared = after(tokenizer, 960, seed=7)
    asks = [Ask(shared + ask.input_ids, NEW_TOKENS) for ask in islice(chats(tokenizer, seed=8), 64)]
    yield Workload("shared prefix, 8 at once", asks, lambda url, asks: closed_loop(url, asks, 8), patient=True)
    mixed = list(islice(chats(tokenizer, seed=9), 96))
    mixed[::4] = [Ask(after(tokenizer, LONG, seed=100 + i), NEW_TOKENS) for i in range(len(mixed[::4]))]
    yield Workload("mix with long prompts, 8 at once", mixed, lambda url, asks: closed_loop(url, asks, 8), patient=True)


def some_chats(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> list[Ask]:
    """So many of chats()."""
    return list(islice(chats(tokenizer, seed), count))


def chats(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Ask]:
    """Held-out questions, the tasks in turn."""
    for example in examples(seed, held_out=True):
        ids = tokenizer.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        yield Ask(ids, NEW_TOKENS, right=example.answer)


def after(tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> list[int]:
    """The last `length` tokens of a long conversation, which ends with a question."""
    ids: list[int] = []
    messages: list[dict[str, str]] = []
    source = examples(seed, held_out=True)
    while len(ids) < length:
        for example in islice(source, 8):
            asked = [*messages, *example.messages]
            messages = [*asked, {"role": "assistant", "content": example.answer}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    return ids[-length:]


# --- figures ----------------------------------------------------------------------------------------------------------


def summary(asks: list[Ask], replies: list[Reply]) -> dict[str, float]:
    """What the client saw of one run; times in milliseconds."""
    begin, end = min(r.sent for r in replies), max(r.events[-1][0] for r in replies)
    firsts = sorted(r.first for r in replies)
    gaps = sorted(gap for r in replies for gap in r.gaps) or [0.0]
    judged = [(ask, reply) for ask, reply in zip(asks, replies, strict=True) if ask.right is not None]
    figures = {
        "tokens/s": sum(r.tokens for r in replies) / (end - begin),
        "TTFT p50": 1e3 * quantile(firsts, 0.5),
        "TTFT p99": 1e3 * quantile(firsts, 0.99),
        "gap p50": 1e3 * quantile(gaps, 0.5),
        "gap p99": 1e3 * quantile(gaps, 0.99),
        "ms/token": 1e3 * median((r.events[-1][0] - r.sent) / r.tokens for r in replies),
        "tokens": sum(r.tokens for r in replies),
    }
    if judged:
        figures["right %"] = 100 * sum(r.text.strip() == a.right for a, r in judged) / len(judged)
    if all("dllm_nfe" in r.meta for r in replies):
        nfe = sum(r.meta["dllm_nfe"] for r in replies)
        figures["TPF"], figures["NFE"] = figures["tokens"] / nfe, nfe
    return figures


def against_reference(asks: list[Ask], replies: list[Reply]) -> dict[str, int]:
    """How many replies have the reference decode's tokens in as many steps; asks are alike but for their prompts."""
    like = asks[0]
    prompts = [ask.input_ids for ask in asks]
    cases = decoded(prompts, like.max_new_tokens, CHECKPOINT, ignore_eos=like.ignore_eos)
    found = dict.fromkeys(("exact", "set apart", "wrong"), 0)
    for case, reply in zip(cases, replies, strict=True):
        same = (reply.token_ids, reply.meta["dllm_steps"]) == (case.want.token_ids, case.want.forwards)
        found["exact" if same else "set apart" if case.close_call else "wrong"] += 1
    return found


def quantile(values: list[float], share: float) -> float:
    """Of sorted values, the one below which this share of them lies."""
    return values[min(int(share * len(values)), len(values) - 1)]


def show(name: str, sides: dict[str, list[dict[str, float]]]) -> None:
    """A table of one workload: medians, with the spread of tokens/s and TTFT."""
    print(f"\n{name}")
    sides = {side: runs for side, runs in sides.items() if runs}
    columns = list(next(iter(sides.values()))[0])
    print(f"  {'':<14}" + "".join(f"{side:>28}" for side in sides))
    for column in columns:
        cells = []
        for runs in sides.values():
            values = sorted(run[column] for run in runs if column in run)
            spread = f" ({values[0]:.1f}-{values[-1]:.1f})" if values and values[0] != values[-1] else ""
            cells.append(f"{median(values):.1f}{spread}" if values else "")
        print(f"  {column:<14}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
