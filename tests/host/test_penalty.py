"""The penalty for repeating the token to the left is the host's: its own step, on whole logits, decides the same."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.dllm.algorithm.joint_threshold import joint_threshold_update_step_vectorized

from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.decide import decide
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import fresh, numbers, record
from tests.sets import set_of

pytestmark = pytest.mark.host

T, V, MASK, ROWS = 32, 24, 7, 400
TOKENS = Tokens(MASK)


@pytest.mark.parametrize("penalty", [0.0, 0.4, 3.0, 100.0])
def test_a_step_is_the_hosts(penalty: float) -> None:
    """Random blocks that like to repeat themselves; some are prompts in part, some have nothing open."""
    torch.manual_seed(int(penalty))
    logits = torch.randn(ROWS, T, V) * 2
    logits[..., MASK] = -9.0  # where the host may choose the mask, we never do
    ids = torch.randint(0, V - 1, (ROWS, T)) % MASK
    ids = torch.where(torch.rand(ROWS, T) < 0.4, ids.roll(1, -1), ids)  # repetitions
    given = torch.arange(T) < torch.randint(0, T, (ROWS, 1)) * (torch.rand(ROWS, 1) < 0.4)
    is_open = ~given & (torch.rand(ROWS, T) < torch.rand(ROWS, 1) * (torch.rand(ROWS, 1) < 0.7))
    ids = ids.masked_fill(is_open, MASK)
    likes = torch.where(torch.rand(ROWS, T) < 0.7, ids.roll(1, -1), ids)
    logits.scatter_add_(-1, likes[..., None], torch.full((ROWS, T, 1), 2.0))

    how = {"threshold": 0.5, "edit_threshold": 0.2, "max_post_edit_steps": 16}
    theirs, finished, edits = ids.clone(), torch.zeros(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.int32)
    joint_threshold_update_step_vectorized(
        theirs.view(-1), logits.clone().view(-1, V), given, finished, edits, MASK, T, penalty_lambda=penalty, **how
    )
    params = DecodeConfig.defaults(T, "joint_threshold").replaced({**how, "penalty_lambda": penalty})
    table = torch.tensor(
        [
            record(set_of(o), set_of(e), numbers(params), fresh(T, TOKENS))
            for o, e in zip(is_open.tolist(), (~given & ~is_open).tolist(), strict=True)
        ]
    )
    head = Head(torch.eye(V))  # hidden states are logits
    ours = decide(logits.view(-1, V), ids.view(-1), table, ROWS * T, head=head, block_size=T, tokens=TOKENS)
    assert torch.equal(ours.ids, theirs)
    assert torch.equal(ours.state.edits, edits.long())
    if penalty:
        plain = numbers(DecodeConfig.defaults(T, "joint_threshold").replaced(how))
        table[:, -len(plain) :] = torch.tensor(plain)
        without = decide(logits.view(-1, V), ids.view(-1), table, ROWS * T, head=head, block_size=T, tokens=TOKENS)
        assert not torch.equal(without.ids, ours.ids), "the penalty changed nothing, so nothing was shown"
