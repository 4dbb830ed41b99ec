"""Selection without logits: a position's best tokens and their probabilities, of a vocabulary that is never whole.

The head runs over chunks of the vocabulary and keeps, per position, the terms of a running softmax and the best tokens
so far. Chunks, parts that run side by side on a device, and shards of several ranks are reduced to the same record,
`Partial` (head.py), and put together by the same function, `fold`; ranks exchange `Partial.pack()`, 8 (k + 1) bytes per
position.

Logits are fp32 whatever the weights are: products are accumulated in fp32 and never rounded to the weights' type. A
step needs positions x VOCAB_CHUNK of them at once, plus one chunk of weights where those are not fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_llada.decode.head import Best, Exchange, Head, Lowered, Partial

VOCAB_CHUNK = 4096  # token ids whose logits exist at once


def select(
    hidden: Tensor,
    head: Head,
    mask_id: int,
    count: int = 1,
    exchange: Exchange | None = None,
    wanted: Tensor | None = None,
    lowered: Lowered | None = None,
) -> Best:
    """Best tokens of each position; of equal logits the lowest id.

    Args:
        hidden: normed hidden states of the positions, [P, H].
        head: what this rank holds of the output embedding.
        mask_id: never a candidate; it counts in the probability.
        count: k, how many tokens per position.
        exchange: with a sharded vocabulary, gives every rank's tensor in order of rank for this rank's.
        wanted: how many of the positions, from the first, matter, int64 []; what the others get means nothing. A device
            saves their work without the host knowing the number.
        lowered: of each position a logit that is changed first.
    """
    if hidden.is_cuda:
        from sglang_llada.decode import select_triton

        return select_triton.select(hidden, head, mask_id, count, exchange, wanted, lowered)
    part = reduce(hidden, head, mask_id, count, lowered)
    if exchange is not None:
        part = merge([Partial.unpack(packed) for packed in exchange(part.pack())])
    return finish(part)


def best(logits: Tensor, mask_id: int, count: int = 1) -> Best:
    """As select, of logits [P, V] that exist already."""
    return finish(reduce_logits(logits.float(), 0, mask_id, count))


def reduce(hidden: Tensor, head: Head, mask_id: int, count: int, lowered: Lowered | None = None) -> Partial:
    """A head reduced chunk by chunk."""
    part: Partial | None = None
    for first, logits in chunks(hidden, head, lowered):
        chunk = reduce_logits(logits, first, mask_id, count)
        part = chunk if part is None else merge([part, chunk])
    assert part is not None
    return part


def chunks(hidden: Tensor, head: Head, lowered: Lowered | None = None) -> Iterator[tuple[int, Tensor]]:
    """The head's ids in parts: the first id of each and logits fp32 [P, v]."""
    hidden = hidden.float()
    for at, rows in enumerate(head.weight.split(VOCAB_CHUNK)):
        first = head.first + at * VOCAB_CHUNK
        logits = F.linear(hidden, rows.float())
        yield first, logits if lowered is None else lower(logits, first, lowered)


def reduce_logits(logits: Tensor, first: int, mask_id: int, count: int) -> Partial:
    """Logits fp32 [P, v] of the token ids from `first` on, reduced."""
    ids = torch.arange(first, first + logits.shape[-1], device=logits.device)
    value, index = top(logits.masked_fill(ids == mask_id, float("-inf")), count)
    peak = logits.amax(-1)
    return Partial(value, index + first, peak, mass_of(logits, peak))


def lower(logits: Tensor, first: int, lowered: Lowered) -> Tensor:
    """Logits fp32 [P, v] of the token ids from `first` on, those changed in place that are to count as lower."""
    at, last = lowered.token - first, logits.shape[-1] - 1
    by = lowered.by.masked_fill((at < 0) | (at > last), 0.0)
    return logits.scatter_add_(-1, at.clamp(0, last)[:, None], -by[:, None])


def merge(parts: list[Partial]) -> Partial:
    """Parts of the vocabulary, in order of their token ids, put together."""
    return fold(
        torch.cat([part.logit for part in parts], dim=-1),
        torch.cat([part.token for part in parts], dim=-1),
        torch.stack([part.peak for part in parts]),
        torch.stack([part.total for part in parts]),
        parts[0].logit.shape[-1],
    )


def fold(logit: Tensor, token: Tensor, peak: Tensor, total: Tensor, count: int) -> Partial:
    """One record of S parts: logit, token [P, n], of equal logits the lower ids first; peak, total [S, P]."""
    value, index = top(logit, count)
    highest = peak.amax(0)
    mass = total * (peak - reference_of(highest)).exp()
    return Partial(value, token.gather(-1, index), highest, sum_in_order(mass))


def finish(part: Partial) -> Best:
    """Probabilities of a whole vocabulary's record."""
    prob = (part.logit - part.peak[:, None]).exp() / part.total[:, None]
    sound = prob[:, :1].isfinite()
    return Best(part.token.where(sound, -1), prob.where(sound, 0.0))


def mass_of(logits: Tensor, peak: Tensor) -> Tensor:
    """Sum of exp(logit - peak) of each row, fp32 [P], of logits [P, v] and their peak [P]; 0 where all are -inf.

    By way of softmax, which sums each row alike; the order of a plain sum on a GPU follows from the number of rows.
    """
    return logits.softmax(-1).amax(-1).reciprocal().masked_fill(peak == float("-inf"), 0.0)


def sum_in_order(parts: Tensor) -> Tensor:
    """Sum of [S, P] over S, one part after the other; the order of torch's sum follows from P."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def reference_of(peak: Tensor) -> Tensor:
    """What to subtract before exp(): the peak, but 0 where all is minus infinity, so that terms are 0 and not NaN."""
    return peak.masked_fill(peak == float("-inf"), 0.0)


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of [P, n] and where they stand, both [P, count]; of equals the first.

    torch.topk does not say which of equals it gives; argmax gives the first.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(count):
        index = values.argmax(-1, keepdim=True)
        found.append((values.gather(-1, index), index))
        if len(found) < count:
            values = values.scatter(-1, index, float("-inf"))
    return torch.cat([v for v, _ in found], dim=-1), torch.cat([i for _, i in found], dim=-1)
