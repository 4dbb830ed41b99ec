"""The host's measured settings of its expert kernel, where a shared expert stands with the routed ones.

The host looks them up by the number of experts. One more expert of the same shape changes nothing that the settings
depend on, and a count for which nobody measured would get the host's guess.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

TARGET = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config.get_config_file_name"

JOINED: set[int] = set()  # numbers of experts with a shared one among them; written where a model is built


def install() -> None:
    """Hook the host's function."""
    HookRegistry.register(TARGET, of_routed_experts, HookType.AROUND)


def of_routed_experts(original: Callable[..., str], experts: int, *args: Any, **kwargs: Any) -> str:
    """The name of the settings for the routed experts alone."""
    return original(experts - (experts in JOINED), *args, **kwargs)
