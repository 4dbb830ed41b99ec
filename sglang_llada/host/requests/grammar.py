"""Structured output: what the host's grammar of a request allows, and the longest run of tokens that it accepts.

The grammar's state is that of the committed tokens, so that only the first open position's tokens can be told before a
step. Those of the run after it are asked about one by one when the step is read; a run ends before the first token
that the grammar does not accept, and what comes after is open again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sglang_llada.blocks import Block, Decided

NUMBER, CALL_NUMBER = r"\d+", r"\d{1,4}"  # in the host's grammar of Kimi's calls, and in ours


class Matcher:
    """A request's grammar, at the token after the last one that it accepted."""

    def __init__(self, grammar: Any, vocabulary: int, never: frozenset[int]) -> None:
        self.grammar = grammar
        self.vocabulary, self.never = vocabulary, never  # of this model's own tokens; a grammar may take them for text
        self.mask: Tensor | None = grammar.allocate_vocab_mask(vocabulary, 1, "cpu")
        self.filled = False

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self.never or self.grammar.is_terminated():
            return False
        mask = self._next()
        if mask is None:
            return True
        if mask.dtype == torch.bool:  # true where forbidden
            return not mask[0, token]
        return token < mask.shape[1] * 32 and bool(int(mask[0, token // 32]) >> token % 32 & 1)

    def accept(self, token: int) -> None:
        """Go on past a token that is allowed."""
        self.grammar.accept_token(token)
        self.filled = False

    def shape(self, logits: Tensor) -> Tensor:
        """Logits [p, V] of which the first row can only take what may come next."""
        logits[:, list(self.never)] = float("-inf")
        mask = self._next()
        if mask is not None:
            first = logits[:1].contiguous()
            self.grammar.apply_vocab_mask(first, self.grammar.move_vocab_mask(mask, logits.device))
            logits[0] = first[0]
        return logits

    def _next(self) -> Tensor | None:
        if self.mask is not None and not self.filled:
            self.mask.fill_(self.mask.dtype != torch.bool and -1)  # all is allowed: not every grammar writes its row
            self.grammar.fill_vocab_mask(self.mask, 0)
            self.filled = True
        return self.mask


def conform(matcher: Matcher, block: Block, new: Decided, mask_id: int) -> Decided | None:
    """The decisions as far as the grammar accepts them, which from now on stands after them; None: not even one."""
    tokens, is_open, accepted = list(new.tokens), new.open, 0
    run = [i for i in range(len(tokens)) if (block.open & ~new.open) >> i & 1]
    for i in run:
        if not matcher.allows(tokens[i]):
            break
        matcher.accept(tokens[i])
        accepted += 1
    for i in run[accepted:]:
        tokens[i] = mask_id
        is_open |= 1 << i
    return Decided(tokens, is_open, is_open == 0, new.state, new.notes) if accepted else None


def bound_tags(backend: Any, key_string: str) -> tuple[tuple[Any, str], dict[str, Any]]:
    """Before the host compiles a structural tag: what models like to fill without an end has one.

    The number of a call has as many digits as a chat may need. --constrained-json-disable-any-whitespace holds inside
    tags as well, which can be held to one character in a row and no less, as usual JSON has.

    Returns:
        The arguments to go on with.
    """
    tag = json.loads(key_string)
    if "structures" in tag and not backend.any_whitespace:  # the older form has no place to say so
        tags = [
            {"type": "tag", "begin": one["begin"], "end": one["end"], "content": json_format(one["schema"])}
            for one in tag["structures"]
        ]
        least = bool(tag.get("at_least_one"))
        tag_format = {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags, "at_least_one": least}
        tag = {"type": "structural_tag", "format": tag_format}
    for part in parts(tag.get("format")):
        if part.get("type") == "regex" and part["pattern"] == NUMBER:
            part["pattern"] = CALL_NUMBER
        if part.get("type") == "json_schema" and not backend.any_whitespace:
            part["max_whitespace_cnt"] = 1
    return (backend, json.dumps(tag)), {}


def json_format(schema: Any) -> dict[str, Any]:
    """The part of a structural tag that is JSON of a schema."""
    return {"type": "json_schema", "json_schema": schema}


def parts(tag_format: Any) -> Iterator[dict[str, Any]]:
    """Every part of a structural tag, down to the schemas, which are none."""
    if isinstance(tag_format, dict):
        yield tag_format
        inside = [value for key, value in tag_format.items() if key != "json_schema"]
    else:
        inside = tag_format if isinstance(tag_format, list) else []
    for part in inside:
        yield from parts(part)
