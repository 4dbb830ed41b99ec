"""The host on a machine without an accelerator: an out-of-tree platform whose device is the CPU.

The host's own CPU engine needs a build of its kernels that the released wheel does not have; this platform needs torch
alone. It serves the stock classes as well as ours.
"""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_llada.config import REPLAY_VARIABLE, read_switch
from sglang_llada.host.backends import ATTENTION_BACKEND

KV_TOKENS = 262_144  # where the user gives no --max-total-tokens: memory is shared with everything else on the machine


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU through torch operations."""

    _enum = PlatformEnum.OOT
    graph_backend: type[Any]  # set where graphs are hooked, if this platform replays them

    def __init__(self) -> None:
        self.replays = read_switch(os.environ, REPLAY_VARIABLE, default=False)
        self.capabilities = PlatformCapabilities(graph_capture=self.replays)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is no device that pinned memory would help."""
        return False

    def get_default_attention_backend(self) -> str:
        """Ours: it runs rows without padding them."""
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        """Layers run their plain torch forward."""
        return "native"

    def get_full_graph_backend_cls(self) -> type[Any]:
        """What stands for CUDA graphs here."""
        return self.graph_backend

    def get_quantization_config(self, quantization: str) -> type[Any]:
        """The host's, of its CPU engine where that has one of its own, with layers that we run."""
        from sglang.srt.layers import quantization as methods

        from sglang_llada.host.cpu.quantised import on_cpu

        return on_cpu((methods.QUANTIZATION_METHODS | methods.CPU_QUANTIZATION_METHODS)[quantization])

    def get_torch_profiler_activity_str(self) -> str:
        """What a profile records here."""
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        """The same, as torch has it."""
        import torch

        return torch.profiler.ProfilerActivity.CPU

    def init_backend(self) -> None:
        """Register our backends of attention and adapters, and DP attention's plain copies; called in each worker."""
        import torch
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers import dp_attention
        from sglang.srt.model_executor import forward_batch_info

        from sglang_llada.host.attention import backend as attention
        from sglang_llada.host.cpu import adapters
        from sglang_llada.host.operations import kernel

        attention.register()
        adapters.register()
        # The host has torch code for these, which it takes on its own CPU engine only.
        dp_attention.memcpy_func = kernel(dp_attention.memcpy_cpu)
        forward_batch_info._is_cpu = True
        parallel_state._is_cpu = True
        if self.replays:  # the host would capture and replay diffusion rows on devices only
            parallel_state.get_current_device_stream_fast = torch.cpu.current_stream
            group = parallel_state.GroupCoordinator  # each collective is one operation, whatever gloo makes of it
            group._all_gather_into_tensor = kernel(group._all_gather_into_tensor)
            group._reduce_scatter_tensor = kernel(group._reduce_scatter_tensor)
            forward_batch_info.ForwardMode.is_cpu_graph = forward_batch_info.ForwardMode.is_cuda_graph

    def post_load_model(self, model: Any) -> None:
        """Take over the expert layers of LLaDA2; called in each worker once weights are loaded."""
        from sglang_llada.host.cpu import experts as cpu_experts

        cpu_experts.adopt(model)


def native_bf16() -> bool:
    """Whether the processor multiplies bf16 by itself."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
