"""Which parsers a checkpoint's answers need, from the text of its chat template.

The host finds parsers by itself only if asked to (`auto`), and by what other models' templates and vocabularies have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes tool calls: the host's name of its parser, and what a template that asks for it contains."""

    parser: str
    marks: tuple[str, ...]


CALL_FORMATS = (
    CallFormat(
        "kimi_k2", ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>")
    ),  # 2.2
    CallFormat("qwen", ("<tools>", "<tool_call>", "arguments")),  # 2.0 and 2.1
)


def call_parser(template: str) -> str | None:
    """The host's parser for the tool calls that a chat template asks for, None if it knows no tools."""
    return next((each.parser for each in CALL_FORMATS if all(mark in template for mark in each.marks)), None)


def chat_template(folder: Path, named: str | None) -> str:
    """The text of a chat template, empty if there is none to read.

    Args:
        folder: of the tokenizer's files.
        named: --chat-template, a file or the name of one of the host's, which none of our models is written for.
    """
    if named is not None:
        return Path(named).read_text(encoding="utf-8") if Path(named).is_file() else ""
    beside, inside = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(inside.read_text(encoding="utf-8")) if inside.is_file() else {}
    templates = config.get("chat_template") or ""
    return templates if isinstance(templates, str) else "\n".join(each["template"] for each in templates)
