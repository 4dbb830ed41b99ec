"""What every benchmark's record begins with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from timeit import repeat
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def new_record() -> dict[str, Any]:
    """Schema, command, commit, environment and pace; the benchmark adds its workload and figures."""
    argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {"schema": 1, "argv": argv, "git": git_state(), "environment": environment(), "pace": pace()}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    devices = range(torch.cuda.device_count())
    packages = ("sglang", "torch", "triton", "transformers")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(device) for device in devices],
        "cuda": torch.version.cuda,
        **{name: version(name) for name in packages},
    }


def processor() -> str:
    """The processor's name, where the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def pace() -> dict[str, float]:
    """How fast one core is: microseconds for a sum of 1,000 integers in Python, GFLOP/s of a product in torch.

    Machines of one kind differ by a factor of two from day to day; figures of two records do so with these.
    """
    count = 5000
    python = min(repeat(lambda: sum(range(1000)), number=count, repeat=3)) / count
    threads, size, x = torch.get_num_threads(), 512, torch.rand(512, 512)
    torch.set_num_threads(1)
    product = min(repeat(lambda: x @ x, number=10, repeat=3)) / 10
    torch.set_num_threads(threads)
    return {"python us": 1e6 * python, "GFLOP/s": 2 * size**3 / product / 1e9}


def git_state() -> str:
    """The commit, marked if the tree is not clean."""
    out = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return out.stdout.strip()
