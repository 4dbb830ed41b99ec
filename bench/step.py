"""Host time of a step between forwards, with a model that costs nothing: `python -m bench.step`.

What stands between one step's outcome and the next forward: the scheduler reads it, takes what the next step depends
on, plans and builds the batch. The rest of a turn is printed too, but a device works meanwhile: enqueueing the decision
and taking the others' (and booking, which is not run here). One line per number of rows, then one JSON record.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import prepare_server_args

from bench.records import ROOT, new_record
from sglang_llada.blocks import Request, Table
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import State, StepOut, Tokens
from sglang_llada.decode.layout import OPEN_COLUMN, fresh, idle, layout_of, numbers
from sglang_llada.host.engine.booking import Booking
from sglang_llada.host.engine.endings import Endings
from sglang_llada.host.engine.executor import Executor
from sglang_llada.host.engine.failures import Failures
from sglang_llada.host.engine.pages import Pages
from sglang_llada.host.engine.pipeline import Pipeline
from sglang_llada.host.engine.scheduler import LladaScheduler
from sglang_llada.host.engine.tiers import Tiers

T, MASK = 32, 2
ROWS = (1, 8, 32, 128)
BLOCKS = 100  # of each request
DECIDED = 4  # positions a step


class FirstOpen:
    """Decides the first open positions of each row and looks at nothing."""

    block_size, tokens = T, Tokens(MASK)
    idle, layout = idle(T, Tokens(MASK)), layout_of(T, Tokens(MASK))
    last = torch.zeros(2 * ROWS[-1], layout.made, dtype=torch.int64)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=400))
    decided: int | torch.Tensor = DECIDED  # positions a step, or of each row

    def __call__(self, hidden: Any, ids: torch.Tensor, table: torch.Tensor, count: int, **_: Any) -> StepOut:
        rows = len(table)
        still_open = (table[:, OPEN_COLUMN] << self.decided) & ((1 << T) - 1)  # they are the last ones
        is_open = still_open[:, None] >> torch.arange(T) & 1 == 1
        ids = ids.view(rows, T)
        still = ids.new_zeros(rows)
        return StepOut(
            ids=torch.where((ids == MASK) & ~is_open, 70, ids),
            open=is_open,
            done=~is_open.any(-1),
            state=State(still, still, ids.new_zeros(rows, 0)),
            written=~is_open,
            origin=torch.arange(T).repeat(rows, 1),
            prob=torch.ones(rows, T),
        )


def main() -> None:
    """Print the lines and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    as_scheduler()
    out: dict[str, Any] = {**new_record(), "milliseconds": {}}
    gc.freeze()  # as the scheduler does
    for rows in ROWS:
        samples = [measure(rows) for _ in range(args.repeats + 1)][1:]
        out["milliseconds"][rows] = samples
        gaps, others = zip(*samples, strict=True)
        spread = f"({min(gaps):.3f}-{max(gaps):.3f})"
        print(f"{rows:4} rows: {median(gaps):.3f} ms {spread}, and {median(others):.3f} ms while a device works")
    times = {rows: median(gap for gap, _ in samples) for rows, samples in out["milliseconds"].items()}
    slope = 1e3 * (times[128] - times[32]) / 96
    print(f"from 32 to 128 rows: {slope:.1f} microseconds a row")
    print(json.dumps(out))


def as_scheduler() -> None:
    """Let this process be to the host what its scheduler's is."""
    torch.set_num_threads(1)
    load_plugins()
    server_args = prepare_server_args(["--model-path", str(ROOT / "examples" / "tiny-llada2")])
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))


@torch.inference_mode()
def measure(rows: int) -> tuple[float, float]:
    """Milliseconds per step between forwards, and of the rest, over the blocks of that many requests."""
    scheduler = scheduler_with(rows)
    runner = scheduler.pipeline.executor.runner
    steps = (BLOCKS - 1) * T // DECIDED
    gap, started = 0.0, time.perf_counter()
    for _ in range(steps):
        begin = time.perf_counter()
        scheduler.pipeline.read()
        scheduler.endings.end_aborted()
        scheduler._launch()
        gap += runner.called - begin
        scheduler.pipeline.take_rest()
        scheduler.pipeline.decided.clear()
    return 1e3 * gap / steps, 1e3 * (time.perf_counter() - started - gap) / steps


def scheduler_with(rows: int, decider: FirstOpen | None = None) -> LladaScheduler:
    """A scheduler that runs so many requests and has nothing around it."""
    scheduler = idle_scheduler(rows, decider)
    for i in range(rows):
        params = DecodeConfig.defaults(T)
        request = Request(
            rid=str(i),
            prompt=[70] * (T + DECIDED * i % T),  # blocks end in turn, not all at once
            max_new_tokens=BLOCKS * T,
            stop_ids=frozenset({1}),
            params=params,
            block_size=T,
            mask_id=MASK,
            fresh=fresh(T, Tokens(MASK)),
            numbers=numbers(params),
            slot=i,
            room=(BLOCKS + 1) * T,
        )
        scheduler.pipeline.executor.stops[list(request.stop_ids)] = True
        scheduler.table.add(request)
        scheduler.table.readmit(request.rid, request.live_from)
        scheduler.pages.reqs[request.rid] = SimpleNamespace(rid=request.rid, to_finish=None)
    scheduler.running_batch.reqs = list(scheduler.pages.reqs.values())
    return scheduler


def idle_scheduler(rows: int, decider: FirstOpen | None = None) -> LladaScheduler:
    """The scheduler without the host around it, on a runner whose forward gives back its input and notes the time."""

    def forward(batch: Any) -> Any:
        runner.called = time.perf_counter()
        return SimpleNamespace(logits_output=SimpleNamespace(hidden_states=batch.input_ids), can_run_graph=False)

    runner = SimpleNamespace(
        device="cpu",
        model=FirstOpen.model,
        decode_cuda_graph_runner=None,
        lora_manager=None,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(rows * (BLOCKS + 2) * T).view(rows, -1).int()),
        kv_index_translator=SimpleNamespace(bind_own_plan=lambda batch: None),
        forward=forward,
    )
    scheduler: LladaScheduler = object.__new__(LladaScheduler)
    executor = Executor(runner, decider or FirstOpen())  # type: ignore[arg-type]  # stand-ins
    scheduler.table, scheduler.failures = Table(), Failures(lambda: None)
    scheduler.pipeline = Pipeline(executor, scheduler.failures, MASK)
    scheduler.tiers, scheduler.enable_hierarchical_cache = Tiers(scheduler, scheduler.table, T), False
    scheduler.pages = Pages(scheduler, scheduler.table, scheduler.tiers, scheduler.failures, T)
    parts = (scheduler, scheduler.table, scheduler.pages, scheduler.pipeline, scheduler.failures)
    scheduler.endings = Endings(*parts, peers=None)
    scheduler.booking = Booking(*parts, scheduler.endings, metrics=None)
    scheduler.overlaps = scheduler.runs_ahead = False
    scheduler.row_budget, scheduler.attention_ranks = 2 * rows, 1
    scheduler.forward_ct = 0
    scheduler.running_batch = SimpleNamespace(reqs=[])
    scheduler.metrics_reporter = SimpleNamespace(record_scheduler_active=lambda at: None)
    scheduler.profiler_manager = SimpleNamespace(_profile_batch_predicate=lambda batch: None)
    scheduler.new_token_ratio_tracker = SimpleNamespace(decay_step=lambda: None)
    return scheduler


if __name__ == "__main__":
    main()
