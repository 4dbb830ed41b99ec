"""The tensor part of a step, from hidden states to decisions: the same code eagerly and inside a CUDA graph.

Rows come and go as numbers (layout.py). Every algorithm that a row asks for steps over all rows, and each row takes
what its own says: no row waits for another's kind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sglang_llada.decode import ALGORITHMS, levenshtein
from sglang_llada.decode.contract import Scores, State, StepOut, Tokens
from sglang_llada.decode.head import Best, Exchange, Head
from sglang_llada.decode.layout import CODES, draws_of, repeated, unpack
from sglang_llada.decode.sampling import draw
from sglang_llada.decode.select import select
from sglang_llada.decode.whole import Group, choose, put_first


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
    drawing: int = 0,
    found: StepOut | None = None,
) -> StepOut:
    """Decisions for all rows of a forward.

    Args:
        hidden: normed hidden states, [R * T, H].
        ids: tokens of the forward, int64 [R * T].
        table: records of the rows, int64 [R, width of a record].
        count: at least as many positions as are open or editable. A graph does not know and says R * T.
        head, exchange: as for select.
        block_size, tokens: T, and the checkpoint's own tokens, which say what algorithms there are.
        groups: requests with more to them than their best tokens.
        codes: of the rows' algorithms, and perhaps others. A graph does not know.
        drawing: at least as many positions as are open or editable in rows that draw; 0 if no row does.
        found: a step over the same rows, and perhaps more behind them, without groups; its tokens stand but for theirs.

    Returns:
        The rows' decisions; all ids of a row are -1 if one of its logits that matter was not finite.

    On a GPU a few kernels of ours do all of it, unless tokens are inserted.
    """
    if hidden.is_cuda and not tokens.indel:
        from sglang_llada.decode import decide_triton

        where = (head, block_size, tokens.mask)
        return decide_triton.decide(hidden, ids, table, count, *where, exchange, groups, drawing, found)
    return in_torch(hidden, ids, table, count, head, block_size, tokens, exchange, groups, codes, drawing, found)


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
    drawing: int = 0,
    found: StepOut | None = None,
) -> StepOut:
    """decide(), for any device and rows of any kind."""
    block, state, params, algorithm = unpack(ids, table, block_size, tokens)
    # Where the checkpoint inserts and deletes several candidates are looked at, the mask among them.
    never, k = (-1, levenshtein.CANDIDATES) if tokens.indel else (tokens.mask, 1)
    wanted = (block.open | block.editable).flatten()
    lowered, draws = repeated(ids, table, block_size), draws_of(table, block_size)
    choosing = [group for group in groups if group.chooses]
    if found is not None and found.best is not None:  # perhaps of a graph, which has rows behind these
        taken = Best(found.best.token[: len(ids)], found.best.prob[: len(ids)])
    else:
        elsewhere = [i for group in choosing for i in group.at]
        selected = wanted.index_fill(0, torch.tensor(elsewhere, device=ids.device), False) if elsewhere else wanted
        taken = Best(ids.new_zeros(len(ids), k), hidden.new_zeros(len(ids), k, dtype=torch.float32))
        if len(elsewhere) < count:
            first = selected.to(torch.uint8).argsort(descending=True, stable=True)[: count - len(elsewhere)]
            some = select(hidden[first], head, never, k, exchange, selected.sum(), lowered.at(first))
            taken = put(taken, first, some)
        if drawing:
            first, spans = by_kind(wanted & draws.drawn, draws.cut, drawing)
            some = draw(hidden[first], head, tokens.mask, draws.at(first), exchange, spans, lowered.at(first))
            taken = put_first(put(Best(taken.token[:, :1], taken.prob[:, :1]), first, some), taken, draws.drawn)
    best = taken
    if choosing:
        best = put(best, *choose(hidden, choosing, head, tokens.mask, never, k, exchange, draws, lowered))
    token, prob = best.token, best.prob
    shape = (*block.ids.shape, -1)
    token, prob = token.view(shape), prob.view(shape)
    unsound = ((token[..., 0] < 0) & wanted.view(block.ids.shape)).any(-1, keepdim=True)
    one, chance = token[..., 0], prob[..., 0]
    if never < 0:  # the mask may be the best candidate
        one, chance = levenshtein.first(token, prob, token != tokens.mask)
    scores = Scores(one, chance, candidates=token, chances=prob)
    out: StepOut | None = None
    for name, each in ALGORITHMS.items():
        if CODES[name] not in codes or (each.indel and not tokens.indel):
            continue
        mine = each.step(block, scores, state, params)
        out = mine if out is None else where(algorithm == CODES[name], mine, out)
    assert out is not None
    return replace(out, ids=out.ids.masked_fill(unsound, -1), best=taken)


def put(all_: Best, at: Tensor, some: Best) -> Best:
    """Candidates [R * T, k] with those of some flat positions."""
    return Best(all_.token.index_copy(0, at, some.token), all_.prob.index_copy(0, at, some.prob))


def by_kind(drawn: Tensor, cut: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first `most` flat positions, the drawn ones [R * T] first, of these the cut ones last; and draw's spans."""
    kind = torch.where(drawn, cut.long(), 2)
    counts = torch.stack((drawn & ~cut, drawn)).sum(-1)
    return kind.argsort(stable=True)[:most], torch.cat((counts.new_zeros(1), counts)).int()


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
