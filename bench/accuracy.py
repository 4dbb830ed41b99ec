"""Accuracy against tokens per forward of every way to decode, on the tiny checkpoints: `python -m bench.accuracy`.

Held-out questions of each checkpoint's tasks, answered by the reference decode, which is what a server answers. The
hard tasks, which only the later checkpoints were taught, are counted apart too. One row per way, then one JSON record;
`--plot FILE` draws it (with matplotlib: `pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench.records import ROOT, new_record
from examples.tiny_llada2.evaluate import by_reference, evaluate, total
from examples.tiny_llada2.tasks import HARD_TASKS, TASKS, examples

THRESHOLDS = (0.999, 0.95, 0.85, 0.7, 0.5)
LINES = {"threshold", "MBE without steps of its own"}  # series along thresholds


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode: what to call it, the series it is drawn in, and a request's custom_params."""

    name: str
    series: str
    params: dict[str, Any]


def threshold(value: float, **more: Any) -> dict[str, Any]:
    return {"algorithm": "threshold", "threshold": value, **more}


def joint(window: int, **more: Any) -> dict[str, Any]:
    return {"algorithm": "joint_threshold", "window": window, **more}


PLAIN = [Way(f"threshold {value}", "threshold", threshold(value)) for value in THRESHOLDS]
LIVE = [
    Way(f"threshold {value}, {blocks} live blocks", "live blocks", threshold(value, live_blocks=blocks))
    for value in (0.95, 0.7)
    for blocks in (2, 4)
]
MODES = [
    Way(
        mode if window == 1 else f"{mode}, window {window}",
        "editing" if window == 1 else "MBE",
        joint(window, mode=mode),
    )
    for window in (1, 2, 3)
    for mode in ("quality", "speed")
]
EDITING = [
    Way(
        "edits at 0.3 / 0, one more step", "editing", joint(1, threshold=0.3, edit_threshold=0.0, max_post_edit_steps=1)
    ),
    # Blocks that are done are edited while the next one is decided, which takes no step of its own.
    *(
        Way(f"edits on the way at {at}", "MBE without steps of its own", joint(2, threshold=at, max_post_edit_steps=0))
        for at in THRESHOLDS[1:]
    ),
]
INDEL = [
    Way("levenshtein", "inserting and deleting", {"algorithm": "levenshtein"}),
    Way("levenshtein, cumulative", "inserting and deleting", {"algorithm": "levenshtein", "cumulative_budget": True}),
    Way("levenshtein 0.9", "inserting and deleting", {"algorithm": "levenshtein", "threshold": 0.9}),
]
WAYS = {
    "tiny-llada2": [*PLAIN, *LIVE],
    "tiny-llada2.1": [*PLAIN, *LIVE, *MODES, *EDITING],
    "tiny-llada2.2": [*PLAIN, *MODES, *INDEL],
}


def main() -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=50, help="held-out questions of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="an SVG to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("| checkpoint | decode | exact, all tasks | exact, hard tasks | tokens per forward |\n|---|---|---|---|---|")
    for checkpoint, ways in WAYS.items():
        folder = ROOT / "examples" / checkpoint
        hard = checkpoint != "tiny-llada2"
        count = args.each * len(HARD_TASKS if hard else TASKS)
        chosen = list(islice(examples(args.seed, held_out=True, hard=hard), count))
        answer, tokenizer = by_reference(folder), PreTrainedTokenizerFast.from_pretrained(folder)
        for way in ways:
            scores = evaluate(answer, tokenizer, chosen, way.params, 1)
            everything = total(scores)
            difficult = total({task: score for task, score in scores.items() if task not in TASKS})
            row = {
                "checkpoint": checkpoint,
                "way": way.name,
                "series": way.series,
                "exact": everything.exact / everything.examples,
                "exact_hard": difficult.exact / difficult.examples if hard else None,
                "tokens_per_forward": everything.tokens / everything.forwards,
                "tokens_per_forward_hard": difficult.tokens / difficult.forwards if hard else None,
                "examples": count,
            }
            rows.append(row)
            print(line(row), flush=True)
    record = {**new_record(), "workload": {"each": args.each, "seed": args.seed}, "rows": rows}
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps(record))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    hard = f"{row['exact_hard']:.1%} at {row['tokens_per_forward_hard']:.2f}" if row["exact_hard"] is not None else ""
    return f"| {row['checkpoint']} | {row['way']} | {row['exact']:.1%} | {hard} | {row['tokens_per_forward']:.2f} |"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Exact match against tokens per forward, one panel per checkpoint."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(WAYS), figsize=(13, 4), constrained_layout=True)
    for axis, checkpoint in zip(axes, WAYS, strict=True):
        mine = [row for row in rows if row["checkpoint"] == checkpoint]
        hard = "_hard" if mine[0]["exact_hard"] is not None else ""
        for series in dict.fromkeys(row["series"] for row in mine):
            points = [row for row in mine if row["series"] == series]
            axis.plot(
                [row["tokens_per_forward" + hard] for row in points],
                [100 * row["exact" + hard] for row in points],
                "o-" if series in LINES else "s",
                label=series,
            )
        axis.set(
            title=f"{checkpoint}, {'hard' if hard else 'all'} tasks", xlabel="tokens per forward", ylabel="exact, %"
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
