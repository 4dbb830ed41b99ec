"""Several ranks decide what one rank decides: real processes over gloo, the trained checkpoint, held-out prompts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.weights import load_reference
from tests.host.conftest import NEW_TOKENS, TINY, Case, compare, decoded
from tests.host.serving import launch, ready, serving, session_members, stop, tail

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

DEATH_SECONDS = 120
LOG_OFTEN = ("--decode-log-interval", "5")

FLAGS = {
    "tensor": ("--tp-size", "2"),
    "experts": ("--tp-size", "2", "--ep-size", "2"),
    "attention": ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
}


@pytest.mark.parametrize(("how", "replay"), [(how, "0") for how in FLAGS] + [("tensor", "1")])
def test_two_ranks_answer_as_one(how: str, replay: str, cases: list[Case], tmp_path: Path) -> None:
    with serving(TINY, tmp_path / "log", *FLAGS[how], *LOG_OFTEN, env={"SGLANG_LLADA_REPLAY": replay}) as server:
        answers = server.generate_all([case.prompt for case in cases[:100]], NEW_TOKENS, 16)
        steps = re.findall(r"graph: (\d+) steps replayed, (\d+) eager", server.log.read_text())
    compare(cases[:100], answers, f"{how}{', graphs replayed' * int(replay)}, 16 at once")
    replayed, eager = map(int, steps[-1])
    print(f"steps: {replayed} replayed, {eager} eager")
    assert (replayed > eager) == (replay == "1")


def test_block_routing_on_two_ranks_answers_as_the_reference(
    cases: list[Case], facts: CheckpointFacts, tmp_path: Path
) -> None:
    """The trained weights, made to route by block: answers are poor, and have to be the same."""
    folder = tmp_path / "by-block"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"expert_capacity": 6}))
    model = load_reference(folder)
    want = [decoded(model, facts, case.prompt) for case in cases[:100]]
    with serving(folder, tmp_path / "log", *FLAGS["experts"]) as server:
        answers = server.generate_all([case.prompt for case in want], NEW_TOKENS, 16)
    compare(want, answers, "block routing, experts on two ranks, 16 at once")
    assert [case.want.token_ids for case in want] != [case.want.token_ids for case in cases[:100]]


def test_the_death_of_a_rank_ends_the_server(tmp_path: Path) -> None:
    """In the middle of a request; the log says which rank it was."""
    log = tmp_path / "log"
    process, url = launch(TINY, log, *FLAGS["tensor"])
    try:
        server = ready(process, url, log)
        with ThreadPoolExecutor(1) as client:
            running = client.submit(server.generate, [70] * 20, 8000, ignore_eos=True)
            os.kill(scheduler_of(process.pid, "TP1"), signal.SIGKILL)
            assert process.wait(DEATH_SECONDS) != 0
            assert running.exception(DEATH_SECONDS) is not None
        assert not session_members(process.pid), "processes outlived the server"
        assert "TP1" in tail(log, 20000) or "rank 1" in tail(log, 20000), tail(log)
    finally:
        stop(process)


def scheduler_of(session: int, name: str) -> int:
    """The process of one rank's scheduler."""
    out = subprocess.check_output(["ps", "-o", "pid=,args=", "-s", str(session)], text=True)
    return next(int(line.split()[0]) for line in out.splitlines() if "scheduler" in line and name in line)
