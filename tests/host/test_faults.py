"""A fault planted wherever one request is handled: that request fails, those beside it are exact, nothing leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from sglang_llada.config import REPLAY_VARIABLE
from tests.host.conftest import TINY, Case, compare
from tests.host.faulty import ALONE, GRAMMAR_STAGES, LEFT, PREFIX, STAGES, VARIABLE
from tests.host.serving import Server, serving

pytestmark = pytest.mark.host

BESIDE = 15
AFTER_THE_END = {"metrics"}  # of a request whose answer is whole
EVERYTHING = {  # so that a request goes through every stage
    "return_logprob": True,
    "top_logprobs_num": 2,
    "logprob_start_len": 0,
}
SAMPLING = {
    "temperature": 0,
    "max_new_tokens": 40,
    "frequency_penalty": 0.1,
    "stop": ["no answer has this"],
    "custom_params": {"trace": True, "stream_mode": "denoise"},
}


# Flags and environment of the server.
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one rank": ([], {}),
    "two ranks": (["--tp-size", "2"], {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}),
    "launched ahead": ([], {REPLAY_VARIABLE: "1"}),
}


@pytest.fixture(scope="module", params=["one rank", *(pytest.param(w, marks=pytest.mark.long) for w in list(WAYS)[1:])])
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the faults in it."""
    more, env = WAYS[request.param]
    flags = ["--enable-metrics", "--constrained-json-disable-any-whitespace", *more]
    log = tmp_path_factory.mktemp("faulty") / "log"
    env = {VARIABLE: "1", "TORCHDYNAMO_DISABLE": "1", **env}
    with serving(TINY, log, *flags, module="tests.host.faulty", env=env) as server:
        yield server


def body_of(stage: str) -> dict[str, Any]:
    """A request that comes to the stage, with a prompt of its own."""
    prompt = [70, 71, 72, *(100 + i for i in range(64))]
    if stage in GRAMMAR_STAGES:
        return {"input_ids": prompt, "sampling_params": {"max_new_tokens": 40, "regex": f"({stage}|[ab]{{9}}){{2}}"}}
    return {"rid": f"{PREFIX}{stage}:", "input_ids": prompt, "sampling_params": SAMPLING, **EVERYTHING}


def test_one_request_fails_and_those_beside_it_are_exact(faulty: Server, cases: list[Case]) -> None:
    beside = [case for case in cases if len(case.prompt) < 200][:BESIDE]
    stages = [*STAGES, *GRAMMAR_STAGES, LEFT]
    said: dict[str, tuple[int, str]] = {}
    with ThreadPoolExecutor(BESIDE + 1) as pool:
        for stage in stages:
            good = [pool.submit(faulty.generate, case.prompt, 40) for case in beside]
            reply = faulty.post("/generate", body_of(stage))
            compare(beside, [each.result() for each in good], f"beside {stage}", most_close=0.5)
            said[stage] = reply.status_code, reply.text
    wrong = {stage: what for stage, what in said.items() if what[0] != (200 if stage in AFTER_THE_END else 500)}
    assert not wrong, wrong
    assert all("planted in" in said[stage][1] for stage in stages if stage not in (*AFTER_THE_END, LEFT))
    assert faulty.metric("sglang:llada_failed_requests_total") >= len(stages) - len(AFTER_THE_END)
    faulty.flush()  # which only an idle server can, and the host checks its pools before
    assert faulty.load()["num_used_tokens"] == 0
    assert faulty.log.read_text().count("Traceback") >= len(stages) - 2


def test_ranks_agree_on_who_failed(faulty: Server, cases: list[Case]) -> None:
    beside = [case for case in cases if len(case.prompt) < 200][:BESIDE]
    ranks = 2 if '"tp_size": 2' in json.dumps(requests.get(faulty.url + "/server_info", timeout=20).json()) else 1
    with ThreadPoolExecutor(BESIDE + 1) as pool:
        good = [pool.submit(faulty.generate, case.prompt, 40) for case in beside]
        reply = faulty.post("/generate", body_of(ALONE))
        compare(beside, [each.result() for each in good], "beside it", most_close=0.5)
    assert reply.status_code == (500 if ranks == 2 else 200)
    faulty.flush()


def test_a_stream_says_that_its_request_failed(faulty: Server) -> None:
    body = {**body_of("decide"), "stream": True, "rid": f"{PREFIX}decide: streamed"}
    reply = faulty.post("/generate", body, stream=True)
    assert "planted in decide" in reply.text
