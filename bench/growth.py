"""How speed and memory change as work grows: `python -m bench.growth`.

Ours and the host's code like for like, as in bench.serve. Held-out chats, more and more at once: output tokens/s, those
of one request, and the peak of the scheduler's process over what it held when its server was ready, also per request.
Then, on ours alone, one request behind more and more context, all of it cached: milliseconds per decode step, each of
which decides about one token. Tables of medians and spreads, the exponents with which each figure grows, then one JSON
record; `--plot FILE` draws tokens/s and milliseconds per step (with matplotlib: `pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import median

from transformers import PreTrainedTokenizerFast

from bench.curves import Curve, Panel, exponents, plot
from bench.load import Ask, Reply, closed_loop
from bench.records import new_record
from bench.serve import CHECKPOINT, Side, Workload, after, chats
from sglang_llada.progress import watched

SIDES = ("ours", "like for like")
AT_ONCE = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 256, 1024, 4096, 16_384, 32_000)  # tokens; whole blocks, so that all of them are cached
NEW_TOKENS = 64  # of the request whose steps are timed
SLOWLY = {"algorithm": "threshold", "threshold": 1.0}  # one token a step: many steps, and all alike
CROWD = ("tokens/s", "tokens/s each", "MiB", "MiB each")  # figures of chats at once

Run = dict[str, float]
Runs = dict[int, list[Run]]  # by requests at once, or by tokens of context


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--at-once", nargs="+", type=int, default=AT_ONCE, help="chats that run at the same time")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens before the timed steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="an SVG to write")
    args = parser.parse_args(argv)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = ("--max-running-requests", str(max(args.at_once)))
        servers = {side: Side(side, log, stack, *flags) for side in args.sides}
        crowds = run_crowds(servers, tokenizer, args.at_once, args.repeats)
        steps = run_steps(servers["ours"], tokenizer, args.contexts, args.repeats) if "ours" in servers else {}
    curves = {side: curves_of(runs, CROWD) for side, runs in crowds.items()}
    curves["one request"] = curves_of(steps, ("ms/step",))
    powers = {side: {name: exponents(curve) for name, curve in mine.items()} for side, mine in curves.items()}
    show(powers)
    if args.plot:
        speed = {side: curves[side]["tokens/s"] for side in crowds}
        crowd = Panel(speed, "chats at once", "output tokens/s")
        context = Panel({"ours": curves["one request"]["ms/step"]}, "tokens of context", "ms per decode step")
        plot([crowd, context], args.plot)
    print(json.dumps({**new_record(), "chats": crowds, "one request": steps, "exponents": powers}))


def run_crowds(
    servers: dict[str, Side], tokenizer: PreTrainedTokenizerFast, counts: Sequence[int], repeats: int
) -> dict[str, Runs]:
    """Figures of chats, so many at once, by side."""
    crowds: dict[str, Runs] = {side: {} for side in servers}
    print("chats at once")
    for count in counts:
        asks = list(islice(chats(tokenizer, seed=count), max(24, 4 * count)))
        chatter = Workload(f"{count} at once", asks, lambda url, asks, n=count: closed_loop(url, asks, n))
        for side, server in servers.items():
            turns = watched(range(1 + repeats), f"{count} at once, {side}", 1 + repeats)
            crowds[side][count] = [crowd(server.run(chatter), count) for _ in turns][1:]
            print(line(count, side, crowds[side][count]), flush=True)
    return crowds


def crowd(run: Run, at_once: int) -> Run:
    """Figures of a run, of all requests and of each."""
    extra = run["extra MiB"]
    return dict(zip(CROWD, (run["tokens/s"], 1e3 / run["ms/token"], extra, extra / at_once), strict=True))


def run_steps(server: Side, tokenizer: PreTrainedTokenizerFast, contexts: Sequence[int], repeats: int) -> Runs:
    """Figures of decode steps behind so many tokens."""
    runs: Runs = {}
    print("tokens of context, one request")
    for context in contexts:
        ids = after(tokenizer, context, seed=0)
        # Greedy, so the longer answer's first token comes in the same step; and its context is cached from now on.
        before = int(answer(server, ids, 1).meta["dllm_steps"])
        turns = watched(range(1 + repeats), f"{context} tokens of context", 1 + repeats)
        runs[context] = [stepping(answer(server, ids, NEW_TOKENS), before) for _ in turns][1:]
        print(line(context, "ours", runs[context]), flush=True)
    return runs


def answer(server: Side, ids: list[int], new_tokens: int) -> Reply:
    """A reply of so many tokens, decided one by one."""
    (reply,) = closed_loop(server.url, [Ask(ids, new_tokens, ignore_eos=True, custom_params=SLOWLY)], 1)
    return reply


def stepping(reply: Reply, before: int) -> Run:
    """Figures of the steps after a reply's first token, which came with its step `before`."""
    steps = int(reply.meta["dllm_steps"]) - before
    return {"ms/step": 1e3 * (reply.events[-1][0] - reply.events[0][0]) / steps, "steps": steps}


def line(size: int, side: str, runs: list[Run]) -> str:
    """A row of a table: the medians of all figures, and their spreads."""
    cells = []
    for figure in runs[0]:
        values = [run[figure] for run in runs]
        cells.append(f"{figure} {median(values):.4g} ({min(values):.4g}-{max(values):.4g})")
    return f"{size:8} {side:<14}" + "".join(f"{cell:<38}" for cell in cells).rstrip()


def curves_of(runs: Runs, figures: Sequence[str]) -> dict[str, Curve]:
    """The medians of each figure, by size."""
    return {figure: {size: median(run[figure] for run in each) for size, each in runs.items()} for figure in figures}


def show(powers: dict[str, dict[str, dict[str, float]]]) -> None:
    """The exponents of each figure from size to size, the last one from end to end."""
    print("growth, as a power of the size")
    for side, figures in powers.items():
        for figure, spans in figures.items():
            if spans:
                print(f"  {side}, {figure}: " + ", ".join(f"{span} {power:.2f}" for span, power in spans.items()))


if __name__ == "__main__":
    main()
