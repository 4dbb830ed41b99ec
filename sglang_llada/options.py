"""What a client sends and gets, with types: `custom_params` of a request, and what `meta_info` says of its decode.

    asked = Threshold(threshold=0.9, trace=True)
    sampling = {"temperature": 0, "custom_params": asked.custom_params}
    reply = requests.post(url + "/generate", json={"text": "...", "sampling_params": sampling})
    decode = Decode.of(reply.json()["meta_info"])
    print(decode.tokens_per_forward, decode.step_map)

The OpenAI endpoints take the same as `extra_body={"custom_params": ..., "return_meta_info": True}`. Imports nothing but
the standard library. docs/decoding.md says what each parameter is good for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from sglang_llada.config import (
    ALGORITHMS,
    CANVAS,
    CHOICES,
    DEFAULT_ALGORITHM,
    FOREIGN,
    MODES,
    NEED_INDEL,
    VARIANTS,
    DecodeConfig,
    Parameter,
)

ANY_BLOCK = 2**31 - 1  # where the block size, which the server knows, is the bound


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every algorithm takes; None leaves a parameter to the server.

    Raises:
        ConfigError: a value is not allowed; the server holds `steps` against its block size, and looks at a canvas.
    """

    algorithm: ClassVar[str]

    max_nfe: int | None = None
    live_blocks: int | None = None
    next_block_share: float | None = None
    trace: bool | None = None
    stream_mode: Literal["committed", "denoise"] | None = None

    def __post_init__(self) -> None:
        decode = {key: value for key, value in self.custom_params.items() if key not in (CANVAS, CHOICES)}
        DecodeConfig.defaults(ANY_BLOCK, self.algorithm, indel=True).replaced(decode, type(self).__name__)

    @property
    def custom_params(self) -> dict[str, Any]:
        """The mapping to send."""
        given = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {"algorithm": self.algorithm, **{name: value for name, value in given.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class Threshold(Options):
    """LLaDA2.0's decode: tokens above a probability are kept.

    `canvas` is the answer as far as it is given; with `choices` the probabilities of these are read where it is open.
    """

    algorithm: ClassVar[str] = "threshold"

    threshold: float | None = None
    steps: int | None = None
    early_exit: bool | None = None
    canvas: Sequence[int | str | None] | None = None
    choices: Sequence[int | str] | None = None


@dataclass(frozen=True, kw_only=True)
class JointThreshold(Options):
    """LLaDA2.1's decode: tokens are kept above a probability, and may be edited.

    `window` above 1 edits blocks before, too; `mode` names LLaDA2.1's own values, which those beside it go before;
    `canvas` is the answer as far as it is given.
    """

    algorithm: ClassVar[str] = "joint_threshold"

    mode: Literal["quality", "speed"] | None = None
    threshold: float | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    window: int | None = None
    penalty_lambda: float | None = None
    canvas: Sequence[int | str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Levenshtein(Options):
    """LLaDA2.2's decode: tokens are kept above a probability, edited, inserted and deleted."""

    algorithm: ClassVar[str] = "levenshtein"

    threshold: float | None = None
    edit_threshold: float | None = None
    steps: int | None = None
    max_post_edit_steps: int | None = None
    cumulative_budget: bool | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What stood after a step.

    Attributes:
        step: its number among the request's steps, from 1.
        committed: tokens of the answer that were decided for good.
        token_ids: those behind them, None where open.
        steps: of these, the step of its block that decided or last edited each; empty without `trace`.
        confidences: their probabilities in that step; empty without `trace`.
    """

    step: int
    committed: int
    token_ids: list[int | None]
    steps: list[int | None] = field(default_factory=list)
    confidences: list[float | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Decode:
    """How an answer was decoded, so far where it is streamed.

    Attributes:
        tokens: tokens of the answer.
        forwards: those that the request took part in (NFE).
        steps: those that decided for it.
        steps_of_blocks: the same of each block that is done.
        step_map: of each token the step of its block, from 1, that decided or last edited it; empty without `trace`.
        confidences: its probability in that step; empty without `trace`.
        snapshots: after each step; empty without `stream_mode` "denoise".
        chances: of each open position of a canvas the probabilities of `choices`; empty without them.
    """

    tokens: int
    forwards: int
    steps: int
    steps_of_blocks: list[int]
    step_map: list[int]
    confidences: list[float]
    snapshots: list[Snapshot]
    chances: list[list[float]]

    @classmethod
    def of(cls, meta_info: Mapping[str, Any]) -> Self:
        """What `meta_info` of an answer says; ValueError if it is none of a LLaDA2 model here."""
        if "dllm_nfe" not in meta_info:
            raise ValueError(
                f"meta_info has no dllm_nfe, only {', '.join(meta_info)}; does sglang-llada serve the model?"
            )
        return cls(
            tokens=meta_info["completion_tokens"],
            forwards=meta_info["dllm_nfe"],
            steps=meta_info["dllm_steps"],
            steps_of_blocks=list(meta_info["dllm_forward_counts"]),
            step_map=list(meta_info.get("step_maps", ())),
            confidences=list(meta_info.get("dllm_confidences", ())),
            snapshots=[Snapshot(**each) for each in meta_info.get("dllm_snapshots", ())],
            chances=list(meta_info.get("dllm_choices", ())),
        )

    @property
    def tokens_per_forward(self) -> float:
        """TPF; 0 before the first forward."""
        return self.tokens / self.forwards if self.forwards else 0.0


def schema() -> dict[str, Any]:
    """The JSON schema of `custom_params`: one mapping for each algorithm, where the server's may be left out.

    Bounds that are the block size are named in descriptions.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "custom_params of a request to a LLaDA2 model",
        "type": "object",
        "anyOf": [schema_of(algorithm) for algorithm in ALGORITHMS],
    }


def schema_of(algorithm: str) -> dict[str, Any]:
    """The JSON schema of one algorithm's mapping."""
    parameters = {p.name: p for p in ALGORITHMS[algorithm]}
    names = [algorithm, *(name for name, (base, _) in VARIANTS.items() if base == algorithm)]
    properties: dict[str, Any] = {"algorithm": {"enum": names}}
    if algorithm in MODES:
        properties["mode"] = {"enum": list(MODES[algorithm])}
    properties |= {name: schema_of_value(p) for name, p in parameters.items()}
    for key, foreign in FOREIGN.items():
        if foreign.ours in parameters and key not in parameters:
            properties[key] = {
                **schema_of_value(parameters[foreign.ours]),
                "description": f"the same as {foreign.ours}",
            }
    if algorithm not in NEED_INDEL:
        properties[CANVAS] = {
            "type": "array",
            "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}, {"type": "null"}]},
            "description": "the answer as far as it is given: token ids, texts, and null for each open position",
        }
    if algorithm == DEFAULT_ALGORITHM:  # which of them makes no difference
        properties[CHOICES] = {
            "type": "array",
            "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]},
            "description": "tokens, or texts of one token, whose probabilities are read where the canvas is open",
        }
    return {"title": algorithm, "type": "object", "properties": properties, "additionalProperties": False}


def schema_of_value(parameter: Parameter) -> dict[str, Any]:
    """The JSON schema of a parameter's values."""
    said: dict[str, Any] = {"description": parameter.help}
    if parameter.default is None:
        said["description"] += "; as many as the block size"
    else:
        said["default"] = parameter.default
    if isinstance(parameter.kind, tuple):
        return {"enum": list(parameter.kind), **said}
    if parameter.kind is bool:
        return {"type": "boolean", **said}
    bounds = {"minimum": parameter.low} | ({} if parameter.high is None else {"maximum": parameter.high})
    return {"type": "number" if parameter.kind is float else "integer", **bounds, **said}
