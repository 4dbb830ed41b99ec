"""A client that streams requests at a server and notes when tokens come: closed loop or open loop."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and the text that would be right; None where nobody knows.

    custom_params say how it is decoded, to a server of ours; None as the server does by itself. sampling: parameters
    beside these, such as a temperature.
    """

    input_ids: list[int]
    max_new_tokens: int
    ignore_eos: bool = False
    right: str | None = None
    custom_params: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Reply:
    """Seconds on one clock, and what came.

    Attributes:
        sent: when the request was.
        events: when tokens came, and how many there were then.
        meta: the last event's meta_info. token_ids: the last event's.
    """

    sent: float
    events: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Returned tokens."""
        return self.events[-1][1] if self.events else 0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.events[0][0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between events that bring tokens."""
        return [later - earlier for (earlier, _), (later, _) in zip(self.events, self.events[1:], strict=False)]


def closed_loop(url: str, asks: Sequence[Ask], at_once: int) -> list[Reply]:
    """All requests, `at_once` at any time, each sent when an earlier one has ended."""
    return asyncio.run(_closed(url, asks, at_once))


def open_loop(url: str, asks: Sequence[Ask], per_second: float, seed: int = 0) -> list[Reply]:
    """All requests at random times, on average so many a second, whether earlier ones have ended or not."""
    return asyncio.run(_open(url, asks, per_second, seed))


async def _closed(url: str, asks: Sequence[Ask], at_once: int) -> list[Reply]:
    limit = asyncio.Semaphore(at_once)
    async with new_session() as session:

        async def one(ask: Ask) -> Reply:
            async with limit:
                return await send(session, url, ask)

        return list(await asyncio.gather(*map(one, asks)))


async def _open(url: str, asks: Sequence[Ask], per_second: float, seed: int) -> list[Reply]:
    rng = random.Random(seed)
    async with new_session() as session:
        running = []
        for ask in asks:
            running.append(asyncio.create_task(send(session, url, ask)))
            await asyncio.sleep(rng.expovariate(per_second))
        return list(await asyncio.gather(*running))


def new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=3600),  # what a host without fast attention may take for one long prompt
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=1 << 24,  # an event is a line, and the last ones of long answers are long
    )


async def send(session: aiohttp.ClientSession, url: str, ask: Ask) -> Reply:
    sampling = {
        "temperature": 0,
        "max_new_tokens": ask.max_new_tokens,
        "ignore_eos": ask.ignore_eos,
        "custom_params": ask.custom_params,
        **ask.sampling,
    }
    body = {"input_ids": ask.input_ids, "stream": True, "sampling_params": sampling}
    reply = Reply(time.perf_counter())
    async with session.post(url + "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            reply.text, reply.meta, reply.token_ids = event["text"], event["meta_info"], event["output_ids"]
            if reply.meta["completion_tokens"] > reply.tokens:  # a prompt that is being read sends empty events
                reply.events.append((now, reply.meta["completion_tokens"]))
    return reply
