"""The threshold decode of LLaDA2.0 (LLaDA2.0 report; the reference loop is llada2/reference.py: generate).

A step decides every open position whose best token has probability > threshold (strictly) if those are at least the
quota, else the quota's most confident open positions; of equally confident ones the earliest. The quota splits the
block evenly over `steps`, the first `block mod steps` steps taking one more, so a block takes at most `steps` steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut


def step(block: BlockRows, scores: Scores, state: State, params: Params) -> StepOut:
    """One step; see the module and the contract."""
    confidence = scores.prob.masked_fill(~block.open, float("-inf"))  # [R, T]
    sure = block.open & (confidence > params.threshold[:, None])
    least = torch.minimum(quota(state.step, block.ids.shape[1], params.steps), block.open.sum(-1))  # [R]
    forced = rank(confidence) < least[:, None]  # the quota's most confident
    enough = sure.sum(-1) >= least
    chosen = torch.where(enough[:, None], sure, forced)
    still_open = block.open & ~chosen
    return StepOut(
        ids=torch.where(chosen, scores.token, block.ids),
        open=still_open,
        state=replace(state, step=state.step + 1),
        done=~still_open.any(-1),
        written=chosen,
        prob=scores.prob,
        origin=positions(block.ids),
    )


def positions(ids: Tensor) -> Tensor:
    """0 to T - 1 for each row of [R, T]: the origin of tokens where nothing moves."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def quota(step_index: Tensor, block_size: int, steps: Tensor) -> Tensor:
    """Positions that step `step_index` [R] (from 0) must decide at least, int64 [R]."""
    return block_size // steps + (step_index < block_size % steps).long()


def rank(confidence: Tensor) -> Tensor:
    """Place of each position when sorted by falling confidence, of equals the earliest first; int64 [R, T]."""
    order = confidence.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(confidence.shape[-1], device=confidence.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
