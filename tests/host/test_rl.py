"""Learning by trying (examples/rl): a trainer's network and a server that takes its weights are one policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from examples.rl.loss import advantages, log_probs, pack, policy_loss
from examples.rl.rollouts import Http, Rollout, Step, rollouts, steps_of
from examples.rl.train import CHECKPOINT, Plan, Trainer
from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.reference import Llada2ForDiffusion
from sglang_llada.options import Decode, Snapshot
from tests.host.serving import Server

pytestmark = pytest.mark.host

CLOSE = 1e-3  # of log-probabilities, which two implementations sum in different orders
PLAN = Plan(noise=0.58, questions=3, samples=4)


@pytest.fixture
def teachable(server: Server) -> Iterator[Http]:
    """The server of all tests, which has its own weights again afterwards."""
    try:
        yield Http(server.url)
    finally:
        server.post("/resume_memory_occupation")
        assert server.post("/update_weights_from_disk", {"model_path": str(CHECKPOINT)}).ok
        server.flush()


def test_steps_are_read_from_snapshots() -> None:
    """Blocks of four; two of the prompt's tokens begin the first one. The last step also decides the answer's end."""
    snapshots = [
        Snapshot(1, 0, [None, 21], [None, 1], [None, 0.5]),
        Snapshot(2, 2, [None] * 4, [None] * 4, [None] * 4),
        Snapshot(3, 2, [None, 31, None, 33], [None, 1, None, 1], [None, 0.25, None, 0.75]),
        Snapshot(4, 4, [], [], []),
    ]
    decode = Decode(4, 4, 4, [2, 2], [2, 1, 2, 1], [0.9, 0.5, 0.8, 0.25], snapshots, [])
    assert steps_of([10, 11], [20, 21, 30, 31], decode, 4) == [
        Step(0, [10, 11, None, None], {3: 21}, {3: 0.5}),
        Step(0, [10, 11, None, 21], {2: 20}, {2: 0.9}),
        Step(4, [None] * 4, {1: 31, 3: 33}, {1: 0.25, 3: 0.75}),
        Step(4, [None, 31, None, 33], {0: 30}, {0: 0.8}),
    ]


def test_a_rollout_in_one_forward_has_the_log_probabilities_of_its_steps(
    teachable: Http, reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    """Each step by itself through the reference, all at once through the packed sequence, and as the server drew."""
    prompts = [[70, 71, 72], list(range(100, 150))]  # of which the network has never seen the like
    tried = [each for group in rollouts(teachable, prompts, 3, 70, facts.block_size) for each in group]
    assert all(each.steps for each in tried) and max(len(each.steps) for each in tried) > 4
    alone = torch.cat([step_by_step(reference, each, facts.mask_id) for each in tried])
    decisions = pack(tried, facts.block_size, facts.mask_id)
    with torch.no_grad():
        together = log_probs(reference, decisions, facts.mask_id)
    torch.testing.assert_close(together, alone, atol=CLOSE, rtol=0)
    torch.testing.assert_close(decisions.drawn, alone, atol=CLOSE, rtol=0)


def step_by_step(model: Llada2ForDiffusion, rollout: Rollout, mask_id: int) -> torch.Tensor:
    """The log-probability of each decision from a forward of its own."""
    found = []
    for step in rollout.steps:
        known = [*rollout.prompt, *rollout.answer][: step.start]
        seen = [mask_id if token is None else token for token in step.seen]
        logits = model.block_causal(known + seen)[step.start :]
        logits[:, mask_id] = float("-inf")
        found += [logits.log_softmax(-1)[i, token] for i, token in step.decided.items()]
    return torch.stack(found)


def test_the_server_draws_with_what_was_learnt(teachable: Http, facts: CheckpointFacts) -> None:
    """A step moves log-probabilities far, and those that the server drew with are never far from the network's."""
    trainer = Trainer(teachable, CHECKPOINT, PLAN)
    for _ in range(2):
        [tried] = rollouts(teachable, [[70, 71, 72]], 4, 40, facts.block_size)
        apart = trainer.learn(tried, torch.tensor([1.0, -1.0, 1.0, -1.0]), facts.mask_id)
        with torch.no_grad():
            decisions = pack(tried, facts.block_size, facts.mask_id)
            moved = (log_probs(trainer.model, decisions, facts.mask_id) - decisions.drawn).abs().max()
        assert apart < CLOSE < moved
        trainer.send()
    reward, apart = trainer.iterate()
    assert 0 <= reward <= 1 and apart < CLOSE


def test_an_answer_is_worth_what_it_does_better_than_the_others_to_its_prompt() -> None:
    worth = advantages([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(worth, torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    drawn = torch.tensor([-1.0, -1.0])
    now = torch.tensor([-1.0, -0.5], requires_grad=True)
    policy_loss(now, drawn, torch.tensor([1.0, 1.0])).backward()
    assert now.grad is not None and now.grad[0] < 0 and now.grad[1] == 0, "moved far enough, it teaches no more"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_weakened_checkpoint_learns_its_task_again(run_example: Callable[..., list[str]]) -> None:
    """With an Engine, as a user would."""
    lines = run_example("examples.rl.train", "--noise", "0.58", "--iterations", "20", "--judged", "60")
    held_out = [int(found[1]) for line in lines if (found := re.search(r"(?:reverse:|held-out) (\d+)%", line))]
    assert held_out[0] < 60 and held_out[-1] > 80, lines
