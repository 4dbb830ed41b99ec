"""A running server as its clients see it: questions and answers in JSON, streams of `/generate`, and its sentences."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

from sglang_llada.config import FLAGS
from sglang_llada.errors import ConfigError

TIMEOUT = 600  # seconds without a byte of the server


@dataclass(frozen=True, slots=True)
class Service:
    """A running server: its address without a path, and its key if it wants one."""

    url: str
    key: str | None = None

    def info(self) -> dict[str, Any]:
        """What the server says of itself: its arguments, and more."""
        said: dict[str, Any] = self._json(self.open("/server_info"))
        return said

    def facts(self) -> dict[str, Any]:
        """What a trace says of it: `model`, `block_size`, `algorithm`."""
        said = self.info()
        flag = said.get("dllm_algorithm")
        if flag not in FLAGS:
            raise ConfigError(f"the server at {self.url} decodes no blocks: its dllm_algorithm is {flag!r}")
        return {"model": said["served_model_name"], "block_size": said["page_size"], "algorithm": FLAGS[flag]}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A JSON answer to a JSON question."""
        return self._json(self.open(path, body))

    def open(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        """The answer as it comes; ConfigError if there is no such server, or it refuses, in its own words."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            opened: HTTPResponse = urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=TIMEOUT
            )
            return opened
        except urllib.error.HTTPError as error:
            raise ConfigError(f"the server at {self.url} says: {message_of(error.read())}") from error
        except (OSError, ValueError, HTTPException) as error:
            raise ConfigError(f"no server answers at {self.url} ({error}); `make serve` starts one") from error

    def _json(self, reply: HTTPResponse) -> Any:
        with reply:
            return json.load(reply)


def outputs(reply: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The outputs of a stream of /generate; ConfigError with the server's words if it says that it failed."""
    for line in reply:
        if line.startswith(b"data: {"):
            output = json.loads(line[6:])
            if "error" in output:
                raise ConfigError(f"the server says: {message_of(line[6:])}")
            ended = output["meta_info"]["finish_reason"]
            if ended is not None and ended["type"] == "abort":
                raise ConfigError(f"the server says: {ended['message']}")
            yield output


def message_of(said: bytes) -> str:
    """The sentence in an answer that is an error."""
    try:
        error = json.loads(said)
        error = error.get("error", error)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        return said.decode(errors="replace")[:300]
