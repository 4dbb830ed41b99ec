"""Served output equals the reference decode token for token, whatever happens around a request."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.host.conftest import NEW_TOKENS, TINY, Case, compare, decoded
from tests.host.serving import Server, serving

CONTEXT = 2080
LONG_ANSWERS, LONG_TOKENS = 16, 256
GRAPH_ROWS = (1, 3, 8, 20, 40)
GRAPH_MODES = ("decode_cuda_graph", "decode_none")  # how the host's metric names steps

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose KV pool holds one or two of the long prompts and whose forwards have 8 rows."""
    log = tmp_path_factory.mktemp("tight") / "log"
    args = (
        "--context-length",
        str(CONTEXT),
        "--max-total-tokens",
        "2560",
        "--chunked-prefill-size",
        "256",
        "--enable-metrics",
    )
    env = {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1",  # admit as if answers had one token
    }
    with serving(TINY, log, *args, env=env) as running:
        yield running


def test_one_at_a_time_from_a_cold_cache(server: Server, cases: list[Case]) -> None:
    server.flush()
    compare(cases, [server.generate(case.prompt, NEW_TOKENS) for case in cases], "one at a time")


def test_thirty_two_at_once_from_a_cold_cache(server: Server, cases: list[Case]) -> None:
    server.flush()
    compare(cases, server.generate_all([c.prompt for c in cases], NEW_TOKENS, 32), "32 at once, cold")


def disturbed(server: Server, cases: list[Case], how: str) -> list[dict[str, Any]]:
    """Answers to all prompts in random order, 29 at once, while 60 other requests are aborted; in the cases' order."""
    rng = random.Random(3)
    shuffled = rng.sample(cases, len(cases))
    doomed = [rng.choice(cases).prompt for _ in range(60)]

    def abort(number: int) -> None:
        rid = f"doomed-{number}"
        body = {
            "input_ids": doomed[number],
            "rid": rid,
            "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
        }
        with ThreadPoolExecutor(1) as one:
            reply = one.submit(server.post, "/generate", body)
            time.sleep(rng.choice([0, 0.01, 0.05, 0.2]))
            server.post("/abort_request", {"rid": rid})
            reply.result()

    with ThreadPoolExecutor(3) as killers:
        aborted = [killers.submit(abort, n) for n in range(len(doomed))]
        answers = server.generate_all([c.prompt for c in shuffled], NEW_TOKENS, 29)
        for each in aborted:
            each.result()
    compare(shuffled, answers, how)
    by_prompt = {tuple(case.prompt): answer for case, answer in zip(shuffled, answers, strict=True)}
    return [by_prompt[tuple(case.prompt)] for case in cases]


def test_random_order_with_aborts_and_a_warm_cache(server: Server, cases: list[Case]) -> None:
    disturbed(server, cases, "random order, aborts, warm cache")


def test_graphs_change_nothing(server: Server, cases: list[Case], tmp_path: Path) -> None:
    """Steps of at most 40 rows are replayed strictly (replay.py), larger ones run; arrivals, ends and aborts."""
    args = ("--enable-metrics", "--cuda-graph-bs-decode", *map(str, GRAPH_ROWS))
    with serving(TINY, tmp_path / "log", *args, env={"SGLANG_LLADA_REPLAY": "1"}) as graphs:
        replayed = disturbed(graphs, cases, "graphs replayed, random order, aborts")
        counted = {mode: graphs.metric("sglang:cuda_graph_passes_total", mode=mode) for mode in GRAPH_MODES}
        ours = [graphs.metric("sglang:llada_steps_total", how=how) for how in ("replayed", "eager")]
        assert ours == list(counted.values()) and graphs.metric("sglang:llada_rows_total", how="replayed") > 0
        logged = re.findall(r"graph: (\d+) steps replayed, (\d+) eager", graphs.log.read_text())
    eager = disturbed(server, cases, "the same without graphs")
    assert [answer["output_ids"] for answer in replayed] == [answer["output_ids"] for answer in eager]
    print(f"steps: {counted}")
    assert min(counted.values()) > 0
    assert (
        logged and int(logged[-1][0]) <= counted["decode_cuda_graph"] and int(logged[-1][1]) <= counted["decode_none"]
    )


@pytest.fixture(scope="module")
def long_cases(cases: list[Case]) -> list[Case]:
    """Short prompts with long answers, which outgrow the small pool together."""
    return decoded([case.prompt[:40] for case in cases[20 : 20 + LONG_ANSWERS]], LONG_TOKENS, ignore_eos=True)


def test_a_small_pool_and_a_small_row_budget(tight: Server, cases: list[Case], long_cases: list[Case]) -> None:
    """Prompts are split over forwards, and long answers beside them fill the pool, so that requests are retracted."""
    with ThreadPoolExecutor(1) as beside:
        prompts = [case.prompt for case in long_cases]
        long = beside.submit(tight.generate_all, prompts, LONG_TOKENS, LONG_ANSWERS, ignore_eos=True)
        answers = tight.generate_all([case.prompt for case in cases], NEW_TOKENS, 32)
        answers += long.result()
    compare(cases + long_cases, answers, "small pool, 8 rows")
    retracted = sum(answer["meta_info"]["num_retractions"] > 0 for answer in answers)
    print(f"requests that were retracted: {retracted}")
    assert retracted > 0, "the pool was never full, so nothing was shown"
    assert tight.metric("sglang:num_retracted_requests_total") >= retracted


def test_the_longest_prompt_is_served_and_a_longer_one_refused_with_the_numbers(tight: Server) -> None:
    limit = CONTEXT - 1 - 5 - 32  # the host's reserve, and one block
    out = tight.generate([70 + i % 9 for i in range(limit - 1)], 2, ignore_eos=True)
    assert len(out["output_ids"]) == 2
    reply = tight.post("/generate", {"input_ids": [70] * limit, "sampling_params": {"temperature": 0}})
    assert reply.status_code == 400
    assert str(limit) in reply.text
