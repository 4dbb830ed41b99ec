"""The host on a machine without an accelerator: an out-of-tree platform whose device is the CPU.

The host's own CPU engine needs a build of its kernels that the released wheel does not have; this platform needs torch
alone. It serves the stock classes as well as ours.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

ATTENTION_BACKEND = "llada_rows"
KV_TOKENS = 262_144  # where the user gives no --max-total-tokens: memory is shared with everything else on the machine


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU through torch operations."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is no device that pinned memory would help."""
        return False

    def get_default_attention_backend(self) -> str:
        """Ours: it runs rows without padding them."""
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        """Layers run their plain torch forward."""
        return "native"

    def init_backend(self) -> None:
        """Register our attention backend; called in each worker."""
        from sglang_llada.host import cpu_attention

        cpu_attention.register()

    def post_load_model(self, model: Any) -> None:
        """Take over the expert layers of LLaDA2; called in each worker once weights are loaded."""
        from sglang_llada.host import cpu_experts

        cpu_experts.adopt(model)
