"""The two sides: servers by the plain host command, and what a client of one sees, whatever it does.

In-tree is started as its documentation says, with an algorithm; what it lacks on a CPU and for a tiny checkpoint (a
platform, attention, experts, the mask's id) is this package's on both sides. Nothing here knows what is probed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from bench.records import ROOT
from bench.timed_server import VARIABLE, totals
from tests.host.serving import Server, each_event, launch, ready, session_members

SIDES = {"in-tree": {"SGLANG_LLADA": "off"}, "here": {}}
SECONDS = 20.0  # for an answer that takes less than one where it comes
END_SECONDS = 15.0
MOST_SAID = 110  # characters of a message
TINY = ROOT / "examples" / "tiny-llada2"


class NotAnswered(Exception):
    """Why there is no answer, in words for a table."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a probe saw.

    Attributes:
        said: in words, with places for the figures.
        good: whether that is what was asked for; None of figures that stand for themselves.
    """

    said: str
    good: bool | None = None
    figures: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """A cell of the table."""
        words = {True: "yes: ", False: "no: ", None: ""}[self.good]
        return words + (self.said.format(*self.figures) if self.figures else self.said)


@dataclass(frozen=True, slots=True)
class Setting:
    """How both sides are started.

    Attributes:
        flags: of both. in_tree: of the in-tree side alone.
        env: variables of both.
    """

    model: Path = TINY
    flags: tuple[str, ...] = ()
    in_tree: tuple[str, ...] = ("--dllm-algorithm", "LowConfidence")
    env: dict[str, str] = field(default_factory=dict)


class Target:
    """A side's server under a setting: started by open(), and again by whoever finds that it answers no more.

    Attributes:
        server: None while it does not run. why: then, in words.
        forwards: how many there were so far is its first number.
    """

    def __init__(self, side: str, setting: Setting, folder: Path) -> None:
        self.side, self.setting, self.server, self.why = side, setting, None, "was not started"
        folder.mkdir(parents=True, exist_ok=True)
        self.log, counts = folder / "log", folder / "forwards"
        self.forwards = totals(counts, fresh=True)
        self.env = {**SIDES[side], **setting.env, VARIABLE: str(counts)}
        self.server: Server | None
        self._process: Any = None

    # --- its life -----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Begin to start; wait() waits for the end of it, so that two sides can start at once."""
        flags = (*self.setting.flags, *(self.setting.in_tree if self.side == "in-tree" else ()))
        self._process, self._url = launch(
            self.setting.model, self.log, *flags, env=self.env, module="bench.timed_server"
        )

    def wait(self) -> None:
        """Until it is ready, or has ended."""
        try:
            self.server = ready(self._process, self._url, self.log)
        except AssertionError:
            self.why = f"does not start: {last_words(self.log)}"
            self.close()

    def answers(self) -> bool:
        """Whether it still does, anything."""
        try:
            return bool(self.generate([70], 1)["meta_info"])
        except (NotAnswered, requests.RequestException):
            return False

    def close(self) -> None:
        """End it, however little it wants to."""
        process, self._process, self.server = self._process, None, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for pid in session_members(process.pid, patience=1):
            os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        """As new."""
        self.close()
        self.launch()
        self.wait()

    # --- what it is asked ---------------------------------------------------------------------------------------------

    def post(
        self, path: str, body: dict[str, Any] | None = None, *, seconds: float = SECONDS, stream: bool = False
    ) -> Any:
        """A reply with status 200, or NotAnswered."""
        if self.server is None:
            raise NotAnswered(self.why)
        try:
            reply = requests.post(self.server.url + path, json=body or {}, timeout=seconds, stream=stream)
        except requests.ReadTimeout:
            raise NotAnswered(f"no answer within {seconds:.0f} s") from None
        except requests.ConnectionError:
            if self.server.process.poll() is None:
                time.sleep(2)  # it may be about to end
            alive = self.server.process.poll() is None
            raise NotAnswered("closes the connection" if alive else f"server ended: {last_words(self.log)}") from None
        if not reply.ok:
            raise NotAnswered(f"HTTP {reply.status_code}: {sentence(reply.text)}")
        return reply

    def generate(
        self,
        prompt: list[int] | str,
        new_tokens: int,
        *,
        top: dict[str, Any] | None = None,
        seconds: float = SECONDS,
        **options: Any,
    ) -> Any:
        """The JSON of one greedy request to /generate; sampling parameters as options, fields beside them in `top`."""
        return self.post("/generate", self.body(prompt, new_tokens, top, options), seconds=seconds).json()

    def stream(self, prompt: list[int] | str, new_tokens: int, **options: Any) -> Iterator[dict[str, Any]]:
        """Events of a stream, as they come."""
        body = self.body(prompt, new_tokens, {"stream": True}, options)
        with self.post("/generate", body, stream=True) as reply:
            yield from each_event(reply)

    def together(self, asked: list[tuple[Any, int, dict[str, Any]]], at_once: int) -> list[Any]:
        """Prompts, lengths and options, so many at a time; answers in their order."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda one: self.generate(one[0], one[1], **one[2]), asked))

    @staticmethod
    def body(
        prompt: list[int] | str, new_tokens: int, top: dict[str, Any] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        named = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        return {**named, "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, **options}, **(top or {})}

    def flush(self) -> None:
        """Empty the prefix cache, once nothing runs."""
        self.post("/flush_cache")

    def idle_after(self, seconds: float) -> float | None:
        """Seconds until nothing runs and, once the cache is empty, no page is held; None if not in time."""
        begin = time.perf_counter()
        while (gone := time.perf_counter() - begin) < seconds:
            try:
                self.flush()
                load = requests.get(f"{self.server.url}/v1/loads", timeout=SECONDS).json()["loads"][0]
                if load["num_running_reqs"] == load["num_waiting_reqs"] == load["num_used_tokens"] == 0:
                    return gone
            except NotAnswered:
                pass
            time.sleep(0.1)
        return None

    def metrics(self) -> dict[str, float]:
        """Prometheus metrics, summed over labels."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(requests.get(self.server.url + "/metrics", timeout=SECONDS).text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


def sentence(text: str) -> str:
    """What an error's body says."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return shorten(text)


def last_words(log: Path) -> str:
    """The last error that a log tells of."""
    told = re.findall(r"^.*?((?:\w+Error|Exception|sglang-llada): .+)$", log.read_text(errors="replace"), flags=re.M)
    return shorten(told[-1]) if told else "without a word"


def shorten(text: str) -> str:
    """A cell of a table."""
    text = " ".join(text.replace("|", "/").replace("`", "'").split())
    return text if len(text) <= MOST_SAID else text[: MOST_SAID - 3].rstrip() + "..."
