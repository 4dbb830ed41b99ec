"""Answers with how they came about: which tokens each step of a server saw, which it decided, and how surely.

The same over HTTP and from the Python Engine; both take the new weights of the network that learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import requests
import torch
from sglang.srt.utils import MultiprocessingSerializer  # noqa: TID251 - outside the package, as a user would
from torch import Tensor

from sglang_llada.options import Decode, Threshold

TRACED = Threshold(trace=True, stream_mode="denoise").custom_params


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of one block.

    Attributes:
        start: where the block begins in the sequence of prompt and answer.
        seen: its tokens before the step, None where open.
        decided: what the step decided, by place in the block.
        chances: the probabilities with which these were drawn, by the same places.
    """

    start: int
    seen: list[int | None]
    decided: dict[int, int]
    chances: dict[int, float]


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled answer: token ids of prompt and answer, the text, and the steps in which the answer came about."""

    prompt: list[int]
    answer: list[int]
    text: str
    steps: list[Step]


def steps_of(prompt: Sequence[int], answer: Sequence[int], decode: Decode, block_size: int) -> list[Step]:
    """The steps of an answer whose request asked for TRACED, one live block at a time.

    Where the step that ended an answer decided tokens behind its end, those are not told, and nobody misses them.
    """
    sequence = [*prompt, *answer]
    chances = {len(prompt) + i: each for i, each in enumerate(decode.confidences)}
    steps: list[Step] = []
    view: dict[int, int] = dict(enumerate(prompt))  # what stands, by place in the sequence
    for snapshot in decode.snapshots:
        first = len(prompt) + snapshot.committed
        behind = [(first + i, t) for i, t in enumerate(snapshot.token_ids) if t is not None]
        new = {**dict(enumerate(sequence[:first])), **dict(behind)}
        chances |= {first + i: each for i, each in enumerate(snapshot.confidences) if each is not None}
        decided = sorted(new.keys() - view.keys())
        if decided:
            start = decided[0] // block_size * block_size
            steps.append(
                Step(
                    start,
                    [view.get(at) for at in range(start, start + block_size)],
                    {at - start: new[at] for at in decided},
                    {at - start: chances[at] for at in decided},
                )
            )
        view = new
    return steps


class Server(Protocol):
    """What the trainer wants of a server."""

    def answers(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
        """Of each prompt its answer as /generate gives it; `n` answers if sampling asks for so many."""

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these weights; KV that was computed with others is dropped."""

    def rest(self) -> None:
        """Give back memory that is not needed while the trainer works."""

    def resume(self) -> None:
        """Take it again."""


class Http:
    """A server of `python -m sglang.launch_server`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def answers(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
        return self._post("/generate", {"input_ids": prompts, "sampling_params": sampling})

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        torch.multiprocessing.set_sharing_strategy("file_system")  # between processes that are not related
        packed = MultiprocessingSerializer.serialize(list(tensors.items()), output_str=True)
        self._post("/begin_weight_update", {})
        self._post("/update_weights_from_tensor", {"serialized_named_tensors": [packed]})
        self._post("/end_weight_update", {})

    def rest(self) -> None:
        self._post("/release_memory_occupation", {})

    def resume(self) -> None:
        self._post("/resume_memory_occupation", {})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        reply = requests.post(self.url + path, json=body, timeout=600)
        if not reply.ok:
            raise RuntimeError(f"{path}: {reply.status_code} {reply.text}")
        return reply.json() if reply.headers.get("content-type", "").startswith("application/json") else None


class InProcess:
    """A `sglang.Engine`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def answers(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
        return self.engine.generate(input_ids=prompts, sampling_params=sampling)

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        self.engine.begin_weight_update()
        self.engine.update_weights_from_tensor(list(tensors.items()))
        self.engine.end_weight_update()

    def rest(self) -> None:
        self.engine.release_memory_occupation()

    def resume(self) -> None:
        self.engine.resume_memory_occupation()


def rollouts(
    server: Server, prompts: list[list[int]], n: int, max_new_tokens: int, block_size: int
) -> list[list[Rollout]]:
    """`n` sampled answers to each prompt, at temperature 1."""
    sampling = {"temperature": 1.0, "n": n, "max_new_tokens": max_new_tokens, "custom_params": TRACED}
    replies = server.answers(prompts, sampling)
    groups = [replies[i * n : (i + 1) * n] for i in range(len(prompts))]
    return [
        [rollout(prompt, reply, block_size) for reply in group] for prompt, group in zip(prompts, groups, strict=True)
    ]


def rollout(prompt: list[int], reply: dict[str, Any], block_size: int) -> Rollout:
    """An answer of a server."""
    answer = reply["output_ids"]
    steps = steps_of(prompt, answer, Decode.of(reply["meta_info"]), block_size)
    return Rollout(prompt, answer, reply["text"], steps)


def greedy(server: Server, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """The text that the server answers to each prompt when it draws nothing."""
    replies = server.answers(prompts, {"temperature": 0, "max_new_tokens": max_new_tokens})
    return [reply["text"] for reply in replies]
