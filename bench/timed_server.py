"""The host's server with its forwards counted and timed: `python -m bench.timed_server FLAGS`, as sglang.launch_server.

The file that BENCH_FORWARDS names holds two numbers, float64: forwards so far, and the seconds spent in them. The
processes that the server spawns import this module too, which is how the hook gets into the scheduler's.
"""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

VARIABLE = "BENCH_FORWARDS"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"


def totals(file: Path, *, fresh: bool = False) -> np.memmap[Any, np.dtype[np.float64]]:
    """The two numbers, shared with whoever else opens the file."""
    return np.memmap(file, np.float64, "w+" if fresh else "r+", shape=(2,))


def timed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a forward."""
    begin = time.perf_counter()
    out = forward(*args, **kwargs)
    TOTALS[:] += 1, time.perf_counter() - begin
    return out


if VARIABLE in os.environ:
    TOTALS = totals(Path(os.environ[VARIABLE]))
    HookRegistry.register(FORWARD, timed, HookType.AROUND)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
