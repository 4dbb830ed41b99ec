"""How long a prompt takes before its first token comes, by its length: `python -m bench.prefill [--all]`.

The servers of bench.serve beside each other; prompts one at a time, each from an empty prefix cache, answered with one
token. Time to that token, forwards, and the peak of the scheduler's process over what it held when its server was
ready. The host's code takes minutes for the longest prompts, so each side stops at a length of its own unless all are
asked for, and answers once, without a warm-up, what takes it long. One line per length and side, the
exponents with which the times grow between the two largest lengths of each side, then one JSON record; `--plot FILE`
draws the times (with matplotlib: `pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from transformers import PreTrainedTokenizerFast

from bench.curves import Panel, exponents, plot
from bench.load import Ask, closed_loop
from bench.records import new_record
from bench.serve import CHECKPOINT, SIDES, Side, Workload, after
from sglang_llada.progress import watched

LENGTHS = (256, 1024, 2016, 4096, 8192, 31_744)
MOST = {"ours": 31_744, "like for like": 8192, "as it comes": 4096}  # tokens of the longest prompt of a side
QUICK = {"ours": 8192, "like for like": 2016, "as it comes": 2016}  # tokens that a side reads in seconds

Run = dict[str, float]


def main(argv: list[str] | None = None) -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", nargs="*", type=limit, default=[], metavar="SIDE=TOKENS", help=f"default: {MOST}")
    parser.add_argument("--all", action="store_true", help="every length on every side")
    parser.add_argument("--plot", type=Path, help="an SVG to write")
    args = parser.parse_args(argv)
    most = dict.fromkeys(SIDES, max(LENGTHS)) if args.all else MOST | dict(args.most)
    most = {side: most[side] for side in args.sides}
    runs = measure(most, args.repeats)
    times = {side: {length: time_of(each) for length, each in lengths.items()} for side, lengths in runs.items()}
    growth = {side: exponents(dict(sorted(curve.items())[-2:])) for side, curve in times.items()}
    for side, powers in growth.items():
        for span, power in powers.items():
            print(f"{side}, {span} tokens: time to the first token grows with the power {power:.2f} of the length")
    if args.plot:
        plot([Panel(times, "tokens of the prompt", "ms to the first token")], args.plot)
    print(json.dumps({**new_record(), "workload": {"most": most}, "runs": runs, "exponents": growth}))


def limit(text: str) -> tuple[str, int]:
    """A side and its longest prompt, of SIDE=TOKENS."""
    side, _, tokens = text.partition("=")
    if side not in SIDES:
        raise argparse.ArgumentTypeError(f"got side {side!r}, expected one of {', '.join(SIDES)}")
    return side, int(tokens)


def measure(most: dict[str, int], repeats: int) -> dict[str, dict[int, list[Run]]]:
    """Runs of each side by length, up to the most tokens that each is given."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    runs: dict[str, dict[int, list[Run]]] = {side: {} for side in most}
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {side: Side(side, log, stack) for side in most}
        print(f"{'tokens':>8}  {'side':<14}{'ms to the first token':>32}{'forwards':>10}{'extra MiB':>11}")
        for length in LENGTHS:
            asks = [Ask(after(tokenizer, length, seed=0), 1, ignore_eos=True)]
            prompt = Workload(f"prompt of {length}", asks, lambda url, asks: closed_loop(url, asks, 1))
            for side in [side for side in most if length <= most[side]]:
                rounds = {"warm_ups": 0, "repeats": 1} if length > QUICK[side] else {"warm_ups": 1, "repeats": repeats}
                runs[side][length] = answers(servers[side], prompt, **rounds)
                print(line(side, length, runs[side][length]), flush=True)
    return runs


def answers(server: Side, prompt: Workload, warm_ups: int, repeats: int) -> list[Run]:
    """Figures of one prompt, answered again and again."""
    turns = warm_ups + repeats
    runs = [server.run(prompt) for _ in watched(range(turns), prompt.name, turns)][warm_ups:]
    return [{"TTFT": run["TTFT p50"], "forwards": run["forwards"], "extra MiB": run["extra MiB"]} for run in runs]


def time_of(runs: list[Run]) -> float:
    """Median milliseconds to the first token."""
    return median(run["TTFT"] for run in runs)


def line(side: str, length: int, runs: list[Run]) -> str:
    """A row of the table: medians, with the spread of times."""
    times = [run["TTFT"] for run in runs]
    spread = f"{median(times):.1f} ({min(times):.1f}-{max(times):.1f})"
    forwards, extra = (median(run[name] for run in runs) for name in ("forwards", "extra MiB"))
    return f"{length:8}  {side:<14}{spread:>32}{forwards:10.0f}{extra:11.1f}"


if __name__ == "__main__":
    main()
