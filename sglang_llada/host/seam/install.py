"""The hooks on the host, put in place once in each process of a server.

What costs time to import is imported where it is needed: most processes need little of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sglang_llada.config import Mode
from sglang_llada.errors import ConfigError
from sglang_llada.host import earlier

MODEL_PACKAGE = "sglang_llada.host.models"
# What an HTTP process may take to load; its last resort when it hangs, too.
HTTP_PROCESS_SECONDS = 90


@cache
def install(mode: Mode) -> None:
    """Check the host, then hook it. The mode's own part is the class of the scheduler, of the model and the algorithms.

    A host that fits no table is left as it is, but for LLaDA2 models, which are refused in both modes.
    """
    from sglang_llada.host.seam import check

    if not check.fits():
        from sglang_llada.host.seam.refuse import refuse_models

        refuse_models()
        return
    register_config(mode)
    hook_arguments(mode)
    load_in_http_processes()
    replays = prepare_cpu()
    if mode is Mode.ON:
        from sglang_llada.host.start.algorithm import register_algorithms

        register_algorithms()
        hook_model_class()
        hook_sampling_defaults()
        hook_door()
        hook_shutdown()
        bound_stops()
        hook_profiles()
        widen_rows()
        replace_parsers()
        hook_grammars()
        replace_adapters()
        hook_storage()
        replace_scheduler()
        hook_graphs(replays)


def hook(target: str, ours: Any, how: str) -> None:
    """Put a function or class of ours before, after, around or in the place of the host's, as HookType names it."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, ours, HookType[how])


def register_config(mode: Mode) -> None:
    """Let transformers read config.json of a LLaDA2 checkpoint without --trust-remote-code."""
    from transformers import AutoConfig

    from sglang_llada.host.start.stock import StockConfig, StockMergedConfig
    from sglang_llada.llada2.config import Llada2Config, MergedConfig

    for config in (Llada2Config, MergedConfig) if mode is Mode.ON else (StockConfig, StockMergedConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def hook_arguments(mode: Mode) -> None:
    """Complete server arguments, and correct the facts that the host reads from a table of architecture names."""
    from sglang.srt.arg_groups.choices import (
        add_attention_backend_choices,
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    from sglang_llada.host.backends import ATTENTION_BACKEND
    from sglang_llada.host.start.arguments import correct_facts, fill_in, keep_features, settle_quantisation
    from sglang_llada.host.start.devices import fill_in_platform

    def fill_in_after(server_args: Any, previous: Callable[[Any], None]) -> None:
        try:
            fill_in_platform(server_args)
            previous(server_args)
            fill_in(server_args, mode)
        except ConfigError as error:
            raise SystemExit(f"sglang-llada: {error}") from None

    def correct(config: Any, server_args: Any) -> Any:
        return correct_facts(config, server_args, mode)

    add_attention_backend_choices([ATTENTION_BACKEND])
    add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    register_resolution_hook("handle_missing_default_values")(fill_in_after)
    if mode is Mode.ON:
        register_resolution_hook("handle_dllm_inference")(keep_features)
    hook("sglang.srt.dllm.config.DllmConfig.from_server_args", correct, "AFTER")
    verify = "sglang.srt.configs.model_config.ModelConfig._verify_quantization"
    hook(verify, settle_quantisation, "AROUND")


def load_in_http_processes() -> None:
    """The processes of --tokenizer-worker-num load the plugins, too, unless the user has an app of their own.

    And they have time to: one that says nothing for 10 s is killed and started anew, which on a busy machine repeats.
    """
    from sglang.srt.environ import envs

    if not earlier.names_http_app():
        return
    if not envs.SGLANG_HTTP_SERVER_APP_PATH.is_set():
        envs.SGLANG_HTTP_SERVER_APP_PATH.set("sglang_llada.host.requests.http_app:app")
    if not envs.SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT.is_set():
        envs.SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT.set(HTTP_PROCESS_SECONDS)


def prepare_cpu() -> bool:
    """On our CPU platform, repair what of the host is wrong or missing there; whether it is to replay graphs."""
    from sglang.srt.platforms import current_platform

    if not type(current_platform).__module__.startswith("sglang_llada."):
        return False
    from sglang_llada.host.cpu import experts as cpu_experts
    from sglang_llada.host.cpu import invariant, transfers

    cpu_experts.install()
    invariant.install()
    transfers.install()
    return bool(current_platform.replays)


def hook_model_class() -> None:
    """Register our model class when a process first looks one up: importing the registry costs 3 s, and few need it.

    Once there is a model, its kernels are compiled while its weights are loaded.
    """
    from sglang_llada.host.engine.compiling import compile_beside

    loader = "sglang.srt.model_loader"
    hook(f"{loader}.utils.get_model_architecture", register_model_class, "BEFORE")
    hook(f"{loader}.loader._initialize_model", compile_beside, "AFTER")


def register_model_class(*args: Any, **kwargs: Any) -> None:
    """Put our model class in the place of the host's. Runs before a lookup and leaves its arguments as they are."""
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.register(MODEL_PACKAGE, overwrite=True, strict=True)


def hook_sampling_defaults() -> None:
    """A chat request that names no temperature is decoded greedily."""
    from sglang_llada.host.start.arguments import default_to_greedy

    target = "sglang.srt.configs.model_config.ModelConfig.get_default_sampling_params"
    hook(target, default_to_greedy, "AFTER")


def hook_door() -> None:
    """Refuse what would be dropped, or end badly, before the scheduler hears of it; what its answers come to say."""
    from sglang_llada.host.requests import door, meta_info, plain_text, scoring

    completions = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request"
    hook(completions, door.refuse_dropped, "AFTER")
    request = "sglang.srt.managers.io_struct.GenerateReqInput"
    hook(request, door.OpenGenerateReqInput, "REPLACE")
    for generate in ("generate", "async_generate"):
        target = f"sglang.srt.entrypoints.engine.Engine.{generate}"
        hook(target, door.take_step_maps, "AROUND")
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    hook(f"{manager}.init_tokenizer_and_processor", plain_text.read_as_text, "AFTER")
    hook(f"{manager}.generate_request", door.admit, "BEFORE")
    hook(f"{manager}._validate_one_request", door.check_prompt, "BEFORE")
    hook(f"{manager}.update_request_meta_info", meta_info.put_whole, "AROUND")
    scores = "sglang.srt.managers.tokenizer_manager_score_mixin.TokenizerManagerScoreMixin"
    hook(f"{scores}.score_request", scoring.score, "AROUND")
    hook(f"{scores}._process_single_item_scoring_results", scoring.from_reads, "AROUND")
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    hook(f"{updater}.update_weights_from_tensor", door.refuse_tensors, "AROUND")
    hook(f"{updater}.update_weights_from_disk", door.keep_weights, "AROUND")


def hook_shutdown() -> None:
    """A server that is told to end answers what it has, and refuses the rest."""
    from sglang_llada.host.requests import draining

    # The last that the host does before its app starts; a hook of what starts it would load the app in all processes.
    last = "sglang.srt.utils.common.set_uvicorn_logging_configs"
    hook(last, draining.add_to_app, "BEFORE")
    watchdog = "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog"
    hook(watchdog, draining.end_drained, "AROUND")


def bound_stops() -> None:
    """Stop expressions are read, and looked for in answers, with a bound."""
    from sglang.srt.managers import schedule_batch

    from sglang_llada.host.requests import stops

    hook("sglang.srt.sampling.sampling_params.get_max_seq_length", stops.read, "AROUND")
    check = "sglang.srt.managers.schedule_batch.Req._check_str_based_finish"
    hook(check, stops.within_time, "AROUND")
    schedule_batch.re = stops.SEARCH  # a hook of re.search would be one of everybody's


def hook_profiles() -> None:
    """A profile that cannot be recorded is an answer, and no end of the scheduler."""
    from sglang_llada.host.engine import profiling

    recorder = "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager"
    hook(f"{recorder}._profile", profiling.on_request, "AROUND")
    hook(f"{recorder}._profile_batch_predicate", profiling.on_step, "AROUND")
    control = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin._execute_profile"
    hook(control, profiling.answer, "AROUND")


def widen_rows() -> None:
    """Rows of req_to_token have room for a last block that ends behind the context length."""
    from sglang_llada.host.start.arguments import room_behind

    target = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
    hook(target, room_behind, "AFTER")


def replace_parsers() -> None:
    """Put parsers that take many tokens at once in the place of the host's, which read answers for its endpoints."""
    from sglang_llada.host.requests.tools import PiecewiseCalls, PiecewiseThinking

    calls = "sglang.srt.function_call.function_call_parser.FunctionCallParser"
    hook(calls, PiecewiseCalls, "REPLACE")
    hook("sglang.srt.parser.reasoning_parser.ReasoningParser", PiecewiseThinking, "REPLACE")


def hook_grammars() -> None:
    """Tool calls whose grammar has an end."""
    from sglang_llada.host.requests.grammar import bound_tags

    target = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend.dispatch_structural_tag"
    hook(target, bound_tags, "BEFORE")


def replace_adapters() -> None:
    """Put our manager of adapters (LoRA) in the place of the host's; only a process with a model makes one."""
    from sglang_llada.host.models.adapters import RowAdapters

    hook("sglang.srt.lora.lora_manager.LoRAManager", RowAdapters, "REPLACE")


def hook_storage() -> None:
    """KV in files is that of certain weights."""
    from sglang_llada.host.engine import storage

    file = "sglang.srt.mem_cache.hicache_storage.HiCacheFile._get_suffixed_key"
    hook(file, storage.file_name, "AROUND")
    hook("sglang.srt.managers.scheduler.Scheduler.flush_cache", storage.name_anew, "AFTER")
    manager = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    hook(f"{manager}.flush_cache_after_weight_update", storage.forget_weights, "AROUND")


def replace_scheduler() -> None:
    """Put our scheduler class in the place of the host's, in every process that imports it from now on."""
    from sglang_llada.host.engine.scheduler import LladaScheduler

    hook("sglang.srt.managers.scheduler.Scheduler", LladaScheduler, "REPLACE")


def hook_graphs(replays: bool) -> None:
    """Capture whole steps; give attention buffers for rows. With `replays`, do so on the CPU too."""
    from sglang_llada.host.engine import graphs

    model_runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    hook(f"{model_runner}._decode_cuda_graph_runner_cls", graphs.graph_runner_class, "AFTER")
    hook(f"{model_runner}.init_attention_backends", graphs.build_attention, "AROUND")
    if replays:
        from sglang_llada.host.cpu.platform import CpuPlatform
        from sglang_llada.host.replay.backend import ReplayBackend, capture_on_cpu

        CpuPlatform.graph_backend = ReplayBackend
        target = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup.capture_decode_graph"
        hook(target, capture_on_cpu, "AROUND")
