"""The inserting and deleting decode of LLaDA2.2 (the reference loop is llada2/editing.py: LevenshteinBlock).

To the editing of 2.1 come two tokens: DELETE drops its position and what follows moves up, SPLIT puts a new hole before
the token that it stands for. The block stays T long: masks fill it up, or its end is cut. What is given never moves.
*Original* holes are those that the block began with, wherever they move; a decided token may become a hole again
(the mask is a candidate there), and is original again if it was. A hole never takes the mask.

While original holes remain, every open position with probability > threshold is decided, and at least the schedule's
number plus the number of newer holes, most confident first; after that all open positions are. Steps that begin without
original holes are post-edit steps; the count starts again when an original hole comes back, unless `cumulative_budget`.
The block is done when a step changes nothing, or after its last step: the first past `max_post_edit_steps`, at the
latest the bound, which takes no mask, DELETE or SPLIT and decides all that is open.

A block that began an earlier step (of the last SEEN) as it is now would go round for ever: the least confident of the
positions that would change takes the best of its CANDIDATES tokens that was not written there (of the last TRIED).

At most T + max_post_edit_steps + 1 steps: the last step is made at that index whatever the scores are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.threshold import positions, quota, rank

CANDIDATES = 5  # tokens per position that a step looks at: three may be forbidden
TRIED = 4  # tokens remembered per position
SEEN = 64  # states of the block remembered


def memory_size(block_size: int) -> int:
    """Of a row's memory: a flag per position, tokens written there, states seen."""
    return block_size * (1 + TRIED) + SEEN


def step(block: BlockRows, scores: Scores, state: State, params: Params) -> StepOut:
    """One step; see the module and the contract."""
    assert scores.candidates is not None and scores.chances is not None and state.memory is not None
    T = block.ids.shape[1]
    newer = state.memory[:, :T] > 0  # holes that the block did not begin with, and what was put there
    tried = state.memory[:, T : T * (1 + TRIED)].unflatten(-1, (T, TRIED))
    seen = state.memory[:, T * (1 + TRIED) :]

    original_left = (block.open & ~newer).any(-1)  # [R]
    before = state.edits.masked_fill(original_left & ~params.cumulative_budget, 0)
    edits = before + ~original_left
    bound = T + params.max_post_edit_steps
    last = (edits > params.max_post_edit_steps) | (state.step >= bound)

    tokens = params.tokens
    banned = scores.candidates == tokens.mask
    banned = banned & (block.open | last[:, None])[..., None]
    edit_tokens = (scores.candidates == tokens.delete) | (scores.candidates == tokens.split)
    banned = banned | (edit_tokens & last[:, None, None])
    token, prob = first(scores.candidates, scores.chances, ~banned)  # [R, T]

    confidence = prob.masked_fill(~block.open, float("-inf"))
    sure = block.open & (confidence > params.threshold[:, None])
    least = quota(state.step, T, params.steps) + (block.open & newer).sum(-1)
    forced = block.open & (rank(confidence) < least[:, None])
    decided = torch.where((sure.sum(-1) >= least)[:, None], sure, forced)
    decided = torch.where((original_left & ~last)[:, None], decided, block.open)
    edited = block.editable & (token != block.ids) & (prob > params.edit_threshold[:, None])
    written = decided | edited

    now = fingerprint(block.ids)
    again = (seen == now[:, None]).any(-1) & ~last
    changing = written & (token != block.ids)
    weakest = rank(-prob.masked_fill(~changing, float("inf"))) == 0
    untried = ~banned & ~(scores.candidates[..., None] == tried[:, :, None]).any(-1)
    another, its_prob = first(scores.candidates, scores.chances, untried)
    turn = weakest & changing & again[:, None] & untried.any(-1)
    token, prob = torch.where(turn, another, token), torch.where(turn, its_prob, prob)

    ids, newer, origin = apply(block, token, written, newer, tokens.mask, tokens.delete, tokens.split)
    came = origin.clamp(min=0)
    fixed = ~(block.open | block.editable)
    known = (tried == token[..., None]).any(-1)
    pushed = torch.cat((token[..., None], tried[..., :-1]), dim=-1)
    tried = torch.where((written & ~known)[..., None], pushed, tried)
    seen = torch.cat((now[:, None], seen[:, :-1]), dim=-1)
    return StepOut(
        ids=ids,
        open=(ids == tokens.mask) & ~fixed,
        state=State(
            step=state.step + 1,
            edits=edits,
            memory=torch.cat((newer.long(), tried.flatten(1), seen), dim=-1),
        ),
        done=last | ~written.any(-1),
        written=(written & (token != tokens.split)).gather(-1, came) & (origin >= 0),
        prob=prob.gather(-1, came),
        origin=origin,
    )


def first(candidates: Tensor, chances: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position the first allowed candidate and its probability; all [R, T, K] to [R, T]."""
    place = allowed.to(torch.uint8).argmax(-1, keepdim=True)
    return candidates.gather(-1, place)[..., 0], chances.gather(-1, place)[..., 0]


def apply(
    block: BlockRows, token: Tensor, written: Tensor, newer: Tensor, mask: int, delete: int, split: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, `newer` flags and where each stood (-1: nowhere), all [R, T], once what is written took effect."""
    T = block.ids.shape[1]
    deletes, splits = written & (token == delete), written & (token == split)
    value = torch.where(written & ~splits, token, block.ids)
    # A position goes to `to`; the new hole of a SPLIT is the mask that nobody is put over, one before. T is the bin.
    to = (1 - deletes.long() + splits.long()).cumsum(-1) - 1
    to = to.masked_fill(deletes, T).clamp(max=T)
    ids = torch.full((len(value), T + 1), mask, dtype=value.dtype, device=value.device).scatter(-1, to, value)
    flags = torch.ones_like(ids, dtype=torch.bool).scatter(-1, to, newer)
    origin = torch.full_like(ids, -1).scatter(-1, to, positions(block.ids))
    return ids[:, :T], flags[:, :T], origin[:, :T]


def fingerprint(ids: Tensor) -> Tensor:
    """A 64-bit hash of each row of [R, T] (polynomial modulo 2**64); never -1, the mark of a free place."""
    T = ids.shape[1]
    factor = torch.full((T,), 0x5851F42D4C957F2D, dtype=torch.int64, device=ids.device).cumprod(0)
    return ((ids + 1) * factor).sum(-1) & 0x7FFFFFFFFFFFFFFF
