"""A server of scripts: what one tells of a decode that is written down in rows of text, and the same over HTTP.

A row is what stands after a step behind the tokens that were committed before: letters, `_` where open, `|` behind what
is committed by then; and below each letter the step of its block that put it there. Tokens are code points.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BLOCK = 8
Row = tuple[str, str]
# Inserts and deletes, behind 3 tokens of the prompt: a hole comes before "e" and becomes "q", "x" is edited to "!", and
# "q" goes again.
MOVING: list[Row] = [
    ("T_ex_", "1.11."),
    ("Th_ex", "12.11"),
    ("Thqe!", "12313"),
    ("The!_", "1213."),
    ("The!|", "1213"),
]
# Nothing moves, behind a block of the prompt: the second block begins when half of the first is decided.
STAYING: list[Row] = [
    ("He__o__w________", "11..1..1........"),
    ("Hell|o__w_r__!___", "11221..1.1..1..."),
    ("o, wor|_d!___", "133121.21..."),
    ("ld!|", "321"),
]


def sure(step: str) -> float:
    """A probability, the lower the later."""
    return 1 - int(step) / 10


@dataclass(frozen=True, slots=True)
class Told:
    """What a server tells of one answer: the prompt's tokens, and its outputs, each with all since the beginning."""

    prompt: list[int]
    outputs: list[dict[str, Any]]


def told(rows: list[Row], prompt: str, fills: int = 1) -> Told:
    """The outputs of a scripted decode, one for each step, which `fills` other forwards come before."""
    text, steps, snapshots, outputs = "", "", [], []
    for number, (row, below) in enumerate(rows, 1):
        count = row.find("|") if "|" in row else 0
        row = row.replace("|", "")
        text, steps = text + row[:count], steps + below[:count]
        standing = [
            (None, None) if letter == "_" else (ord(letter), step) for letter, step in zip(row, below, strict=True)
        ]
        snapshots.append(
            {
                "step": number,
                "committed": len(text),
                "token_ids": [token for token, _ in standing[count:]],
                "steps": [None if step is None else int(step) for _, step in standing[count:]],
                "confidences": [None if step is None else sure(step) for _, step in standing[count:]],
            }
        )
        meta = {
            "finish_reason": {"type": "stop"} if number == len(rows) else None,
            "completion_tokens": len(text),
            "dllm_nfe": number + fills,
            "dllm_steps": number,
            "dllm_forward_counts": [number],
            "step_maps": [int(step) for step in steps],
            "dllm_confidences": [sure(step) for step in steps],
            "dllm_snapshots": snapshots[:],
        }
        outputs.append({"text": text, "output_ids": [ord(letter) for letter in text], "meta_info": meta})
    return Told([ord(letter) for letter in prompt], outputs)


SCRIPTS = {
    "levenshtein": told(MOVING, "abc"),
    "threshold": told(STAYING, "abcdefgh"),
}


class Handler(BaseHTTPRequestHandler):
    """The routes of a server that service.Service has; the algorithm that is asked for is the script that is told."""

    server: Server

    def do_GET(self) -> None:
        said = {"served_model_name": "scripted", "page_size": BLOCK, "incremental_streaming_output": self.server.pieces}
        self._say({**said, "dllm_algorithm": self.server.flag})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked, self.headers.get("Authorization")))
        if self.path == "/tokenize":
            script = "levenshtein" if "move" in asked["messages"][-1]["content"] else "threshold"
            self._say({"tokens": SCRIPTS[script].prompt})
        elif self.path == "/detokenize":
            self._say({"text": ["".join(map(chr, ids)) for ids in asked["tokens"]]})
        elif asked["sampling_params"]["custom_params"].get("live_blocks") == 4:
            refused = {"type": "abort", "message": "4 are too many"}
            self._stream([{"text": "", "output_ids": [], "meta_info": {"finish_reason": refused}}])
        else:
            script = next(each for each in SCRIPTS.values() if each.prompt == asked["input_ids"])
            self._stream(self.server.tells(script.outputs))

    def _say(self, answer: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def _stream(self, outputs: list[dict[str, Any]]) -> None:
        self.send_response(200)
        self.end_headers()
        for output in outputs:
            self.wfile.write(b"data: " + json.dumps(output).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """The server, what it was asked, and what differs from test to test: its flags, and which outputs it tells."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any, str | None]] = []
        self.flag, self.pieces = "Threshold", False
        self.tells: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """While a server serves."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
