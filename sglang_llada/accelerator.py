"""Whether our CPU platform should serve this process. Imports nothing of the host, which may be half imported."""

from __future__ import annotations

import os

import torch

PLATFORM = "sglang_llada.host.cpu.platform.CpuPlatform"


def activate_platform() -> str | None:
    """The class path of our CPU platform, or None where the host must choose.

    None if an accelerator is visible (the same questions that the host asks torch) or if the host's own CPU engine was
    asked for. With SGLANG_PLATFORM naming another platform the host does not ask us at all.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or accelerator_visible():
        return None
    return PLATFORM


def accelerator_visible() -> bool:
    """Whether torch sees any device but the CPU."""
    return torch.accelerator.is_available()
