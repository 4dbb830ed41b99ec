"""SGLang 0.5.22: what differs from 0.5.23.

A function whose further parameters we do not name is a new signature and nothing else. What is missing is left out
here (seam) or made up for (host/earlier.py, host/models/parts/topk.py), by asking whether the host has the name.
"""

from __future__ import annotations

from sglang_llada.host.seam.releases import v0_5_23
from sglang_llada.host.seam.rows import MISSING, VALUE, Kind, Seam

GOES = "0.5.22 is no longer supported"

RELEASE = v0_5_23.RELEASE.but(
    "0.5.22",
    {
        # Parameters that we do not give.
        "sglang.srt.managers.scheduler:Scheduler.get_num_allocatable_reqs": (
            "(self, running_bs, beam_width, running_batch)"
        ),
        "sglang.srt.layers.layer_boundary.factories:declare_attn": (
            "(*, read, update, reduction, gathers_attn_tp_input, output_transform, tp_group, attn_tp_gather)"
        ),
        "sglang.srt.layers.layer_boundary.factories:declare_ffn": (
            "(*, sparse, read, update, output_transform, next_layer_sparse, dense_tp_size, exit_rows, output_complete)"
        ),
        "sglang.srt.function_call.function_call_parser:FunctionCallParser.__init__": (
            "(self, tools, tool_call_parser, tokenizer, tool_choice)"
        ),
        "sglang.srt.function_call.function_call_parser:FunctionCallParser.parse_non_stream": "(self, full_text)",
        # Adapters are refused.
        "sglang.srt.lora.lora_manager:LoRAManager.set_lora_module": "(self, module_name, module)",
        "sglang.srt.lora.backend.base_backend:BaseLoRABackend.prepare_lora_batch": (
            "(self, forward_batch, weight_indices, lora_ranks, scalings, use_cuda_graph, use_prefill_cuda_graph)"
        ),
        "sglang.srt.lora.backend.base_backend:BaseLoRABackend.forward_with_base": MISSING,
        # Its detectors find no call without tools.
        "sglang.srt.function_call.base_format_detector:BaseFormatDetector.parses_without_tools": MISSING,
        # It has no server but the HTTP one, so aborts are sent where outputs are.
        "sglang.srt.managers.scheduler:Scheduler.send_abort_output": MISSING,
        # Several HTTP processes are refused.
        "sglang.srt.environ:Envs.SGLANG_HTTP_SERVER_APP_PATH": MISSING,
        # It writes one private parameter less.
        "sglang.srt.sampling.sampling_params:REQUEST_REASONING_IN_GRAMMAR_KEY": MISSING,
        # It asks nobody who runs the experts.
        "sglang.srt.layers.quantization.base_config:FusedMoEMethodBase.get_moe_runner_backend": MISSING,
        "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.runner_backend": MISSING,
        "sglang.srt.layers.moe.topk:TopK.bind_runner_backend": MISSING,
        # Models hand it what it needs.
        "sglang.srt.layers.moe.topk:TopK.routing_inputs": MISSING,
    },
    more=(
        Seam("sglang.srt.managers.scheduler:Scheduler.ipc_channels", Kind.USE, VALUE,
             "aborts are sent where outputs are", GOES),
        Seam("sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels.send_to_tokenizer", Kind.USE,
             VALUE, "aborts are sent where outputs are", GOES),
        Seam("sglang.srt.eplb.expert_location_dispatch:ExpertLocationDispatchInfo.init_new", Kind.USE,
             "(cls, layer_id)", "where experts are", GOES),
    ),
)  # fmt: skip
