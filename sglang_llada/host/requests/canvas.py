"""The canvas of a request: an answer of which some tokens are given, anywhere, and the others are open.

In `custom_params` it is a list whose entries are token ids, null for one open position, or texts that stand for their
tokens. So a hole is as many nulls as it has tokens, and no text can be taken for one. Texts become ids in the process
that has the tokenizer; what the list means, and whether it fits the request, is read where requests are let in.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sglang_llada.config import CANVAS, DecodeConfig
from sglang_llada.errors import ConfigError

Canvas = tuple[int | None, ...]  # of each position its token, None where open


def with_ids(sampling_params: Any, tokenizer: Any) -> Any:
    """Sampling parameters of one or of several requests with ids for a canvas's texts, and of the length it asks for.

    Raises:
        ValueError: there are texts, and no tokenizer.
    """
    if isinstance(sampling_params, list):
        return [with_ids(each, tokenizer) for each in sampling_params]
    custom = (sampling_params or {}).get("custom_params") or {}
    if custom.get(CANVAS) is None:
        return sampling_params
    canvas: list[int | None] = []
    for entry in custom[CANVAS]:
        canvas += ids_of(entry, tokenizer) if isinstance(entry, str) else [entry]
    return {**sampling_params, "max_new_tokens": len(canvas), "custom_params": {**custom, CANVAS: canvas}}


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text by itself."""
    if tokenizer is None:
        raise ValueError(f"canvas holds a text, {text[:80]!r}; allowed: ids, since the server has no tokenizer")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def check(canvas: Canvas, params: DecodeConfig, stop_ids: Collection[int], *, structured: bool) -> None:
    """Refuse a canvas that nothing can be decided in, or that does not go with what else its request wants.

    Raises:
        ConfigError: says why.
    """
    if params.reopens:
        raise ConfigError(
            f"canvas: algorithm is {params.algorithm!r}, which inserts and deletes, so that what is given would move; "
            "allowed: threshold, joint_threshold, mbe"
        )
    if structured:
        raise ConfigError("canvas: structured output is decided from left to right; allowed: one of both")
    last = max((i for i, token in enumerate(canvas) if token is not None), default=0)
    counting = canvas[: last + 1] if canvas and canvas[last] in stop_ids else canvas
    if None not in counting:
        behind = f" before its end, the stop token at position {last}" if len(counting) < len(canvas) else ""
        raise ConfigError(f"canvas has no open position{behind}; needed is one at least, as null")
