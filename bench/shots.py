"""One hostile request as the bytes of its connection, and what comes of it: `fire(address, shot)`.

Requests are written by hand, since no client library sends what these have to: bodies that end early, heads that never
end, bytes that are no text. Each has a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

HANG_SECONDS = 60.0  # an answer that takes longer does not come
SHOWN = 400  # characters at either end of a body
LEFT, HUNG, CUT, REFUSED = "left", "hung", "cut", "refused"
# Of an event of a stream, or of an answer that says so inside: the status that it stands for.
INSIDE = re.compile(rb'"(?:status_)?code": ?(5\d\d)')

# Values that json.dumps cannot write, or takes too long to, stand in a body as these strings.
DEEP, MILLION = "@deep@", "@million@"
WRITTEN = {DEEP: '{"a":' * 5000 + "1" + "}" * 5000, MILLION: "[" + "70," * 999_999 + "70]"}


@dataclass(frozen=True, slots=True)
class Shot:
    """Bytes for a connection.

    Attributes:
        delay: seconds before it is sent.
        leave: seconds after which the client hangs up, whatever has come by then; None: it waits for the answer.
        expected: the one status that is right; None: any but a 5xx.
        then: what is sent when this one is over.
    """

    data: bytes
    delay: float = 0.0
    leave: float | None = None
    expected: int | None = None
    then: Shot | None = None

    @property
    def text(self) -> str:
        """What it takes to send it again by hand: the first line and the body, without the middle of a long one."""
        head, _, body = self.data.partition(b"\r\n\r\n")
        line, shown = head.split(b" HTTP/1.1")[0], body
        if len(body) > 2 * SHOWN:
            shown = body[:SHOWN] + f" ... {len(body)} bytes ... ".encode() + body[-SHOWN:]
        return (line[:SHOWN] + b" " + shown).decode(errors="backslashreplace")


Fired = Callable[[Shot, str], None]
"""Is told of a shot and what came of it: a status, or LEFT, HUNG, CUT (closed without an answer) or REFUSED."""


def http(path: str, body: bytes = b"", method: str = "POST", kind: str = "application/json", **more: Any) -> Shot:
    """A request with these bytes for a body; `more` are fields of the shot."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return Shot(head.encode() + body, **more)


def ask(path: str, body: Any, **more: Any) -> Shot:
    """A request with a JSON body."""
    return http(path, dumps(body).encode(), **more)


def dumps(body: Any) -> str:
    """JSON, also of what is none (NaN), with what WRITTEN has in its place."""
    text = json.dumps(body)
    for name, value in WRITTEN.items():
        text = text.replace(f'"{name}"', value)
    return text


async def fire(address: tuple[str, int], shot: Shot, fired: Fired) -> None:
    """Send a shot and those after it."""
    await asyncio.sleep(shot.delay)
    patience = HANG_SECONDS if shot.leave is None else shot.leave
    try:
        outcome = await asyncio.wait_for(exchange(address, shot.data), patience)
    except TimeoutError:
        outcome = HUNG if shot.leave is None else LEFT
    except ConnectionRefusedError:
        outcome = REFUSED
    except OSError:
        outcome = CUT
    fired(shot, outcome)
    if shot.then is not None:
        await fire(address, shot.then, fired)


async def exchange(address: tuple[str, int], data: bytes) -> str:
    """The status that a connection ends with."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        sending: Awaitable[None] = asyncio.ensure_future(send(writer, data))
        answer = await reader.read()  # to its end
        await sending
    finally:
        writer.transport.abort()
    return status(answer)


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write it all; whoever answers before the end need not read the rest."""
    writer.write(data)
    try:
        await writer.drain()
    except ConnectionError:
        return


def status(answer: bytes) -> str:
    """Of the head, or the failure inside that a head of 200 could not know of."""
    if not answer.startswith(b"HTTP/1.1 "):
        return CUT
    inside = INSIDE.search(answer)
    return (inside[1] if inside else answer[9:12]).decode()
