"""The host's layers as they are built for a GPU, on a machine that has none.

What a quantised layer is made of depends on the device: the host asks for its capability as it is imported. In a
process of its own torch is made to speak of one; kernels are neither there nor needed for loading.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_llada.config import COMPILE_VARIABLE
from tests.host import warm

PATIENCE = 280
HOPPER = (9, 0)

SPLITS = ("tp", "attn_tp", "moe_tp")  # the groups of ranks that layers are split over

Task = Callable[[Path], Any]


def pretend(capability: tuple[int, int]) -> None:
    """From now on torch has a device, whose kernels fail and need not be compiled. Before the host is imported."""
    os.environ[COMPILE_VARIABLE] = "0"
    properties = types.SimpleNamespace(
        name="pretended", major=capability[0], minor=capability[1], total_memory=80 << 30, multi_processor_count=132
    )
    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 1  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: capability  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda device=None: properties.name  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.mem_get_info = lambda device=None: (80 << 30, 80 << 30)  # type: ignore[assignment]
    torch.cuda.max_memory_allocated = lambda device=None: 0  # type: ignore[assignment]
    # The host's kernels would look for the driver as their package is imported.
    kernels: Any = types.ModuleType("sgl_kernel.load_utils")
    kernels._load_architecture_specific_ops = lambda: types.ModuleType("common_ops")
    kernels._preload_cuda_library = lambda: None
    sys.modules["sgl_kernel.load_utils"] = kernels


def run(task: Task, folders: list[Path], capability: tuple[int, int] | None, send: Any) -> None:
    """In the process: what a task makes of each folder."""
    if capability is not None:
        pretend(capability)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    send.send([task(folder) for folder in folders])


def built(folder: Path, rank: int = 0, ranks: int = 1) -> Any:
    """The model of a checkpoint, or a rank's part of it, in the host's layers, on the CPU and without weights."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(["--model-path", str(folder), "--dtype", "bfloat16"])
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    config, load = ModelConfig.from_server_args(args), LoadConfig()
    group = types.SimpleNamespace(rank_in_group=rank, world_size=ranks)
    split = {f"{of}_size": ranks for of in SPLITS} | {f"{of}_rank": rank for of in SPLITS}
    alone = {f"{of}_group": group for of in SPLITS} if ranks > 1 else {}
    with get_parallel().override(**split, **alone), set_default_torch_dtype(config.dtype):
        return _initialize_model(config, load, _get_quantization_config(config, load))


def in_a_process(task: Task, folders: list[Path], capability: tuple[int, int] | None) -> list[Any]:
    """What `task`, a function of a module, gives for each folder, where torch has such a device or none."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = warm.fork(run, (task, folders, capability, send), warm.environment(), warm.BENEATH)
    send.close()
    try:
        return receive.recv()
    finally:
        process.join(PATIENCE)
