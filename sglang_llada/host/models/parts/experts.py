"""The host's measured settings of its expert kernel, where a shared expert stands with the routed ones.

The host looks them up by the number of experts. One more expert of the same shape changes nothing that the settings
depend on, and a count for which nobody measured would get the host's guess. The lookup is replaced only in processes
that build such a model: the module that has it costs others seconds to import.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as host

JOINED: set[int] = set()  # numbers of experts with a shared one among them; written by joined()


def joined(routed: int) -> None:
    """From now on find the settings of so many routed experts for these and a shared one."""
    JOINED.add(routed + 1)
    install()


@cache
def install() -> None:
    """Replace the host's function."""
    original = host.get_config_file_name

    @wraps(original)
    def of_routed_experts(E: int, *args: Any, **kwargs: Any) -> str:
        name: str = original(E - (E in JOINED), *args, **kwargs)
        return name

    host.get_config_file_name = of_routed_experts
