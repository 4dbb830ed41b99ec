"""Teach a weakened checkpoint a task again, by trying: `python -m examples.rl.train`.

A server starts with the checkpoint and is given weights with noise on them, so that it fails most of the task's
questions. Then, again and again: it samples several answers to each of a few questions; an answer that is right to the
letter earns 1, another one 0; the network takes one gradient step on the decisions of these answers, weighed by how
much better each did than the others to its question (as GRPO does); the server takes the new weights. Prints a line for
each iteration, and writes the curve of held-out accuracy as a picture (needs matplotlib).

    --url http://...   a server that runs already with the same checkpoint, instead of an Engine in this process
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.rl.loss import advantages, log_probs, pack, policy_loss
from examples.rl.rollouts import Http, InProcess, Rollout, Server, greedy, rollouts
from examples.tiny_llada2.tasks import HARD_TASKS, Example
from examples.tiny_llada2.train import checkpoint_tensors, fuse
from sglang_llada.llada2.reference import Llada2ForDiffusion
from sglang_llada.llada2.weights import load_reference
from sglang_llada.progress import say, watched

CHECKPOINT = Path(__file__).parents[1] / "tiny-llada2"
NEW_TOKENS = 64
FRAGILE = ("embed", "head", "mlp.gate.w")  # what stays as it is when a network is weakened


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train.

    Attributes:
        noise: on each weight, in standard deviations of its matrix.
        questions, samples: of an iteration, and answers to each of them.
        rate: of AdamW.
        judged: held-out questions by which a network is judged.
    """

    task: str = "reverse"
    noise: float = 0.58
    iterations: int = 30
    questions: int = 8
    samples: int = 8
    rate: float = 3e-4
    judged: int = 100
    judge_every: int = 3
    seed: int = 0


def weaken(model: Llada2ForDiffusion, noise: float, seed: int) -> None:
    """Add noise to the layers' matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and not any(part in name for part in FRAGILE):
                p.add_(noise * p.std() * torch.randn(p.shape, generator=generator))


def questions(task: str, seed: int, *, held_out: bool) -> Iterator[Example]:
    """Endless questions of a task without earlier turns, from one side of the split."""
    rng = random.Random(f"{seed}/{held_out}")
    while True:
        example = HARD_TASKS[task](rng)
        if example.held_out == held_out and len(example.messages) == 1:
            yield example


class Trainer:
    """A network that learns, and the server that tries things out with its weights."""

    def __init__(self, server: Server, checkpoint: Path, plan: Plan) -> None:
        self.server, self.plan = server, plan
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        self.model = load_reference(checkpoint)
        fuse(self.model)
        weaken(self.model, plan.noise, plan.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.source = questions(plan.task, plan.seed, held_out=False)
        held_out = questions(plan.task, plan.seed, held_out=True)
        self.exam = [next(held_out) for _ in range(plan.judged)]
        self.send()

    def prompt(self, example: Example) -> list[int]:
        """Token ids up to where the answer begins."""
        ids = self.tokenizer.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)

    def send(self) -> None:
        """The server takes the network's weights, in full precision: what it draws is what the network would draw."""
        self.server.update(checkpoint_tensors(self.model, torch.float32))

    def accuracy(self) -> float:
        """Of held-out questions, how many the server answers right when it draws nothing."""
        said = greedy(self.server, [self.prompt(each) for each in self.exam], NEW_TOKENS)
        return sum(text == each.answer for text, each in zip(said, self.exam, strict=True)) / len(said)

    def iterate(self) -> tuple[float, float]:
        """Try, learn, send; the mean reward, and how far a log-probability was from the server's at most."""
        size, mask_id = self.model.config.block_size, self.tokenizer.mask_token_id
        asked = [next(self.source) for _ in range(self.plan.questions)]
        prompts = [self.prompt(each) for each in asked]
        groups = rollouts(self.server, prompts, self.plan.samples, NEW_TOKENS, size)
        rewards = [[float(r.text == each.answer) for r in group] for each, group in zip(asked, groups, strict=True)]
        self.server.rest()
        apart = self.learn([r for group in groups for r in group], advantages(rewards), mask_id)
        self.server.resume()
        self.send()
        return sum(map(sum, rewards)) / (len(asked) * self.plan.samples), apart

    def learn(self, tried: list[Rollout], advantage: Tensor, mask_id: int) -> float:
        """One gradient step."""
        decisions = pack(tried, self.model.config.block_size, mask_id)
        now = log_probs(self.model, decisions, mask_id)
        policy_loss(now, decisions.drawn, advantage[decisions.row]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float((now.detach() - decisions.drawn).abs().max())


def train(trainer: Trainer) -> dict[int, float]:
    """Held-out accuracy by iteration."""
    plan = trainer.plan
    curve = {0: trainer.accuracy()}
    print(f"{plan.task}: {curve[0]:.0%} of {plan.judged} held-out questions", flush=True)
    for i in watched(range(1, plan.iterations + 1), plan.task, plan.iterations):
        begin = time.perf_counter()
        reward, apart = trainer.iterate()
        line = f"{i}: reward {reward:.2f}, {time.perf_counter() - begin:.1f} s, log-probabilities within {apart:.1e}"
        if i % plan.judge_every == 0 or i == plan.iterations:
            curve[i] = trainer.accuracy()
            line += f", held-out {curve[i]:.0%}"
        say(line)
    return curve


def picture(curve: dict[int, float], plan: Plan, path: Path) -> None:
    """The curve as a file whose name says which kind."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    axis.plot(list(curve), [100 * each for each in curve.values()], "o-")
    axis.set(xlabel="iterations", ylabel="held-out answers that are right, %", ylim=(0, 100), title=plan.task)
    axis.grid(alpha=0.3)
    figure.savefig(path)


@contextmanager
def server_at(url: str | None, checkpoint: Path) -> Iterator[Server]:
    """The server at an address, or an Engine of our own."""
    if url is not None:
        yield Http(url)
        return
    import sglang  # noqa: TID251 - outside the package, as a user would

    with sglang.Engine(model_path=str(checkpoint), log_level="warning") as engine:
        yield InProcess(engine)


def main() -> None:
    """Train, and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--picture", type=Path)
    defaults: dict[str, Any] = {name: Plan.__dataclass_fields__[name].default for name in Plan.__slots__}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=str(value))
    args = vars(parser.parse_args())
    plan = Plan(**{name: args[name] for name in defaults})
    with server_at(args["url"], args["checkpoint"]) as server:
        curve = train(Trainer(server, args["checkpoint"], plan))
    if args["picture"] is not None:
        picture(curve, plan, args["picture"])


if __name__ == "__main__":  # needed: the engine's processes are spawned
    main()
