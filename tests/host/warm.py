"""Processes of the host that start in a fifth of the time: forked from one that has imported what all of them import.

An import of the host takes 16 s, 10 of them for packages beneath it, and a server consists of three processes that
import it. So a test run has a fork server (the standard library's) that has imported those packages, and forks from it
one for each set of variables that the host's imports may read, which all test processes of the run share. A process
takes its own environment before it does anything. Inside a server the host forks its processes where it would spawn
them; all else is the plain command's, whose `main` runs. With TEST_SERVERS=cold, and where there is an accelerator,
which no process may have begun to use that is forked, every server is started by the plain command, and ranks are
spawned.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import setproctitle
import torch
import uvicorn._subprocess

COMMAND = "sglang.launch_server"
PATIENCE = 200  # with a command, in seconds
WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND
WARM = os.environ.get("TEST_SERVERS") != "cold" and not torch.cuda.is_available()
# What the host imports of others.
BENEATH = (
    "torch",
    "torch.utils.cpp_extension",
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "scipy.signal",
    "openai",
    "torchvision",
    "timm",
    "compressed_tensors.quantization",
    "fastapi",
    "aiohttp",
    "xgrammar",
)
HOST = (
    "sglang_llada.host.requests.http_app",  # which loads the plugins first, as the plain command does
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang_llada.host.engine.scheduler",
)
# The process whose end is that of the test run, which all its test processes have in common.
RUN = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
FOLDER = Path(tempfile.gettempdir()) / f"fork-servers-{os.environ.get('PYTEST_XDIST_TESTRUNUID', RUN)}"
Variables = frozenset[tuple[str, str]]


def environment() -> dict[str, str]:
    """Ours, without what changes with each test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


READ_LATER = {  # than by imports, or taken by take_environment
    "BENCH_FORWARDS",
    "FAULTS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE",
    "SGLANG_LLADA_CHECKED",
    "SGLANG_REQ_RUNNING_TIMEOUT",
    "SGLANG_REQ_WAITING_TIMEOUT",
    "TORCHDYNAMO_DISABLE",
}


class ForkServer(forkserver.ForkServer):
    """A fork server that some test process of this run has started, and that ends with the run."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        self._forkserver_alive_fd = os.pidfd_open(RUN)

    def ensure_running(self) -> None:
        """It is; what it forks tells our resource tracker what to clean up."""
        resource_tracker.ensure_running()


@functools.cache
def fork_server(modules: tuple[str, ...], variables: Variables) -> ForkServer:
    """The process of this test run that has imported these modules under these variables."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    address = FOLDER / hashlib.sha256(repr((modules, sorted(variables))).encode()).hexdigest()[:16]
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            start_fork_server(str(address), modules, dict(sorted(variables)))
    return ForkServer(str(address))


def start_fork_server(address: str, modules: tuple[str, ...], variables: dict[str, str]) -> None:
    """Have it started; requests wait at the address until it has imported the modules."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        if modules == BENEATH:
            with mock.patch.dict(os.environ, variables, clear=True):
                process = multiprocessing.get_context("spawn").Process(
                    target=serve_forks, args=(listener, modules, RUN)
                )
                process.start()
        else:
            process = fork(serve_forks, (listener, modules, RUN), variables, BENEATH)
        process.join()


def serve_forks(listener: socket.socket, modules: tuple[str, ...], run: int) -> None:
    """In the process that becomes the fork server, which is nobody's child, so that nobody waits for it."""
    # Titles of processes are written where the environment was, which is found by its first variable, while that lies
    # where it was. So that one must not be by chance what an import sets anew.
    setproctitle.getproctitle()
    if os.fork():
        os._exit(0)
    folder, end = Path(listener.getsockname()).parent, os.pidfd_open(run)
    with contextlib.suppress(OSError):  # nothing can be read of the end of a process, which the fork server tries
        forkserver.main(listener.detach(), end, list(modules))
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def fork(
    target: Callable[..., None], args: tuple[Any, ...], variables: dict[str, str], modules: tuple[str, ...] = HOST
) -> BaseProcess:
    """A function of a module, called in a process of its own whose environment is these variables.

    It has imported HOST, or only BENEATH.
    """
    if not WARM:
        spawned = multiprocessing.get_context("spawn").Process(target=begin, args=(variables, target, args))
        spawned.start()
        return spawned
    process: ForkServerProcess = ForkServerContext().Process(target=begin, args=(variables, target, args))
    later = {*READ_LATER, *(name for name in variables if modules == BENEATH and name.startswith("SGLANG"))}
    server = fork_server(modules, frozenset(item for item in variables.items() if item[0] not in later))
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        process.start()
    return process


def begin(variables: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """In the forked process."""
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    take_environment()
    target(*args)


class WarmServer:
    """What tests use of a subprocess.Popen: `python -m module args`, in a folder, its output appended to files."""

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
        self._process = fork(serve, (["-m", module, *args], out, errors or out, folder), variables)
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


def run_python(
    words: list[str], variables: dict[str, str], folder: Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python -c ...` or `python -m ...`, in a process that has imported nothing of the host yet."""
    if not WARM:
        command = [sys.executable, *words]
        piped: dict[str, Any] = {"input": stdin, "capture_output": True, "text": True, "timeout": PATIENCE}
        return subprocess.run(command, env=variables, cwd=folder, check=False, **piped)
    with tempfile.TemporaryDirectory() as files:
        out, errors, typed = (Path(files, name) for name in ("out", "errors", "typed"))
        typed.write_text(stdin)
        process = fork(serve, (words, out, errors, folder, typed), variables, BENEATH)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, PATIENCE, out.read_text(), errors.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), errors.read_text())


def serve(words: list[str], out: Path, errors: Path, folder: Path, stdin: Path = Path(os.devnull)) -> None:
    """In the forked process: become the leader of a session, and do what `python words` does."""
    os.setsid()
    os.chdir(folder)
    for path, flags, stream in ((stdin, os.O_RDONLY, 0), (out, WRITE, 1), (errors, WRITE, 2)):
        os.dup2(os.open(path, flags), stream)
    sys.stdin = os.fdopen(0)
    os.register_at_fork(after_in_child=take_environment)
    if WARM:
        uvicorn._subprocess.spawn = multiprocessing.get_context("fork")
        multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    kind, what, *args = words
    sys.argv = [what if kind == "-m" else kind, *args]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def take_environment() -> None:
    """What torch has read at its import: the server settles its schedulers' threads only later."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
