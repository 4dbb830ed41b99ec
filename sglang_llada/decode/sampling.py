"""Sampling, for positions of requests that ask for it: one draw per position and step, from a vocabulary never whole.

The tokens' distribution is the softmax of logits / temperature, the mask left out, cut and scaled to 1 again. Of a cut
distribution those tokens stay above which there are fewer than top_k others, with at most top_p of the mass, and that
have at least min_p times the best one's probability; equals stay or go together. What is drawn is the token whose logit
and noise (noise.py) are highest in sum, so that chunks, and shards of several ranks, are put together like those of
selection (select.py). Its probability in this distribution is the confidence by which an algorithm decides.

Where a distribution is cut is searched between the highest logit and RANGE below it, where nothing has any weight:
PASSES times the tokens above BOUNDS evenly spaced bounds are counted and weighed, and the next bounds divide the space
between two of them. All bounds are exact in fp32. In the end the cut is known to 2^-19, which is what rounding leaves
of such logits.

Here is the definition; on a CUDA device kernels do the same (sampling_triton.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_llada.decode.contract import BOUNDS, PASSES, RANGE, Draws
from sglang_llada.decode.head import Best, Exchange, Head, Lowered
from sglang_llada.decode.noise import gumbel
from sglang_llada.decode.select import chunks, mass_of, reference_of, sum_in_order

Chunks = Callable[[], Iterable[tuple[int, Tensor]]]  # first ids and logits, of the whole vocabulary or a rank's shard


class Drawn(NamedTuple):
    """Of each position over part of the vocabulary, [P]: the token that is drawn from it, and what it weighs.

    score: fp32, its logit (divided by the temperature) and noise in sum. token: int64. logit: fp32. peak, total: fp32,
    as in select.Partial.
    """

    score: Tensor
    token: Tensor
    logit: Tensor
    peak: Tensor
    total: Tensor

    def pack(self) -> Tensor:
        """All of it, fp32 [P, 5]; ids below 2**24 survive exactly."""
        return torch.stack([each.float() for each in self], dim=-1)

    @staticmethod
    def unpack(packed: Tensor) -> Drawn:
        """The inverse of pack."""
        score, token, logit, peak, total = packed.unbind(-1)
        return Drawn(score, token.long(), logit, peak, total)


def draw(
    hidden: Tensor,
    head: Head,
    mask_id: int,
    draws: Draws,
    exchange: Exchange | None = None,
    spans: Tensor | None = None,
    lowered: Lowered | None = None,
) -> Best:
    """A token for each position, and its probability.

    A position has token -1 and probability 0 whose logits hold a NaN or plus infinity, or nothing but minus infinity
    beside the mask.

    Args:
        hidden: normed hidden states of the positions, [P, H].
        head, exchange, lowered: as for select.
        mask_id: never drawn.
        spans: where positions begin that are drawn from all tokens, then those that are drawn from some, and where
            these end, int32 [3]; what others get means nothing. A device saves their work.
    """
    if hidden.is_cuda:
        from sglang_llada.decode import sampling_triton

        return sampling_triton.draw(hidden, head, mask_id, draws, exchange, spans, lowered)
    return from_chunks(lambda: chunks(hidden, head, lowered), mask_id, draws, exchange)


def draw_whole(logits: Tensor, mask_id: int, draws: Draws) -> Best:
    """As draw, of logits fp32 [P, V] that exist already."""
    if logits.is_cuda:
        from sglang_llada.decode import sampling_triton

        return sampling_triton.draw(logits, None, mask_id, draws, None, None, None)
    return from_chunks(lambda: [(0, logits)], mask_id, draws)


def warm_up(vocabulary: int, mask_id: int, device: torch.device | str) -> None:
    """Draw from whole logits once, so that no request waits for kernels to be compiled."""
    one = torch.ones(1, device=device)
    draw_whole(torch.zeros(1, vocabulary, device=device), mask_id, Draws(one.long(), one, one, one, one - math.inf))


def from_chunks(logits: Chunks, mask_id: int, draws: Draws, exchange: Exchange | None = None) -> Best:
    """As draw, of logits that come chunk by chunk, as often as they are asked for."""

    def heated() -> Iterator[tuple[int, Tensor]]:
        for first, x in logits():
            yield first, divided(x, first, mask_id, draws)

    def ranks(mine: Tensor) -> Sequence[Tensor]:
        return [mine] if exchange is None else exchange(mine)

    def drawn(change: Callable[[Tensor], Tensor]) -> Drawn:
        mine = join([drawn_of(change(x), first, draws.key) for first, x in heated()])
        return join([Drawn.unpack(each) for each in ranks(mine.pack())])

    every = drawn(lambda x: x)
    searched = (draws.top_k < math.inf) | (draws.top_p < math.inf)
    low, width = torch.full_like(every.peak, -RANGE).where(searched, -math.inf), RANGE / BOUNDS
    for _ in range(PASSES):
        above = sum_in_order(torch.stack([above_bounds(x - every.peak[:, None], low, width) for _, x in heated()]))
        low = raised(low, width, sum_in_order(torch.stack(list(ranks(above)))), draws, every.total)
        width /= BOUNDS

    def cut_off(x: Tensor) -> Tensor:
        below = x - every.peak[:, None]
        return x.where((below > low[:, None]) & (below >= draws.least[:, None]), -math.inf)

    return finish(drawn(cut_off))


def divided(logits: Tensor, first: int, mask_id: int, draws: Draws) -> Tensor:
    """Logits fp32 [P, v] of the ids from `first` on over their temperatures; the mask's, if sound, minus infinity."""
    x = logits / draws.temperature.where(draws.drawn, 1.0)[:, None]
    is_mask = torch.arange(first, first + x.shape[-1], device=x.device) == mask_id
    return x.masked_fill_(is_mask & (x < float("inf")), float("-inf"))


def drawn_of(x: Tensor, first: int, key: Tensor) -> Drawn:
    """The record of logits [P, v] of the ids from `first` on."""
    peak = x.amax(-1)
    score = x + gumbel(key, torch.arange(first, first + x.shape[-1], device=x.device))
    at = score.argmax(-1, keepdim=True)
    score, logit = (each.gather(-1, at)[:, 0] for each in (score, x))
    return Drawn(score, at[:, 0] + first, logit, peak, mass_of(x, peak))


def join(parts: Sequence[Drawn]) -> Drawn:
    """Parts of the vocabulary, in order of their token ids, put together; of equal scores the lowest id."""
    score, token, logit, peak, total = (torch.stack(each) for each in zip(*parts, strict=True))
    at, highest = score.argmax(0, keepdim=True), peak.amax(0)
    score, token, logit = (each.gather(0, at)[0] for each in (score, token, logit))
    return Drawn(score, token, logit, highest, sum_in_order(total * (peak - reference_of(highest)).exp()))


def above_bounds(x: Tensor, low: Tensor, width: float) -> Tensor:
    """How many of the logits [P, v], less the highest, are above each bound, and their mass, fp32 [P, 2 BOUNDS].

    Bound j is low [P] + j * width.
    """
    bounds = low[:, None] + torch.arange(BOUNDS, device=x.device) * width
    passed = torch.searchsorted(bounds, x)  # so many bounds are below
    kinds = torch.stack((torch.ones_like(x), x.exp())).double()
    sums = kinds.new_zeros(2, len(x), BOUNDS + 1).scatter_add(-1, passed.expand(kinds.shape), kinds)
    above = sums[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return torch.cat(tuple(above), dim=-1).float()


def raised(low: Tensor, width: float, above: Tensor, draws: Draws, total: Tensor) -> Tensor:
    """The highest bound [P] at which tokens go, of `above` [P, 2 BOUNDS]; the lowest one if there is none."""
    count, mass = above.split(BOUNDS, dim=-1)
    go = (count >= draws.top_k[:, None]) | (mass > (draws.top_p * total)[:, None])  # true, then false
    return low + (go.sum(-1) - 1).clamp(min=0) * width


def finish(part: Drawn) -> Best:
    """The token and its probability, of a whole vocabulary's record."""
    prob = (part.logit - part.peak).exp() / part.total
    sound = prob.isfinite()
    return Best(part.token.where(sound, -1)[:, None], prob.where(sound, 0.0)[:, None])
