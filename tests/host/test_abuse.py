"""Hostile requests of every kind beside good load: nothing dies, hangs or leaks, good answers come as ever."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from bench.abuse import CHECKPOINT, Plan, run, serving_or, show
from bench.hostile import KINDS, Facts
from bench.shots import CUT, ask, status
from tests.sizes import size

pytestmark = pytest.mark.host

# Whether no other tests run beside these, which would slow good answers down in some phases and not in others.
ALONE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1
CORES = len(os.sched_getaffinity(0))  # as many ranks leave none to those that send


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_says_what_is_sent(kind: str, tmp_path: Path) -> None:
    facts = Facts(CHECKPOINT, 400, 32_768, tmp_path)
    volleys = [[KINDS[kind](rng, facts) for _ in range(20)] for rng in (random.Random(3), random.Random(3))]
    assert volleys[0] == volleys[1]
    assert len({shot.data for volley in volleys[0] for shot in volley}) > 1


def test_the_status_of_an_answer_is_that_of_the_failure_inside_it() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    assert status(head) == "200" and status(b"HTTP/1.1 404 Not Found\r\n\r\n") == "404" and status(b"") == CUT
    assert status(head + b'data: {"error": {"code": 500}}') == "500"
    assert status(head + b'data: {"finish_reason":{"type":"abort","status_code":503}}') == "503"
    assert status(head + b'data: {"finish_reason":{"type":"abort","status_code":400}}') == "200"


def test_a_shot_is_shown_as_it_can_be_sent_again() -> None:
    assert ask("/generate", {"text": "a"}).text == 'POST /generate {"text": "a"}'
    long = ask("/generate", {"text": "a" * 5000, "rid": "b"}).text
    assert len(long) < 1000 and "5024 bytes" in long and long.endswith('"rid": "b"}')


def attack(minutes: float, tp: int, folder: Path, *, gaps: bool) -> None:
    """As `python -m bench.abuse` does it; gaps between good answers' tokens say something of a long run alone."""
    with serving_or(None, folder / "log", folder, tp) as target:
        report = run(target, Plan(list(KINDS), minutes), folder)
        show(report)
    wrong = [each for each in report.wrong if gaps or not each.startswith("good gaps")]
    assert not wrong, "\n\n".join(wrong)
    assert set(report.kinds) == set(KINDS), "every kind was sent"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_requests_harm_nobody(tmp_path: Path) -> None:
    attack(size(25, 80) / 60, 1, tmp_path, gaps=False)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("minutes", "ranks"), [(2.0, 2), (6.0, 1)])
def test_hostile_requests_harm_nobody_for_longer_and_on_two_ranks(minutes: float, ranks: int, tmp_path: Path) -> None:
    attack(minutes, ranks, tmp_path, gaps=ALONE and ranks < CORES)
