"""The page (page.html) with what it is to show, as one text, and a small web server that gives it what it asks.

GET / is the page; POST /ask a question (ask.Question), answered with its events as lines of JSON while they come, the
last one {"error": a sentence} if it failed; POST /draw a list of traces, answered with their picture. Nothing else of
the model's server can be reached through it. Bodies must be JSON by their type, which a page of another site cannot
send unasked.
"""

from __future__ import annotations

import json
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sglang_llada.service import Service
from sglang_llada.view.ask import Question, Trace, put
from sglang_llada.view.draw import svg

PAGE = Path(__file__).parent / "page.html"
PLACE = '<script type="application/json" id="given">null</script>'
MOST_BYTES = 64 << 20  # of a body


def page(traces: list[Trace], asks: bool) -> str:
    """The page, with traces to begin with; `asks` if there is a server behind it that takes questions."""
    given = json.dumps({"traces": traces, "asks": asks}).replace("<", "\\u003c")  # no tag may end the script
    before, after = PAGE.read_text(encoding="utf-8").split(PLACE)
    return before + PLACE.replace("null", given) + after


class Handler(BaseHTTPRequestHandler):
    """One request of the page."""

    server: Viewer

    def do_GET(self) -> None:
        """The page."""
        if self.path == "/":
            self._answer(HTTPStatus.OK, "text/html", page(self.server.traces, asks=True))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is / alone")

    def do_POST(self) -> None:
        """A question, or a picture."""
        size = int(self.headers.get("Content-Length", 0))
        if self.headers.get_content_type() != "application/json" or size > MOST_BYTES:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", f"a body is JSON of at most {MOST_BYTES} bytes")
        elif self.path == "/ask":
            self._ask(self.rfile.read(size))
        elif self.path == "/draw":
            self._draw(self.rfile.read(size))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there are /ask and /draw alone")

    def _ask(self, body: bytes) -> None:
        self._begin(HTTPStatus.OK, "application/x-ndjson")
        try:
            with closing(put(self.server.service, Question.read(json.loads(body)))) as events:
                for event in events:
                    self._line(event)
        except ValueError as error:  # ConfigError, and what is no JSON
            self._line({"error": str(error)})
        except ConnectionError:
            pass  # who asked has left; the stream is closed, which ends the request

    def _draw(self, body: bytes) -> None:
        try:
            drawn = svg(json.loads(body))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # no list of traces
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", f"that cannot be drawn: {error}")
        else:
            self._answer(HTTPStatus.OK, "image/svg+xml", drawn)

    def _line(self, event: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")
        self.wfile.flush()

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        self._begin(status, f"{kind}; charset=utf-8")
        self.wfile.write(text.encode())

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: the page says what it does."""


class Viewer(ThreadingHTTPServer):
    """The web server behind the page; port 0 is any free one."""

    daemon_threads = True

    def __init__(self, host: str, port: int, service: Service, traces: list[Trace]) -> None:
        self.service, self.traces = service, traces
        super().__init__((host, port), Handler)
