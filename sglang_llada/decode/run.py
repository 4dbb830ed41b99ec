"""The decode of requests whose output must conform to a grammar: from left to right, as far as the network is sure.

A step decides the first open position, and of those after it as many in a row as have probability > threshold
(strictly). What the grammar allows at the first open position is known, and the others are candidates: the host keeps
the longest run of them that the grammar accepts (host/requests/grammar.py). At most T steps: each decides a position.
"""

from __future__ import annotations

from dataclasses import replace

from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.threshold import positions


def step(block: BlockRows, scores: Scores, state: State, params: Params) -> StepOut:
    """One step; see the module and the contract."""
    first = block.open & (block.open.cumsum(-1) == 1)  # [R, T]
    passed = ~block.open | first | (scores.prob > params.threshold[:, None])
    chosen = block.open & passed.long().cumprod(-1).bool()
    still_open = block.open & ~chosen
    return StepOut(
        ids=scores.token.where(chosen, block.ids),
        open=still_open,
        state=replace(state, step=state.step + 1),
        done=~still_open.any(-1),
        written=chosen,
        prob=scores.prob,
        origin=positions(block.ids),
    )
