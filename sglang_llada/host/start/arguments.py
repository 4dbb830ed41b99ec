"""Server arguments of a LLaDA2 model: what is filled in, what is refused, and the facts that the checkpoint settles.

A model of another architecture passes through untouched. Nothing here turns an option off silently: what we do not
serve is refused in one message that lists every such option.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution

from sglang_llada.config import (
    DEFAULT_MAX_RUNNING_REQUESTS,
    REPLAY_VARIABLE,
    Mode,
    flag_of_checkpoint,
    read_switch,
)
from sglang_llada.errors import ConfigError
from sglang_llada.host import earlier
from sglang_llada.host.backends import ATTENTION_BACKEND, ATTENTION_BACKENDS, RUN_ON_CPU
from sglang_llada.host.cpu.platform import KV_TOKENS, CpuPlatform, native_bf16
from sglang_llada.host.facts import (
    architectures,
    attention_dp,
    config_of,
    decode_config,
    facts_of,
    own_flag,
    row_budget,
)
from sglang_llada.host.hub import folder_of
from sglang_llada.host.start.templates import call_parser, chat_template
from sglang_llada.llada2.checkpoint import read_config
from sglang_llada.llada2.config import ARCHITECTURE, Llada2Config, remarks
from sglang_llada.llada2.weights import check_files

logger = logging.getLogger(__name__)

STOCK_FLAG = "LowConfidence"
# Of config.json: what decides how it is decoded, and what rotary_dim and rope_theta have been worked out from.
UNHEARD = (
    "block_size mask_token_id delete_token_id split_token_id partial_rotary_factor rotary_dim rope_parameters "
    "rope_scaling"
).split()
FLASHINFER_HEADS = (64, 128, 256, 512)  # DISPATCH_HEAD_DIM of its utils.cuh
OTHER_LOADERS = {"bitsandbytes", "gguf"}  # quantisations that bring names and loaders of their own


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server option that we do not serve; `asks` gets the host's arguments and tells whether the user wants it."""

    option: str
    asks: Callable[[Any], Any]


# The host would turn most of these off with a warning. Fields are those of its ServerArgs.
REFUSALS = (
    Refusal("--pp-size above 1", lambda a: a.pp_size > 1),
    Refusal("--disaggregation-mode", lambda a: a.disaggregation_mode != "null"),
    Refusal("--speculative-algorithm", lambda a: a.speculative_algorithm is not None),
    Refusal("--enable-lora and --lora-paths", lambda a: a.enable_lora or a.lora_paths),
    Refusal("--enable-hierarchical-cache", lambda a: a.enable_hierarchical_cache),
    Refusal("--enable-lmcache", lambda a: a.enable_lmcache),
    Refusal("--enable-flexkv", lambda a: a.enable_flexkv),
    Refusal("--enable-mixed-chunk", lambda a: a.enable_mixed_chunk),
    Refusal("--no-dllm-fdfo", lambda a: not a.dllm_fdfo),
    Refusal("--is-embedding", lambda a: a.is_embedding),
    Refusal("--enable-two-batch-overlap", lambda a: a.enable_two_batch_overlap),
    Refusal("CUDA graphs of prefills", lambda a: captures_prefills(a)),
    Refusal(
        "--tokenizer-worker-num above 1 with this release of SGLang, whose HTTP processes load no plugins",
        lambda a: a.tokenizer_worker_num > 1 and not earlier.names_http_app(),
    ),
    Refusal(
        f"--attention-backend other than {', '.join(ATTENTION_BACKENDS)}",
        lambda a: (
            {a.attention_backend, a.prefill_attention_backend, a.decode_attention_backend} - {None, *ATTENTION_BACKENDS}
        ),
    ),
)


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
    os.environ.setdefault("OMP_NUM_THREADS", str(max((len(cores) - 1) // args.tp_size, 1)))
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


def fill_in(server_args: Any, mode: Mode) -> None:
    """Complete the arguments of a LLaDA2 model, so that --model-path alone starts a server.

    Raises:
        ConfigError: an option is not supported, or contradicts the checkpoint.
    """
    args = resolving_view(server_args)
    if ARCHITECTURE not in architectures(args.model_path, args.revision):
        return
    model = read_config(folder_of(args.model_path, args.revision))
    for remark in remarks(config_of(args.model_path, args.revision)):
        logger.warning(remark)
    chosen: dict[str, Any] = {}
    if args.max_running_requests is None:
        chosen["max_running_requests"] = DEFAULT_MAX_RUNNING_REQUESTS
    if mode is Mode.OFF:
        chosen["dllm_algorithm"] = args.dllm_algorithm or STOCK_FLAG
    else:
        refuse_unsupported(args)
        refuse_unheard(json.loads(args.json_model_override_args), model)
        check_split(args, model)
        if args.load_format in ("auto", "safetensors") and Path(args.model_path).is_dir():
            # Here, so that a fault is one message and not a dead scheduler.
            check_files(Path(args.model_path), declared=args.quantization is not None)
        chosen["dllm_algorithm"] = own_flag(args.dllm_algorithm or checkpoint_flag(args))
        chosen["page_size"] = page_size(args)
        # Ranks with requests of their own cannot share a head: selection exchanges numbers per open position.
        chosen["enable_dp_lm_head"] = attention_dp(args)
        chosen |= graph_options(args, chosen["page_size"]) | parsers(args)
        if args.device == "cuda":
            chosen |= cuda_options(args)
    declare_resolution(server_args, "sglang_llada", **chosen)


def default_to_greedy(defaults: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """The host's sampling defaults of a model, greedy where a LLaDA2 checkpoint says nothing: it is decoded so."""
    if ARCHITECTURE in (model_config.hf_config.architectures or []):
        return {"temperature": 0.0, **defaults}
    return defaults


def settle_quantisation(verify: Callable[[Any], None], model_config: Any) -> None:
    """Around the host's look at how a model is quantised: what cannot be served is one sentence, not a traceback."""
    from sglang.srt.layers import quantization
    from sglang.srt.platforms import current_platform

    if isinstance(current_platform, CpuPlatform):  # where the host lists some methods for its own CPU engine only
        for method, config in quantization.CPU_QUANTIZATION_METHODS.items():
            quantization.QUANTIZATION_METHODS.setdefault(method, config)
    if ARCHITECTURE not in (model_config.hf_config.architectures or []):
        return verify(model_config)
    try:
        verify(model_config)
        if model_config.quantization in OTHER_LOADERS:
            raise ValueError(
                f"quantization is {model_config.quantization!r}, whose loader asks for models made for it; allowed are "
                f"the host's other methods: {', '.join(quantization.QUANTIZATION_METHODS.keys() - OTHER_LOADERS)}"
            )
    except ValueError as error:
        raise SystemExit(f"sglang-llada: {error}") from None


def correct_facts(config: Any, server_args: Any, mode: Mode) -> Any:
    """The host's DllmConfig (or None) with block size and mask id of the checkpoint instead of its table's.

    Raises:
        ConfigError: the file of --dllm-algorithm-config has an unknown key or a bad value.
    """
    args = resolving_view(server_args)
    if config is None or ARCHITECTURE not in architectures(args.model_path, args.revision):
        return config
    facts = facts_of(args.model_path, args.revision)
    config.mask_id = facts.mask_id
    if mode is Mode.ON or "block_size" not in config.algorithm_config:
        config.block_size = facts.block_size
    if mode is Mode.ON:
        decode_config(config, facts)
    return config


def checkpoint_flag(args: Any) -> str:
    """The value of --dllm-algorithm that the checkpoint asks for."""
    facts = facts_of(args.model_path, args.revision)
    return flag_of_checkpoint(args.model_path, indel=facts.indel)


def refuse_unsupported(args: Any) -> None:
    """Raise ConfigError naming every option that is asked for and not served."""
    asked = [refusal.option for refusal in REFUSALS if refusal.asks(args)]
    if asked:
        raise ConfigError(f"not supported for {ARCHITECTURE}: {', '.join(asked)}. Leave these options out.")


def refuse_unheard(overrides: dict[str, Any], model: Llada2Config) -> None:
    """Raise ConfigError for each override of the user that would not be heard: those are read from config.json alone.

    The host sets all others on the configuration that the network is made from.
    """
    asked = {name: overrides[name] for name in UNHEARD if name in overrides}
    unheard = [f"{name} {value!r}" for name, value in asked.items() if value != getattr(model, name)]
    if unheard:
        raise ConfigError(f"--json-model-override-args: {', '.join(unheard)} would have no effect; change config.json")


def check_split(args: Any, config: Llada2Config) -> None:
    """Raise ConfigError unless heads, experts and widths divide evenly over the ranks; the host replicates KV heads."""
    attention_ranks = args.dp_size if args.enable_dp_attention else args.attn_dp_size
    if args.tp_size % attention_ranks:
        raise ConfigError(f"{attention_ranks} ranks of DP attention do not divide --tp-size {args.tp_size}")
    attention = args.tp_size // attention_ranks
    ranks_per_expert = max(args.tp_size // args.ep_size, 1)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rules = [
        (args.tp_size % args.ep_size == 0, f"--ep-size {args.ep_size} does not divide --tp-size {args.tp_size}"),
        (heads % attention == 0, f"{heads} attention heads do not divide over {attention} ranks"),
        (
            kv_heads % attention == 0 or attention % kv_heads == 0,
            f"{kv_heads} KV heads can be neither divided over {attention} ranks nor copied evenly to them",
        ),
        (
            config.num_experts % args.ep_size == 0,
            f"{config.num_experts} experts do not divide over {args.ep_size} ranks",
        ),
        (
            config.moe_intermediate_size % ranks_per_expert == 0,
            f"experts of width {config.moe_intermediate_size} do not divide over {ranks_per_expert} ranks",
        ),
        (
            config.shared_intermediate_size % args.tp_size == 0 and config.intermediate_size % args.tp_size == 0,
            f"feed-forward layers of width {config.intermediate_size} and {config.shared_intermediate_size} do not "
            f"divide over {args.tp_size} ranks",
        ),
    ]
    wrong = [message for holds, message in rules if not holds]
    if wrong:
        raise ConfigError("; ".join(wrong))


def graph_options(args: Any, block_size: int) -> dict[str, Any]:
    """Which CUDA graphs to capture, unless the user says: steps of up to two rows for each request that may run.

    The host would stop at one row for each. Its graphs of prefills are off: they are made for causal prefills.
    """
    chosen: dict[str, Any] = {"disable_prefill_cuda_graph": True}
    if args.device == "cpu" and read_switch(os.environ, REPLAY_VARIABLE, default=False) and attention_dp(args):
        raise ConfigError(f"{REPLAY_VARIABLE} is '1', and the host cannot capture DP attention on the CPU")
    if args.cuda_graph_bs_decode or args.cuda_graph_max_bs_decode or args.cuda_graph_config:
        return chosen
    running = args.max_running_requests or DEFAULT_MAX_RUNNING_REQUESTS
    most = min(2 * running, row_budget(args.chunked_prefill_size, block_size))
    if args.device == "cpu":  # where graphs are a test: few sizes will do
        return chosen | {"cuda_graph_bs_decode": [*powers_of_two(most), most]}
    return chosen | {"cuda_graph_max_bs_decode": most}


def cuda_options(args: Any) -> dict[str, Any]:
    """Our attention on a GPU, unless the user names another or it cannot serve the model there.

    Where it cannot, the host would take FlashInfer, because graphs are on; it does not have every size of heads.

    Raises:
        ConfigError: the host's norms do not know the dtype, or the attention that is asked for not the size of heads.
    """
    import torch

    if args.dtype in ("float32", "float"):
        raise ConfigError(
            f"--dtype is {args.dtype}, for which the host has no norms on CUDA; allowed: bfloat16, float16"
        )
    asked = {args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend} - {None}
    head_dim = read_config(folder_of(args.model_path, args.revision)).head_dim
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
        return {}
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
        (not args.enable_deterministic_inference, "--enable-deterministic-inference"),
    ]
    return ", ".join(what for holds, what in rules if not holds)


def parsers(args: Any) -> dict[str, Any]:
    """Parsers of answers, unless the user names them: for tool calls as the chat template has them, for thinking none.

    LLaDA2 is told not to think ("detailed thinking off"); the host's guess would take whole answers for thoughts.
    """
    chosen: dict[str, Any] = {}
    if args.tool_call_parser in (None, "auto"):
        folder = folder_of(args.tokenizer_path or args.model_path, args.revision)
        if (parser := call_parser(chat_template(folder, args.chat_template))) is not None:
            chosen["tool_call_parser"] = parser
    if args.reasoning_parser == "auto":
        chosen["reasoning_parser"] = None
    for field, value in chosen.items():
        logger.info("--%s is %s, from the chat template", field.replace("_", "-"), value or "none")
    return chosen


def powers_of_two(below: int) -> Iterator[int]:
    """1, 2, 4, ... while less than `below`."""
    power = 1
    while power < below:
        yield power
        power *= 2


def captures_prefills(args: Any) -> bool:
    """Whether the user asks for CUDA graphs of prefills."""
    config = args.cuda_graph_config or {}
    in_config = config.get("prefill", {}).get("backend") if isinstance(config, dict) else config.prefill.backend
    return {args.cuda_graph_backend_prefill, in_config} - {None, "disabled"} != set()


def page_size(args: Any) -> int:
    """One KV page holds one block, because a row of a forward writes one page."""
    block_size = facts_of(args.model_path, args.revision).block_size
    if args.page_size not in (None, block_size):
        raise ConfigError(f"--page-size is {args.page_size}; allowed: {block_size}, the checkpoint's block size")
    return block_size


def room_behind(extra: int) -> int:
    """Columns of req_to_token behind the context length, of which the host counts `extra`.

    A page is taken whole, as one block: the last one ends behind a context length that is no multiple of it.
    """
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size

    return max(extra, get_alloc_page_size() - 1)
