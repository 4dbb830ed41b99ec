"""Server arguments of a LLaDA2 model: what is filled in, what is refused, and the facts that the checkpoint settles.

A model of another architecture passes through untouched. Nothing here turns an option off silently: what we do not
serve is refused in one message that lists every such option.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution

from sglang_llada.config import (
    DEFAULT_MAX_RUNNING_REQUESTS,
    Mode,
    flag_of_checkpoint,
)
from sglang_llada.errors import ConfigError
from sglang_llada.host import earlier
from sglang_llada.host.backends import ATTENTION_BACKENDS
from sglang_llada.host.cpu.platform import CpuPlatform
from sglang_llada.host.facts import (
    architectures,
    attention_dp,
    config_of,
    decode_config,
    facts_of,
    own_flag,
)
from sglang_llada.host.hub import folder_of
from sglang_llada.host.start.adapters import adapter_options, places_experts, wants_adapters
from sglang_llada.host.start.devices import cuda_options
from sglang_llada.host.start.graphs import captures_prefills, graph_options
from sglang_llada.host.start.ranks import check_split
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
OTHER_LOADERS = {"bitsandbytes", "gguf"}  # quantisations that bring names and loaders of their own


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server option that we do not serve, and what to use instead.

    `asks` gets the host's arguments and tells whether the user wants it. Why not is in docs/refusals.md.
    """

    option: str
    instead: str
    asks: Callable[[Any], Any]


TIERS = "--enable-hierarchical-cache, with --hicache-storage-backend"
AS_IT_IS = "leave it out"

# The host would turn most of these off with a warning. Fields are those of its ServerArgs.
REFUSALS = (
    Refusal("--pp-size above 1", "--tp-size and --ep-size", lambda a: a.pp_size > 1),
    Refusal("--attn-cp-size or --dcp-size above 1", "--tp-size", lambda a: max(a.attn_cp_size, a.dcp_size) > 1),
    Refusal(
        "--disaggregation-mode",
        "--chunked-prefill-size bounds what prompts take of a step",
        lambda a: a.disaggregation_mode != "null",
    ),
    Refusal(
        "--speculative-algorithm",
        "a lower threshold decides more tokens a step",
        lambda a: a.speculative_algorithm is not None,
    ),
    Refusal(
        "--enable-lora with --enable-dp-attention",
        "--tp-size without it",
        lambda a: wants_adapters(a) and attention_dp(a),
    ),
    Refusal(
        "--enable-lora with --enable-eplb, --ep-num-redundant-experts or --init-expert-location",
        "--ep-size without them",
        lambda a: wants_adapters(a) and places_experts(a),
    ),
    Refusal(
        "--enable-lora with this release of SGLang",
        "SGLang 0.5.23",
        lambda a: wants_adapters(a) and not earlier.adds_adapters(),
    ),
    Refusal("--enable-lora-overlap-loading", AS_IT_IS, lambda a: a.enable_lora_overlap_loading),
    Refusal(
        "--experts-shared-outer-loras or --lora-use-virtual-experts",
        AS_IT_IS,
        lambda a: a.experts_shared_outer_loras or a.lora_use_virtual_experts,
    ),
    Refusal("--hicache-host-memory-mode buffer_only", AS_IT_IS, lambda a: a.hicache_host_memory_mode == "buffer_only"),
    Refusal("--enable-unified-cache-external-linker", TIERS, lambda a: a.enable_unified_cache_external_linker),
    Refusal("--enable-lmcache", TIERS, lambda a: a.enable_lmcache),
    Refusal("--enable-flexkv", TIERS, lambda a: a.enable_flexkv),
    Refusal("--enable-mixed-chunk", AS_IT_IS, lambda a: a.enable_mixed_chunk),
    Refusal("--no-dllm-fdfo", AS_IT_IS, lambda a: not a.dllm_fdfo),
    Refusal("--is-embedding", "a model that embeds", lambda a: a.is_embedding),
    Refusal(
        "--rl-on-policy-target",
        "--enable-deterministic-inference; no trainer's operations are repeated bit for bit",
        lambda a: a.rl_on_policy_target is not None,
    ),
    Refusal("--enable-two-batch-overlap", AS_IT_IS, lambda a: a.enable_two_batch_overlap),
    Refusal("CUDA graphs of prefills", "--cuda-graph-max-bs-decode", captures_prefills),
    Refusal(
        "--tokenizer-worker-num above 1 with this release of SGLang, whose HTTP processes load no plugins",
        "SGLang 0.5.23",
        lambda a: a.tokenizer_worker_num > 1 and not earlier.names_http_app(),
    ),
    Refusal(
        f"--attention-backend other than {', '.join(ATTENTION_BACKENDS)}",
        "one of those",
        lambda a: (
            {a.attention_backend, a.prefill_attention_backend, a.decode_attention_backend} - {None, *ATTENTION_BACKENDS}
        ),
    ),
)


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
        chosen |= graph_options(args, chosen["page_size"]) | adapter_options(args, model) | parsers(args)
        if args.device == "cuda":
            chosen |= cuda_options(args, model.head_dim)
    declare_resolution(server_args, "sglang_llada", **chosen)


def keep_features(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around the host's step for diffusion models, which turns off what ours uses: tiers of KV, and adapters."""
    args = resolving_view(server_args)
    kept = {name: True for name in ("enable_hierarchical_cache", "enable_lora") if getattr(args, name)}
    if not kept or ARCHITECTURE not in architectures(args.model_path, args.revision):
        return previous(server_args)
    declare_resolution(server_args, "sglang_llada", **dict.fromkeys(kept, False))  # or the step warns of it
    previous(server_args)
    declare_resolution(server_args, "sglang_llada", **kept)


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
    """Raise ConfigError naming every option that is asked for and not served, and what to use instead."""
    asked = [f"{refusal.option} (instead: {refusal.instead})" for refusal in REFUSALS if refusal.asks(args)]
    if asked:
        raise ConfigError(f"not supported for {ARCHITECTURE}: {'; '.join(asked)}. Leave these options out.")


def refuse_unheard(overrides: dict[str, Any], model: Llada2Config) -> None:
    """Raise ConfigError for each override of the user that would not be heard: those are read from config.json alone.

    The host sets all others on the configuration that the network is made from.
    """
    asked = {name: overrides[name] for name in UNHEARD if name in overrides}
    unheard = [f"{name} {value!r}" for name, value in asked.items() if value != getattr(model, name)]
    if unheard:
        raise ConfigError(f"--json-model-override-args: {', '.join(unheard)} would have no effect; change config.json")


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
