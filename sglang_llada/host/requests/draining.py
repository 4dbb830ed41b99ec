"""A server that was told to end (SIGTERM) takes no new requests, and ends when every answer is written.

The host ends when it finds no request in its tokenizer manager. It goes on taking new ones until then, so that a server
under load never ends, and those that are being tokenized when it ends are never answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from sglang.srt.utils import get_bool_env_var
from starlette.responses import JSONResponse

from sglang_llada.host.facts import is_ours

logger = logging.getLogger(__name__)

READING = {"GET", "HEAD", "OPTIONS"}
ENDING = {"abort_request", "continue_generation"}  # commands without which some answers would not end
MESSAGE = "this server is shutting down and takes no new requests; send this one to another server, or again later"
LOOK_SECONDS = 0.1
FORCED = "SGL_FORCE_SHUTDOWN"  # the host's: end without waiting for anything

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(slots=True)
class Answers:
    """How many requests this process is answering; written by Drain, read by end_drained()."""

    being_written: int = 0


ANSWERS = Answers()


class Drain:
    """ASGI middleware: counts the requests that are being answered, and refuses new ones with 503 when told to end.

    app: what answers. host_app: the host's app, which knows its tokenizer manager once it has started.
    """

    def __init__(self, app: Any, host_app: Any) -> None:
        self.app = app
        self.host_app = host_app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] in READING or scope["path"].rpartition("/")[2] in ENDING:
            await self.app(scope, receive, send)
        elif (manager := self._manager()).gracefully_exit and is_ours(manager.server_args):
            error = {"message": MESSAGE, "type": "service_unavailable", "code": HTTPStatus.SERVICE_UNAVAILABLE.value}
            refusal = JSONResponse({"error": error}, HTTPStatus.SERVICE_UNAVAILABLE, {"connection": "close"})
            await refusal(scope, receive, send)
        else:
            ANSWERS.being_written += 1
            try:
                await self.app(scope, receive, send)
            finally:
                ANSWERS.being_written -= 1

    def _manager(self) -> Any:
        return self.host_app.state.openai_serving_completion.tokenizer_manager


def add_to_app(server_args: Any = None) -> None:
    """Before the host starts its app, which has no place for middleware afterwards."""
    from sglang.srt.entrypoints.http_server import app  # loaded by then; few processes get here

    app.add_middleware(Drain, host_app=app)


async def end_drained(end: Callable[..., Awaitable[None]], manager: Any) -> None:
    """Around the host's wait for the signal, after which it ends: not before every answer is written.

    The first of several HTTP processes that is done must not end the scheduler that the others need; what started them
    ends it when all of them have ended.
    """
    from sglang.srt.managers.tokenizer_manager import ServerStatus  # loaded by then; few processes get here

    while not manager.gracefully_exit:
        await asyncio.sleep(LOOK_SECONDS)
    logger.info("shutting down: new requests are refused, %d are still answered", ANSWERS.being_written)
    while ANSWERS.being_written and manager.server_status != ServerStatus.UnHealthy and not get_bool_env_var(FORCED):
        await asyncio.sleep(LOOK_SECONDS)
    if manager.tokenizer_ipc_name is not None:
        raise SystemExit(0)
    await end(manager)
