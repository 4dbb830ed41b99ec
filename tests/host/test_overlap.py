"""What the scheduler does while a device works: a fake one, whose steps go on for a while after they are launched."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.host

LATENCY, BOOKING, STEPS, ROWS = 0.02, 0.005, 20, 4

Interval = tuple[float, float]


class FakeDevice:
    """An executor whose outcomes can be read only LATENCY seconds after the launch."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.flights: list[Interval] = []

    def launch(self, plan: Any, of_ranks: list[int] | None = None) -> Any:
        launched = self.executor.launch(plan, of_ranks)
        now = time.perf_counter()
        self.flights.append((now, now + LATENCY))
        return launched

    def read(self, launched: Any) -> Any:
        time.sleep(max(self.flights[-1][1] - time.perf_counter(), 0))
        return self.executor.read(launched)


@torch.inference_mode()
def turns(overlaps: bool) -> tuple[list[Interval], list[Interval]]:
    """When steps were in flight and when bookings took place, in turns of the scheduler's loop."""
    from bench.step import scheduler_with

    scheduler = scheduler_with(ROWS)
    device = FakeDevice(scheduler.executor)
    bookings: list[Interval] = []

    def book() -> None:
        begin = time.perf_counter()
        scheduler._take_rest()
        time.sleep(BOOKING if scheduler.unbooked else 0)
        if scheduler.unbooked:
            bookings.append((begin, time.perf_counter()))
        scheduler.unbooked.clear()

    nothing = SimpleNamespace(_admit_waiting=lambda: None, _book=book, _share=lambda: None)
    vars(scheduler).update(vars(nothing), executor=device, overlaps=overlaps)
    for _ in range(STEPS):
        scheduler._turn()
    return device.flights, bookings


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's parallel state, of which an executor asks this, is not up here."""
    from sglang_llada.host import executor

    monkeypatch.setattr(executor, "enable_num_token_non_padded", lambda: False)


def test_a_step_is_booked_while_the_next_one_is_in_flight() -> None:
    flights, bookings = turns(overlaps=True)
    assert len(flights) == STEPS and len(bookings) == STEPS - 1
    for (launched, ready), (begin, end) in zip(flights[1:], bookings, strict=True):
        assert launched <= begin and end < ready
    took = flights[-1][0] - flights[0][0]
    print(f"{1e3 * took / (STEPS - 1):.1f} ms a step of {1e3 * LATENCY:.0f} ms, with {1e3 * BOOKING:.0f} ms to book")
    assert took < (STEPS - 1) * (LATENCY + BOOKING)


def test_where_nothing_overlaps_a_step_is_booked_before_the_next_is_launched() -> None:
    flights, bookings = turns(overlaps=False)
    for (_, ready), (launched, _), (begin, end) in zip(flights, flights[1:], bookings, strict=False):
        assert ready <= begin and end <= launched
