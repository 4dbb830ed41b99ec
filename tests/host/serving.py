"""A real server in a child process, spoken to over HTTP, and what the reference says it must answer."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.host import warm

START_SECONDS = 280
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes] | warm.WarmServer
    log: Path

    def generate(self, input_ids: list[int], max_new_tokens: int, **options: Any) -> dict[str, Any]:
        """One greedy request to /generate; further sampling parameters as `options`."""
        reply = self.post(
            "/generate",
            {
                "input_ids": input_ids,
                "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens, **options},
            },
        )
        assert reply.status_code == 200, reply.text
        return reply.json()

    def generate_all(
        self, prompts: list[list[int]], max_new_tokens: int, at_once: int, **options: Any
    ) -> list[dict[str, Any]]:
        """Many requests, `at_once` at a time; answers in the order of the prompts."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda ids: self.generate(ids, max_new_tokens, **options), prompts))

    def stream(self, input_ids: list[int], max_new_tokens: int, **options: Any) -> dict[str, Any]:
        """As generate, streamed; the last event, which everything before it must lead up to without a change."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **options}
        body = {"input_ids": input_ids, "stream": True, "sampling_params": sampling}
        seen = events(self.post("/generate", body, stream=True))
        for earlier, later in pairwise(seen):
            for field in ("text", "output_ids"):
                assert later[field][: len(earlier[field])] == earlier[field], f"retracted: {earlier}, then {later}"
        return seen[-1]

    def post(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> requests.Response:
        """POST a JSON body."""
        return requests.post(self.url + path, json=body or {}, timeout=200, **options)

    def flush(self) -> None:
        """Empty the prefix cache; fails unless the server is idle."""
        deadline = time.monotonic() + 20
        while not (reply := self.post("/flush_cache")).ok:
            assert time.monotonic() < deadline, reply.text
            time.sleep(0.2)

    def metric(self, name: str, **labels: str) -> float:
        """A Prometheus metric with these labels, summed over the others; 0 if there is none yet."""
        families = text_string_to_metric_families(requests.get(self.url + "/metrics", timeout=20).text)
        samples = [sample for family in families for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def load(self) -> dict[str, Any]:
        """What the scheduler says of itself."""
        return requests.get(self.url + "/v1/loads", timeout=20).json()["loads"][0]


def events(reply: requests.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream of /generate."""
    return list(each_event(reply))


def each_event(reply: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream of /generate, as they come."""
    for line in filter(None, reply.iter_lines()):
        if (event := line.removeprefix(b"data: ")) != b"[DONE]":
            yield json.loads(event)


def free_port() -> int:
    """A port that nobody listens on at the moment.

    Below those that the system hands out by itself: the host listens on further ports at fixed distances from it.
    """
    while True:
        port = random.randrange(12_000, 30_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def launch(
    model: Path,
    log: Path,
    *args: str,
    env: dict[str, str] | None = None,
    module: str = warm.COMMAND,
) -> tuple[subprocess.Popen[bytes] | warm.WarmServer, str]:
    """Start the plain host command, or another module that ends in it, on a free port; the process and its address."""
    port = free_port()
    flags = ["--model-path", str(model), "--port", str(port), *args]
    variables = warm.environment() | {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1", **(env or {})}
    if warm.WARM:
        return warm.WarmServer(module, flags, log, variables, ROOT), f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=variables,
            start_new_session=True,
        )
    return process, f"http://127.0.0.1:{port}"


@contextmanager
def serving(model: Path, log: Path, *args: str, **options: Any) -> Iterator[Server]:
    """A server that is ready, as launch(); ended with Ctrl-C, after which none of its processes may be left."""
    process, url = launch(model, log, *args, **options)
    try:
        yield ready(process, url, log)
        assert process.poll() is None, f"the server ended by itself:\n{tail(log)}"
    finally:
        stop(process)


def ready(process: subprocess.Popen[bytes] | warm.WarmServer, url: str, log: Path) -> Server:
    """The server, once it answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{tail(log)}"
        assert time.monotonic() < deadline, f"the server is not ready:\n{tail(log)}"
        try:
            if requests.get(url + "/health_generate", timeout=20).ok:
                return Server(url, process, log)
        except requests.RequestException:
            pass
        time.sleep(0.5)


def stop(process: subprocess.Popen[bytes] | warm.WarmServer) -> None:
    """Ctrl-C, then make sure that the whole session is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError("the server survived Ctrl-C for 60 seconds") from None
    left = session_members(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes outlived the server: {left}"


def session_members(session: int, patience: float = 10) -> list[int]:
    """Processes of a session that do not end within `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        out = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
        alive = [int(pid) for pid, state in (line.split() for line in out.splitlines()) if not state.startswith("Z")]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def tail(log: Path, characters: int = 3000) -> str:
    """The end of a server's log."""
    return log.read_text(errors="replace")[-characters:]
