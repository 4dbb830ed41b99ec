"""Resident memory of a process by the kernel's count, and how to find the one of a server that holds the model.

The kernel keeps the peak of each process and forgets it when asked to, so a peak is that of one piece of work. Pages
count once they are touched. What a process has freed may still be resident, and covers later work: compare peaks with
what the process held before any of the work that is compared. Linux only, and nothing of a device's memory.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil

MIB = 2**20
FORGET_PEAK = "5"  # for clear_refs; see proc(5)


def scheduler_of(server: subprocess.Popen[bytes]) -> int:
    """Process id of a server's scheduler, which runs the model; of a server with one rank."""
    children = psutil.Process(server.pid).children(recursive=True)
    (scheduler,) = [child.pid for child in children if "scheduler" in " ".join(child.cmdline())]
    return scheduler


def resident(pid: int) -> int:
    """Bytes that a process holds now."""
    return field(pid, "VmRSS")


def forget_peak(pid: int) -> None:
    """From now on, peak() is the most since now."""
    Path(f"/proc/{pid}/clear_refs").write_text(FORGET_PEAK, encoding="ascii")


def peak(pid: int) -> int:
    """Most bytes that a process held."""
    return field(pid, "VmHWM")


def field(pid: int, name: str) -> int:
    """A size in /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    (size,) = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(size) * 1024
