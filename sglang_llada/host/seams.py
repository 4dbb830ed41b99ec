"""Every host name that this package hooks, replaces or relies on, as a table that is checked before anything is hooked.

The check reads the host's source files and imports none of them: a release that renamed a method or changed its
parameters is reported in less than a second, in one message that lists every difference. It compares names and
parameters, not behaviour; behaviour is what the tests under tests/host are for.
"""

from __future__ import annotations

import ast
import enum
import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_llada.errors import HostMismatch

RELEASE = "0.5.23"
CHECKED = "SGLANG_LLADA_CHECKED"  # in the environment of child processes: the host that was checked

# Canonical signatures of what is no function.
CLASS = "class"
VALUE = "value"


class Kind(enum.Enum):
    """What we do with a host name."""

    HOOK = "hook"
    REPLACE = "replace"
    USE = "use"


@dataclass(frozen=True, slots=True)
class Seam:
    """One host name.

    Attributes:
        target: "module:Qualified.name", in the module that defines it. An attribute that methods assign to self counts
            as a member of its class.
        signature: parameter names and kinds without annotations and defaults, as signature_of() writes them, or CLASS,
            or VALUE.
        why: what we need it for.
        until: what would make it unnecessary.
    """

    target: str
    kind: Kind
    signature: str
    why: str
    until: str


@dataclass(frozen=True, slots=True)
class Host:
    """An installed host: its release and the folder of its package."""

    version: str
    root: Path


OWN_SCHEDULER = "the host can choose a scheduler class by model"
CHECKPOINT_FACTS = "the host reads block size and mask id from the checkpoint"
PLUGIN_API = "never: the host's plugin interface"
LAZY_MODELS = "the host has an entry point group for models"
NAMED_ALGORITHMS = "the host has a registry of diffusion algorithms"
ROW_PLANS = "the host has a batch whose rows may be several blocks of one request"
CPU_ENGINE = "the released wheel has the host's CPU kernels"
NO_PLAN = "the host has attention of diffusion rows that needs no plan"
COMPACT_TAGS = "the host bounds numbers of calls, and white space inside structural tags where JSON has none"
MANY_TOKENS = "the host's detectors take pieces of many tokens"
OWN_MODEL = "the host's model class gives hidden states and checks its weights"
STEP_MAPS_API = "the host takes return_step_maps"
PROFILES = "the host goes on after a profile that fails"
BOUNDED = "the host bounds every field of a request before it uses it"
ENGINE_GENERATE = (
    "(self, prompt, sampling_params, input_ids, image_data, audio_data, video_data, mm_hashes, "
    "mm_content_hashes, return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob, "
    "lora_path, custom_logit_processor, require_reasoning, return_hidden_states, return_routed_experts, "
    "routed_experts_start_len, stream, bootstrap_host, bootstrap_port, bootstrap_room, routed_dp_rank, "
    "disagg_prefill_dp_rank, kv_hints, data_parallel_rank, external_trace_header, rid, session_params, "
    "priority, session_id, *, cache_salt)"
)


def fields(owner: str, names: str, why: str, until: str) -> Iterator[Seam]:
    """Rows of attributes of a class, or names of a module, that serve one purpose; separated by spaces."""
    for name in names.split():
        yield Seam(f"{owner}.{name}" if ":" in owner else f"{owner}:{name}", Kind.USE, VALUE, why, until)


# fmt: off
SEAMS: tuple[Seam, ...] = (
    # Registering
    Seam("sglang.srt.plugins.hook_registry:HookRegistry.register",
         Kind.USE, "(cls, target, hook, hook_type, *, source)",
         "every hook and replacement below goes through it", PLUGIN_API),
    Seam("sglang.srt.plugins.hook_registry:HookType", Kind.USE, CLASS,
         "names the ways of hooking", PLUGIN_API),
    Seam("sglang.srt.arg_groups.resolution_hooks:register_resolution_hook", Kind.USE, "(name)",
         "wraps the steps of argument resolution", PLUGIN_API),
    Seam("sglang.srt.platforms:current_platform", Kind.USE, VALUE,
         "tells whether our CPU platform is the active one", PLUGIN_API),
    # Server arguments
    Seam("sglang.srt.arg_groups.serving_hook:handle_missing_default_values", Kind.HOOK, "(server_args)",
         "fills in the algorithm, the number of running requests and the page size of a LLaDA2 model",
         "the host defaults them from the model"),
    Seam("sglang.srt.arg_groups.model_override_base:resolving_view", Kind.USE, "(server_args)",
         "reads arguments while they are resolved", PLUGIN_API),
    Seam("sglang.srt.arg_groups.overrides:declare_resolution", Kind.USE, "(server_args, source, **fields)",
         "sets arguments while they are resolved", PLUGIN_API),
    Seam("sglang.srt.arg_groups.overrides:_dllm_page_size", Kind.USE, "(view)",
         "keeps the page size at the block size, which a row needs",
         "the host takes the page size of a model as given"),
    Seam("sglang.srt.arg_groups.fields.exec_:ExecDllm.dllm_algorithm", Kind.USE, VALUE,
         "makes attention backends and graph runners treat the model as block diffusion", NAMED_ALGORITHMS),
    Seam("sglang.srt.arg_groups.fields.exec_:ExecDllm.dllm_algorithm_config", Kind.USE, VALUE,
         "names the YAML file of decode parameters", NAMED_ALGORITHMS),
    Seam("sglang.srt.configs.model_config:ModelConfig._verify_quantization", Kind.HOOK, "(self)",
         "ends a start with a traceback where it does not know how a model is quantised",
         "the host reports it in a sentence"),
    *fields("sglang.srt.arg_groups.fields.serving:Serving",
            "chat_template tokenizer_path tool_call_parser reasoning_parser",
            "the parsers that a checkpoint's chat template asks for", "the host's `auto` knows LLaDA2's templates"),
    # Diffusion facts
    Seam("sglang.srt.dllm.config:DllmConfig.__init__", Kind.USE,
         "(self, algorithm, algorithm_config, block_size, mask_id, max_running_requests, first_done_first_out_mode, "
         "requires_separate_context_encoding, capture_input_preparation, delete_token_id, split_token_id)",
         "block_size and mask_id of what it builds are set from the checkpoint", CHECKPOINT_FACTS),
    Seam("sglang.srt.dllm.config:DllmConfig.from_server_args", Kind.HOOK, "(server_args)",
         "takes block size and mask id from a table of architecture names, wrong for every checkpoint but one",
         CHECKPOINT_FACTS),
    Seam("sglang.srt.dllm.algorithm:algo_name_to_cls", Kind.USE, VALUE,
         "makes --dllm-algorithm Threshold resolve", NAMED_ALGORITHMS),
    Seam("sglang.srt.dllm.algorithm.base:DllmAlgorithm", Kind.USE, CLASS,
         "base of the class that stands for our algorithm in the host", NAMED_ALGORITHMS),
    Seam("sglang.srt.dllm.algorithm.base:DllmAlgorithm.supported_attention_backends", Kind.USE, VALUE,
         "keeps the host from forcing an attention backend", NAMED_ALGORITHMS),
    Seam("sglang.srt.dllm.algorithm.base:DllmAlgorithm.run",
         Kind.USE, "(self, model_runner, forward_batch, algo_states)",
         "must never run under our scheduler", NAMED_ALGORITHMS),
    Seam("sglang.srt.configs.model_config:ModelConfig.get_default_sampling_params", Kind.HOOK, "(self)",
         "greedy where a chat request names no temperature", NAMED_ALGORITHMS),
    Seam("sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._validate_request",
         Kind.HOOK, "(self, request)",
         "refuses what the host drops", "the host refuses or honours best_of and suffix"),
    Seam("sglang.srt.managers.io_struct:GenerateReqInput", Kind.REPLACE, CLASS,
         "takes return_step_maps", STEP_MAPS_API),
    Seam("sglang.srt.entrypoints.engine:Engine.generate", Kind.HOOK, ENGINE_GENERATE,
         "takes return_step_maps", STEP_MAPS_API),
    Seam("sglang.srt.entrypoints.engine:Engine.async_generate", Kind.HOOK, f"async {ENGINE_GENERATE}",
         "takes return_step_maps", STEP_MAPS_API),
    Seam("sglang.srt.managers.io_struct:EmbeddingReqInput", Kind.USE, CLASS,
         "refused", OWN_MODEL),
    Seam("sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
         Kind.HOOK, "async (self, obj, request)",
         "refuses what no request may carry, and embeddings", BOUNDED),
    Seam("sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
         Kind.HOOK, "(self, obj, input_ids)",
         "refuses more log-probabilities of a prompt than others can wait for", BOUNDED),
    *fields("sglang.srt.managers.tokenizer_manager:TokenizerManager", "model_config context_len enable_metrics",
            "the vocabulary, the context length and metrics, which bound requests", BOUNDED),
    Seam("sglang.srt.arg_groups.fields.observability:Observability.tokenizer_metrics_allowed_custom_labels", Kind.USE,
         VALUE, "labels that metrics have", BOUNDED),
    *fields("sglang.srt.sampling.sampling_params", "MAX_STOP_COUNT MAX_STOP_REGEX_COUNT MAX_STOP_REGEX_LEN",
            "the host's own bounds", BOUNDED),
    Seam("sglang.srt.managers.tokenizer_manager_score_mixin:TokenizerManagerScoreMixin.score_request",
         Kind.HOOK, "async (self, query, items, label_token_ids, apply_softmax, item_first, embed_override_token_id, "
         "query_embed_overrides, item_embed_overrides, stacked_query_item_embed_overrides, request, "
         "return_pooled_hidden_states, score_extraction_token_id, temperature, return_token_logprobs, image_data)",
         "refuses scores", "the host refuses scores of models that are not causal"),
    Seam("sglang.srt.managers.tokenizer_manager:TokenizerManager.init_tokenizer_and_processor", Kind.HOOK, "(self)",
         "gives the model's own tokens names that nobody writes", "the host encodes what users write as text"),
    Seam("sglang.srt.managers.tokenizer_manager:TokenizerManager.tokenizer", Kind.USE, VALUE,
         "gives the model's own tokens names that nobody writes", "the host encodes what users write as text"),
    Seam("sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
         Kind.HOOK, "(self, meta_info, state, customized_info, index, finish_reason)",
         "puts numbers of a request where the host appends lists", OWN_SCHEDULER),
    Seam("sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_tensor",
         Kind.HOOK, "(self, named_tensors, load_format)",
         "names tensors that do not fit", "the host goes on after a load that fails"),
    Seam("sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.get_model", Kind.USE, VALUE,
         "the model whose weights were updated", OWN_MODEL),
    Seam("sglang.srt.model_loader.loader:post_load_weights", Kind.USE, "(model)",
         "what a model derives of its weights", OWN_MODEL),
    Seam("sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_disk",
         Kind.HOOK, "(self, model_path, load_format, weight_name_filter, recapture_cuda_graph)",
         "loads the weights before again", "the host rolls back to the checkpoint before"),
    Seam("sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.model_config", Kind.USE, VALUE,
         "which checkpoint that was", "the host rolls back to the checkpoint before"),
    Seam("sglang.srt.sampling.sampling_params:SamplingParams", Kind.USE, CLASS,
         "of which kind custom_params are", BOUNDED),
    Seam("sglang.srt.mem_cache.allocation_sizing:get_req_to_token_extra_context_len", Kind.HOOK, "()",
         "room for a last page that ends behind the context length", ROW_PLANS),
    Seam("sglang.srt.mem_cache.allocation_sizing:get_alloc_page_size", Kind.USE, "()",
         "room for a last page that ends behind the context length", ROW_PLANS),
    # Stop expressions
    Seam("sglang.srt.sampling.sampling_params:get_max_seq_length", Kind.HOOK, "(regex_str)",
         "reads a stop_regex, and fails in ways of its parser", BOUNDED),
    Seam("sglang.srt.sampling.sampling_params:MAX_LEN", Kind.USE, VALUE,
         "what it says of a stop_regex without a longest match", BOUNDED),
    Seam("sglang.srt.managers.schedule_batch:re", Kind.REPLACE, VALUE,
         "looks for stop expressions on the scheduler's thread, for as long as that takes", BOUNDED),
    Seam("sglang.srt.managers.schedule_batch:Req._check_str_based_finish", Kind.HOOK, "(self, new_accepted_len)",
         "says how long that may take for a request in a step", BOUNDED),
    # Profiles
    Seam("sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._profile", Kind.HOOK,
         "(self, recv_req)", "starts and ends a recording that somebody asks for", PROFILES),
    *fields("sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager",
            "torch_profiler rpd_profiler profile_in_progress profile_by_stage profiler_start_forward_ct "
            "profiler_target_forward_ct", "a recording that failed is forgotten", PROFILES),
    Seam("sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin._execute_profile", Kind.HOOK,
         "async (self, req)", "ends in an error of the server's where there is no profile", PROFILES),
    *fields("sglang.srt.managers.io_struct:ProfileReq", "req_type activities num_steps profile_by_stage",
            "what is to be recorded", PROFILES),
    Seam("sglang.srt.managers.io_struct:ProfileReqType.START_PROFILE", Kind.USE, VALUE,
         "what is asked of a recording", PROFILES),
    Seam("sglang.srt.managers.io_struct:ProfileReqOutput", Kind.USE, CLASS, "why there is none", PROFILES),
    # Tool calls and thinking in streams
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser", Kind.REPLACE, CLASS,
         "our parser of tool calls is a subclass in its place", MANY_TOKENS),
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser.__init__", Kind.USE,
         "(self, tools, tool_call_parser, tokenizer, tool_choice, prefix, constrained)",
         "makes the parser of the whole answer", MANY_TOKENS),
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser.parse_stream_chunk", Kind.REPLACE,
         "(self, chunk_text)", "feeds detectors what tokens might have been", MANY_TOKENS),
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser.parse_stream_end", Kind.REPLACE,
         "(self)", "adds what a stream has not brought", MANY_TOKENS),
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser.has_tool_call", Kind.USE, "(self, text)",
         "whether the whole answer has calls", MANY_TOKENS),
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser.parse_non_stream", Kind.USE,
         "(self, full_text, *, preserve_incomplete)", "the calls and the text of the whole answer", MANY_TOKENS),
    Seam("sglang.srt.function_call.function_call_parser:FunctionCallParser.get_structure_constraint", Kind.REPLACE,
         "(self, tool_choice, parallel_tool_calls, thinking_mode)", "holds a call by name to that name",
         "the host's older tags know the name that is asked for"),
    Seam("sglang.srt.entrypoints.openai.protocol:ToolChoice", Kind.USE, CLASS, "whether a name is asked for",
         "the host's older tags know the name that is asked for"),
    *fields("sglang.srt.function_call.function_call_parser:FunctionCallParser", "tools detector",
            "whether there is anything to parse", MANY_TOKENS),
    Seam("sglang.srt.function_call.base_format_detector:BaseFormatDetector.parses_without_tools", Kind.USE, "(cls)",
         "whether there is anything to parse", MANY_TOKENS),
    *fields("sglang.srt.function_call.base_format_detector:BaseFormatDetector", "prev_tool_call_arr",
            "emptied at the end of a stream, so that the host adds nothing twice", MANY_TOKENS),
    Seam("sglang.srt.function_call.core_types:ToolCallItem", Kind.USE, CLASS,
         "a call, or more of its arguments", MANY_TOKENS),
    *fields("sglang.srt.function_call.core_types:ToolCallItem", "tool_index name parameters",
            "which call, and what of it", MANY_TOKENS),
    Seam("sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._process_tool_call_stream", Kind.USE,
         "async (self, index, delta, parser_dict, content, request, has_tool_calls, created, continuous_usage_stats, "
         "flush)", "asks for the end of a stream with its last piece", MANY_TOKENS),
    Seam("sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._check_for_unstreamed_tool_args", Kind.USE,
         "(self, parser, content, request, index, created)", "adds arguments by what a detector says it sent",
         MANY_TOKENS),
    Seam("sglang.srt.parser.reasoning_parser:ReasoningParser", Kind.REPLACE, CLASS,
         "our parser of thinking is a subclass in its place", MANY_TOKENS),
    Seam("sglang.srt.parser.reasoning_parser:ReasoningParser.parse_stream_chunk", Kind.REPLACE, "(self, chunk_text)",
         "feeds detectors what tokens might have been", MANY_TOKENS),
    Seam("sglang.srt.parser.reasoning_parser:ReasoningParser.parse_stream_end", Kind.REPLACE, "(self)",
         "the end of a stream", MANY_TOKENS),
    Seam("sglang.srt.constrained.xgrammar_backend:XGrammarGrammarBackend.dispatch_structural_tag", Kind.HOOK,
         "(self, key_string)", "bounds numbers and white space in tool calls", COMPACT_TAGS),
    *fields("sglang.srt.constrained.xgrammar_backend:XGrammarGrammarBackend", "any_whitespace",
            "whether a server wants none", COMPACT_TAGS),
    # Model class
    Seam("sglang.srt.models.registry:ModelRegistry", Kind.USE, VALUE,
         "the registry of the process that loads weights", LAZY_MODELS),
    Seam("sglang.srt.model_loader.utils:get_model_architecture", Kind.HOOK, "(model_config)",
         "registers our model class in the process that loads weights; the registry costs others seconds to import",
         LAZY_MODELS),
    Seam("sglang.srt.models.registry:_ModelRegistry.register", Kind.USE, "(self, package_name, overwrite, strict)",
         "puts our model class in the place of the host's", LAZY_MODELS),
    # Scheduler
    Seam("sglang.srt.managers.scheduler:Scheduler", Kind.REPLACE, CLASS,
         "our scheduler is a subclass in its place", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.__init__", Kind.USE, "(self, server_args, port_args)",
         "constructed by the host's scheduler process", OWN_SCHEDULER),
    # Scheduler: what we override. SchedulerDllmMixin holds its diffusion part
    Seam("sglang.srt.dllm.mixin.scheduler:SchedulerDllmMixin.init_diffusion_llm", Kind.HOOK, "(self)",
         "builds our table and executor once the pools exist", OWN_SCHEDULER),
    Seam("sglang.srt.dllm.mixin.scheduler:SchedulerDllmMixin.validate_dllm_request", Kind.REPLACE, "(self, req)",
         "the door at which requests are refused", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.init_output_streamer", Kind.HOOK, "(self)",
         "gives the table to our streamer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.get_output_streamer_class", Kind.REPLACE, "(self)",
         "names our streamer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.event_loop_normal", Kind.REPLACE, "(self)",
         "our loop runs rows", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler._release_aborted_request", Kind.HOOK, "(self, req)",
         "the table forgets what the host drops from its queue", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.abort_request", Kind.REPLACE, "(self, recv_req)",
         "ends the request with an id, and none whose id begins with it", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher", Kind.HOOK, "(self)",
         "a command that cannot be carried out is answered", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler", "_request_dispatcher",
            "the same", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:ExpertDistributionReq", Kind.USE, CLASS,
         "a command that may fail before it begins, or its answer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:ExpertDistributionReqOutput", Kind.USE, CLASS,
         "a command that may fail before it begins, or its answer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:ReleaseMemoryOccupationReqInput", Kind.USE, CLASS,
         "a command that may fail before it begins, or its answer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:ReleaseMemoryOccupationReqOutput", Kind.USE, CLASS,
         "a command that may fail before it begins, or its answer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:ResumeMemoryOccupationReqInput", Kind.USE, CLASS,
         "a command that may fail before it begins, or its answer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:ResumeMemoryOccupationReqOutput", Kind.USE, CLASS,
         "a command that may fail before it begins, or its answer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler._abort_on_queued_limit", Kind.HOOK, "(self, recv_req)",
         "a retracted request is not one more that waits", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.handle_generate_request", Kind.HOOK,
         "(self, recv_req, *, mm_input_error)",
         "what goes wrong with a request answers it", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.pause_generation", Kind.HOOK, "(self, recv_req)",
         "books the step in flight before a pause", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.is_fully_idle", Kind.HOOK, "(self, for_health_check, ignore_waiting)",
         "a step in flight is work too", OWN_SCHEDULER),
    # Scheduler: what our loop calls
    Seam("sglang.srt.managers.scheduler:Scheduler.ingest_requests", Kind.USE, "(self, stop_at_pause)",
         "receives and dispatches requests, once a turn", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler._record_scheduler_state_for_paused_engine", Kind.USE, "(self)",
         "metrics of a paused engine", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.on_idle", Kind.USE, "(self)",
         "idle checks, metrics and sleep", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.maybe_send_health_check_signal", Kind.USE, "(self)",
         "answers health checks while requests run", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.get_prefill_adder_class", Kind.USE, "(self)",
         "the admission that the host would use", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.get_num_allocatable_reqs",
         Kind.USE, "(self, running_bs, beam_width, running_batch, num_held_rows)",
         "request slots that are left", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler._add_request_to_queue", Kind.USE, "(self, req, is_retracted)",
         "puts a retracted request back", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.publish_load_snapshot", Kind.USE, "(self, force)",
         "load reports after each step", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler:Scheduler.send_abort_output", Kind.USE, "(self, abort_req, req)",
         "answers a request of which there is no output to send", OWN_SCHEDULER),
    Seam("sglang.srt.managers.io_struct:AbortReq", Kind.USE, CLASS,
         "the same", OWN_SCHEDULER),
    *fields("sglang.srt.managers.io_struct:AbortReq", "abort_all abort_message finished_reason",
            "the same", OWN_SCHEDULER),
    # Scheduler: its state
    *fields("sglang.srt.managers.scheduler:Scheduler", "tokenizer",
            "names tokens that end a turn", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "running_batch waiting_queue policy",
            "requests that hold KV and those that wait; the host's checks and reports read them", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "req_to_token_pool token_to_kv_pool_allocator tree_cache tp_worker",
            "rows, pages, radix tree and model", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "output_streamer metrics_reporter metrics_collector metrics_collector_context profiler_manager",
            "told of every step", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler", "load_publisher load_inquirer",
            "told of every step", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "new_token_ratio_tracker page_size chunked_prefill_size max_prefill_tokens max_running_requests",
            "budgets", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "enable_priority_preemption priority_scheduling_preemption_threshold schedule_low_priority_values_first",
            "when a waiting request displaces a running one", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "_engine_paused gracefully_exit",
            "end or hold the loop", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "_sched_idled cur_batch_for_debug forward_ct processed_tokens_counter",
            "written each turn for metrics, crash dumps and the queue policy", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler:Scheduler",
            "server_args dllm_config model_config device",
            "what the server was started with", OWN_SCHEDULER),
    # Scheduler: its parts
    Seam("sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority",
         Kind.USE, "(self, waiting_queue, running_batch, processed_tokens)",
         "sorts the waiting queue", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_policy:PrefillAdder.__init__", Kind.USE,
         "(self, page_size, tree_cache, token_to_kv_pool_allocator, running_batch, new_token_ratio, "
         "rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens, priority_scheduling_preemption_threshold, "
         "max_prefill_bs, max_running_requests, prefill_max_requests, prefill_delayer_single_pass, dllm_config, "
         "waiting_queue_len, prefill_tile_block_m)",
         "a fresh budget for each admission", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
         Kind.USE, "(self, req, has_chunked_req, truncation_align_size)",
         "reserves KV for a request", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_policy:PrefillAdder.budget_state", Kind.USE, "(self)",
         "whether admission goes on", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_policy:PrefillAdder.can_run_list", Kind.USE, VALUE,
         "requests that fit", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_policy:AddReqResult.CONTINUE", Kind.USE, VALUE,
         "the budget state that lets more requests in", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.new_token_ratio_tracker:NewTokenRatioTracker.decay_step",
         Kind.USE, "(self)",
         "reserves less while nothing is retracted", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.new_token_ratio_tracker:NewTokenRatioTracker.current",
         Kind.USE, VALUE,
         "raised after a retraction", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._profile_batch_predicate",
         Kind.HOOK, "(self, batch)",
         "starts and stops profiles by step", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter.report_decode_stats",
         Kind.USE, "(self, can_run_cuda_graph, running_batch, num_generated_tokens)",
         "log line and metrics of decoding", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter.record_scheduler_active",
         Kind.USE, "(self, event_ns)",
         "busy time", OWN_SCHEDULER),
    *fields("sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter",
            "num_generated_tokens forward_ct_decode num_retracted_reqs",
            "written for metrics", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.load_publisher:SchedulerLoadPublisher.publish_load_stat",
         Kind.USE, "(self, load_provider, force, snapshot)",
         "load reports after each step", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.load_inquirer:SchedulerLoadInquirer.get_loads", Kind.USE, "(self)",
         "what the load is", OWN_SCHEDULER),
    Seam("sglang.srt.runtime_context:get_schedule", Kind.USE, "()",
         "a limit of admission that the scheduler has no field for", OWN_SCHEDULER),
    *fields("sglang.srt.observability.metrics_collector:SchedulerMetricsCollectorContext",
            "collector current_scheduler_metrics_enabled",
            "whether this rank has metrics", OWN_SCHEDULER),
    Seam("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector.labels", Kind.USE, VALUE,
         "labels of our own metrics", OWN_SCHEDULER),
    Seam("sglang.srt.runtime_context:get_serving", Kind.USE, "()",
         "whether answers stay out of the radix tree", OWN_SCHEDULER),
    Seam("sglang.srt.environ:envs", Kind.USE, VALUE,
         "reads and sets the host's switches", OWN_SCHEDULER),
    *fields("sglang.srt.environ:Envs",
            "SGLANG_EAGER_INPUT_NO_COPY SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
            "the eager runner must not copy rows; checks in tests", OWN_SCHEDULER),
    Seam("sglang.srt.utils.common:DynamicGradMode", Kind.USE, CLASS,
         "inference mode for the loop", OWN_SCHEDULER),
    Seam("sglang.srt.observability.req_time_stats:set_time_batch", Kind.USE, "(reqs, set_func, trace_only, attrs)",
         "stamps admitted requests", OWN_SCHEDULER),
    Seam("sglang.srt.observability.req_time_stats:SchedulerReqTimeStats.set_forward_entry_time", Kind.USE, "(self, ts)",
         "named to set_time_batch", OWN_SCHEDULER),
    Seam("sglang.srt.observability.req_time_stats:SchedulerReqTimeStats.set_completion_time", Kind.USE, "(self, ts)",
         "stamps ended requests", OWN_SCHEDULER),
    Seam("sglang.srt.observability.req_time_stats:SchedulerReqTimeStats.wait_queue_entry_time", Kind.USE, VALUE,
         "of equal priority the latest is displaced", OWN_SCHEDULER),
    # Requests
    Seam("sglang.srt.managers.schedule_batch:FINISH_ABORT.__init__", Kind.USE, "(self, message, status_code, err_type)",
         "ends a request with an error", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:FINISH_LENGTH.__init__", Kind.USE, "(self, length)",
         "ends a request whose steps are spent", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:ScheduleBatch._get_decode_retraction_order", Kind.USE, "(reqs)",
         "whom to retract when the pool is full", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:ScheduleBatch",
            "reqs forward_mode",
            "what running_batch lists, and as what", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:release_req", Kind.USE,
         "(*, req, remaing_req_count, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, "
         "hisparse_coordinator, offload_kv)",
         "takes the KV of a retracted request", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:Req.update_finish_state", Kind.USE, "(self, new_accepted_len)",
         "the host judges an end, and new tokens that may have stop strings: stop ids, stop strings, length",
         OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:Req.finished", Kind.USE, "(self)",
         "whether the host sees an end", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:Req.output_ids_through_stop", Kind.USE, "(self)",
         "how much of what was decided is returned", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:Req.refresh_fill_ids", Kind.USE, "(self)",
         "joins prompt and output before the radix tree is asked", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "rid origin_input_ids output_ids sampling_params to_finish priority time_stats",
            "what a request is and how it ends", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "full_untruncated_fill_ids prefix_len kv extra_key cache_salt skip_radix_cache_insert",
            "what the radix tree is asked and given", OWN_SCHEDULER),
    Seam("sglang.srt.managers.schedule_batch:Req.owned_kv_len", Kind.USE, "(self)",
         "how much of an ended request is returned", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "cached_tokens cached_tokens_device retracted_stain",
            "the cache report, counted on first admission", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "tokenizer eos_token_ids",
            "tokens that end a request", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "session",
            "refused where it streams", OWN_SCHEDULER),
    *fields("sglang.srt.managers.io_struct:GenerateReqInput",
            "return_hidden_states return_routed_experts return_indexer_topk return_sampling_mask input_embeds "
            "positional_embed_overrides multi_item_delimiter_indices token_indices_to_pool lora_id",
            "refused", BOUNDED),
    Seam("sglang.srt.environ:Envs.SGLANG_HTTP_SERVER_APP_PATH", Kind.USE, VALUE,
         "loads the plugins in the processes of --tokenizer-worker-num", "these load plugins"),
    Seam("sglang.srt.entrypoints.http_server:app", Kind.USE, VALUE, "what those processes serve", "these load plugins"),
    Seam("sglang.srt.plugins:load_plugins", Kind.USE, "()", "loads them there", PLUGIN_API),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "custom_logit_processor grammar return_logprob logprob logprob_start_len",
            "what a request does to its logits and wants of them", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:ReqLogprob",
            "top_logprobs_num token_ids_logprob input_token_logprobs_val input_token_logprobs_idx "
            "input_top_logprobs_val input_top_logprobs_idx input_token_ids_logprobs_val input_token_ids_logprobs_idx",
            "log-probabilities of a prompt", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:ReqLogprob",
            "output_token_logprobs_val output_token_logprobs_idx output_top_logprobs_val output_top_logprobs_idx "
            "output_token_ids_logprobs_val output_token_ids_logprobs_idx",
            "log-probabilities of an answer", OWN_SCHEDULER),
    Seam("sglang.srt.layers.sampler:SGLANG_RETURN_ORIGINAL_LOGPROB", Kind.USE, VALUE,
         "which log-probabilities the user wants", OWN_SCHEDULER),
    Seam("sglang.srt.sampling.custom_logit_processor:CustomLogitProcessor", Kind.USE, CLASS,
         "code of a request", OWN_SCHEDULER),
    Seam("sglang.srt.sampling.custom_logit_processor:CustomLogitProcessor.from_str", Kind.USE, "(cls, json_str)",
         "code of a request", OWN_SCHEDULER),
    # Grammars
    Seam("sglang.srt.managers.scheduler:Scheduler.grammar_manager", Kind.USE, VALUE,
         "compiles grammars while requests wait", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.grammar_manager:GrammarManager.has_waiting_grammars", Kind.USE, "(self)",
         "compiles grammars while requests wait", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.grammar_manager:GrammarManager.get_ready_grammar_requests", Kind.USE, "(self)",
         "compiles grammars while requests wait", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.accept_token", Kind.USE, "(self, token)",
         "a grammar goes on", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.is_terminated", Kind.USE, "(self)",
         "nothing may follow", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.allocate_vocab_mask",
         Kind.USE, "(self, vocab_size, batch_size, device)",
         "what may follow", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.fill_vocab_mask",
         Kind.USE, "(self, vocab_mask, idx)",
         "what may follow", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.move_vocab_mask",
         Kind.USE, "(vocab_mask, device)",
         "what may follow", OWN_SCHEDULER),
    Seam("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.apply_vocab_mask",
         Kind.USE, "(logits, vocab_mask)",
         "what may follow", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:ReqKvInfo",
            "req_pool_idx kv_allocated_len kv_committed_len cache_protected_len",
            "a request's row and pages", OWN_SCHEDULER),
    *fields("sglang.srt.sampling.sampling_params:SamplingParams",
            "max_new_tokens stop_token_ids stop_strs stop_regex_strs ignore_eos custom_params",
            "where an answer ends and how it is decoded", OWN_SCHEDULER),
    *fields("sglang.srt.sampling.sampling_params:SamplingParams",
            "temperature top_k top_p min_p sampling_seed",
            "how tokens are drawn", OWN_SCHEDULER),
    *fields("sglang.srt.sampling.sampling_params:SamplingParams",
            "frequency_penalty presence_penalty repetition_penalty min_new_tokens logit_bias",
            "what a request does to its logits", OWN_SCHEDULER),
    *fields("sglang.srt.sampling.sampling_params:SamplingParams",
            "json_schema regex ebnf structural_tag",
            "whether its output has a grammar", OWN_SCHEDULER),
    Seam("sglang.srt.sampling.sampling_params:SamplingParams.watermark", Kind.USE, VALUE,
         "refused", OWN_SCHEDULER),
    *fields("sglang.srt.sampling.sampling_params",
            "REQUEST_REASONING_END_TOKEN_IDS_KEY REQUEST_REASONING_IN_GRAMMAR_KEY",
            "keys of custom_params that are the host's", OWN_SCHEDULER),
    # KV
    Seam("sglang.srt.mem_cache.common:match_kv_cache",
         Kind.USE, "(req, tree_cache, token_ids, *, cow_mamba, max_prefix_len)",
         "finds a request's cached blocks", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache.checkpoint",
         Kind.USE, "(self, req, *, up_to, **kwargs)",
         "shares filled blocks", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.common:release_kv_cache", Kind.USE, "(req, tree_cache, *, checkpoint)",
         "gives back what an ended request held", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.common:evict_from_tree_cache", Kind.USE, "(tree_cache, num_tokens)",
         "makes room for pages", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache.prefix_device_indices", Kind.USE, "(self, req)",
         "where the cached blocks lie", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.memory_pool:ReqToTokenPool.alloc", Kind.USE, "(self, reqs)",
         "a row for an admitted request", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.memory_pool:ReqToTokenPool.write", Kind.USE, "(self, indices, values)",
         "enters pages in a row", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.memory_pool:ReqToTokenPool.req_to_token", Kind.USE, VALUE,
         "where the KV of a position lies", OWN_SCHEDULER),
    Seam("sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.alloc", Kind.USE, "(self, need_size)",
         "pages of one block", OWN_SCHEDULER),
    *fields("sglang.srt.managers.schedule_batch:Req",
            "finished_output finished_len send_token_offset send_decode_id_offset input_logprob_sent "
            "send_output_token_logprobs_offset",
            "what the streamer notes as sent, which is taken back where it was not", OWN_SCHEDULER),
    # Streaming
    Seam("sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer", Kind.USE, CLASS,
         "base of our streamer", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer.has_additional_customized_info",
         Kind.REPLACE, VALUE,
         "says that there is more to send", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer.build_additional_customized_info",
         Kind.REPLACE, "(self, reqs)",
         "sends forward counts", OWN_SCHEDULER),
    Seam("sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer.stream_output",
         Kind.USE, "(self, reqs, return_logprob, skip_req)",
         "sends tokens and ends", OWN_SCHEDULER),
    # Forward
    *fields("sglang.srt.model_executor.forward_batch_info:ForwardBatch",
            "forward_mode batch_size input_ids req_pool_indices seq_lens out_cache_loc seq_lens_sum seq_lens_cpu "
            "req_pool_indices_cpu positions capture_hidden_mode spec_algorithm",
            "a batch is built from a plan", ROW_PLANS),
    *fields("sglang.srt.model_executor.forward_batch_info:ForwardBatch",
            "extend_num_tokens extend_seq_lens extend_prefix_lens extend_start_loc extend_seq_lens_cpu "
            "extend_prefix_lens_cpu extend_logprob_start_lens_cpu",
            "a row is an extension by one block", ROW_PLANS),
    Seam("sglang.srt.model_executor.forward_batch_info:enable_num_token_non_padded", Kind.USE, "()",
         "whether experts must know which tokens are padding", ROW_PLANS),
    *fields("sglang.srt.model_executor.forward_batch_info:ForwardBatch",
            "global_num_token_non_padded global_num_token_non_padded_cpu",
            "and how many are not", ROW_PLANS),
    Seam("sglang.srt.model_executor.forward_batch_info:ForwardMode.DLLM_EXTEND", Kind.USE, VALUE,
         "an extension whose rows see their whole block", ROW_PLANS),
    Seam("sglang.srt.model_executor.forward_batch_info:CaptureHiddenMode.NULL", Kind.USE, VALUE,
         "hidden states come from our model class", ROW_PLANS),
    Seam("sglang.srt.speculative.spec_info:SpeculativeAlgorithm.NONE", Kind.USE, VALUE,
         "a batch must name one", ROW_PLANS),
    Seam("sglang.srt.model_executor.model_runner:ModelRunner.forward", Kind.USE,
         "(self, forward_batch, skip_attn_backend_init, pp_proxy_tensors, reinit_attn_backend, split_forward_count)",
         "runs the layers", ROW_PLANS),
    *fields("sglang.srt.model_executor.model_runner:ModelRunner",
            "model device req_to_token_pool token_to_kv_pool kv_index_translator",
            "what the executor and our attention read", ROW_PLANS),
    Seam("sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator.bind_own_plan", Kind.USE, "(self, forward_batch)",
         "a batch that the host did not build needs it", ROW_PLANS),
    *fields("sglang.srt.layers.logits_processor:LogitsProcessorOutput",
            "next_token_logits hidden_states",
            "what our model class gives back", ROW_PLANS),
    # CUDA graphs
    Seam("sglang.srt.model_executor.model_runner:ModelRunner._decode_cuda_graph_runner_cls", Kind.HOOK, "(self)",
         "our runner captures whole steps", ROW_PLANS),
    Seam("sglang.srt.model_executor.model_runner:ModelRunner.init_attention_backends", Kind.HOOK, "(self)",
         "attention buffers are sized for rows", ROW_PLANS),
    Seam("sglang.srt.model_executor.model_runner:ModelRunner.graph_shared_output", Kind.REPLACE, VALUE,
         "would hold logits that nobody reads", ROW_PLANS),
    Seam("sglang.srt.model_executor.graph_shared_output:GraphSharedOutput.__init__",
         Kind.USE, "(self, *, device, max_rows)",
         "one of no size instead", ROW_PLANS),
    Seam("sglang.srt.mem_cache.memory_pool:ReqToTokenPool.size", Kind.USE, VALUE,
         "what buffers are sized by", ROW_PLANS),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner", Kind.USE, CLASS,
         "base of our runner", ROW_PLANS),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.__init__", Kind.HOOK,
         "(self, model_runner, *, attn_backend, speculative_num_steps, speculative_num_draft_tokens, "
         "record_nolora_graph)",
         "captures all sizes", ROW_PLANS),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:"
         "DecodeCudaGraphRunner._next_token_logits_buffer_capacity_rows", Kind.REPLACE, "(self, max_num_tokens)",
         "no logits are kept", ROW_PLANS),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.capture",
         Kind.HOOK, "(self)",
         "the table of records is made before", ROW_PLANS),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.capture_one_shape",
         Kind.HOOK, "(self, size, forward, stream_idx, variant_label, attention_variant)",
         "decisions are made inside the graph", ROW_PLANS),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.load_batch",
         Kind.HOOK, "(self, forward_batch, pp_proxy_tensors)",
         "records are copied with the host's inputs", ROW_PLANS),
    *fields("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
            "max_bs bs buffers",
            "sizes and inputs of a replay", ROW_PLANS),
    *fields("sglang.srt.model_executor.forward_batch_info:ForwardBatch",
            "can_run_decode_cuda_graph original_global_num_tokens_cpu",
            "which graph DP attention ranks replay", ROW_PLANS),
    Seam("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector.increment_decode_cuda_graph_pass",
         Kind.USE, "(self, value)",
         "counts replayed and eager steps", OWN_SCHEDULER),
    # CUDA graphs on the CPU
    Seam("sglang.srt.model_executor.model_runner_components.cuda_graph_setup:capture_decode_graph",
         Kind.HOOK, "(*, model_runner)",
         "captures nothing on the CPU", "never: for tests"),
    Seam("sglang.srt.model_executor.model_runner_components.cuda_graph_setup:GraphCapture", Kind.USE, CLASS,
         "what a capture gives back", "never: for tests"),
    Seam("sglang.srt.model_executor.runner_backend.base_cuda_graph_backend:BaseCudaGraphBackend", Kind.USE, CLASS,
         "base of the strict replay", "never: for tests"),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:"
         "DecodeCudaGraphRunner._record_in_graph_metadata_prep_done", Kind.REPLACE, "(self)",
         "records an event", "never: for tests"),
    Seam("sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner._publish_read_done",
         Kind.REPLACE, "(self, in_graph)",
         "records an event", "never: for tests"),
    Seam("sglang.srt.utils.common:get_current_device_stream_fast", Kind.REPLACE, "()",
         "asks for a CUDA device's stream", "never: for tests"),
    Seam("sglang.srt.model_executor.forward_batch_info:ForwardMode.is_cpu_graph", Kind.REPLACE, "(self)",
         "leaves diffusion rows out", "never: for tests"),
    Seam("sglang.srt.model_executor.forward_batch_info:ForwardMode.is_cuda_graph", Kind.USE, "(self)",
         "does not", "never: for tests"),
    Seam("sglang.srt.platforms.interface:SRTPlatform.get_full_graph_backend_cls", Kind.REPLACE, "(self)",
         "names the strict replay", "never: for tests"),
    # CPU platform
    Seam("sglang.srt.platforms.interface:SRTPlatform", Kind.USE, CLASS,
         "base of our platform", PLUGIN_API),
    Seam("sglang.srt.platforms.interface:SRTPlatform.get_default_attention_backend", Kind.REPLACE, "(self)",
         "names our attention", PLUGIN_API),
    Seam("sglang.srt.platforms.interface:SRTPlatform.get_dispatch_key_name", Kind.REPLACE, "(self)",
         "layers run their torch forward", PLUGIN_API),
    Seam("sglang.srt.platforms.interface:SRTPlatform.init_backend", Kind.REPLACE, "(self)",
         "registers our attention in each worker", PLUGIN_API),
    Seam("sglang.srt.platforms.interface:SRTPlatform.post_load_model", Kind.REPLACE, "(self, model)",
         "takes over the expert layers", PLUGIN_API),
    Seam("sglang.srt.platforms.interface:SRTPlatform.capabilities", Kind.REPLACE, VALUE,
         "none beyond the basic ones", PLUGIN_API),
    Seam("sglang.srt.platforms.device_mixin:DeviceMixin.is_pin_memory_available", Kind.REPLACE, "(self, device)",
         "there is none to pin for", PLUGIN_API),
    Seam("sglang.srt.platforms.device_mixin:DeviceMixin._enum", Kind.REPLACE, VALUE,
         "says that the platform is not the host's", PLUGIN_API),
    Seam("sglang.srt.platforms.cpu:CpuDeviceMixin", Kind.USE, CLASS,
         "the host's own notion of the CPU as a device", PLUGIN_API),
    Seam("sglang.srt.platforms.device_mixin:PlatformEnum.OOT", Kind.USE, VALUE,
         "says that the platform is not the host's", PLUGIN_API),
    Seam("sglang.srt.platforms.interface:PlatformCapabilities", Kind.USE, CLASS,
         "none beyond the basic ones", PLUGIN_API),
    # CPU attention and experts
    Seam("sglang.srt.layers.attention.attention_registry:register_attention_backend", Kind.USE, "(name)",
         "makes --attention-backend llada_rows resolve", NO_PLAN),
    Seam("sglang.srt.arg_groups.choices:add_attention_backend_choices", Kind.USE, VALUE,
         "makes the command line accept it", NO_PLAN),
    Seam("sglang.srt.arg_groups.overrides:_dllm_attention_backend", Kind.USE, "(view)",
         "would make any backend that our algorithms do not name flashinfer", NO_PLAN),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.needs_cpu_seq_lens", Kind.REPLACE, VALUE,
         "lengths stay on the device", NO_PLAN),
    *fields("sglang.srt.layers.radix_attention:RadixAttention",
            "layer_id tp_q_head_num tp_k_head_num qk_head_dim v_head_dim scaling k_scale v_scale k_scale_float "
            "v_scale_float attn_type",
            "what a layer asks of its attention", NO_PLAN),
    *fields("sglang.srt.layers.radix_attention:RadixAttention",
            "sliding_window_size logit_cap is_cross_attention xai_temperature_len",
            "refused", NO_PLAN),
    *fields("sglang.srt.model_executor.model_runner:ModelRunner",
            "page_size dtype model_config",
            "sizes of our attention", NO_PLAN),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.init_forward_metadata",
         Kind.USE, "(self, forward_batch)",
         "comes to init_forward_metadata_out_graph unless a graph runs", CPU_ENGINE),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.init_forward_metadata_out_graph",
         Kind.REPLACE, "(self, forward_batch, in_capture)",
         "plans the spans of a forward", CPU_ENGINE),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward_extend",
         Kind.REPLACE, "(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)",
         "attention of rows", CPU_ENGINE),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward_decode",
         Kind.REPLACE, "(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)",
         "attention of rows of one token", CPU_ENGINE),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.get_cuda_graph_seq_len_fill_value",
         Kind.REPLACE, "(self)",
         "asked by graph runners", CPU_ENGINE),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.init_cuda_graph_state",
         Kind.REPLACE, "(self, max_bs, max_num_tokens)",
         "asked by graph runners", CPU_ENGINE),
    Seam("sglang.srt.layers.attention.base_attn_backend:AttentionBackend.support_triton", Kind.REPLACE, "(self)",
         "no kernel of ours is Triton's", CPU_ENGINE),
    Seam("sglang.srt.model_executor.forward_batch_info:ForwardMode.is_decode_or_idle", Kind.USE, "(self)",
         "whether rows have one token", CPU_ENGINE),
    Seam("sglang.srt.mem_cache.memory_pool:KVWriteLoc", Kind.USE, CLASS,
         "where KV is written", CPU_ENGINE),
    Seam("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer", Kind.USE,
         "(self, layer, loc_info, cache_k, cache_v, k_scale, v_scale, layer_id_override, dcp_kv_mask)",
         "writes a step's KV", CPU_ENGINE),
    Seam("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.get_key_buffer", Kind.USE, "(self, layer_id)",
         "reads KV", CPU_ENGINE),
    Seam("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.get_value_buffer", Kind.USE, "(self, layer_id)",
         "reads KV", CPU_ENGINE),
    Seam("sglang.srt.layers.dp_attention:memcpy_func", Kind.REPLACE, VALUE,
         "would be a Triton kernel", CPU_ENGINE),
    Seam("sglang.srt.layers.dp_attention:memcpy_cpu", Kind.USE, "(dst, src, dim, offset, sz, offset_src)",
         "the same in torch", CPU_ENGINE),
    Seam("sglang.srt.model_executor.forward_batch_info:_is_cpu", Kind.REPLACE, VALUE,
         "would pin memory", CPU_ENGINE),
    Seam("sglang.srt.layers.moe.fused_moe_native:moe_forward_native",
         Kind.HOOK, "(layer, x, topk_output, moe_runner_config)",
         "forgets the scaling factor and indexes expert -1", CPU_ENGINE),
    Seam("sglang.srt.platforms.interface:SRTPlatform.get_quantization_config", Kind.REPLACE, "(self, quantization)",
         "quantised layers are run as what they stand for", PLUGIN_API),
    *fields("sglang.srt.layers.quantization", "QUANTIZATION_METHODS CPU_QUANTIZATION_METHODS",
            "what is quantised how", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:QuantizationConfig.get_quant_method",
         Kind.REPLACE, "(self, layer, prefix)",
         "gives each layer its method", CPU_ENGINE),
    Seam("sglang.srt.runtime_context:get_flags", Kind.USE, "()",
         "methods ask it which experts' kernel they are for", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod", Kind.USE, CLASS,
         "layers that a GPTQ checkpoint leaves out", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.utils:get_dynamic_override", Kind.USE,
         "(config, layer_name, key, default_value)",
         "layers that a GPTQ checkpoint leaves out", CPU_ENGINE),
    Seam("sglang.srt.layers.moe.utils:MoeRunnerBackend.MARLIN", Kind.USE, VALUE,
         "the kernel for weights alone", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:QuantizationConfig.get_supported_act_dtypes",
         Kind.REPLACE, "(self)",
         "would refuse fp32", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.compressed_tensors.compressed_tensors:"
         "CompressedTensorsConfig._check_scheme_supported", Kind.REPLACE, "(self, min_capability, error)",
         "would ask the device", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:QuantizeMethodBase.process_weights_after_loading",
         Kind.REPLACE, "(self, layer)",
         "would prepare weights for a device's kernels", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:LinearMethodBase.apply", Kind.REPLACE, "(self, layer, x, bias)",
         "would run a device's kernel", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:FusedMoEMethodBase.apply",
         Kind.REPLACE, "(self, layer, dispatch_output)",
         "would run a device's kernel", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:FusedMoEMethodBase.create_moe_runner",
         Kind.REPLACE, "(self, layer, moe_runner_config)",
         "would choose a device's kernel", CPU_ENGINE),
    Seam("sglang.srt.layers.quantization.base_config:FusedMoEMethodBase.get_moe_runner_backend",
         Kind.REPLACE, "(self, layer)",
         "tells the router who runs the experts: nobody of the host", CPU_ENGINE),
    Seam("sglang.srt.layers.moe.token_dispatcher.standard:StandardCombineInput", Kind.USE, CLASS,
         "what an expert layer gives", CPU_ENGINE),
    # Model: layers are named only, since one that takes other arguments fails loudly when the model is built
    Seam("sglang.srt.model_executor.forward_context:get_token_to_kv_pool", Kind.USE, "()",
         "the model writes KV before attention", OWN_MODEL),
    Seam("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool", Kind.USE, CLASS,
         "the pool that a kernel of ours writes to", OWN_MODEL),
    Seam("sglang.srt.mem_cache.memory_pool:KVCache.store_dtype", Kind.USE, VALUE,
         "whether the pool holds KV as it is", OWN_MODEL),
    Seam("sglang.srt.layers.rotary_embedding.base:RotaryEmbedding", Kind.USE, CLASS,
         "the rotation that a kernel of ours does", OWN_MODEL),
    Seam("sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.cos_sin_cache", Kind.USE, VALUE,
         "its angles", OWN_MODEL),
    Seam("sglang.srt.mem_cache.memory_pool:KVWriteLoc.for_layer", Kind.USE,
         "(cls, forward_batch, layer, *, swa_loc, full_loc)",
         "where a layer's KV is written", OWN_MODEL),
    Seam("sglang.srt.distributed.parallel_state:get_attn_tp_group", Kind.USE, "()",
         "ranks that share the head under DP attention", OWN_MODEL),
    Seam("sglang.srt.distributed.parallel_state:get_tp_group", Kind.USE, "()",
         "ranks that share the head", OWN_MODEL),
    Seam("sglang.srt.distributed.parallel_state:GroupCoordinator.all_gather", Kind.USE,
         "(self, input_, dim, output_tensor_list)",
         "a few numbers per open position of every rank", OWN_MODEL),
    Seam("sglang.srt.eplb.expert_location:ModelConfigForExpertLocation", Kind.USE, CLASS,
         "what expert load balancing must know", OWN_MODEL),
    Seam("sglang.srt.layers.activation:SiluAndMul", Kind.USE, CLASS,
         "SwiGLU", OWN_MODEL),
    Seam("sglang.srt.layers.dp_attention:is_dp_attention_enabled", Kind.USE, "()",
         "how embeddings are split", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.factories:append_stages", Kind.USE, "(*stages, prepared_from)",
         "norms, residuals and collectives between stages", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.factories:declare_attn", Kind.USE,
         "(*, read, update, reduction, gathers_attn_tp_input, output_transform, tp_group, attn_tp_gather, "
         "in_token_order, sum_impl, row_transport)",
         "says that a stage is attention", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.factories:declare_ffn", Kind.USE,
         "(*, sparse, read, update, output_transform, next_layer_sparse, dense_tp_size, exit_rows, output_complete, "
         "sum_impl, row_transport)",
         "says that a stage is dense or sparse", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.layout:is_dense_ffn_fully_dp", Kind.USE, "()",
         "how dense layers are split", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.residual.batch:start", Kind.USE, "(forward_batch)",
         "residuals of a forward", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.residual.batch:complete_output", Kind.USE, "(hidden_states, forward_batch)",
         "residuals of a forward", OWN_MODEL),
    Seam("sglang.srt.layers.layer_boundary.residual.batch:final_norm", Kind.USE,
         "(hidden_states, forward_batch, layernorm, capture, *, finalize_norm, skip_empty, **read_kwargs)",
         "the last norm", OWN_MODEL),
    Seam("sglang.srt.layers.layernorm:RMSNorm", Kind.USE, CLASS,
         "norms", OWN_MODEL),
    Seam("sglang.srt.layers.linear:QKVParallelLinear", Kind.USE, CLASS,
         "fused projections", OWN_MODEL),
    Seam("sglang.srt.layers.linear:MergedColumnParallelLinear", Kind.USE, CLASS,
         "gate and up in one", OWN_MODEL),
    Seam("sglang.srt.layers.linear:RowParallelLinear", Kind.USE, CLASS,
         "output projections", OWN_MODEL),
    Seam("sglang.srt.layers.moe.ep_moe.layer:get_moe_impl_class", Kind.USE, "(quant_config)",
         "the expert layer of the chosen backend", OWN_MODEL),
    Seam("sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE", Kind.USE, CLASS,
         "expert layers, found and mapped to checkpoint names", OWN_MODEL),
    *fields("sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE",
            "moe_ep_size moe_tp_size should_fuse_routed_scaling_factor_in_topk params_dtype",
            "how experts are split, and what runs them", OWN_MODEL),
    Seam("sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.weight_loader", Kind.USE,
         "(self, param, loaded_weight, weight_name, shard_id, expert_id)",
         "stacks and splits experts", OWN_MODEL),
    Seam("sglang.srt.layers.linear:LinearBase", Kind.USE, CLASS,
         "layers whose parameters a quantisation method makes", OWN_MODEL),
    Seam("sglang.srt.layers.linear:LinearBase.tp_group", Kind.USE, VALUE,
         "how a linear layer is split", OWN_MODEL),
    Seam("sglang.srt.layers.linear:MergedColumnParallelLinear.weight_loader", Kind.USE,
         "(self, param, loaded_weight, loaded_shard_id)",
         "fuses and splits gate and up", OWN_MODEL),
    Seam("sglang.srt.layers.linear:MergedColumnParallelLinear.weight_loader_v2", Kind.USE,
         "(self, param, loaded_weight, loaded_shard_id)",
         "the same for quantised ones", OWN_MODEL),
    *fields("sglang.srt.layers.linear:QKVParallelLinear",
            "total_num_heads total_num_kv_heads num_heads num_kv_heads",
            "how fused projections are split", OWN_MODEL),
    Seam("sglang.srt.distributed.utils:get_group_rank_size", Kind.USE, "(group)",
         "how a linear layer is split", OWN_MODEL),
    Seam("sglang.srt.models.utils:WeightsMapper", Kind.USE, CLASS,
         "names of the other spelling in what a quantised checkpoint excludes", OWN_MODEL),
    Seam("sglang.srt.layers.quantization.kv_cache:BaseKVCacheMethod.create_weights", Kind.USE, "(self, layer)",
         "marks the scales of a KV cache as ones that need not come", OWN_MODEL),
    Seam("sglang.srt.layers.moe.topk:TopK", Kind.USE, CLASS,
         "group-limited routing", OWN_MODEL),
    Seam("sglang.srt.layers.moe.topk:TopK.routing_inputs", Kind.USE, "(self)",
         "whether anything is left to do once experts are chosen", OWN_MODEL),
    Seam("sglang.srt.layers.moe.topk:TopKOutputFormat.STANDARD", Kind.USE, VALUE,
         "whether experts are chosen before the expert layer", OWN_MODEL),
    Seam("sglang.srt.layers.moe.topk:precomputed_topk_postprocess_is_noop", Kind.USE,
         "(topk_config, num_token_non_padded, expert_location_dispatch_info)",
         "whether anything is left to do once experts are chosen", OWN_MODEL),
    Seam("sglang.srt.layers.moe.topk:build_precomputed_topk_output", Kind.USE,
         "(topk_weights, topk_ids, topk_config, layer_id)",
         "experts that a kernel of ours chose", OWN_MODEL),
    Seam("sglang.srt.layers.moe.utils:get_moe_a2a_backend", Kind.USE, "()",
         "whether tokens travel to experts", OWN_MODEL),
    Seam("sglang.srt.layers.moe.utils:get_moe_runner_backend", Kind.USE, "()",
         "which kernels run the experts", OWN_MODEL),
    Seam("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config:get_config_file_name", Kind.REPLACE,
         "(E, N, dtype, block_shape, per_channel_quant, down_moe)",
         "knows no settings for one expert more", "the host has settings for a shared expert among routed ones"),
    Seam("sglang.srt.layers.moe.topk:TopK.bind_runner_backend",
         Kind.USE, "(self, runner_backend, *, routing_method_type)",
         "tells the router who runs the experts", OWN_MODEL),
    Seam("sglang.srt.layers.radix_attention:RadixAttention", Kind.USE, CLASS,
         "attention over paged KV", OWN_MODEL),
    Seam("sglang.srt.layers.radix_attention:AttentionType.ENCODER_ONLY", Kind.USE, VALUE,
         "not causal, for every backend", OWN_MODEL),
    Seam("sglang.srt.layers.rotary_embedding.factory:get_rope", Kind.USE,
         "(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype, partial_rotary_factor, "
         "dual_chunk_attention_config)",
         "rotary embedding", OWN_MODEL),
    Seam("sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding", Kind.USE, CLASS,
         "embeddings", OWN_MODEL),
    Seam("sglang.srt.layers.vocab_parallel_embedding:ParallelLMHead", Kind.USE, CLASS,
         "output embeddings", OWN_MODEL),
    Seam("sglang.srt.model_loader.weight_utils:default_weight_loader", Kind.USE, "(param, loaded_weight)",
         "weights that need no splitting", OWN_MODEL),
    Seam("sglang.srt.models.utils:apply_qk_norm",
         Kind.USE, "(q, k, q_norm, k_norm, head_dim, alt_stream, allow_inplace)",
         "norms of queries and keys", OWN_MODEL),
    Seam("sglang.srt.runtime_context:get_exec", Kind.USE, "()",
         "redundant experts", OWN_MODEL),
    Seam("sglang.srt.runtime_context:get_parallel", Kind.USE, "()",
         "ranks", OWN_MODEL),
    Seam("sglang.srt.utils.common:add_prefix", Kind.USE, "(name, prefix)",
         "names of layers, by which quantisation finds them", OWN_MODEL),
    Seam("sglang.srt.utils.common:make_pp_layers", Kind.USE,
         "(num_hidden_layers, layer_fn, prefix, return_tuple, offloader_kwargs, final_read, stage_facts)",
         "the layers of this rank", OWN_MODEL),
    Seam("sglang.srt.model_executor.forward_batch_info:ForwardMode.is_idle", Kind.USE, "(self)",
         "a rank without tokens", OWN_MODEL),
)
# fmt: on


Scopes = dict[ast.AST, dict[str, ast.AST]]  # what modules and classes bind, looked up once per check


def installed_host() -> Host:
    """The host that this Python would import, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise HostMismatch(f"sglang-llada: SGLang is not installed; install sglang=={RELEASE}")
    return Host(importlib.metadata.version("sglang"), Path(spec.submodule_search_locations[0]))


def require(table: Iterable[Seam] = SEAMS, host: Host | None = None) -> None:
    """Raise HostMismatch with every difference between the table and the host (the installed one by default).

    Processes that this one starts need not check the same host again: there are three or more, at a second each.
    """
    host = installed_host() if host is None else host
    checked = f"{host.version} {host.root}"
    if os.environ.get(CHECKED) == checked:
        return
    differences = check(table, host)
    if differences:
        listed = "\n".join(f"  - {difference}" for difference in differences)
        raise HostMismatch(
            f"sglang-llada: the installed SGLang is not the release that it was written for, {RELEASE}:\n{listed}\n"
            f"Install sglang=={RELEASE}, or a release of sglang-llada that supports this one."
        )
    os.environ[CHECKED] = checked


def check(table: Iterable[Seam] = SEAMS, host: Host | None = None) -> list[str]:
    """One sentence for each difference between the table and the host, the host's release first."""
    host = installed_host() if host is None else host
    with collector_paused():
        differences = [difference for _, difference in compare(table, host) if difference]
    if host.version != RELEASE:
        differences.insert(0, f"release is {host.version}, expected {RELEASE}")
    return differences


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection: it would walk millions of syntax tree nodes and take three times as long as the check."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compare(table: Iterable[Seam], host: Host) -> Iterator[tuple[Seam, str | None]]:
    """Each row with what is different about it, or None."""
    trees: dict[str, ast.Module | None] = {}
    known: Scopes = {}
    for seam in table:
        module, _, name = seam.target.partition(":")
        if module not in trees:
            trees[module] = parse(module, host.root)
        yield seam, difference(seam, trees[module], module, name, known)


def difference(seam: Seam, tree: ast.Module | None, module: str, name: str, known: Scopes) -> str | None:
    """What is different about one row."""
    if tree is None:
        return f"{seam.target}: module {module} is missing"
    found = find(tree, name.split("."), known)
    if found is None:
        return f"{seam.target}: {name} is missing from {module}"
    signature = signature_of(found)
    if signature != seam.signature:
        return f"{seam.target}: is {signature}, expected {seam.signature}"
    return None


def parse(module: str, root: Path) -> ast.Module | None:
    """The syntax tree of a host module, None if it has no source file."""
    base = root.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def find(scope: ast.AST, names: list[str], known: Scopes | None = None) -> ast.AST | None:
    """The node that binds a dotted name; of several, the last, as at run time. What scopes bind is kept in `known`."""
    known = {} if known is None else known
    if scope not in known:
        known[scope] = {bound: node for node, bound in bindings(scope)}
    found = known[scope].get(names[0])
    if found is None or len(names) == 1:
        return found
    return find(found, names[1:], known)


def bindings(scope: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What a module or class binds: definitions, assignments, imports, also inside if and try; self.NAME of methods."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
            if isinstance(scope, ast.ClassDef) and not isinstance(node, ast.ClassDef):
                yield from assigned_to_self(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield node, target.id
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from bindings(node)


def assigned_to_self(method: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The attributes that a method assigns to self."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node, node.attr


def signature_of(node: ast.AST) -> str:
    """Canonical signature: parameter names with /, *, * and ** where Python has them; CLASS; VALUE."""
    if isinstance(node, ast.ClassDef):
        return CLASS
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return VALUE
    a = node.args
    parts = [p.arg for p in a.posonlyargs] + ["/"] * bool(a.posonlyargs) + [p.arg for p in a.args]
    if a.vararg:
        parts.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        parts.append("*")
    parts += [p.arg for p in a.kwonlyargs]
    if a.kwarg:
        parts.append(f"**{a.kwarg.arg}")
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}({', '.join(parts)})"
