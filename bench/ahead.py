"""What launching steps ahead brings, on a device that exists in numbers only: `python -m bench.ahead`.

The scheduler and executor are the real ones; a clock stands for the device and for the host's time, so the figures are
those of the costs below and not of this machine. Ways to decide when the block behind a row's block is begun:

    after    the last step is read first (nothing is launched ahead)
    lag      never early: a block begins one step after the one that finished the block before it
    pace     when no more positions are open than the request's last step decided (what is served)
    always   beside every row, and thrown away until the block before it is done

Tokens a second, forwards a block, share of rows thrown away, and of time in which the device was idle. A second table
has tokens a second where some of 32 requests need the host between their steps: all wait for that, or these requests
are left out of every other step.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from bench.records import new_record
from bench.step import FirstOpen, as_scheduler, scheduler_with
from sglang_llada.blocks import Request
from sglang_llada.host.engine import pipeline

NEED_HOST = (1, 4, 8, 12, 16)  # of 32 requests
ROWS, PACES, STEPS = (1, 8, 32, 64), (1, 3, 6, 12), 200
LAUNCH, ROW, READ, BOOK = 1.0, 0.005, 0.05, 0.3  # milliseconds: a graph's launch, a row's host time, a read, booking
FORWARD = ((1, 4.6), (8, 8.0), (32, 12.0), (64, 15.5), (128, 24.0))  # milliseconds by rows, as measured on an H200

WAYS: dict[str, Callable[[Request[Any]], bool] | None] = {
    "after": None,
    "lag": lambda request: False,
    "pace": Request.may_finish_block.fget,  # type: ignore[attr-defined]  # a property
    "always": lambda request: True,
}


def forward_time(rows: int) -> float:
    """Milliseconds of a forward, between the measured sizes along a line."""
    for (low, fast), (high, slow) in zip(FORWARD, FORWARD[1:], strict=False):
        if rows <= high:
            return fast + (slow - fast) * max(rows - low, 0) / (high - low)
    return FORWARD[-1][1] * rows / FORWARD[-1][0]


class Uneven(FirstOpen):
    """Decides the first open positions of each row, 1 to 2 x pace - 1 of them."""

    def __init__(self, pace: int) -> None:
        self.pace, self.random = pace, random.Random(0)

    def __call__(self, hidden: Any, ids: torch.Tensor, table: torch.Tensor, count: int, **options: Any) -> Any:
        self.decided = torch.tensor([self.random.randint(1, 2 * self.pace - 1) for _ in table])
        return super().__call__(hidden, ids, table, count, **options)


class Clock:
    """An executor whose steps take their time on a device of its own; the host's time is added up beside it."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.writer, self.stops = executor, executor.writer, executor.stops
        self.now = self.free_at = self.idle = 0.0
        self.rows = self.forwards = 0
        self.ready: deque[float] = deque()

    def launch(self, plan: Any, of_ranks: Any = None) -> Any:
        self.now += LAUNCH + ROW * len(plan.rows)
        begin = max(self.now, self.free_at)
        self.idle += begin - self.free_at if self.ready or self.forwards else 0.0
        self.free_at = begin + forward_time(len(plan.rows))
        self.ready.append(self.free_at)
        self.rows, self.forwards = self.rows + len(plan.rows), self.forwards + 1
        return self.executor.launch(plan, of_ranks)

    def read(self, launched: Any) -> Any:
        self.now = max(self.now, self.ready.popleft()) + READ
        return self.executor.read(launched)


@torch.inference_mode()
def measure(rows: int, pace: int, way: str, need_host: int = 0, most_left_out: float = 1) -> dict[str, float]:
    """One load of so many requests, decided in one way; the share of them that may be left out of a step."""
    rule = WAYS[way]
    with (
        patch.object(Request, "may_finish_block", property(rule or (lambda request: False))),
        patch.object(pipeline, "LEFT_OUT_SHARE", most_left_out),
    ):
        scheduler: Any = scheduler_with(rows, Uneven(pace))
        for request in islice(scheduler.table, need_host):
            request.needs_host, request.can_defer = True, False
        clock = Clock(scheduler.pipeline.executor)

        def book() -> None:
            scheduler.pipeline.take_rest()
            scheduler.pipeline.decided.clear()
            clock.now += BOOK + ROW * rows

        scheduler.admission = SimpleNamespace(admit_waiting=lambda: None)
        scheduler.booking.book, scheduler.pages.share = book, lambda plan: None
        scheduler.pipeline.executor, scheduler.overlaps, scheduler.runs_ahead = clock, True, rule is not None
        for _ in range(STEPS):
            scheduler._turn()
    requests = list(scheduler.table)
    tokens, blocks = (
        sum(map(count, requests)) for count in (lambda r: len(r.output), lambda r: len(r.steps_per_block))
    )
    steps = sum(sum(request.steps_per_block) for request in requests)
    return {
        "tokens_s": 1e3 * tokens / clock.now,
        "forwards_per_block": sum(request.forwards for request in requests) / blocks,
        "steps_per_block": steps / blocks,
        "thrown_away": 1 - (steps + blocks) / clock.rows,
        "idle": clock.idle / clock.free_at,
    }


def main() -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    as_scheduler()
    out: dict[str, Any] = {**new_record(), "summary": {}}
    print("rows  tokens/step  " + "".join(f"{way:>34}" for way in WAYS))
    for rows in ROWS:
        for pace in PACES:
            found = {way: measure(rows, pace, way) for way in WAYS}
            out["summary"][f"{rows} rows, {pace} a step"] = found
            cells = (
                f"{f['tokens_s']:9.0f}/s {f['forwards_per_block']:5.2f} fw {100 * f['idle']:4.0f} % idle"
                for f in found.values()
            )
            print(f"{rows:4} {pace:12}  " + "".join(f"{cell:>34}" for cell in cells), flush=True)
    print("\nof 32 requests need the host; tokens/step; tokens/s if all wait, if these are left out")
    for need_host in NEED_HOST:
        for pace in PACES:
            wait, left_out = (measure(32, pace, "pace", need_host, share)["tokens_s"] for share in (0, 1))
            out["summary"][f"{need_host} of 32 need the host, {pace} a step"] = {"wait": wait, "left_out": left_out}
            print(f"{need_host:4} {pace:12}  {wait:9.0f} {left_out:9.0f}", flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
