"""Single requests that once ended the server, or slowed it for everybody, each beside a good one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.host.conftest import TINY
from tests.host.serving import Server, serving

pytestmark = pytest.mark.host

# One token a step, so that it runs for a while.
LONG = {"temperature": 0, "max_new_tokens": 120, "ignore_eos": True, "custom_params": {"threshold": 1.0}}


def prompt(i: int) -> list[int]:
    return [70 + i, 71, 72, 80 + i] * 3


def until_running(server: Server, count: int) -> None:
    """Wait until so many requests run."""
    deadline = time.monotonic() + 60
    while server.load()["num_running_reqs"] < count:
        assert time.monotonic() < deadline, server.load()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lets one request wait."""
    with serving(TINY, tmp_path_factory.mktemp("narrow") / "log", "--max-queued-requests", "1") as server:
        yield server


def test_a_pause_keeps_requests_that_the_queue_has_no_room_for(narrow: Server) -> None:
    want = [narrow.generate(prompt(i), **LONG)["output_ids"] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        running = []
        for i in range(4):  # one by one, since only one may wait
            running.append(pool.submit(narrow.generate, prompt(i), **LONG))
            until_running(narrow, i + 1)
        assert narrow.post("/pause_generation", {"mode": "retract"}).ok
        assert narrow.post("/continue_generation").ok
        assert [each.result()["output_ids"] for each in running] == want


def test_an_abort_of_a_retracted_request_leaves_nothing_to_show_to_others(narrow: Server) -> None:
    shown: dict[str, Any] = {**LONG, "custom_params": {"stream_mode": "denoise", "threshold": 1.0}}
    body = {"rid": "shown", "input_ids": prompt(0), "sampling_params": shown}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(narrow.post, "/generate", body)
        until_running(narrow, 1)
        assert narrow.post("/pause_generation", {"mode": "retract"}).ok
        assert narrow.post("/abort_request", {"rid": "shown"}).ok
        assert narrow.post("/continue_generation").ok
        running.result()
    assert "dllm_snapshots" not in narrow.generate(prompt(1), 8)["meta_info"]
    narrow.flush()


def test_an_abort_ends_the_request_with_that_id_alone(narrow: Server) -> None:
    want = narrow.generate(prompt(0), **LONG)["output_ids"]
    with ThreadPoolExecutor(2) as pool:
        running = {}
        for i, rid in enumerate(("one", "one and another")):
            body = {"rid": rid, "input_ids": prompt(0), "sampling_params": LONG}
            running[rid] = pool.submit(narrow.post, "/generate", body)
            until_running(narrow, i + 1)
        assert narrow.post("/abort_request", {"rid": "one"}).ok
        assert "abort" in running["one"].result().text
        assert running["one and another"].result().json()["output_ids"] == want


def test_commands_that_cannot_be_carried_out_are_answered(narrow: Server) -> None:
    want = narrow.generate(prompt(0), **LONG)["output_ids"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(narrow.generate, prompt(0), **LONG)
        until_running(narrow, 1)
        assert narrow.post("/release_memory_occupation").ok
        assert narrow.post("/resume_memory_occupation").ok
        for what in ("start", "stop", "dump"):
            path = f"/{what}_expert_distribution_record"
            assert narrow.post(path).ok
        assert running.result()["output_ids"] == want
    reply = narrow.post("/update_weights_from_disk", {"model_path": str(TINY), "load_format": "nothing"})
    assert reply.status_code == 400 and "'nothing'" in reply.text and "loaded again" in reply.text
    assert narrow.generate(prompt(0), **LONG)["output_ids"] == want


def test_a_second_request_with_the_id_of_one_that_is_not_done_is_refused() -> None:
    """With several tokenizer processes the scheduler is the first that sees both."""
    from sglang_llada.host.engine.admission import Admission

    admission: Any = object.__new__(Admission)
    admission.table = SimpleNamespace(get=lambda rid: "known" if rid == "runs" else None)
    admission.host = SimpleNamespace(
        waiting_queue=[SimpleNamespace(rid="waits")],
        grammar_manager=SimpleNamespace(grammar_queue=[SimpleNamespace(rid="compiles")]),
    )
    for rid in ("runs", "waits", "compiles"):
        said = admission.read(SimpleNamespace(rid=rid))
        assert said == f"rid is {rid!r}, which is that of a request that is not done; allowed: another one"
