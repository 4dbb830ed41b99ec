"""What the scheduler does while a device works: the order in which steps are launched, read and booked."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.host

STEPS, ROWS = 20, 4

Event = tuple[str, int]  # what was done, and the number of the step


class FakeDevice:
    """An executor that notes what is asked of it."""

    def __init__(self, executor: Any, events: list[Event]) -> None:
        self.executor, self.events = executor, events
        self.launched = 0
        self.unread: deque[int] = deque()
        self.last_read = -1

    def launch(self, plan: Any, of_ranks: list[int] | None = None) -> Any:
        self.events.append(("launch", self.launched))
        self.unread.append(self.launched)
        self.launched += 1
        return self.executor.launch(plan, of_ranks)

    def read(self, launched: Any) -> Any:
        self.last_read = self.unread.popleft()
        self.events.append(("read", self.last_read))
        return self.executor.read(launched)


@torch.inference_mode()
def turns(*, overlaps: bool, ahead: bool = False) -> list[Event]:
    """What is done in turns of the scheduler's loop."""
    from bench.step import scheduler_with

    scheduler, events = scheduler_with(ROWS), []
    device = FakeDevice(scheduler.pipeline.executor, events)

    def book() -> None:
        scheduler.pipeline.take_rest()
        if scheduler.pipeline.decided:
            events.append(("book", device.last_read))
        scheduler.pipeline.decided.clear()

    stand_in: Any = scheduler
    stand_in.admission = SimpleNamespace(admit_waiting=lambda: None)
    stand_in.booking.book, stand_in.pages.share = book, lambda plan: None
    stand_in.pipeline.executor, stand_in.overlaps, stand_in.runs_ahead = device, overlaps, ahead
    for _ in range(STEPS):
        scheduler._turn()
    return events


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's parallel state, of which an executor asks this, is not up here."""
    from sglang_llada.host.engine import executor

    monkeypatch.setattr(executor, "enable_num_token_non_padded", lambda: False)


def in_order(events: list[Event], *order: tuple[str, int]) -> bool:
    """Whether step k + each number is in that state one after the other, for every k that went through all of it."""
    at = {event: i for i, event in enumerate(events)}
    last = max(step for what, step in events if what == "book") - 2
    places = [[at[what, k + later] for what, later in order] for k in range(last)]
    return bool(places) and all(each == sorted(each) for each in places)


def test_a_step_is_booked_while_the_next_one_is_in_flight() -> None:
    assert in_order(turns(overlaps=True), ("launch", 0), ("read", 0), ("launch", 1), ("book", 0), ("read", 1))


def test_a_step_is_launched_before_the_one_before_it_is_read() -> None:
    events = turns(overlaps=True, ahead=True)
    assert in_order(events, ("launch", 0), ("launch", 1), ("read", 0), ("book", 0), ("launch", 2), ("read", 1))


def test_where_nothing_overlaps_a_step_is_booked_before_the_next_is_launched() -> None:
    assert in_order(turns(overlaps=False), ("launch", 0), ("read", 0), ("book", 0), ("launch", 1))
