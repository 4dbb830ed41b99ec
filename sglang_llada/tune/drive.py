"""A client that keeps a number of requests under way, and notes when their tokens come.

Threads are daemons: whoever stops waiting for them (Ctrl-C) may leave at once, and the server ends requests whose
client is gone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from sglang_llada.errors import ConfigError
from sglang_llada.options import Decode
from sglang_llada.service import Service, outputs
from sglang_llada.tune.prompts import Prompt

Setting = Mapping[str, Any]  # custom_params


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt as /generate takes it (`input_ids` or `text`), and the most tokens of its answer."""

    prompt: Mapping[str, Any]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; seconds to its first token, and to its end."""

    text: str
    ids: list[int]
    forwards: int
    first: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Driver:
    """Puts prompts to a server, greedily; `pieces` if its outputs hold what is new, and not all so far."""

    service: Service
    pieces: bool

    def ask_of(self, prompt: Prompt, max_tokens: int) -> Ask:
        """A prompt, a chat by the server's own template; it may say itself how many tokens it may take."""
        if isinstance(prompt.asked, str):
            as_taken = {"text": prompt.asked}
        else:
            as_taken = {"input_ids": self.service.post("/tokenize", {"messages": prompt.asked})["tokens"]}
        return Ask(as_taken, prompt.max_tokens or max_tokens)

    def answer(self, ask: Ask, setting: Setting) -> Reply:
        """One answer.

        Raises:
            ConfigError: the server refuses, is gone, or is none of ours.
        """
        sampling = {"temperature": 0, "max_new_tokens": ask.max_tokens, "custom_params": setting}
        first, text, ids, meta = None, "", list[int](), dict[str, Any]()
        sent = time.perf_counter()
        try:
            with self.service.open("/generate", {**ask.prompt, "stream": True, "sampling_params": sampling}) as reply:
                for output in outputs(reply):
                    meta = output["meta_info"]
                    if first is None and meta["completion_tokens"]:  # a prompt that is being read sends empty ones
                        first = time.perf_counter() - sent
                    text = text + output["text"] if self.pieces else output["text"]
                    ids = ids + output["output_ids"] if self.pieces else output["output_ids"]
        except (OSError, HTTPException) as error:
            raise ConfigError(f"the server at {self.service.url} broke off: {error}") from error
        seconds = time.perf_counter() - sent
        if not meta or meta["finish_reason"] is None:
            raise ConfigError(f"the server at {self.service.url} broke off inside an answer")
        try:
            return Reply(text, ids, Decode.of(meta).forwards, first or seconds, seconds)
        except ValueError as error:
            raise ConfigError(f"the server at {self.service.url}: {error}") from error

    def answers(self, asks: Sequence[Ask], setting: Setting, at_once: int, done: Callable[[int], None]) -> list[Reply]:
        """All, `at_once` at any time; `done` hears how many there are.

        Raises:
            ConfigError: one failed; no further one begins.
        """
        futures = [Future[Reply]() for _ in asks]
        todo = deque(zip(futures, asks, strict=True))

        def work() -> None:
            with contextlib.suppress(IndexError):  # nothing is left
                while True:
                    settle(todo.popleft())

        def settle(task: tuple[Future[Reply], Ask]) -> None:
            future, ask = task
            try:
                future.set_result(self.answer(ask, setting))
            except BaseException as error:  # is raised where it is waited for
                future.set_exception(error)

        for _ in range(min(at_once, len(asks))):
            threading.Thread(target=work, daemon=True).start()
        try:
            replies = []
            for count, future in enumerate(futures, 1):
                replies.append(future.result())
                done(count)
            return replies
        finally:
            todo.clear()
