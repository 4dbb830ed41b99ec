"""The tensor part of a step, from hidden states to decisions: the same code eagerly and inside a CUDA graph.

What a step must know of each row stands in one int64 table, so that one copy takes it to the device and a graph reads
it in one place. A row's record is the set of its open positions (bit i for position i), the state of its block, the set
of positions that may be edited once they are decided, its algorithm and its parameters; floats are kept as the bits of
a float64. What a step gives back of a row begins with its tokens and the first two of these, so that its next record
begins where the last one ended. Rows that decide nothing
(FILL, SEAL, padding) have the idle record. Every algorithm that a row asks for steps over all rows, and each row takes
what its own says: no row waits for another's kind.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import ALGORITHMS, levenshtein
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut, Tokens
from sglang_llada.decode.select import Best, Exchange, Head, Lowered, select
from sglang_llada.decode.whole import Group, choose

CODES = {name: code for code, name in enumerate(ALGORITHMS)}

# Of a record: the set of open positions and the state, which change from step to step, then what stays as it is.
OPEN_COLUMN = 0
COUNTS = ("step", "edits")  # of a state, before the memory
NUMBERS = ("steps", "max_post_edit_steps", "cumulative_budget")
FLOATS = ("threshold", "edit_threshold")
STAYS = ("editable", "algorithm", *NUMBERS, *FLOATS, "penalty_lambda")
EDITABLE_COLUMN, ALGORITHM_COLUMN = (STAYS.index(name) - len(STAYS) for name in ("editable", "algorithm"))


def fresh(block_size: int, tokens: Tokens) -> list[int]:
    """The state of a block that no step has seen, as it goes through records and comes back from steps."""
    return [0] * len(COUNTS) + [-1] * (levenshtein.memory_size(block_size) if tokens.indel else 0)


def numbers(params: DecodeConfig) -> tuple[int, ...]:
    """What a record says of a request's parameters, the same for all of its rows."""
    integers = (int(getattr(params, name)) for name in NUMBERS)
    floats = (bits(getattr(params, name)) for name in (*FLOATS, "penalty_lambda"))
    return (CODES[params.algorithm], *integers, *floats)


def record(is_open: int, editable: int, numbers: Sequence[int], state: Sequence[int]) -> list[int]:
    """The record of a DENOISE row; a position that is in both sets is open."""
    return [is_open, *state, editable, *numbers]


def idle(block_size: int, tokens: Tokens) -> list[int]:
    """The record of a row that decides nothing."""
    return record(0, 0, numbers(DecodeConfig.defaults(block_size)), fresh(block_size, tokens))


def unpack(ids: Tensor, table: Tensor, block_size: int, tokens: Tokens) -> tuple[BlockRows, State, Params, Tensor]:
    """A step's arguments and each row's algorithm [R]: ids [R * T] of the forward, table [R, width of a record]."""
    positions = torch.arange(block_size, device=table.device)
    step, edits = table[:, 1 : 1 + len(COUNTS)].unbind(-1)
    column = dict(zip(STAYS, table[:, -len(STAYS) :].unbind(-1), strict=True))
    is_open, editable = (sets[:, None] >> positions & 1 == 1 for sets in (table[:, OPEN_COLUMN], column["editable"]))
    floats = {name: column[name].view(torch.float64).float() for name in FLOATS}
    integers = {name: column[name] for name in NUMBERS}
    integers["cumulative_budget"] = integers["cumulative_budget"].bool()
    return (
        BlockRows(ids=ids.view(-1, block_size), open=is_open, editable=editable & ~is_open),
        State(step=step, edits=edits, memory=table[:, 1 + len(COUNTS) : -len(STAYS)]),
        Params(**integers, **floats, tokens=tokens),
        column["algorithm"],
    )


def repeated(ids: Tensor, table: Tensor, block_size: int) -> Lowered:
    """Of each position [R * T] the token to its left, as it stands in its block, and the row's penalty for it.

    The host's rule: the first position of a block has no such token, and to the right of an open one it is the mask.
    """
    has_left = torch.arange(block_size, device=table.device) > 0
    by = table[:, -1:].view(torch.float64).float() * has_left  # [R, T]
    return Lowered(ids.roll(1), by.flatten())


def pack(out: StepOut, *, trace: bool = False) -> Tensor:
    """All that the host reads of a step, int64 [R, T + 2 + len(fresh)]: ids, the set of open ones, the state, done.

    With `trace` [R, 3 T] more: written, origin, and prob as the bits of a float64.
    """
    if out.packed is not None:
        return out.packed if trace else out.packed[:, : -3 * out.ids.shape[1]]
    assert out.state.memory is not None
    is_open = (out.open.long() << torch.arange(out.ids.shape[1], device=out.ids.device)).sum(-1)
    counts = [getattr(out.state, name)[:, None] for name in COUNTS]
    more = (out.written.long(), out.origin, out.prob.double().view(torch.int64)) if trace else ()
    return torch.cat((out.ids, is_open[:, None], *counts, out.state.memory, out.done.long()[:, None], *more), dim=-1)


def decide(
    hidden: Tensor,
    ids: Tensor,
    table: Tensor,
    count: int,
    *,
    head: Head,
    block_size: int,
    tokens: Tokens,
    exchange: Exchange | None = None,
    groups: Sequence[Group] = (),
    codes: Collection[int] = tuple(CODES.values()),
    best: Best | None = None,
) -> StepOut:
    """Decisions for all rows of a forward.

    Args:
        hidden: normed hidden states, [R * T, H].
        ids: tokens of the forward, int64 [R * T].
        table: records of the rows, int64 [R, width of a record].
        count: at least as many positions as are open or editable. A graph does not know and says R * T.
        head, exchange: as for select.
        block_size, tokens: T, and the checkpoint's own tokens, which say what algorithms there are.
        groups: requests with more to them than their best tokens, sorted by whole.order().
        codes: of the rows' algorithms, and perhaps others. A graph does not know.
        best: StepOut.best of a step over the same rows, which is then not selected again.

    Returns:
        The rows' decisions; all ids of a row are -1 if one of its logits that matter was not finite.

    On a GPU a few kernels of ours do all of it, unless tokens are inserted.
    """
    if hidden.is_cuda and not tokens.indel:
        from sglang_llada.decode import decide_triton

        return decide_triton.decide(hidden, ids, table, count, head, block_size, tokens.mask, exchange, groups, best)
    return in_torch(hidden, ids, table, count, head, block_size, tokens, exchange, groups, codes)


def in_torch(
    hidden: Tensor,
    ids: Tensor,
    table: Tensor,
    count: int,
    head: Head,
    block_size: int,
    tokens: Tokens,
    exchange: Exchange | None = None,
    groups: Sequence[Group] = (),
    codes: Collection[int] = tuple(CODES.values()),
) -> StepOut:
    """decide(), for any device and rows of any kind."""
    block, state, params, algorithm = unpack(ids, table, block_size, tokens)
    # Where the checkpoint inserts and deletes several candidates are looked at, the mask among them.
    never, k = (-1, levenshtein.CANDIDATES) if tokens.indel else (tokens.mask, 1)
    wanted = (block.open | block.editable).flatten()
    lowered = repeated(ids, table, block_size)
    token, prob = ids.new_zeros(len(ids), k), hidden.new_zeros(len(ids), k, dtype=torch.float32)
    choosing = [group for group in groups if group.chooses]
    elsewhere = [i for group in choosing for i in group.at]
    selected = wanted.index_fill(0, torch.tensor(elsewhere, device=ids.device), False) if elsewhere else wanted
    if len(elsewhere) < count:
        first = selected.to(torch.uint8).argsort(descending=True, stable=True)[: count - len(elsewhere)]
        found = select(hidden[first], head, never, k, exchange, selected.sum(), lowered.at(first))
        token, prob = token.index_copy(0, first, found.token), prob.index_copy(0, first, found.prob)
    if choosing:
        at, found = choose(hidden, choosing, head, tokens.mask, never, k, exchange, lowered)
        token, prob = token.index_copy(0, at, found.token), prob.index_copy(0, at, found.prob)
    shape = (*block.ids.shape, -1)
    token, prob = token.view(shape), prob.view(shape)
    unsound = ((token[..., 0] < 0) & wanted.view(block.ids.shape)).any(-1, keepdim=True)
    best, chance = token[..., 0], prob[..., 0]
    if never < 0:  # the mask may be the best candidate
        best, chance = levenshtein.first(token, prob, token != tokens.mask)
    scores = Scores(best, chance, candidates=token, chances=prob)
    out: StepOut | None = None
    for name, each in ALGORITHMS.items():
        if CODES[name] not in codes or (each.indel and not tokens.indel):
            continue
        mine = each.step(block, scores, state, params)
        out = mine if out is None else where(algorithm == CODES[name], mine, out)
    assert out is not None
    return replace(out, ids=out.ids.masked_fill(unsound, -1))


def where(rows: Tensor, a: StepOut, b: StepOut) -> StepOut:
    """For each row what a says if `rows` [R] is true, else what b says."""
    pick = rows[:, None]
    assert a.state.memory is not None and b.state.memory is not None
    return StepOut(
        ids=torch.where(pick, a.ids, b.ids),
        open=torch.where(pick, a.open, b.open),
        state=State(
            step=torch.where(rows, a.state.step, b.state.step),
            edits=torch.where(rows, a.state.edits, b.state.edits),
            memory=torch.where(pick, a.state.memory, b.state.memory),
        ),
        done=torch.where(rows, a.done, b.done),
        written=torch.where(pick, a.written, b.written),
        prob=torch.where(pick, a.prob, b.prob),
        origin=torch.where(pick, a.origin, b.origin),
    )


def number(bits: int) -> float:
    """The float64 of an integer's bits."""
    x: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return x


def bits(x: float) -> int:
    """A float64 as the integer of the same bits."""
    number: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return number
