"""The canvas of a request: an answer of which some tokens are given, anywhere, and the others are open.

In `custom_params` it is a list whose entries are token ids, null for one open position, or texts that stand for their
tokens. So a hole is as many nulls as it has tokens, and no text can be taken for one. Texts become ids in the process
that has the tokenizer; what the list means, and whether it fits the request, is read where requests are let in.

With `choices` nothing is decided: a read is one forward over prompt and canvas, the mask where the canvas is open, that
gives the probabilities of these tokens there. To all that fills and caches KV its canvas is the end of its prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from typing import Any

from sglang_llada.config import CANVAS, CHOICES, DecodeConfig, Report
from sglang_llada.errors import ConfigError

Canvas = tuple[int | None, ...]  # of each position its token, None where open


def with_ids(sampling_params: Any, tokenizer: Any) -> Any:
    """Sampling parameters of one or of several requests with ids for texts, and of the length that a canvas asks for.

    Raises:
        ValueError: there are texts, and no tokenizer; a choice is not one token.
    """
    if isinstance(sampling_params, list):
        return [with_ids(each, tokenizer) for each in sampling_params]
    custom = (sampling_params or {}).get("custom_params") or {}
    found: dict[str, Any] = {}
    for name in (CANVAS, CHOICES):
        if custom.get(name) is not None:
            entries = [ids_of(name, entry, tokenizer) for entry in custom[name]]
            found[name] = [token for ids in entries for token in ids]
    if not found:
        return sampling_params
    length = {"max_new_tokens": len(found[CANVAS])} if CANVAS in found else {}
    return {**sampling_params, **length, "custom_params": {**custom, **found}}


def ids_of(name: str, entry: int | str | None, tokenizer: Any) -> list[int | None]:
    """The tokens of an entry: of a text by itself, which has one if it is a choice."""
    if not isinstance(entry, str):
        return [entry]
    if tokenizer is None:
        raise ValueError(f"{name} holds a text, {entry[:80]!r}; allowed: ids, since the server has no tokenizer")
    ids: list[int | None] = tokenizer.encode(entry, add_special_tokens=False)
    if name == CHOICES and len(ids) != 1:
        raise ValueError(f"{name} holds {entry[:80]!r}, which is {len(ids)} tokens, {ids[:8]}; allowed: one")
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


def check_read(req: Any, canvas: Canvas, choices: tuple[int, ...], *, structured: bool) -> None:
    """Refuse choices that nothing is read of, and what a request wants of tokens that a read does not return.

    Raises:
        ConfigError: says why.
    """
    if not choices:
        raise ConfigError(f"{CHOICES} is empty; needed is one token at least")
    if None not in canvas:
        raise ConfigError(f"{CHOICES} are read at the open positions of a canvas; needed is one at least, as null")
    asked = {"return_logprob": req.return_logprob, "session_params": req.session, "structured output": structured}
    for name, wanted in asked.items():
        if wanted:
            raise ConfigError(f"{CHOICES}: a read decides no tokens, which {name} is about; leave one of them out")


def as_prompt(req: Any, canvas: Canvas, mask_id: int) -> None:
    """Let a host request's canvas be the end of its prompt, with nothing behind it to decide."""
    tokens = array("q", [mask_id if token is None else token for token in canvas])
    req.origin_input_ids = req.origin_input_ids + tokens
    req.sampling_params.max_new_tokens = req.sampling_params.min_new_tokens = 0


def report_of_read(canvas: Canvas, choices: tuple[int, ...], prompt: int) -> Report:
    """What a read reports, if the prompt that it has become is so long."""
    return Report(ids=choices, original=True, prompt_from=prompt - len(canvas) + canvas.index(None), only_open=True)
