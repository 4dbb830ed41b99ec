"""What a request does to its logits beside sampling: penalties, a grammar, bias, bans, a custom logit processor.

In the host's order. Everything is a function of the tokens before the step, those of the live blocks included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_llada.blocks import Request
from sglang_llada.decode.penalties import add, ban, counted, penalise
from sglang_llada.decode.transfer import to_device
from sglang_llada.decode.whole import Shape
from sglang_llada.errors import ConfigError
from sglang_llada.host.requests.grammar import Matcher
from sglang_llada.host.requests.wishes import Wishes

NO_PENALTIES = (1.0, 0.0, 0.0)


@dataclass(slots=True)
class Shaping:
    """A request's wishes.

    Attributes:
        penalties: for repetition, frequency and presence.
        bias: what is added to the logits of token ids.
        min_new_tokens: how many tokens come before any of `ends`.
        processor: as the host calls it: logits [p, V], and the same `params` p times.
        matcher: the grammar that its output conforms to.
    """

    penalties: tuple[float, float, float]
    bias: dict[int, float]
    min_new_tokens: int
    ends: list[int]
    processor: Callable[[Tensor, list[dict[str, Any]]], Tensor] | None
    params: dict[str, Any]
    matcher: Matcher | None

    def of(self, request: Request[Any], positions: list[int]) -> Shape:
        """What changes the logits of these positions, in order, in the next step.

        It raises ConfigError if the request asks for what cannot be, or its own code fails.
        """

        def shape(logits: Tensor) -> Tensor:
            device = logits.device
            if self.penalties != NO_PENALTIES:
                counts = self._counts(request, positions, logits)
                logits = penalise(logits, counts, *self.penalties)
            early = [i - len(request.prompt) < self.min_new_tokens for i in positions]
            if any(early) and self.ends:
                rows, ends = (to_device(torch.tensor(each), device) for each in (early, self.ends))
                logits = ban(logits, rows, ends)
            if self.matcher is not None:
                logits = self._conforming(logits)
            if self.bias:
                values = to_device(torch.tensor(list(self.bias.values()), dtype=logits.dtype), device)
                logits = add(logits, to_device(torch.tensor(list(self.bias)), device), values)
            return logits if self.processor is None else self._processed(logits)

        return shape

    def _conforming(self, logits: Tensor) -> Tensor:
        """What the grammar leaves of the logits, which is not nothing."""
        assert self.matcher is not None
        left = self.matcher.shape(logits.clone())
        if (left[0] == float("-inf")).all():
            raise ConfigError(f"the grammar must end here, and min_new_tokens is {self.min_new_tokens}")
        return left

    def _processed(self, logits: Tensor) -> Tensor:
        """What the request's own code makes of its logits."""
        assert self.processor is not None
        try:
            result = self.processor(logits.clone(), [self.params] * len(logits)).to(logits.dtype)
            if result.shape != logits.shape:
                raise ValueError(f"gave logits of shape {list(result.shape)} for {list(logits.shape)}")
            if not result.amax(-1).isfinite().all():
                raise ValueError("gave logits that are no numbers, or allow no token")
        except Exception as error:  # a user's code may raise anything
            raise ConfigError(f"custom_logit_processor failed: {error!r}") from error
        return result

    def _counts(self, request: Request[Any], positions: list[int], logits: Tensor) -> Tensor:
        """How often each token stands in the output and, decided, in the live blocks; not at the position itself."""
        live = [
            (block.start + i, block.tokens[i])
            for block in request.blocks
            for i in range(max(request.known - block.start, 0), request.block_size)
            if not block.open >> i & 1
        ]
        standing = dict(live)
        used = torch.tensor([*request.output, *standing.values()], dtype=torch.int64)
        own = torch.tensor([standing.get(i, -1) for i in positions])
        return counted(to_device(used, logits.device), to_device(own, logits.device), logits.shape[-1])


def shaping_of(req: Any, wishes: Wishes, vocabulary: int, never: frozenset[int]) -> Shaping | None:
    """What a host request does to its logits; None if nothing.

    Args:
        never: the model's own tokens, which no structured output has.
    """
    p = req.sampling_params
    penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
    if penalties == NO_PENALTIES and not any(
        (p.logit_bias, p.min_new_tokens, wishes.processor, req.grammar is not None)
    ):
        return None
    return Shaping(
        penalties=penalties,
        bias={int(token): value for token, value in (p.logit_bias or {}).items()},
        min_new_tokens=p.min_new_tokens,
        ends=sorted(wishes.ends),
        processor=wishes.processor,
        params={**(p.custom_params or {}), "__req__": req},
        matcher=None if req.grammar is None else Matcher(req.grammar, vocabulary, never),
    )
