"""SIGTERM: what runs is answered, what comes is refused, the process ends with status 0."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from sglang.srt.managers.tokenizer_manager import ServerStatus

from sglang_llada.host.requests import draining
from tests.host.conftest import TINY, Case, compare
from tests.host.serving import Server, launch, ready, session_members, stop, tail

pytestmark = pytest.mark.host

END_SECONDS = 60
AT_ONCE = 16
# One token a step, so that it runs until all others are looked at.
LONG = {"temperature": 0, "max_new_tokens": 600, "ignore_eos": True, "custom_params": {"threshold": 1.0}}
OURS = {"server_args": "ours", "tokenizer_ipc_name": None}


def test_a_server_that_is_told_to_end_under_load_answers_what_it_has(cases: list[Case], tmp_path: Path) -> None:
    process, url = launch(TINY, tmp_path / "log", "--max-running-requests", "8")
    try:
        server = ready(process, url, tmp_path / "log")
        want = server.generate([70, 71, 72], **LONG)["output_ids"]
        with ThreadPoolExecutor(1 + AT_ONCE) as pool:
            last = pool.submit(server.stream, [70, 71, 72], **LONG)
            first = [pool.submit(server.generate, case.prompt, 40) for case in cases[:AT_ONCE]]
            while sum(each.done() for each in first) + known_to(server) < 1 + AT_ONCE:
                assert not last.done(), "the answer that holds the server was too short for this test"
            process.send_signal(signal.SIGTERM)
            refused = list(refusals(server))
            compare(cases[:AT_ONCE], [each.result() for each in first], "answered before the end")
            assert last.result()["output_ids"] == want
        assert {status for _, status in refused} == {503}, refused
        assert process.wait(END_SECONDS) == 0, tail(server.log)
        assert not session_members(process.pid), "processes outlived the server"
    finally:
        stop(process)


def known_to(server: Server) -> int:
    """How many requests run or wait."""
    load = server.load()
    return load["num_running_reqs"] + load["num_waiting_reqs"]


def refusals(server: Server) -> Iterator[tuple[str, int]]:
    """Path and status of what is asked of a server that is told to end."""
    generate = {"input_ids": [70], "sampling_params": {"max_new_tokens": 1}, "stream": True}
    complete = {"model": "tiny", "prompt": "1", "max_tokens": 1, "stream": True}
    while requests.get(server.url + "/ready", timeout=20).ok:  # the signal is on its way
        pass
    for path in ("/health", "/health_generate", "/ready"):
        yield path, requests.get(server.url + path, timeout=20).status_code
    for path, body in (("/generate", generate), ("/v1/completions", complete)):
        reply = server.post(path, body)
        assert "shutting down" in reply.json()["error"]["message"]
        yield path, reply.status_code


async def told_to_end(manager: Any, path: str = "/generate") -> tuple[list[str], list[int]]:
    """A request comes, then the signal, then another request; what happened in which order, and the second's status."""
    happened: list[str] = []
    status: list[int] = []
    may_end = asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await may_end.wait()
        happened.append("answered")

    async def end(manager: Any) -> None:
        happened.append("ended")

    async def send(message: Any) -> None:
        status.extend([message["status"]] if "status" in message else [])

    state = SimpleNamespace(openai_serving_completion=SimpleNamespace(tokenizer_manager=manager))
    scope = {"type": "http", "method": "POST", "path": path}
    app = draining.Drain(answer, SimpleNamespace(state=state))
    first = asyncio.create_task(app(scope, None, send))
    ending = asyncio.create_task(draining.end_drained(end, manager))
    await asyncio.sleep(0)
    manager.gracefully_exit = True
    second = asyncio.create_task(app(scope, None, send))
    await asyncio.sleep(3 * draining.LOOK_SECONDS)
    may_end.set()
    await asyncio.gather(first, second, ending)
    return happened, status


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What is looked at of the host's tokenizer manager, of a server of ours."""
    monkeypatch.setattr(draining, "is_ours", lambda server_args: server_args == "ours")
    return SimpleNamespace(
        gracefully_exit=False, server_status=ServerStatus.Up, server_args="ours", tokenizer_ipc_name=None
    )


def test_the_end_waits_for_the_last_byte_of_an_answer(manager: SimpleNamespace) -> None:
    assert asyncio.run(told_to_end(manager)) == (["answered", "ended"], [503])


def test_a_server_that_hangs_ends_at_once(manager: SimpleNamespace) -> None:
    manager.server_status = ServerStatus.UnHealthy
    assert asyncio.run(told_to_end(manager)) == (["ended", "answered"], [503])


def test_one_of_several_http_processes_leaves_the_scheduler_alone(manager: SimpleNamespace) -> None:
    manager.tokenizer_ipc_name = "its own"
    with pytest.raises(SystemExit):
        asyncio.run(told_to_end(manager))


def test_what_lets_answers_end_is_taken_to_the_end(manager: SimpleNamespace) -> None:
    assert asyncio.run(told_to_end(manager, "/abort_request")) == (["ended", "answered", "answered"], [])


def test_other_models_are_left_to_the_host(manager: SimpleNamespace) -> None:
    manager.server_args = "another model's"
    assert asyncio.run(told_to_end(manager)) == (["answered", "answered", "ended"], [])
