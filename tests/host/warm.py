"""Processes of the host that start in a fifth of the time: forked from one that has imported what all of them import.

An import of the host takes 16 s, and a server consists of three processes that import it. The standard library's fork
server does it once for all processes of a test run, and once more for each set of variables that imports may read
(all but READ_LATER). A process that it forks takes its own environment before it does anything. Inside a server the
host forks its processes where it would spawn them; all else is the plain command's, whose `main` runs. With
TEST_SERVERS=cold every server is started by the plain command, and ranks are spawned.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import setproctitle
import torch
import uvicorn._subprocess

COMMAND = "sglang.launch_server"
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


def environment() -> dict[str, str]:
    """Ours, without what changes with each test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


READ_LATER = {  # than by imports, or taken by take_environment
    "FAULTS",
    "OMP_NUM_THREADS",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE",
    "SGLANG_LLADA_CHECKED",
    "SGLANG_REQ_RUNNING_TIMEOUT",
    "SGLANG_REQ_WAITING_TIMEOUT",
    "TORCHDYNAMO_DISABLE",
}


@functools.cache
def fork_server(variables: frozenset[tuple[str, str]]) -> forkserver.ForkServer:
    """The process that has imported MODULES under these variables."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(MODULES)
    with mock.patch.dict(os.environ, dict(variables), clear=True):
        server.ensure_running()
    return server


def fork(target: Callable[..., None], args: tuple[Any, ...], variables: dict[str, str]) -> ForkServerProcess:
    """A function of a module, called in a process of its own whose environment is these variables."""
    process: ForkServerProcess = ForkServerContext().Process(target=begin, args=(variables, target, args))
    server = fork_server(frozenset(item for item in variables.items() if item[0] not in READ_LATER))
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        process.start()
    return process


def begin(variables: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """In the forked process."""
    setproctitle.getproctitle()  # finds the memory of titles by that of the environment, once
    os.environ.clear()
    os.environ.update(variables)
    take_environment()
    target(*args)


class WarmServer:
    """What tests use of a subprocess.Popen."""

    def __init__(
        self,
        module: str,
        args: list[str],
        out: Path,
        variables: dict[str, str],
        folder: Path,
        errors: Path | None = None,
    ) -> None:
        self.args = args
        self._process = fork(serve, (module, args, out, errors or out, folder), variables)
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


def serve(module: str, args: list[str], out: Path, errors: Path, folder: Path) -> None:
    """In the forked process: become the leader of a session, and run the command as `python -m` does."""
    os.setsid()
    os.chdir(folder)
    for path, stream in ((out, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.register_at_fork(after_in_child=take_environment)
    uvicorn._subprocess.spawn = multiprocessing.get_context("fork")
    multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def take_environment() -> None:
    """What torch has read at its import: the server settles its schedulers' threads only later."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
