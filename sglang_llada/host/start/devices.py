"""Server arguments that a device settles: our CPU platform's, and attention on a GPU."""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution

from sglang_llada.errors import ConfigError
from sglang_llada.host.backends import ATTENTION_BACKEND, ATTENTION_BACKENDS, RUN_ON_CPU
from sglang_llada.host.cpu.platform import KV_TOKENS, CpuPlatform, native_bf16
from sglang_llada.host.facts import attention_dp, config_of

ALL_LAYERS = 1 << 20  # as one chunk, however many a model has

logger = logging.getLogger(__name__)

FLASHINFER_HEADS = (64, 128, 256, 512)  # DISPATCH_HEAD_DIM of its utils.cuh


def fill_in_platform(server_args: Any) -> None:
    """What our CPU platform needs to be said before the host decides anything by device.

    The host's own hook for this, SRTPlatform.apply_server_args_defaults, runs once graphs and attention are settled.
    """
    from sglang.srt.platforms import current_platform

    if not isinstance(current_platform, CpuPlatform):
        return
    args = resolving_view(server_args)
    # One core stays free for the server's other processes: torch's threads wait for the slowest of them. Read by the
    # schedulers, which are started after this.
    cores = sorted(os.sched_getaffinity(0))
    # Threads share an operation by its size, and vectorised ends of their shares need not be what stands in the middle.
    threads = 1 if args.enable_deterministic_inference else max((len(cores) - 1) // args.tp_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The host wants one NUMA node per rank, or to be told; only its own kernels would bind threads to what it is told.
    ranks = args.tp_size * args.dp_size
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([",".join(map(str, cores))] * ranks))
    declare_resolution(
        server_args,
        "sglang_llada",
        # The host's idle loop would keep a core busy; ranks that wait for each other in each turn must not sleep.
        sleep_on_idle=not attention_dp(args),
        device=current_platform.device_type,
        disable_cuda_graph=True,
        **cpu_attention(args),
        # Of the host's ways to copy KV between its tiers, the one without kernels of a device.
        hicache_io_backend="direct",
        hicache_mem_layout="layer_first",
        # Experts that move all at once are timed by the host, which waits for a device then.
        eplb_rebalance_layers_per_chunk=args.eplb_rebalance_layers_per_chunk or ALL_LAYERS,
        max_total_tokens=args.max_total_tokens or KV_TOKENS,
        dtype=cpu_dtype(args.model_path, args.revision) if args.dtype == "auto" else args.dtype,
    )


def cpu_attention(args: Any) -> dict[str, str]:
    """The attention backends of the CPU platform: ours where the user names none, or one that needs a device.

    Commands in documentation name such a one, and all give the same answers: as the host does elsewhere, it goes on.
    """
    chosen = {} if args.attention_backend else {"attention_backend": ATTENTION_BACKEND}
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        asked = getattr(args, field)
        if asked in ATTENTION_BACKENDS and asked not in RUN_ON_CPU:
            flag = field.replace("_", "-")
            logger.warning("--%s %s needs an accelerator; here it is %s", flag, asked, ATTENTION_BACKEND)
            chosen[field] = ATTENTION_BACKEND
    return chosen


def cpu_dtype(model_path: str, revision: str | None) -> str:
    """What a model computes in on the CPU: bf16 if its checkpoint is and the processor multiplies it, else fp32.

    The host would halve fp32 checkpoints, and emulated bf16 is several times slower than fp32.
    """
    config = config_of(model_path, revision)
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" and native_bf16() else "float32"


def cuda_options(args: Any, head_dim: int) -> dict[str, Any]:
    """Our attention on a GPU, unless the user names another or it cannot serve the model there.

    Where it cannot, the host would take FlashInfer, because graphs are on; it does not have every size of heads. For
    determinism it would take FA3 on some cards, which is none of ours.

    Raises:
        ConfigError: the host's norms do not know the dtype, or the attention that is asked for not the size of heads.
    """
    import torch

    if args.dtype in ("float32", "float"):
        raise ConfigError(
            f"--dtype is {args.dtype}, for which the host has no norms on CUDA; allowed: bfloat16, float16"
        )
    asked = {args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend} - {None}
    in_flashinfer = head_dim in FLASHINFER_HEADS
    if "flashinfer" in asked and not in_flashinfer:
        others = ", ".join(backend for backend in ATTENTION_BACKENDS if backend != "flashinfer")
        raise ConfigError(f"--attention-backend is flashinfer, which has no heads of {head_dim}; allowed: {others}")
    if asked:
        return {}
    obstacles = attention_obstacles(args, head_dim, torch.cuda.get_device_capability())
    if not obstacles:
        logger.info("--attention-backend is %s", ATTENTION_BACKEND)
        return {"attention_backend": ATTENTION_BACKEND}
    if in_flashinfer:
        logger.warning("attention is left to the host, because %s cannot serve %s", ATTENTION_BACKEND, obstacles)
        return {"attention_backend": "flashinfer"} if args.enable_deterministic_inference else {}
    logger.warning(
        "--attention-backend is triton, because %s cannot serve %s, and flashinfer has no heads of %d",
        ATTENTION_BACKEND,
        obstacles,
        head_dim,
    )
    return {"attention_backend": "triton"}


def attention_obstacles(args: Any, head_dim: int, capability: tuple[int, int]) -> str:
    """What keeps our attention kernel from serving a model on a GPU; empty if nothing does."""
    from sglang_llada.llada2.attention_triton import HEAD_SIZES

    kv = args.kv_cache_dtype
    rules = [
        (capability >= (8, 0), f"compute capability {capability[0]}.{capability[1]}"),
        (head_dim in HEAD_SIZES, f"heads of {head_dim}"),
        (kv in ("auto", "bfloat16", "bf16", "fp8_e5m2", "fp8_e4m3"), f"--kv-cache-dtype {kv}"),
        (kv != "fp8_e4m3" or capability >= (8, 9), f"--kv-cache-dtype {kv} below compute capability 8.9"),
    ]
    return ", ".join(what for holds, what in rules if not holds)
