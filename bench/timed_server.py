"""The host's server with its forwards counted and timed: `python -m bench.timed_server FLAGS`, as sglang.launch_server.

The file that BENCH_FORWARDS names holds five numbers, float64: forwards so far, their rows, the seconds spent in them,
and when the first of them began, once that is set to 0, and the last one ended, on the clock of all processes. The
host's forwards end with logits, so the head counts as part of a forward on our side too, where it is run afterwards for
the positions that matter. The processes that the server spawns import this module too, which is how the hooks get into
the scheduler's.
"""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sglang.srt import plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

VARIABLE = "BENCH_FORWARDS"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
HEAD = "sglang_llada.decode.select.select"


def totals(file: Path, *, fresh: bool = False) -> np.memmap[Any, np.dtype[np.float64]]:
    """The numbers, shared with whoever else opens the file."""
    return np.memmap(file, np.float64, "w+" if fresh else "r+", shape=(5,))


def timed_forward(forward: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a forward."""
    begin = time.perf_counter()
    out = forward(runner, batch, *args, **kwargs)
    end = time.perf_counter()
    TOTALS[:3] += 1, batch.batch_size, end - begin
    TOTALS[3:] = TOTALS[3] or begin, end
    return out


def timed_head(select: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a selection, which runs the head."""
    begin = time.perf_counter()
    out = select(*args, **kwargs)
    end = time.perf_counter()
    TOTALS[2] += end - begin
    TOTALS[4] = end
    return out


if VARIABLE in os.environ:
    TOTALS = totals(Path(os.environ[VARIABLE]))
    HookRegistry.register(FORWARD, timed_forward, HookType.AROUND)
    HookRegistry.register(HEAD, timed_head, HookType.AROUND)
    if plugins._plugins_loaded:  # in a process that was forked from one that has imported the host
        HookRegistry.apply_hooks()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
