"""The editing decode of LLaDA2.1 (its report; the reference loop is llada2/editing.py: JointBlock).

A step decides every open position whose best token has probability > threshold (strictly), or if there is none the most
confident open position, of equals the earliest. At the same time it replaces every editable position whose best
token is another one with probability > edit_threshold. A step that begins with nothing open is a post-edit step. The
block is done after a step that changes nothing, which therefore has written its final KV, and when nothing is open and
max_post_edit_steps are spent: the host's code would make one more step then, which may change nothing and only writes
KV; here a SEAL row does that beside the next block's first step. With 0, edits are made in the steps that decide
something, and cost none of their own.

At most T + max_post_edit_steps steps: at most T begin with something open, since each decides a position and none opens
again, and at most max_post_edit_steps do not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.threshold import positions, rank


def step(block: BlockRows, scores: Scores, state: State, params: Params) -> StepOut:
    """One step; see the module and the contract."""
    confidence = scores.prob.masked_fill(~block.open, float("-inf"))  # [R, T]
    sure = block.open & (confidence > params.threshold[:, None])
    forced = block.open & (rank(confidence) == 0)
    decided = torch.where(sure.any(-1, keepdim=True), sure, forced)
    edits = state.edits + ~block.open.any(-1)
    edited = block.editable & (scores.token != block.ids) & (scores.prob > params.edit_threshold[:, None])
    written = decided | edited
    still_open = block.open & ~decided
    spent = ~still_open.any(-1) & (edits >= params.max_post_edit_steps)
    return StepOut(
        ids=torch.where(written, scores.token, block.ids),
        open=still_open,
        state=replace(state, step=state.step + 1, edits=edits),
        done=~written.any(-1) | spent,
        written=written,
        prob=scores.prob,
        origin=positions(block.ids),
    )
