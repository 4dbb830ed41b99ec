"""Servers that start in a fifth of the time: each is forked from a process that has imported what all of them import.

An import of the host takes 16 s, and a server consists of three processes that import it. The standard library's fork
server does it once for all servers of a test run. Inside such a server the host forks its processes where it would
spawn them; all else is the plain command's, whose `main` runs. TEST_SERVERS=cold has every server start by the
plain command, as those do anyway that are given variables of the environment, which are read by imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

WARM = os.environ.get("TEST_SERVERS") != "cold"
MODULES = [
    "sglang_llada.host.requests.http_app",  # which loads the plugins first, as the plain command does
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "torch.utils.cpp_extension",
    "torch._inductor.compile_fx",
    "sglang_llada.host.engine.scheduler",
]


class WarmServer:
    """What tests use of a subprocess.Popen."""

    def __init__(self, module: str, args: list[str], log: Path, environment: dict[str, str], folder: Path) -> None:
        context = ForkServerContext()
        context.set_forkserver_preload(MODULES)
        self.args = args
        self._process: ForkServerProcess = context.Process(target=serve, args=(module, args, log, environment, folder))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def serve(module: str, args: list[str], log: Path, environment: dict[str, str], folder: Path) -> None:
    """In the forked process: become the leader of a session, and run a module of the host as `python -m` does."""
    os.setsid()
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")  # type: ignore[attr-defined]
    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
