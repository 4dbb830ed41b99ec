"""Nothing that one request carries ends, hangs or slows the server: every field is bounded, and its edges are held."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.io_struct import GenerateReqInput, SessionParams
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_llada.host.requests import bounds
from sglang_llada.host.requests.bounds import BOUNDS, CUSTOM, OF, REQUEST, SAMPLING, SESSION, Bound, Limits
from tests.host.serving import ROOT, Server, events

pytestmark = pytest.mark.host

LIMITS = Limits(vocabulary=400, context=32_768)  # the small checkpoint's
PLAIN = {"text": "What is 17 + 25?", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
AT_ONCE = 16

# Fields of the host's request that carry no number, text or list of a client's to us.
NOT_BOUNDED = {
    "sampling parameters and sessions have rows of their own": "sampling_params session_params",
    "for other models, and looked at for those only": (
        "image_data video_data audio_data mm_hashes mm_content_hashes use_audio_in_video video_config modalities "
        "need_wait_for_mm_inputs num_items_assigned encoder_urls max_dynamic_patch min_dynamic_patch "
        "image_max_dynamic_patch video_max_dynamic_patch images_config mm_processor_kwargs return_bytes return_entropy "
        "require_reasoning"
    ),
    "refused whatever it holds": "watermark sampling_logprobs_mode",
    "yes or no, as the HTTP server parses it": (
        "return_logprob return_text_in_logprobs return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs "
        "return_flat_raw_top_logprobs_b64 stream log_metrics background no_logs return_prompt_token_ids "
        "return_step_maps"
    ),
    "the host's own, which it writes or checks": "http_worker_ipc external_trace_header kv_hints",
}
OF_NORMALISED = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# What ended a server, hung it, or was answered with 500, before there was a table; a word that the sentence has.
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("top_k", {"temperature": 1, "top_k": 2**63}),
    ("top_k", {"temperature": 1, "top_k": 2**31}),
    ("stop_token_ids", {"min_new_tokens": 1, "stop_token_ids": [-1_000_000]}),
    ("stop_token_ids", {"min_new_tokens": 1, "stop_token_ids": [-5]}),
    ("stop_token_ids", {"stop_token_ids": [2**64]}),
    ("stop_token_ids", {"stop_token_ids": 5}),
    ("stop_regex", {"stop_regex": "a{99999999999999999999}"}),
    ("stop_regex", {"stop_regex": "(" * 3000 + ")" * 3000}),
    ("stop", {"stop": ["a" * 1_000_000]}),
    ("stop", {"stop": ["a"] * 1_000_000}),
    ("logit_bias", {"logit_bias": {"5": 1e300}}),
    ("logit_bias", {"logit_bias": {"5": math.nan}}),
    ("logit_bias", {"logit_bias": {"-5": 1}}),
    ("logit_bias", {"logit_bias": {"five": 1}}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(100_000)}}),
    ("temperature", {"temperature": 1e300}),
    ("temperature", {"temperature": math.nan}),
    ("top_p", {"temperature": 1, "top_p": 1e-300}),
    ("repetition_penalty", {"repetition_penalty": 1e-300}),
    ("max_new_tokens", {"max_new_tokens": True}),
    ("max_new_tokens", {"max_new_tokens": 2**63}),
    ("n is", {"n": 10**9}),
    ("n is", {"n": -1}),
    ("n is", {"n": 0}),
    ("sampling_seed", {"temperature": 1, "sampling_seed": 2**63}),
    ("stream_interval", {"stream_interval": 0}),
    ("stream_interval", {"stream_interval": -3}),
    ("stream_interval", {"stream_interval": 2**70}),
    ("beam_width", {"beam_width": 2**70}),
    ("custom_params", {"custom_params": {"deep": nested(400)}}),
    ("custom_params", {"custom_params": {"max_nfe": 2**64}}),
    ("custom_params", {"custom_params": {"a": "b" * 10**6}}),
    ("custom_params", {"custom_params": {str(i): 1 for i in range(300_000)}}),
    ("canvas", {"custom_params": {"canvas": "a"}}),
    ("canvas", {"custom_params": {"canvas": [2**31, None]}}),
    ("canvas", {"custom_params": {"canvas": [None, "a" * 300_000]}}),
    ("canvas", {"custom_params": {"canvas": [None] * 40_000}}),
    ("canvas", {"custom_params": {"canvas": [5, 6]}}),
    ("json_schema", {"json_schema": '{"items": ' * 101 + "{}" + "}" * 101}),
    ("json_schema", {"json_schema": "[" * 100_000 + "]" * 100_000}),
    ("structural_tag", {"structural_tag": '{"format": ' * 300 + "{}" + "}" * 300}),
    ("is_normalized", {"is_normalized": True}),
    ("stop_regex_max_len", {"stop_regex_max_len": 2**70}),
]
HOSTILE_OUTSIDE: list[tuple[str, dict[str, Any]]] = [
    ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": 399, "logprob_start_len": 0}),
    (
        "allowed: 131072",
        {"text": "a " * 4000, "return_logprob": True, "top_logprobs_num": 128, "logprob_start_len": 0},
    ),
    ("token_ids_logprob", {"return_logprob": True, "token_ids_logprob": [5] * 100_000}),
    ("token_ids_logprob", {"return_logprob": True, "token_ids_logprob": [True]}),
    ("logprob_start_len", {"return_logprob": True, "logprob_start_len": 2**70}),
    ("logprob_start_len", {"return_logprob": True, "logprob_start_len": -5}),
    ("rid", {"rid": "r" * 1_000_000}),
    ("rid", {"rid": ""}),
    ("rid", {"rid": ["a", "b"]}),
    ("priority", {"priority": 2**70}),
    ("custom_labels", {"custom_labels": {"nobody": "knows"}}),
    ("extra_key", {"extra_key": "k" * 1_000_000}),
    ("bootstrap_room", {"bootstrap_room": 2**70}),
    ("offset", {"session_params": {"id": "x", "offset": "y"}}),
    ("offset", {"session_params": {"id": "x", "offset": 2**70}}),
    ("session_params", {"session_params": {"nothing": 1}}),
    ("text", {"text": "a " * 1_000_000}),
    ("prompts", {"text": ["a"] * 3000}),
    ("prompts", {"text": ["a"] * 200, "sampling_params": {"n": 100, "max_new_tokens": 1}}),
    ("sampling_params", {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 1}]}),
]


def named() -> list[str]:
    return [name for names in NOT_BOUNDED.values() for name in names.split()]


def test_every_field_of_the_host_has_its_bound_or_a_reason() -> None:
    fields = {field.name for field in dataclasses.fields(GenerateReqInput)} | {"return_step_maps"}
    assert sorted(fields) == sorted([*OF[REQUEST], *bounds.REFUSED, *named()])
    sampling = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert sampling == {*OF[SAMPLING], *bounds.ALSO_SAMPLING, *OF_NORMALISED}
    assert {field.name for field in msgspec.structs.fields(SessionParams)} == OF[SESSION].keys()
    assert len({(bound.where, bound.name) for bound in BOUNDS}) == len(BOUNDS)


def test_the_table_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert bounds.table() in page, f"put this into docs/options.md:\n{bounds.table()}"


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"{bound.where}-{bound.name}")
def test_edges_are_held(bound: Bound) -> None:
    """At and inside an edge is allowed, beyond it is refused with a short sentence that names the field."""
    verdicts = Counter(verdict(bound, value) for value in bounds.edges(bound, LIMITS))
    assert verdicts[True] >= 2 and verdicts[False] >= 5, verdicts


def verdict(bound: Bound, value: Any) -> bool:
    try:
        bounds.check_value(value, bound, LIMITS)
    except ValueError as error:
        said = str(error)
        assert said.startswith(f"{bound.name} ") and "allowed: " in said and len(said) < 400, said
        return False
    return True


def body_of(bound: Bound, value: Any) -> dict[str, Any]:
    """A request with this value, and what makes the server look at it."""
    if bound.where == SESSION:
        return PLAIN | {"session_params": {"id": "none", bound.name: value}}
    if bound.where == CUSTOM:
        sampling = PLAIN["sampling_params"] | {"custom_params": {"algorithm": "threshold", bound.name: value}}
        return PLAIN | {"sampling_params": sampling}
    if bound.where == SAMPLING:
        more = {"temperature": 1} if bound.name in ("top_k", "top_p", "min_p", "sampling_seed") else {}
        return PLAIN | {
            "sampling_params": PLAIN["sampling_params"] | {"max_new_tokens": 2} | more | {bound.name: value}
        }
    if bound.name == "input_ids":
        return {"input_ids": value, "sampling_params": {"max_new_tokens": 2}}
    logprob = {"return_logprob": True} if "logprob" in bound.name else {}
    return PLAIN | {"sampling_params": {"max_new_tokens": 2}} | logprob | {bound.name: value}


def send(server: Server, body: dict[str, Any]) -> tuple[int, str]:
    reply = server.post("/generate", data=json.dumps(body), headers={"Content-Type": "application/json"})
    return reply.status_code, reply.text


def test_what_ended_servers_is_refused_and_the_next_request_is_answered(server: Server) -> None:
    want = server.post("/generate", PLAIN).json()["output_ids"]
    for word, body in [
        *((word, PLAIN | {"sampling_params": PLAIN["sampling_params"] | params}) for word, params in HOSTILE),
        *((word, PLAIN | more) for word, more in HOSTILE_OUTSIDE),
    ]:
        status, text = send(server, body)
        parsers = ("invalid type", "unknown field", "json_invalid")  # what the host's own parsers say first
        said = any(words in text for words in (word, *parsers))
        assert status == 400 and said and len(text) < 2000, (word, status, text[:2000])
    assert server.post("/generate", PLAIN).json()["output_ids"] == want
    streamed = events(server.post("/generate", PLAIN | {"stream": True, "rid": "r" * 1000}, stream=True))
    assert streamed[0]["error"]["code"] == 400 and "rid is" in streamed[0]["error"]["message"]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    for field, value in (("top_k", 2**63), ("n", 10**9), ("stop_token_ids", [-5]), ("min_tokens", -1)):
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"model": "tiny", "prompt": "a"})):
            reply = server.post(path, body | {field: value})
            assert reply.status_code == 400 and "allowed: " in reply.text, (field, path, reply.text)


def test_every_edge_that_is_allowed_is_answered_or_refused(server: Server) -> None:
    """By the host's or our own sentence, and never with an error of the server's."""
    want = server.post("/generate", PLAIN).json()["output_ids"]
    bodies = [
        body_of(bound, value) for bound in BOUNDS for value in bounds.edges(bound, LIMITS) if verdict(bound, value)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = list(pool.map(lambda body: send(server, body), bodies))
    statuses = Counter(status for status, _ in replies)
    wrong = [
        (bounds.shown(body), reply) for body, reply in zip(bodies, replies, strict=True) if reply[0] not in (200, 400)
    ]
    assert not wrong, wrong[:20]
    assert statuses[200] > 100, statuses
    assert server.post("/generate", PLAIN).json()["output_ids"] == want
    server.flush()


WRONG: list[Any] = [True, False, 1, 2**70, math.nan, "x", [], [[]], [None], ["x"], {}, {"x": None}]


def test_no_value_of_the_other_fields_is_an_error_of_the_server(server: Server) -> None:
    want = server.post("/generate", PLAIN).json()["output_ids"]
    bodies = [PLAIN | {name: value} for name in (*bounds.REFUSED, *named()) for value in WRONG]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = list(pool.map(lambda body: send(server, body), bodies))
    wrong = [
        (bounds.shown(body), reply) for body, reply in zip(bodies, replies, strict=True) if reply[0] not in (200, 400)
    ]
    assert not wrong, wrong[:20]
    taken = [
        value
        for body, (status, _) in zip(bodies, replies, strict=True)
        for name, value in body.items()
        if status == 200 and name in bounds.REFUSED
    ]
    assert all(value in (False, [None]) for value in taken), taken
    assert server.post("/generate", PLAIN).json()["output_ids"] == want
    server.flush()


def test_levels_are_counted_as_people_count_them() -> None:
    for text, levels in {"1": 0, "[]": 1, '{"a": [1]}': 2, "[[[]], []]": 3, '"[[["': 0, "[[": 0}.items():
        assert not bounds.is_deeper(text, levels)
        assert levels == 0 or bounds.is_deeper(text, levels - 1), text


def test_sentences_are_short_whatever_the_value() -> None:
    deep = nested(5000)
    for value in ("a" * 10**6, 10**3000, [1] * 10**6, {"a" * 1000: "b" * 1000}, deep, {"x": deep}):
        assert len(bounds.shown(value)) < 300
    assert re.fullmatch(r"'a+\.\.\.a+' of 1000000 characters", bounds.shown("a" * 10**6))
