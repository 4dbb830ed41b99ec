"""A user's own prompts: a file of JSON lines.

A line has `messages` (a chat), or `prompt` or `text` (as it is, without a template), by itself or in the `body` of a
line of OpenAI's batches. `answer` is the text that would be right, `max_tokens` the line's own bound. Whatever else is
there changes nothing: how an answer is decoded is the setting's, and greedy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_llada.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat, or a text as it is; the answer that would be right, and the most tokens, where the file says so."""

    asked: list[dict[str, Any]] | str
    answer: str | None
    max_tokens: int | None


def read(path: Path) -> list[Prompt]:
    """The prompts of a file; ConfigError, with the line, if there are none or one cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error}") from error
    prompts = [prompt_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts: {path} is empty; needed is a JSON object with messages or text on each line")
    return prompts


def prompt_of(line: str, where: str) -> Prompt:
    """The prompt of a line."""
    try:
        said = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    body = said.get("body", said) if isinstance(said, dict) else None
    body = body if isinstance(body, dict) else {}
    kinds = [kind for kind in ("messages", "prompt", "text") if kind in body]
    if len(kinds) != 1:
        raise ConfigError(f"{where} is {line[:80]}; needed is an object with messages, prompt or text, one of them")
    asked, answer, most = body[kinds[0]], said.get("answer"), body.get("max_tokens")
    if not isinstance(asked, list if kinds == ["messages"] else str) or not asked:
        wanted = "a list of messages" if kinds == ["messages"] else "a text"
        raise ConfigError(f"{where}: {kinds[0]} is {json.dumps(asked)[:80]}; needed is {wanted}")
    if not isinstance(answer, str | None):
        raise ConfigError(f"{where}: answer is {json.dumps(answer)[:80]}; needed is a text")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ConfigError(f"{where}: max_tokens is {json.dumps(most)[:80]}; needed is an integer from 1")
    return Prompt(asked, answer, most)
