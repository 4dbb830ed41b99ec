"""What every benchmark's record begins with."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def new_record() -> dict[str, Any]:
    """Schema, command, commit and environment; the benchmark adds its workload and figures."""
    return {"schema": 1, "argv": sys.argv, "git": git_state(), "environment": environment()}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    devices = range(torch.cuda.device_count())
    packages = ("sglang", "torch", "triton", "transformers")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(device) for device in devices],
        "cuda": torch.version.cuda,
        **{name: version(name) for name in packages},
    }


def git_state() -> str:
    """The commit, marked if the tree is not clean."""
    out = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return out.stdout.strip()
