"""Whole logits, for the positions of requests that ask for more than the best tokens.

Most positions never have logits. Those of requests that sample or change their logits (penalties, bias, grammars,
custom processors) do: all ids of CHUNK positions at once. A position's logits are first changed as its request says,
and then its token is the best one, with the mask counting in its probability, or is drawn (sampling.py).
Log-probabilities need none (logprobs.py).
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
from sglang_llada.decode.sampling import draw
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
        vocabulary: V.
        noise: a number in [0, 1) for each, if the request samples.
        shape: what it does to their logits.
        report: the log-probabilities that it wants.
    """

    at: list[int]
    vocabulary: int
    sampling: Sampling | None = None
    noise: Tensor | None = None
    shape: Shape | None = None
    report: Report | None = None

    @property
    def chooses(self) -> bool:
        """Whether its tokens come from here; a greedy request that only wants log-probabilities leaves it to select."""
        return self.sampling is not None or self.shape is not None

    @property
    def whole(self) -> bool:
        """Whether it draws from all tokens."""
        how = self.sampling
        return how is not None and how.top_p == 1 and how.min_p == 0 and how.top_k >= self.vocabulary


def order(group: Group) -> tuple[bool, bool]:
    """Sorts groups as a step needs them: those that draw from all tokens, then others that draw, then the rest."""
    return group.sampling is None, not group.whole


def choose(
    hidden: Tensor,
    groups: list[Group],
    head: Head,
    mask_id: int,
    never: int,
    count: int,
    exchange: Exchange | None,
    lowered: Lowered | None = None,
) -> tuple[Tensor, Best]:
    """The flat positions [P] of groups that choose, of which there is at least one, and the best tokens there.

    Args:
        hidden: of all positions of the forward, [R * T, H].
        groups: sorted by order().
        mask_id: the mask, which is never drawn.
        never: what is no candidate either, as for select.
        count: k; a drawn token goes before the best ones.
        lowered: of all positions of the forward, a logit that is changed before anything else.
    """
    where: list[Tensor] = []
    found: list[Best] = []
    for part in parts([group for group in groups if group.chooses]):
        at, logits = shaped_logits(hidden, part, head, exchange, lowered)
        draws = draws_of(part, hidden.device)
        n = 0 if draws is None else len(draws.noise)
        if draws is not None:
            found.append(drawn(logits[:n], mask_id, draws, never, count))
        if n < len(logits):
            found.append(best(logits[n:], never, count))
        where.append(at)
    return torch.cat(where), Best(torch.cat([each.token for each in found]), torch.cat([each.prob for each in found]))


def drawn(logits: Tensor, mask_id: int, draws: Draws, never: int, count: int) -> Best:
    """A drawn token of each position before its count - 1 best ones."""
    others = best(logits, never, count - 1) if count > 1 else None  # before the draw, which spoils the logits
    token, prob = draw(logits, mask_id, draws)
    one = Best(token[:, None], prob[:, None])
    if others is None:
        return one
    return Best(torch.cat((one.token, others.token), dim=-1), torch.cat((one.prob, others.prob), dim=-1))


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


def draws_of(part: list[Group], device: torch.device) -> Draws | None:
    """How the groups draw that do, which stand first."""
    found = [(group, group.sampling, group.noise) for group in part if group.sampling is not None]
    if not found:
        return None
    counts = torch.tensor([len(group.at) for group, *_ in found])
    noise = torch.cat([noise for *_, noise in found if noise is not None])
    hows = torch.tensor([(how.temperature, how.top_k, how.top_p, how.min_p) for _, how, _ in found], dtype=noise.dtype)
    table = torch.cat((hows.repeat_interleave(counts, 0).T, noise[None]))  # one copy takes it all
    temperature, top_k, top_p, min_p, noise = to_device(table, device)
    return Draws(
        temperature=temperature.float(),
        top_k=top_k.long(),
        top_p=top_p.float(),
        min_p=min_p.float(),
        noise=noise,
        whole=sum(len(group.at) for group, *_ in found if group.whole),
    )
