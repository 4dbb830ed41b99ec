"""Several HTTP processes in front of one scheduler (--tokenizer-worker-num)."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.host.conftest import TINY, Case, compare
from tests.host.serving import Server, launch, ready, session_members, stop, tail

pytestmark = pytest.mark.host

# One token a step, so that it runs for a while.
LONG = {"temperature": 0, "max_new_tokens": 600, "ignore_eos": True, "custom_params": {"threshold": 1.0}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("two") / "log"
    process, url = launch(TINY, log, "--tokenizer-worker-num", "2")
    try:
        server = ready(process, url, log)
        deadline = time.monotonic() + 120
        while log.read_text().count("Application startup complete") < 2:
            assert time.monotonic() < deadline, f"one of two processes does not start:\n{tail(log)}"
            time.sleep(0.2)
        yield server
    finally:
        stop(process)


def test_every_process_answers(two: Server, cases: list[Case]) -> None:
    compare(cases[:32], two.generate_all([case.prompt for case in cases[:32]], 40, at_once=8), "two HTTP processes")


def test_one_id_from_two_processes_is_refused_and_the_first_goes_on(two: Server) -> None:
    body = {"rid": "same", "input_ids": [70, 71, 72], "sampling_params": LONG}
    want = two.generate([70, 71, 72], **LONG)["output_ids"]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(two.post, "/generate", body)
        while not two.load()["num_running_reqs"]:
            time.sleep(0.02)
        said: set[str] = set()
        while len(said) < 2 and not first.done():
            reply = two.post("/generate", body)
            if not first.done():
                assert reply.status_code == 400, reply.text
                said.add(reply.json()["error"]["message"])
        answer = first.result().json()
        assert answer.get("output_ids") == want, answer
    assert any("Duplicate request ID" in each for each in said), "the process that has the first one"
    assert any("that of a request that is not done" in each for each in said), "the other one, through the scheduler"


def test_the_one_that_is_done_first_waits_for_the_other(two: Server) -> None:
    """Told to end; the last test, because it ends the server of all."""
    want = two.generate([70, 71, 72], **LONG)["output_ids"]
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(two.generate, [70, 71, 72], **LONG)
        while not two.load()["num_running_reqs"]:
            assert not last.done(), "the answer was too short for this test"
        two.process.send_signal(signal.SIGTERM)
        assert last.result()["output_ids"] == want
    assert two.process.wait(60) == 0, tail(two.log)
    assert not session_members(two.process.pid), "processes outlived the server"
