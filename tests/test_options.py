"""The typed helpers of clients say what the server's tables say."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest
from jsonschema import Draft202012Validator

from sglang_llada.config import ALGORITHMS, MODES, NAMES, DecodeConfig
from sglang_llada.errors import ConfigError
from sglang_llada.options import Decode, JointThreshold, Levenshtein, Options, Snapshot, Threshold, schema

KINDS: tuple[type[Options], ...] = (Threshold, JointThreshold, Levenshtein)
META = {"completion_tokens": 6, "dllm_nfe": 3, "dllm_steps": 2, "dllm_forward_counts": [2]}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_the_parameters(kind: type[Options]) -> None:
    said = {
        name: get_args(hint)[0]
        for name, hint in get_type_hints(kind).items()
        if name not in ("algorithm", "canvas", "choices")
    }
    named = {name: get_args(value) or value for name, value in said.items()}
    modes = {"mode": tuple(MODES[kind.algorithm])} if kind.algorithm in MODES else {}
    assert named == {p.name: p.kind for p in ALGORITHMS[kind.algorithm]} | modes


def test_every_algorithm_has_its_class() -> None:
    assert [kind.algorithm for kind in KINDS] == list(ALGORITHMS)


def test_only_what_is_given_is_sent() -> None:
    assert Threshold(threshold=0.9, trace=True).custom_params == {
        "algorithm": "threshold",
        "threshold": 0.9,
        "trace": True,
    }


def test_a_canvas_goes_with_what_keeps_positions() -> None:
    asked = Threshold(canvas=["a", 5, None], choices=["b", 6])
    assert asked.custom_params == {"algorithm": "threshold", "canvas": ["a", 5, None], "choices": ["b", 6]}
    validator = Draft202012Validator(schema())
    assert validator.is_valid(asked.custom_params) and validator.is_valid({"canvas": [None]})
    assert not validator.is_valid({"algorithm": "threshold", "canvas": [0.5]})
    assert not validator.is_valid({"algorithm": "levenshtein", "canvas": [None]})


def test_a_bad_value_is_refused_where_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r"JointThreshold: window is 5; allowed: an integer from 1 to 4"):
        JointThreshold(window=5)


def test_a_decode_is_read() -> None:
    snapshot = {"step": 1, "committed": 0, "token_ids": [7, None]}
    decode = Decode.of({**META, "step_maps": [1, 2], "dllm_confidences": [0.5, 1.0], "dllm_snapshots": [snapshot]})
    assert decode == Decode(6, 3, 2, [2], [1, 2], [0.5, 1.0], [Snapshot(1, 0, [7, None])], [])
    traced = {**snapshot, "steps": [1, None], "confidences": [0.5, None]}
    assert Decode.of({**META, "dllm_snapshots": [traced]}).snapshots == [
        Snapshot(1, 0, [7, None], [1, None], [0.5, None])
    ]
    assert decode.tokens_per_forward == 2.0
    assert Decode.of(META).snapshots == []
    with pytest.raises(ValueError, match="has no dllm_nfe, only id; does sglang-llada"):
        Decode.of({"id": 1})


def test_the_schema_allows_what_the_server_allows() -> None:
    """Random mappings with values at the edges; no algorithm named means any of them."""
    validator = Draft202012Validator(schema())
    rng, block_size, seen = random.Random(0), 2**31 - 1, [0, 0]
    keys = [*sorted({p.name for parameters in ALGORITHMS.values() for p in parameters}), "return_step_maps", "nothing"]
    values: list[Any] = [0, 1, -1, 0.5, 1.5, 2, 4, 5, 100, 1025, True, False, "denoise", "speed", "x", None]
    for _ in range(4000):
        mapping = {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 2))}
        if {"trace", "return_step_maps"} <= mapping.keys():
            continue  # one parameter said twice, which a schema cannot forbid
        if "penalty_lambda" in mapping and mapping["penalty_lambda"] in (0, False):
            continue  # which the others ignore
        if rng.random() < 0.5:
            mapping |= {"algorithm": rng.choice([*NAMES, "x"])}
        if rng.random() < 0.2:
            mapping |= {"mode": rng.choice(["speed", "quality", "x"])}
        algorithms = [mapping["algorithm"]] if mapping.get("algorithm") in NAMES else list(ALGORITHMS)
        allowed = any(is_allowed(mapping, algorithm, block_size) for algorithm in algorithms)
        assert validator.is_valid(mapping) is allowed, mapping
        seen[allowed] += 1
    assert min(seen) > 300


def is_allowed(mapping: dict[str, Any], algorithm: str, block_size: int) -> bool:
    """Whether a server with this algorithm takes a mapping."""
    try:
        DecodeConfig.defaults(block_size, algorithm, indel=True).replaced(mapping)
    except ConfigError:
        return False
    return True


def test_the_command_prints_the_schema() -> None:
    command = [sys.executable, "-m", "sglang_llada", "algorithms", "--json"]
    assert json.loads(subprocess.check_output(command, text=True)) == schema()


def test_fields_say_nothing_by_default() -> None:
    assert all(field.default is None for kind in KINDS for field in dataclasses.fields(kind))
