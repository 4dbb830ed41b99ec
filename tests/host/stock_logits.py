"""Runs the host's own LLaDA2 class once and prints how far its logits are from the reference's.

A program, because the host keeps a run's facts in globals of the process. Last line of its output: module of the model
class, attention backend, largest difference, and the same with the experts as the host has them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sglang.benchmark.one_batch as host
import torch
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_llada.decode.layout import RowLayout
from sglang_llada.host.cpu import experts as cpu_experts
from sglang_llada.host.engine.executor import Executor
from tests.rows import idle_rows
from tests.toy import EOS, make_checkpoint

T, BLOCKS, SLOT = 32, 5, 1


def main(folder: Path) -> None:
    """Write a checkpoint, load it into the host and compare."""
    reference = make_checkpoint(folder)
    load_plugins()
    runner = load(folder)
    ids = torch.randint(EOS, (BLOCKS * T,), generator=torch.Generator().manual_seed(1))
    want = reference.block_causal(ids.tolist())
    difference = (logits(runner, ids)[:, : want.shape[1]] - want).abs().max().item()
    cpu_experts.ADOPTED.clear()
    without = (logits(runner, ids)[:, : want.shape[1]] - want).abs().max().item()
    print(type(runner.model).__module__, type(runner.attn_backend).__name__, difference, without)


def load(folder: Path) -> Any:
    """The host's model runner, as its own one-batch benchmark makes it."""
    server_args = ServerArgs(model_path=str(folder), max_total_tokens=4096, max_running_requests=8)
    server_args.resolve_once()
    host._set_envs_and_config(server_args)
    rank = host.spawn_world_rank(server_args, tp_rank=0, pp_rank=0)
    host.publish(server_args, role="scheduler", ranks=host.SpawnRanks(world_rank=rank, gpu_id=0))
    host._init_process_global_configs()
    return host.load_model(server_args, PortArgs.init_new(server_args), 0, 0)[0].torch_runner


@torch.inference_mode()
def logits(runner: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [BLOCKS * T, V] of one request whose blocks are rows of one forward."""
    layout, last = RowLayout(T, 0), torch.zeros(1, T + 1, dtype=torch.int64)
    idle = [0] * (layout.record.stop - T)
    decider = SimpleNamespace(block_size=T, layout=layout, idle=idle, model=runner.model, last=last)
    executor = Executor(runner, decider)  # type: ignore[arg-type]  # a stand-in
    table = executor.req_to_token
    table[SLOT, : len(ids)] = torch.arange(T, T + len(ids), dtype=table.dtype)  # page 0 is the host's padding
    batch = executor._batch(idle_rows(layout, ids.view(-1, T).numpy(), [SLOT] * BLOCKS, range(0, len(ids), T)))
    executor._unfold(batch)
    return runner.forward(batch).logits_output.full_logits


if __name__ == "__main__":
    main(Path(sys.argv[1]))
