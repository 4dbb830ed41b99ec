"""Ranks of a model, without a scheduler.

Each rank is a process of its own, because the host's parallel groups and hooks are made once per process. It runs what
a scheduler runs, from the plugin's entry point to the model runner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.host import warm
from tests.host.serving import free_port

PATIENCE = 540

Task = Callable[[Any], dict[str, Any]]  # of the host's model runner


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What every rank does: load the checkpoint of a folder split in a way, and leave a task's result in the folder."""

    task: Task
    folder: Path
    port: int
    flags: tuple[str, ...]
    prepare: Callable[[], None] | None


def run_rank(rank: int, job: Job) -> None:
    """Load the checkpoint, in a process that was prepared for it, and save what the task makes of it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if job.prepare is not None:
        job.prepare()
    torch.save(job.task(make_runner(rank, job)), job.folder / f"rank{rank}.pt")


def make_runner(rank: int, job: Job) -> Any:
    """The host's model runner, made as its scheduler makes it."""
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(
        ["--model-path", str(job.folder), "--nccl-port", str(job.port), "--max-total-tokens", "2048", *job.flags]
    )
    world_rank = spawn_world_rank(args, tp_rank=rank, pp_rank=0)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=rank))
    initialize_moe_config()
    config = ModelConfig.from_server_args(args)
    bootstrap.init_parallel_runtime(server_args=args, device=resolution_result(args, "device"), dist_port=job.port)
    bootstrap.init_layer_runtime(model_config=config)
    runner = ModelRunner(
        model_config=config,
        mem_fraction_static=resolution_result(args, "mem_fraction_static"),
        gpu_id=rank,
        nccl_port=job.port,
        server_args=args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def start_rank(rank: int, job: Job) -> BaseProcess:
    """The process of one rank; where something is to be prepared, it has not imported the host before."""
    modules = warm.HOST if job.prepare is None else warm.BENEATH
    return warm.fork(run_rank, (rank, job), warm.environment(), modules)


def run_ranks(
    task: Task, folder: Path, ranks: int, *flags: str, prepare: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """What `task` gives on each rank; functions of a module, because they are sent to other processes."""
    job = Job(task, folder, free_port(), ("--tp-size", str(ranks), *flags), prepare)
    processes = [start_rank(rank, job) for rank in range(ranks)]
    try:
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
