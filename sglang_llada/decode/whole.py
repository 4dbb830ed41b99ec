"""Whole logits, for the positions of requests that ask for more than the best tokens.

Most positions never have logits. Those of requests that change theirs (penalties, bias, grammars, custom processors)
do: all ids of CHUNK positions at once. A position's logits are first changed as its request says, and then its token is
the best one, with the mask counting in its probability, or is drawn (sampling.py). Log-probabilities need none
(logprobs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_llada.config import Report, Sampling
from sglang_llada.decode.contract import Draws
from sglang_llada.decode.head import Best, Exchange, Head, Lowered
from sglang_llada.decode.sampling import draw_whole
from sglang_llada.decode.select import best, lower
from sglang_llada.decode.transfer import to_device

CHUNK = 256  # positions whose logits exist at once
HALVES = (torch.bfloat16, torch.float16)

Shape = Callable[[Tensor], Tensor]  # changes a request's logits, fp32 [p, V]


@dataclass(frozen=True, slots=True)
class Group:
    """Positions of a request of which tokens may change.

    Attributes:
        at: where they stand among the R * T of the forward.
        sampling: how the request draws, if it does.
        shape: what it does to their logits.
        report: the log-probabilities that it wants.
    """

    at: list[int]
    sampling: Sampling | None = None
    shape: Shape | None = None
    report: Report | None = None

    @property
    def chooses(self) -> bool:
        """Whether its tokens come from here; a request that only wants log-probabilities leaves that to a step."""
        return self.shape is not None


def choose(
    hidden: Tensor,
    groups: list[Group],
    head: Head,
    mask_id: int,
    never: int,
    count: int,
    exchange: Exchange | None,
    draws: Draws,
    lowered: Lowered | None = None,
) -> tuple[Tensor, Best]:
    """The flat positions [P] of groups that choose, of which there is at least one, and the best tokens there.

    Args:
        hidden: of all positions of the forward, [R * T, H].
        mask_id: the mask, which is never drawn.
        never: what is no candidate either, as for select.
        count: k; a drawn token goes before the best ones.
        draws: how all positions of the forward are drawn.
        lowered: of all of them, a logit that is changed before anything else.
    """
    where: list[Tensor] = []
    found: list[Best] = []
    for part in parts([group for group in groups if group.chooses]):
        at, logits = shaped_logits(hidden, part, head, exchange, lowered)
        chosen, mine = best(logits, never, count), draws.at(at)
        if any(group.sampling is not None for group in part):
            chosen = put_first(draw_whole(logits, mask_id, mine), chosen, mine.drawn)
        found.append(chosen)
        where.append(at)
    return torch.cat(where), Best(torch.cat([each.token for each in found]), torch.cat([each.prob for each in found]))


def put_first(drawn: Best, best: Best, where: Tensor) -> Best:
    """Candidates [P, k] with, `where` [P], a drawn one before the best k - 1."""
    token, prob = (
        torch.where(where[:, None], torch.cat((mine, others[:, :-1]), dim=-1), others)
        for mine, others in ((drawn.token, best.token), (drawn.prob, best.prob))
    )
    return Best(token, prob)


def shaped_logits(
    hidden: Tensor, part: list[Group], head: Head, exchange: Exchange | None, lowered: Lowered | None = None
) -> tuple[Tensor, Tensor]:
    """Flat positions [P] of these groups, and their logits, fp32 [P, V], as the groups change them."""
    at = places(part, hidden.device)
    logits, first = whole_logits(hidden[at], head, exchange), 0
    if lowered is not None:
        logits = lower(logits, 0, lowered.at(at))
    for group in part:
        rows = slice(first, first + len(group.at))
        first += len(group.at)
        if group.shape is not None:
            logits[rows] = group.shape(logits[rows])
    return at, logits


def places(part: list[Group], device: torch.device) -> Tensor:
    """The flat positions of groups, int64 [P]."""
    return to_device(torch.tensor([i for group in part for i in group.at]), device)


def whole_logits(hidden: Tensor, head: Head, exchange: Exchange | None) -> Tensor:
    """Logits fp32 [P, V] of all token ids, from all ranks if the head is sharded."""
    logits = products(hidden, head.weight)
    if exchange is None:
        return logits
    padded = F.pad(logits, (0, head.slots - logits.shape[-1]), value=float("nan"))
    return torch.cat(list(exchange(padded)), dim=-1)[:, : head.vocabulary]


def products(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits fp32 [P, v] of rows of a head, never rounded to its type."""
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in HALVES:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # a head in fp32 would be a copy of all of it
    return F.linear(hidden.float(), weight.float())


def parts(groups: list[Group]) -> Iterator[list[Group]]:
    """The groups in order, cut where CHUNK positions are passed."""
    part: list[Group] = []
    for group in groups:
        if part and sum(len(each.at) for each in part) + len(group.at) > CHUNK:
            yield part
            part = []
        part.append(group)
    if part:
        yield part
