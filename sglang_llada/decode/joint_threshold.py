"""The editing decode of LLaDA2.1 (its report; the reference loop is llada2/editing.py: JointBlock).

A step decides every open position whose best token has probability > threshold (strictly), or if there is none the most
confident open position, of equals the earliest. At the same time it replaces every editable position whose best
token is another one with probability > edit_threshold. A step that begins with nothing open counts as a post-edit
step; the first past the budget changes nothing. The block is done after a step that changes nothing, which therefore
has written its final KV.

At most T + max_post_edit_steps + 1 steps: at most T begin with something open, since each decides a position and none
opens again, and of the others at most max_post_edit_steps change anything.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.threshold import rank


def step(block: BlockRows, scores: Scores, state: State, params: Params) -> StepOut:
    """One step; see the module and the contract."""
    confidence = scores.prob.masked_fill(~block.open, float("-inf"))  # [R, T]
    sure = block.open & (confidence > params.threshold[:, None])
    forced = block.open & (rank(confidence) == 0)
    decided = torch.where(sure.any(-1, keepdim=True), sure, forced)
    nothing_open = ~block.open.any(-1)
    edits = state.edits + nothing_open
    may_edit = block.editable & ~(nothing_open & (edits > params.max_post_edit_steps))[:, None]
    edited = may_edit & (scores.token != block.ids) & (scores.prob > params.edit_threshold[:, None])
    written = decided | edited
    return StepOut(
        ids=torch.where(written, scores.token, block.ids),
        open=block.open & ~decided,
        state=replace(state, step=state.step + 1, edits=edits),
        done=~written.any(-1),
    )
