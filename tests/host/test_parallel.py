"""Several ranks decide what one rank decides: real processes over gloo, the trained checkpoint, held-out prompts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.host.conftest import NEW_TOKENS, TINY, Case, compare, loaded
from tests.host.serving import Server, free_port, launch, ready, serving, session_members, stop, tail
from tests.host.ways import CHECKPOINT, SHAPED, WAYS, ask, ask_sampled, ask_shaped, babble
from tests.sizes import size

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

DEATH_SECONDS = 120
COUNT = size(30, 100)
SEEDS = size(14, 64)
LOG_OFTEN = ("--decode-log-interval", "5")

FLAGS = {
    "tensor": ("--tp-size", "2"),
    "experts": ("--tp-size", "2", "--ep-size", "2"),
    "attention": ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
    "copies of experts": ("--tp-size", "2", "--ep-size", "2", "--ep-num-redundant-experts", "2"),
}
MOVING = ("--enable-eplb", "--eplb-rebalance-num-iterations", "20", "--expert-distribution-recorder-buffer-size", "20")


@pytest.mark.parametrize("replay", [pytest.param("0", marks=pytest.mark.long), "1"])
def test_two_ranks_with_requests_of_their_own_answer_as_one(cases: list[Case], replay: str, tmp_path: Path) -> None:
    """Each has its own rows, or none, while both replay the size that the one with more needs."""
    env = {"SGLANG_LLADA_REPLAY": replay}
    with serving(TINY, tmp_path / "log", *FLAGS["attention"], *LOG_OFTEN, env=env) as server:
        alone = server.generate_all([case.prompt for case in cases[:4]], NEW_TOKENS, 1)
        replayed, eager = answer_as_one(server, cases, f"attention, replay {replay}")
    compare(cases[:4], alone, "attention, one at a time", most_close=0.5)
    assert (replayed > eager) is (replay == "1")


def answer_as_one(server: Server, cases: list[Case], how: str) -> tuple[int, int]:
    """COUNT prompts, 16 at once; how many steps were replayed, and how many not."""
    answers = server.generate_all([case.prompt for case in cases[:COUNT]], NEW_TOKENS, 16)
    replayed, eager = re.findall(r"graph: (\d+) steps replayed, (\d+) eager", server.log.read_text())[-1]
    compare(cases[:COUNT], answers, f"{how}, 16 at once")
    print(f"steps: {replayed} replayed, {eager} eager")
    return int(replayed), int(eager)


def test_every_way_to_decode_on_two_ranks_answers_as_the_reference(cases: list[Case], tmp_path: Path) -> None:
    """The checkpoint that routes by block, experts on ranks, graphs replayed; greedy and sampled requests, and such as
    change their logits, which take whole ones beside what a graph has decided."""
    model, facts = loaded(CHECKPOINT)
    assert facts.indel and model.config.expert_capacity is not None
    prompts = [case.prompt[-60:] for case in cases[: size(2, 4)]]
    asked = [each for way in WAYS for each in ask(way, prompts)]
    sampled = ask_sampled([*prompts, *babble(SEEDS - len(prompts))])
    shaped = [each for way in SHAPED for each in ask_shaped(way, prompts, facts)]
    mixed = [each for some in zip(sampled, shaped, strict=False) for each in some]
    with serving(CHECKPOINT, tmp_path / "log", *FLAGS["experts"], env={"SGLANG_LLADA_REPLAY": "1"}) as server:
        for some, what in ((asked, "greedy"), (sampled, "sampled"), (mixed, "sampled and shaped")):
            with ThreadPoolExecutor(16) as pool:
                answers = list(
                    pool.map(lambda each: server.generate(each.case.prompt, NEW_TOKENS, **each.options), some)
                )
            compare([each.case for each in some], answers, f"{what}, every way, two ranks", most_close=0.6)


def test_two_ranks_answer_as_one_until_one_of_them_dies(cases: list[Case], tmp_path: Path) -> None:
    """Steps are replayed. One dies in the middle of a request: the server ends, and the log says which rank it was."""
    log = tmp_path / "log"
    process, url = launch(TINY, log, *FLAGS["tensor"], *LOG_OFTEN, env={"SGLANG_LLADA_REPLAY": "1"})
    try:
        server = ready(process, url, log)
        replayed, eager = answer_as_one(server, cases, "tensor, graphs replayed")
        assert replayed > eager
        with ThreadPoolExecutor(1) as client:
            running = client.submit(server.generate, [70] * 20, 8000, ignore_eos=True)
            os.kill(scheduler_of(process.pid, "TP1"), signal.SIGKILL)
            assert process.wait(DEATH_SECONDS) != 0
            assert running.exception(DEATH_SECONDS) is not None
        assert not session_members(process.pid), "processes outlived the server"
        assert "TP1" in tail(log, 20000) or "rank 1" in tail(log, 20000), tail(log)
    finally:
        stop(process)


@pytest.mark.long
@pytest.mark.parametrize("replay", ["0", "1"])
def test_experts_may_move_between_ranks_while_they_answer(cases: list[Case], replay: str, tmp_path: Path) -> None:
    flags = (*FLAGS["copies of experts"], *MOVING, *LOG_OFTEN)
    with serving(TINY, tmp_path / "log", *flags, env={"SGLANG_LLADA_REPLAY": replay}) as server:
        for _ in range(3):
            server.flush()
            replayed, eager = answer_as_one(server, cases, f"experts that move, replay {replay}")
        assert (replayed > eager) is (replay == "1")
        moves = server.log.read_text().count("rebalance end")
        print(f"experts were moved {moves} times")
        assert moves > 1


@pytest.mark.long
def test_two_nodes_answer_as_one_until_one_of_them_is_lost(cases: list[Case], tmp_path: Path) -> None:
    """Two commands, which know each other by --dist-init-addr alone."""
    logs = [tmp_path / "first", tmp_path / "second"]
    flags = ("--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}")
    nodes = [launch(TINY, log, *flags, "--node-rank", str(rank)) for rank, log in enumerate(logs)]
    (first, url), (second, _) = nodes
    try:
        server = ready(first, url, logs[0])
        compare(cases[:16], server.generate_all([case.prompt for case in cases[:16]], NEW_TOKENS, 8), "two nodes")
        os.killpg(second.pid, signal.SIGKILL)
        assert first.wait(DEATH_SECONDS) != 0
        assert not session_members(first.pid), "processes outlived the server"
        assert "another rank of this server, or its node, is lost" in logs[0].read_text()
    finally:
        for process, _ in nodes:
            stop(process)


def scheduler_of(session: int, name: str) -> int:
    """The process of one rank's scheduler."""
    out = subprocess.check_output(["ps", "-o", "pid=,args=", "-s", str(session)], text=True)
    return next(int(line.split()[0]) for line in out.splitlines() if "scheduler" in line and name in line)
