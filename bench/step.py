"""Host time of a step between forwards, with a model and a decode that cost nothing: `python -m bench.step`.

What stands between one step's outcome and the next launch: reading it, committing, planning, building the batch. One
line per number of rows, then one JSON record.
"""

from __future__ import annotations

import argparse
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
from sglang_llada.blocks import Request, Table, next_step
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import State, StepOut, Tokens
from sglang_llada.decode.decide import fresh, idle, numbers
from sglang_llada.host.executor import Executor

T, MASK = 32, 2
ROWS = (1, 8, 32, 128)
BLOCKS = 24  # of each request, so that 128 rows have their pages


class NoDecider:
    """Decides one position after the other, of all rows at once, and looks at nothing."""

    block_size, tokens = T, Tokens(MASK)
    idle = idle(T, Tokens(MASK))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=400))

    def __init__(self, rows: int) -> None:
        self.step = 0
        self.outs = [outcome(2 * rows, decided) for decided in range(1, T + 1)]  # rows, and seals beside them

    def __call__(self, hidden: Any, ids: Any, table: torch.Tensor, count: int, groups: Any = ()) -> StepOut:
        out, rows = self.outs[self.step % T], len(table)
        self.step += 1
        return StepOut(
            ids=out.ids[:rows],
            open=out.open[:rows],
            done=out.done[:rows],
            state=State(out.state.step[:rows], out.state.edits[:rows], out.state.memory[:rows]),
            written=out.written[:rows],
            origin=out.origin[:rows],
            prob=out.prob[:rows],
        )


def outcome(rows: int, decided: int) -> StepOut:
    """Rows of which the first positions are decided."""
    is_open = (torch.arange(T) >= decided).repeat(rows, 1)
    zeros = torch.zeros(rows, dtype=torch.int64)
    return StepOut(
        ids=torch.where(is_open, MASK, 70),
        open=is_open,
        done=~is_open.any(-1),
        state=State(zeros, zeros, zeros.new_zeros(rows, 0)),
        written=~is_open,
        origin=torch.arange(T).repeat(rows, 1),
        prob=torch.ones(rows, T),
    )


def main() -> None:
    """Print the lines and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_plugins()
    server_args = prepare_server_args(["--model-path", str(ROOT / "examples" / "tiny-llada2")])
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    out: dict[str, Any] = {**new_record(), "milliseconds": {}}
    for rows in ROWS:
        samples = [measure(rows) for _ in range(args.repeats + 1)][1:]
        out["milliseconds"][rows] = samples
        print(f"{rows:4} rows: {median(samples):.3f} ms ({min(samples):.3f}-{max(samples):.3f})")
    times = {rows: median(samples) for rows, samples in out["milliseconds"].items()}
    slope = 1e3 * (times[128] - times[32]) / 96
    print(f"from 32 to 128 rows: {slope:.1f} microseconds a row")
    print(json.dumps(out))


def measure(rows: int) -> float:
    """Milliseconds per step over the blocks of that many requests."""
    requests = [
        Request(
            rid=str(i),
            prompt=[70] * T,
            max_new_tokens=BLOCKS * T,
            stop_ids=frozenset({1}),
            params=DecodeConfig.defaults(T),
            block_size=T,
            mask_id=MASK,
            fresh=fresh(T, Tokens(MASK)),
            numbers=numbers(DecodeConfig.defaults(T)),
        )
        for i in range(rows)
    ]
    table = Table()
    for request in requests:
        table.add(request)
        table.readmit(request.rid, T)
    pages = torch.arange(rows * (BLOCKS + 2) * T, dtype=torch.int32).view(rows, -1)
    runner = SimpleNamespace(
        device="cpu",
        model=NoDecider.model,
        req_to_token_pool=SimpleNamespace(req_to_token=pages),
        kv_index_translator=SimpleNamespace(bind_own_plan=lambda batch: None),
        forward=lambda batch: SimpleNamespace(
            logits_output=SimpleNamespace(hidden_states=batch.input_ids), can_run_graph=False
        ),
    )
    executor = Executor(runner, NoDecider(rows))
    slots = {request.rid: i for i, request in enumerate(requests)}
    steps = (BLOCKS - 1) * T
    begin = time.perf_counter()
    for _ in range(steps):
        plan = next_step(table, 2 * rows)
        launched = executor.launch(plan, [slots[row.request.rid] for row in plan.rows])
        table.advance(plan)
        for decision in executor.read(launched):
            decision.request.decide(decision.blocks)
    return 1e3 * (time.perf_counter() - begin) / steps


if __name__ == "__main__":
    main()
