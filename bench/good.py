"""Good clients beside which others misbehave: they stream answers that are known, all the time, and never give up.

They are a process of their own, so that what the hostile clients take to write their requests delays nobody's clock.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event

import aiohttp

from bench.load import Ask, Reply, new_session, send

START_SECONDS = HANG_SECONDS = 60.0
PATIENCE_SECONDS = 0.2  # after a request that failed


@dataclass(frozen=True, slots=True)
class Answer:
    """To the request of this number; `error` says why there is none."""

    number: int
    reply: Reply | None
    error: str = ""


@contextmanager
def good_load(url: str, asks: Sequence[Ask], clients: int) -> Iterator[GoodLoad]:
    """Running within the block, where an answer has come; all are there once the block has called end()."""
    context = multiprocessing.get_context("spawn")
    events = context.Event(), context.Event()
    with ProcessPoolExecutor(1, mp_context=context, initializer=_share, initargs=events) as pool:
        begun, ended = events
        load = GoodLoad(ended, pool.submit(_keep_asking, url, asks, clients))
        try:
            begun.wait(START_SECONDS)
            yield load
        finally:
            ended.set()


@dataclass(frozen=True, slots=True)
class GoodLoad:
    """Clients that go on until they are told to end."""

    ended: Event
    answers: Future[list[Answer]]

    def end(self) -> list[Answer]:
        """Every answer, the last ones complete."""
        self.ended.set()
        return self.answers.result()


_begun: Event
_ended: Event


def _share(begun: Event, ended: Event) -> None:
    global _begun, _ended  # events reach a process as it begins only
    _begun, _ended = begun, ended


def _keep_asking(url: str, asks: Sequence[Ask], clients: int) -> list[Answer]:
    return asyncio.run(_ask_all(url, asks, clients))


async def _ask_all(url: str, asks: Sequence[Ask], clients: int) -> list[Answer]:
    answers: list[Answer] = []
    async with new_session() as session:

        async def client(first: int) -> None:
            number = first
            while not _ended.is_set():
                answers.append(await _ask(session, url, number, asks[number]))
                _begun.set()
                number = (number + clients) % len(asks)
                if answers[-1].error:
                    await asyncio.sleep(PATIENCE_SECONDS)

        await asyncio.gather(*(client(i) for i in range(clients)))
    return answers


async def _ask(session: aiohttp.ClientSession, url: str, number: int, ask: Ask) -> Answer:
    try:
        return Answer(number, await asyncio.wait_for(send(session, url, ask), HANG_SECONDS))
    except TimeoutError:
        return Answer(number, None, "hung")
    except (aiohttp.ClientError, RuntimeError) as error:
        return Answer(number, None, repr(error))
