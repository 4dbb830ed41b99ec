"""Log-probabilities of tokens after a step, from the vocabulary chunk by chunk.

Whole logits exist only for requests that change them (whole.py); all others have CHUNK positions times VOCAB_CHUNK ids
of them at once. Of each chunk there remains a record, what is largest in it, what was asked for and the terms of a
softmax; chunks and shards of several ranks are put together by the same function, `join`. Ranks exchange such records,
where whole logits would be the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_llada.decode.head import Exchange, Head, Lowered
from sglang_llada.decode.select import lower, mass_of, reference_of, sum_in_order
from sglang_llada.decode.transfer import to_device
from sglang_llada.decode.whole import Group, parts, products, shaped_logits

VOCAB_CHUNK = 16384  # token ids; larger than select's, because each costs a dozen launches


class Asked(NamedTuple):
    """What is asked about P positions.

    ids: int64 [P, n], tokens of interest. top: how many of the largest. mask_id: never among those. temperature:
    fp32 [P], by which logits are divided. masked: bool [P], where the mask has no probability at all. lowered: as for
    select.
    """

    ids: Tensor
    top: int
    mask_id: int
    temperature: Tensor
    masked: Tensor
    lowered: Lowered | None


class Record(NamedTuple):
    """Of each position over part of the vocabulary, fp32 but for `token`; minus infinity for what is not in it.

    value, token: [P, k], the largest logits, falling, and their ids. given: [P, n], those of the ids asked for. peak,
    total: [P], as in select.Partial.
    """

    value: Tensor
    token: Tensor
    given: Tensor
    peak: Tensor
    total: Tensor

    def pack(self) -> Tensor:
        """All of it, fp32 [P, 2k + n + 2]; ids below 2**24 survive exactly."""
        return torch.cat((self.value, self.token.float(), self.given, self.peak[:, None], self.total[:, None]), dim=-1)

    @staticmethod
    def unpack(packed: Tensor, top: int) -> Record:
        """The inverse of pack."""
        value, token, given, sums = packed.split([top, top, packed.shape[-1] - 2 * top - 2, 2], dim=-1)
        return Record(value, token.long(), given, sums[:, 0], sums[:, 1])


def report(
    hidden: Tensor,
    groups: list[Group],
    ids: Tensor,
    origin: Tensor,
    head: Head,
    mask_id: int,
    exchange: Exchange | None,
    lowered: Lowered | None = None,
) -> Tensor:
    """Log-probabilities after a step, fp64, of all groups that want some, one after the other, flat.

    ids, origin: int64 [R, T], as in StepOut. Of each position: that of the token which the step put there, or moved
    away from there; the `top` largest, but not the mask's, and their ids; those of `ids`. They are of the distribution
    that the token came from before it was cut, or where the group's report says so of the logits as the network gives
    them. lowered: as for choose.
    """
    chosen = tokens_by_place(ids, origin)
    wanting = [group for group in groups if group.report is not None]
    found: dict[int, Tensor] = {}
    for part in parts([group for group in wanting if not shapes(group)]):
        at, asked = asked_of(part, chosen, mask_id, lowered)
        record = join((record_of(*chunk, asked) for chunk in chunks(hidden[at], head)), asked.top)
        if exchange is not None:
            record = join([Record.unpack(packed, asked.top) for packed in exchange(record.pack())], asked.top)
        found |= columns(part, record)
    for part in parts([group for group in wanting if shapes(group)]):
        _, logits = shaped_logits(hidden, part, head, exchange, lowered)
        found |= columns(part, record_of(0, logits, asked_of(part, chosen, mask_id, None)[1]))
    return torch.cat([found[id(group)] for group in wanting])


def shapes(group: Group) -> bool:
    """Whether what is reported are logits that the group has changed."""
    return group.shape is not None and group.report is not None and not group.report.original


def tokens_by_place(ids: Tensor, origin: Tensor) -> Tensor:
    """The token that a step put at each position, or moved away from there, int64 [R * T]."""
    T = ids.shape[1]
    place = torch.where(origin < 0, T, origin)
    return torch.zeros_like(ids[:, :1]).repeat(1, T + 1).scatter(-1, place, ids)[:, :T].flatten()


def asked_of(part: list[Group], chosen: Tensor, mask_id: int, lowered: Lowered | None) -> tuple[Tensor, Asked]:
    """The flat positions [P] of groups and what they ask about these, first their tokens of all `chosen` [R * T]."""
    reports = [group.report for group in part if group.report is not None]
    width = max(len(report.ids) for report in reports)
    table = []  # of each position: temperature, whether the mask is out, whether logits are lowered, where it is, ids
    for group, report in zip(part, reports, strict=True):
        how = None if report.original else group.sampling
        row = [1.0 if how is None else how.temperature, how is not None, not report.original]
        table += [[*row, at, *report.ids, *[0] * (width - len(report.ids))] for at in group.at]
    columns = to_device(torch.tensor(table, dtype=torch.float64), chosen.device)  # one copy takes it all
    at = columns[:, 3].long()
    lowered = None if lowered is None else lowered.at(at)
    return at, Asked(
        ids=torch.cat((chosen[at].clamp(min=0)[:, None], columns[:, 4:].long()), dim=-1),
        top=max(report.top for report in reports),
        mask_id=mask_id,
        temperature=columns[:, 0].float(),
        masked=columns[:, 1] > 0,
        lowered=None if lowered is None else Lowered(lowered.token, lowered.by * columns[:, 2].float()),
    )


def chunks(hidden: Tensor, head: Head) -> Iterator[tuple[int, Tensor]]:
    """The head's first id and logits fp32 [P, v], chunk by chunk."""
    for at, rows in enumerate(head.weight.split(VOCAB_CHUNK)):
        yield head.first + at * VOCAB_CHUNK, products(hidden, rows)


def record_of(first: int, logits: Tensor, asked: Asked) -> Record:
    """The record of logits fp32 [P, v] of the ids from `first` on, which are spoilt."""
    size = logits.shape[-1]
    if asked.lowered is not None:
        logits = lower(logits, first, asked.lowered)
    is_mask = torch.arange(first, first + size, device=logits.device) == asked.mask_id
    logits = logits.masked_fill(is_mask & asked.masked[:, None], float("-inf")).div_(asked.temperature[:, None])
    at = asked.ids - first
    given = logits.gather(-1, at.clamp(0, size - 1)).masked_fill((at < 0) | (at >= size), float("-inf"))
    peak = logits.amax(-1)
    total = mass_of(logits, peak)
    value, token = logits.masked_fill_(is_mask, float("-inf")).topk(min(asked.top, size), dim=-1)
    return Record(value, token + first, given, peak, total)


def join(records: Iterable[Record], top: int) -> Record:
    """Records of parts of the vocabulary as one of all of it."""
    value, token, given, peak, total = zip(*records, strict=True)
    values, index = torch.cat(value, dim=-1).topk(top, dim=-1)
    highest = torch.stack(peak).amax(0)
    mass = torch.stack(total) * (torch.stack(peak) - reference_of(highest)).exp()
    ids = torch.cat(token, dim=-1).gather(-1, index)
    return Record(values, ids, torch.stack(given).amax(0), highest, sum_in_order(mass))


def columns(part: list[Group], record: Record) -> dict[int, Tensor]:
    """Each group's part of the report, flat, by the group's identity."""
    # (x - peak) - log(total), as log_softmax has it: never above 0, and exact where one token has all the mass.
    value, given = (
        (x - record.peak[:, None] - record.total.log()[:, None]).double() for x in (record.value, record.given)
    )
    token, found, first = record.token.double(), {}, 0
    for group in part:
        assert group.report is not None
        rows, top, asked = slice(first, first + len(group.at)), group.report.top, 1 + len(group.report.ids)
        first += len(group.at)
        each = (given[rows, :1], value[rows, :top], token[rows, :top], given[rows, 1:asked])
        found[id(group)] = torch.cat(each, dim=-1).flatten()
    return found
