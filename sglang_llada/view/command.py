"""What `python -m sglang_llada view` does with traces: a page that is served, or a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from sglang_llada.errors import ConfigError
from sglang_llada.service import Service
from sglang_llada.view.ask import Question, Trace, collected, load, put
from sglang_llada.view.draw import svg
from sglang_llada.view.gif import gif
from sglang_llada.view.serve import Viewer, page

__all__ = ["Question", "collected", "load", "put", "save", "serve"]


def as_json(traces: list[Trace]) -> bytes:
    """The one trace, to be opened again."""
    if len(traces) != 1:
        raise ConfigError(f"a .json file holds one trace; got {len(traces)}")
    return json.dumps(traces[0]).encode()


def as_page(traces: list[Trace]) -> bytes:
    """The page with its traces in it, which needs no server."""
    return page(traces, asks=False).encode()


def as_svg(traces: list[Trace]) -> bytes:
    """The picture, which plays wherever images are shown."""
    return svg(traces).encode()


FORMS: dict[str, Callable[[list[Trace]], bytes]] = {".json": as_json, ".html": as_page, ".svg": as_svg, ".gif": gif}


def save(traces: list[Trace], path: Path) -> None:
    """Write traces in the form that the file's name asks for."""
    if path.suffix not in FORMS:
        raise ConfigError(f"--save is {str(path)!r}; allowed: a name that ends in {' or '.join(FORMS)}")
    if not traces:
        raise ConfigError("--save has nothing to write; give --ask or --trace")
    path.write_bytes(FORMS[path.suffix](traces))


def serve(host: str, port: int, service: Service, traces: list[Trace]) -> None:
    """Serve the page until Ctrl-C."""
    with Viewer(host, port, service, traces) as viewer:
        print(f"http://{host}:{viewer.server_port} shows answers of {service.url}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            viewer.serve_forever()
