"""The policy's loss over recorded trajectories of a block-diffusion decode.

An answer is a chain of decisions: each step sees the clean blocks before its block and the block as it stood, and draws
the tokens that it decides independently of each other. The log-probability of a rollout is the sum over these. All
steps of a rollout are one sequence for the network: the clean blocks, then a copy of the block for each step, which
sees itself and the clean blocks before it. So one forward gives every decision's log-probability, as many steps as
there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.rl.rollouts import Rollout
from sglang_llada.llada2.reference import Llada2ForDiffusion

CLIP = 0.2  # how far a decision's probability may move from the one with which it was drawn, before it teaches no more


@dataclass(frozen=True, slots=True)
class Decisions:
    """Rollouts as the network takes them, padded to the longest.

    Attributes:
        ids, positions: int64 [B, L]. mask: bool [B, L, L], True where a query (row) may attend.
        row, at, token: int64 [N], of each decision its rollout, its place in [0, L) and what was drawn.
        drawn: fp32 [N], the log-probability with which it was drawn.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    row: Tensor
    at: Tensor
    token: Tensor
    drawn: Tensor


def pack(rollouts: Sequence[Rollout], block_size: int, mask_id: int) -> Decisions:
    """Every decision of these rollouts."""
    ids, positions, copies = [], [], []
    found: list[tuple[int, int, int, float]] = []
    for b, each in enumerate(rollouts):
        sequence = each.prompt + each.answer
        clean = max((step.start for step in each.steps), default=0)
        mine, where, copy = sequence[:clean], list(range(clean)), [0] * clean
        for number, step in enumerate(each.steps, 1):
            found += [(b, len(mine) + i, token, step.chances[i]) for i, token in step.decided.items()]
            mine += [mask_id if token is None else token for token in step.seen]
            where += range(step.start, step.start + block_size)
            copy += [number] * block_size
        ids.append(torch.tensor(mine))
        positions.append(torch.tensor(where))
        copies.append(torch.tensor(copy))
    padded, places = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (ids, positions))
    copy_of = torch.nn.utils.rnn.pad_sequence(copies, batch_first=True, padding_value=-1)
    row, at, token = (torch.tensor([each[i] for each in found], dtype=torch.int64) for i in range(3))
    chance = torch.tensor([each[3] for each in found])
    return Decisions(padded, places, sees(places // block_size, copy_of), row, at, token, chance.log())


def sees(block: Tensor, copy: Tensor) -> Tensor:
    """Who may attend to whom, bool [B, L, L]: all to the clean blocks before their own, a block or its copy to itself.

    Args:
        block: of each position, int64 [B, L]. copy: 0 of clean blocks, then the number of the step; -1 of padding.
    """
    q, k, qc, kc = block[:, :, None], block[:, None, :], copy[:, :, None], copy[:, None, :]
    return ((kc == 0) & (k < q)) | ((kc == qc) & (k == q))


def log_probs(model: Llada2ForDiffusion, decisions: Decisions, mask_id: int) -> Tensor:
    """The log-probability of each decision as the network is now, fp32 [N]: at temperature 1 and without the mask."""
    hidden = model.hidden(decisions.ids, decisions.positions, decisions.mask)
    logits = model.lm_head(hidden[decisions.row, decisions.at]).float()
    logits[:, mask_id] = float("-inf")
    return logits.log_softmax(-1).gather(-1, decisions.token[:, None])[:, 0]


def policy_loss(now: Tensor, drawn: Tensor, advantage: Tensor) -> Tensor:
    """The clipped loss of PPO, a mean over decisions; all fp32 [N], the last each decision's rollout's advantage."""
    ratio = (now - drawn).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def advantages(rewards: Sequence[Sequence[float]]) -> Tensor:
    """Of each answer how much better it is than the others to its prompt, in standard deviations; fp32 [P * n]."""
    table = torch.tensor(rewards)
    spread = table.std(-1, correction=0, keepdim=True)
    return ((table - table.mean(-1, keepdim=True)) / (spread + 1e-4)).flatten()
