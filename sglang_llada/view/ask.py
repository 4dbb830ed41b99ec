"""Chats put to a running server, as the events from which a page draws them while they come, and as traces in files.

A trace is a JSON object: what was asked (`messages`, `custom_params`, `max_new_tokens`, `temperature`), what is served
(`model`, `block_size`, `algorithm`), the prompt's last tokens, in the answer's first block (`given`), `frames`
(trajectory.Frame), `texts` of tokens, and how it ended (`answer`, `finish`, `tokens`, `forwards`, `steps`). Events are
its parts: an object each, whose lists and mappings continue those before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_llada.config import NEED_INDEL, VARIANTS
from sglang_llada.errors import ConfigError
from sglang_llada.service import Service, outputs
from sglang_llada.view.trajectory import Frame, Trajectory

FORMAT = "sglang-llada trace 1"

Event = dict[str, Any]
Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What is put to a server: a chat, `custom_params`, and the host's two sampling parameters that matter here."""

    messages: list[dict[str, str]]
    custom_params: dict[str, Any]
    max_new_tokens: int = 128
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.custom_params, dict):
            raise ConfigError(f"custom_params is {self.custom_params!r}; allowed: an object")

    @classmethod
    def read(cls, asked: Mapping[str, Any]) -> Question:
        """From JSON; ConfigError if it is none."""
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(asked, dict) or not {"messages", "custom_params"} <= asked.keys() <= names:
            raise ConfigError(f"a question has {', '.join(sorted(names))}; got {json.dumps(asked)[:200]}")
        return cls(**asked)


def put(service: Service, question: Question) -> Generator[Event]:
    """The events of an answer, as it comes.

    Raises:
        ConfigError: there is no such server, or it refuses, in its own words.
    """
    facts = service.facts()
    algorithm = question.custom_params.get("algorithm", facts["algorithm"])
    prompt = service.post("/tokenize", {"messages": question.messages})["tokens"]
    body = {
        "input_ids": prompt,
        "stream": True,
        "sampling_params": {
            "temperature": question.temperature,
            "max_new_tokens": question.max_new_tokens,
            "custom_params": {**question.custom_params, "trace": True, "stream_mode": "denoise"},
        },
    }
    moves = VARIANTS.get(algorithm, (algorithm,))[0] in NEED_INDEL
    trajectory = Trajectory(facts["block_size"], len(prompt), moves=moves)
    given = prompt[len(prompt) - trajectory.given :]
    with service.open("/generate", body) as reply:
        frames, texts, output = [trajectory.begin()], dict[int, str](), None
        yield {"format": FORMAT, **dataclasses.asdict(question), **facts, "algorithm": algorithm}
        yield {"given": given, **shown(service, frames, given, texts)}
        for output in outputs(reply):
            if frames := list(trajectory.take(output)):
                yield shown(service, frames, [], texts)
    if output is None or (meta := output["meta_info"])["finish_reason"] is None:
        raise ConfigError(f"the server at {service.url} broke off after {trajectory.step} steps")
    if meta["dllm_steps"] != trajectory.step:
        raise ConfigError(
            f"the server at {service.url} told {trajectory.step} of {meta['dllm_steps']} steps; start it without"
            " --incremental-streaming-output, which leaves the others out"
        )
    ended = {"answer": output["text"], "finish": meta["finish_reason"]["type"], "tokens": meta["completion_tokens"]}
    yield {**ended, "forwards": meta["dllm_nfe"], "steps": meta["dllm_steps"]}


def shown(service: Service, frames: list[Frame], given: list[int], texts: dict[int, str]) -> Event:
    """Frames as an event, with the texts of tokens that `texts` does not have yet, which it has then."""
    here = [*given, *(token for frame in frames for token in frame.tokens())]
    new = [token for token in dict.fromkeys(here) if token not in texts]
    if new:
        said = service.post("/detokenize", {"tokens": [[token] for token in new], "skip_special_tokens": False})
        texts.update(zip(new, said["text"], strict=True))
    return {"frames": [frame.json() for frame in frames], "texts": {str(each): texts[each] for each in new}}


def collected(events: Iterable[Event]) -> Trace:
    """The trace that events make."""
    trace: Trace = {}
    for event in events:
        for key, value in event.items():
            if key == "frames":
                trace[key] = [*trace.get(key, ()), *value]
            elif key == "texts":
                trace[key] = {**trace.get(key, {}), **value}
            else:
                trace[key] = value
    return trace


def load(path: Path) -> Trace:
    """A trace from its file; ConfigError if it is none."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(trace, dict) or trace.get("format") != FORMAT:
        raise ConfigError(f"{path} is no trace; allowed: what `view --save FILE.json` wrote, or the page")
    return trace
