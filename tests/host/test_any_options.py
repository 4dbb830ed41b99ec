"""Whatever a request combines: a valid answer or a 4xx, never a 5xx, never a hang, never a changed neighbour."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.host.grammars import record
from tests.host.serving import Server
from tests.sizes import size

pytestmark = pytest.mark.host

COUNT, AT_ONCE = size(500, 1000), 16
SCHEMA = json.dumps(record(a={"type": "integer", "maximum": 9, "minimum": 0}, b={"enum": ["x", "yz"]}))

# Of each field, values of which some are not allowed; a request takes a few fields at random.
SAMPLING: dict[str, list[Any]] = {
    "temperature": [0, 0, 0.3, 1, 7.5, -1, "hot"],
    "top_p": [1, 0.5, 0.01, 0, 1.1],
    "top_k": [-1, 1, 2, 50, 10_000, 0],
    "min_p": [0, 0.2, 1, -0.5],
    "sampling_seed": [0, 7, 2**40, -3],
    "frequency_penalty": [0, 1.5, -2, 3],
    "presence_penalty": [0.5, -0.5, 9],
    "repetition_penalty": [1, 1.5, 0.5, 0],
    "max_new_tokens": [0, 1, 31, 32, 33, 90, -1],
    "min_new_tokens": [0, 3, 20, 60, -2],
    "n": [1, 2, 3],
    "stop": ["1", ["a", "7"], "", []],
    "stop_token_ids": [[22], [5, 399], [100_000]],
    "stop_regex": ["[0-9]{2}", "x+", "(("],
    "ignore_eos": [True, False],
    "no_stop_trim": [True],
    "skip_special_tokens": [False],
    "stream_interval": [1, 5, 100],
    "logit_bias": [{"22": 5}, {"70": -100, "71": 1.5}, {"-1": 1}, {"400": 1}],
    "regex": ["[ab]{3,9}", "\\d+-\\d+", "a(", "", "\\p{L}{2}"],
    "json_schema": [SCHEMA, "{", '{"type": "nothing"}'],
    "ebnf": ['root ::= "yes" | "no"', "root ::="],
    "beam_width": [1, 4],
    "custom_params": [
        {"threshold": 0.5},
        {"threshold": 0, "steps": 1},
        {"threshold": 1.0, "trace": True},
        {"algorithm": "joint_threshold", "mode": "speed"},
        {"algorithm": "mbe", "window": 3, "max_post_edit_steps": 2},
        {"algorithm": "threshold", "live_blocks": 3, "next_block_share": 1.0},
        {"stream_mode": "denoise"},
        {"max_nfe": 2},
        {"early_exit": False},
        {"algorithm": "threshold", "canvas": [None, "is", None, 22, *[None] * 40, ".", None]},
        {"algorithm": "mbe", "canvas": [*[70] * 40, *[None] * 3, *[71] * 70, None]},
        {"canvas": [5, 6]},
        {"algorithm": "levenshtein"},
        {"window": 2},
        {"threshold": "high"},
        {"nothing": 1},
    ],
}
OUTSIDE: dict[str, list[Any]] = {
    "return_logprob": [True],
    "top_logprobs_num": [0, 3, 399, 400, -1],
    "token_ids_logprob": [[1, 2, 3], [-5], []],
    "logprob_start_len": [-1, 0, 5, 10_000],
    "return_text_in_logprobs": [True],
    "return_hidden_states": [True],
    "return_routed_experts": [True],
    "priority": [3],
    "lora_path": ["somewhere"],
    "stream": [True],
}
TEXTS: dict[str, list[Any]] = {
    "text": [
        "What is 17 + 25?",
        "<role>HUMAN</role>Reverse KBD.<|role_end|><role>ASSISTANT</role>",
        "",
        "a\0b",
        "é" * 90,
    ],
    "input_ids": [[70] * 31, [70] * 32, [70] * 33, [], [399, 0, 1], [5, 400], [-1], list(range(300))],
}
PATHS = {"/generate": 4, "/v1/completions": 1, "/v1/chat/completions": 1}


def some_of(rng: random.Random, fields: dict[str, list[Any]], most: int) -> dict[str, Any]:
    return {name: rng.choice(fields[name]) for name in rng.sample(sorted(fields), rng.randint(0, most))}


def body_of(rng: random.Random, path: str) -> dict[str, Any]:
    """A request to this endpoint, which may ask for anything."""
    sampling = {"max_new_tokens": 40, "temperature": rng.choice([0, 1]), **some_of(rng, SAMPLING, 6)}
    outside = some_of(rng, OUTSIDE, 2) if rng.random() < 0.4 else {}
    kind = rng.choice(sorted(TEXTS))
    text = rng.choice(TEXTS[kind])
    if path == "/generate":
        return {kind: text, "sampling_params": sampling, **outside}
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
    body = {"model": "tiny", **{names.get(key, key): value for key, value in sampling.items()}}
    body |= {"stream": True} if outside.get("stream") else {}
    if path == "/v1/completions":
        return body | {"prompt": text, **({"logprobs": 2} if "return_logprob" in outside else {})}
    return body | {"messages": [{"role": "user", "content": str(text)}]}


def is_valid(body: dict[str, Any], answer: Any) -> bool:
    """Whether an answer of /generate has what was asked for."""
    copies = answer if isinstance(answer, list) else [answer]
    sampling = body["sampling_params"]
    most = 200 if "canvas" in sampling.get("custom_params", {}) else sampling["max_new_tokens"]
    return len(copies) == sampling.get("n", 1) and all(
        len(each["output_ids"]) == each["meta_info"]["completion_tokens"] <= most
        and each["meta_info"]["finish_reason"]["type"] in ("stop", "length")
        and (
            not body.get("return_logprob") or len(each["meta_info"]["output_token_logprobs"]) == len(each["output_ids"])
        )
        for each in copies
    )


def send(server: Server, seed: int) -> tuple[int, str]:
    """The status of one request, and what is wrong with its answer, if anything."""
    rng = random.Random(seed)
    path = rng.choices(list(PATHS), list(PATHS.values()))[0]
    body = body_of(rng, path)
    try:
        reply = server.post(path, body, stream=bool(body.get("stream")))
        content = reply.content
    except requests.RequestException as error:
        return 0, f"{seed}: {path} {body}: {error!r}"
    status, streamed = reply.status_code, bool(body.get("stream"))
    good = status < 500 and (status == 200 or b"error" in content)
    if status == 200 and streamed:
        good = b'"code":5' not in content.replace(b" ", b"")
    elif status == 200 and path == "/generate":
        good = is_valid(body, json.loads(content))
    return status, "" if good else f"{seed}: {path} {body}: {status} {content[:1000]!r}"


def test_any_combination_is_answered_or_refused_and_disturbs_nobody(server: Server) -> None:
    plain = [[70 + i, 71, 72] for i in range(4)]
    want = [server.generate(ids, 60, ignore_eos=True)["output_ids"] for ids in plain]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sent = [pool.submit(send, server, seed) for seed in range(COUNT)]
        beside = [server.generate(plain[i % 4], 60, ignore_eos=True)["output_ids"] for i in range(40)]
        found = [each.result() for each in sent]
    wrong = [what for _, what in found if what]
    print(f"{COUNT} requests: {dict(Counter(status for status, _ in found))}")
    assert not wrong, "\n".join(wrong[:10])
    assert beside == [want[i % 4] for i in range(40)]
    assert sum(status == 200 for status, _ in found) > COUNT / 10
    server.flush()  # which only an idle server can
