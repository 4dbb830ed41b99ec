"""Hostile requests of every kind beside good load: nothing dies, hangs or leaks, good answers come as ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.abuse import Plan, run, serving_or, show
from bench.hostile import KINDS

pytestmark = [pytest.mark.host, pytest.mark.slow]


def attack(minutes: float, tp: int, folder: Path) -> None:
    """As `python -m bench.abuse` does it."""
    with serving_or(None, folder / "log", folder, tp) as target:
        report = run(target, Plan(list(KINDS), minutes), folder)
    show(report)
    assert not report.wrong, "\n\n".join(report.wrong)
    assert set(report.kinds) == set(KINDS), "every kind was sent"


@pytest.mark.timeout(600)
def test_hostile_requests_harm_nobody(tmp_path: Path) -> None:
    attack(1.33, 1, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("minutes", "ranks"), [(2.0, 2), (6.0, 1)])
def test_hostile_requests_harm_nobody_for_longer_and_on_two_ranks(minutes: float, ranks: int, tmp_path: Path) -> None:
    attack(minutes, ranks, tmp_path)
