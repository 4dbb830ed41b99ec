"""What hostile clients send: KINDS, each a function that draws the shots of one client, which are sent together.

Anything here may come at any time from anyone who reaches the server's port, so nothing of it may end the server, hang,
or change what others get. Left out is what the host offers for just that: to abort all requests, to slow down, to write
logs elsewhere.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.faulty_server import planted
from bench.processors import PROCESSORS
from bench.shots import DEEP, MILLION, Shot, ask, dumps, http
from tests.host.grammars import GRAMMARS, record
from tests.host.test_any_options import OUTSIDE, SAMPLING

LONG = 3.0  # seconds after which a client loses interest in an answer that may well take minutes


@dataclass(frozen=True, slots=True)
class Facts:
    """Of the server: what it serves, how long its contexts are, and a folder that it may write to."""

    checkpoint: Path
    vocabulary: int
    context: int
    folder: Path


Kind = Callable[[random.Random, Facts], list[Shot]]

# Values that no field is made for; which of them is right for which field does not matter.
NASTY: list[Any] = [
    *(2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**40, 0, -1, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "x", "\0", "\ud800", "x" * 1_000_000),
    *([], {}, [[]], [None], [2**63], [-1_000_000], [float("nan")], [1] * 100_000, ["x"] * 100_000),
    *({"": ""}, {"x": None}, {"x": 2**70}, DEEP, MILLION),
]
COUNTING = "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>"


# --- fields -----------------------------------------------------------------------------------------------------------


def values(rng: random.Random, allowed: dict[str, list[Any]], most: int) -> dict[str, Any]:
    """Some fields, each at an edge of what it may be or far beyond."""
    names = rng.sample(sorted(allowed), rng.randint(1, most))
    return {name: rng.choice(allowed[name] if rng.random() < 0.4 else NASTY) for name in names}


def patience(body: dict[str, Any]) -> float | None:
    """When to hang up: what may be a request for as many tokens as there is room for need not be waited for."""
    return LONG if {"max_new_tokens", "max_tokens", "max_completion_tokens", "n"} & body.keys() else None


def fields(rng: random.Random, facts: Facts) -> list[Shot]:
    """Sampling parameters."""
    given = values(rng, SAMPLING, 3)
    body = {"input_ids": prompt(rng), "sampling_params": {"max_new_tokens": 40, **given}}
    return [ask("/generate", body, leave=patience(given))]


def outer_fields(rng: random.Random, facts: Facts) -> list[Shot]:
    """Fields beside the sampling parameters, those of other models and of the host's own use too."""
    given = values(rng, OUTSIDE | dict.fromkeys(OTHERS, NASTY), 2)
    return [ask("/generate", {"input_ids": prompt(rng), "sampling_params": {"max_new_tokens": 8}, **given})]


OTHERS = (
    "text input_ids sampling_params rid session_id session_params image_data modalities input_embeds lora_id "
    "custom_logit_processor routed_dp_rank data_parallel_rank bootstrap_host bootstrap_room priority extra_key "
    "cache_salt routing_key conversation_id http_worker_ipc background require_reasoning max_thinking_tokens "
    "custom_labels return_entropy return_prompt_token_ids external_trace_header received_time kv_hints "
    "token_indices_to_pool multi_item_delimiter_indices positional_embed_overrides watermark return_sampling_mask "
    "return_step_maps return_flat_raw_top_logprobs log_metrics no_logs video_config mm_hashes stream"
).split()


def openai(rng: random.Random, facts: Facts) -> list[Shot]:
    """The endpoints of other clients, their fields of the wrong types."""
    path = rng.choice(sorted(APIS))
    given = {name: rng.choice(NASTY) for name in rng.sample(OPENAI, rng.randint(1, 2))}
    body = {"model": "x", **APIS[path], **given}
    return [ask(path, body, leave=patience(given))]


MESSAGES = [{"role": "user", "content": "Reverse KBD."}]
APIS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "12, 13,", "max_tokens": 8},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/responses": {"input": "Reverse KBD.", "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/tokenize": {"prompt": "a"},
    "/v1/detokenize": {"tokens": [70]},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "a"},
    "/invocations": {"messages": MESSAGES, "max_tokens": 8},
    "/vertex_generate": {"instances": [{"text": "a"}], "parameters": {"sampling_params": {"max_new_tokens": 8}}},
}
OPENAI = (
    "model messages prompt input instances parameters tokens max_tokens max_completion_tokens max_output_tokens n stop "
    "stop_token_ids temperature top_p top_k min_p seed logprobs top_logprobs logit_bias frequency_penalty "
    "presence_penalty repetition_penalty stream stream_options response_format tools tool_choice user echo suffix "
    "best_of rid regex ebnf json_schema custom_params chat_template_kwargs continue_final_message "
    "add_generation_prompt reasoning_effort options system skip_special_tokens ignore_eos min_tokens"
).split()


# --- bodies and prompts -----------------------------------------------------------------------------------------------


def bodies(rng: random.Random, facts: Facts) -> list[Shot]:
    """What is no JSON, or comes with a head that says otherwise."""
    path = rng.choice(["/generate", "/v1/chat/completions", "/v1/completions", "/abort_request", "/pause_generation"])
    whole = dumps({"model": "x", "prompt": "a", "text": "a", "max_tokens": 4}).encode()
    shot = http(path, whole)
    return [
        rng.choice(
            [
                http(path, whole[: rng.randrange(len(whole))]),
                http(path, whole, kind=rng.choice(["text/plain", "", "application/xml", "multipart/form-data"])),
                http(path, b""),
                http(path, gzip.compress(whole)),
                http(path, b'{"text": "\xff\xfe\xc3("}'),
                http(path, b"[" * 100_000),
                http(path, b'{"text": "a"}' * 1000),
                http(path, rng.choice([b"null", b"[]", b'"a"', b"1", b"\0", b"\xef\xbb\xbf{}", b"NaN"])),
                Shot(shot.data[:-5], leave=1.0),  # less than was announced
                Shot(shot.data.replace(b"Content-Length: ", b"Content-Length: -")),
                Shot(shot.data.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX"), leave=1.0),
                Shot(b"\x16\x03\x01" + rng.randbytes(200), leave=1.0),  # as a client that speaks TLS begins
            ]
        )
    ]


def prompts(rng: random.Random, facts: Facts) -> list[Shot]:
    """Far too long, empty, or of tokens that there are not."""
    vocabulary, context = facts.vocabulary, facts.context
    texts: list[Any] = [
        "",
        " ",
        "a" * 10 * context,
        "é\0\ud800",
        "<|mask|>" * 100,
        "\n" * 50_000,
        ["a"] * 100,
        [],
        [""],
    ]
    edge = rng.choice([context - 1, context, context + 1])
    ids: list[Any] = [
        [],
        [vocabulary],
        [-1],
        [2**63 - 1],
        [2**63],
        [70.5],
        ["70"],
        [[70], []],
        [70] * edge,
        MILLION,
        [2] * 40,
    ]
    given = {"text": rng.choice(texts)} if rng.random() < 0.5 else {"input_ids": rng.choice(ids)}
    body = {**given, "sampling_params": {"max_new_tokens": rng.choice([0, 1, 8])}, "stream": rng.random() < 0.5}
    return [ask("/generate", body, leave=LONG)]


def prompt(rng: random.Random) -> list[int]:
    """A short one."""
    return [rng.randrange(65, 90) for _ in range(rng.choice([1, 31, 32, 33, 70]))]


# --- connections and control ------------------------------------------------------------------------------------------


def endless(rng: random.Random, **more: Any) -> dict[str, Any]:
    """A request whose answer takes seconds."""
    sampling = {"temperature": 0, "max_new_tokens": 3000, "ignore_eos": True}
    return {"text": COUNTING, "stream": rng.random() < 0.7, "sampling_params": sampling, **more}


def leavers(rng: random.Random, facts: Facts) -> list[Shot]:
    """Clients that hang up before the first byte, or in the middle of the stream."""
    return [ask("/generate", endless(rng), leave=rng.choice([0.001, 0.02, 0.2, 1.0])) for _ in range(rng.randint(1, 3))]


def half_open(rng: random.Random, facts: Facts) -> list[Shot]:
    """Heads or bodies that never end."""
    data = ask("/generate", endless(rng)).data
    return [Shot(data[: rng.randrange(1, len(data))], leave=LONG) for _ in range(3)]


def aborts(rng: random.Random, facts: Facts) -> list[Shot]:
    """Of requests that run, are over or never were."""
    rid = f"{rng.getrandbits(64):x}"
    return [
        ask("/generate", endless(rng, rid=rid), leave=10.0),
        ask("/abort_request", {"rid": rid}, delay=rng.choice([0.0, 0.05, 0.5])),
        ask("/abort_request", {"rid": rid}, delay=1.0),
        ask("/abort_request", {"rid": rng.choice(["nobody", "", "x" * 100_000, None, 7, ["a"], DEEP])}),
    ]


def prefixes(rng: random.Random, facts: Facts) -> list[Shot]:
    """An id that others' begin with, and its end."""
    rid = rng.choice("0123456789abcdef")
    return [
        ask("/generate", endless(rng, rid=rid), leave=rng.choice([0.2, 10.0])),
        ask("/abort_request", {"rid": rid}, delay=0.3),
    ]


def twins(rng: random.Random, facts: Facts) -> list[Shot]:
    """Requests with one id, at once or nearly so, or in one batch."""
    rid = f"{rng.getrandbits(64):x}"
    sampling = {"max_new_tokens": 200, "ignore_eos": True}
    body = {"text": COUNTING, "rid": rid, "stream": rng.random() < 0.5, "sampling_params": sampling}
    batch = {**body, "text": [COUNTING] * 3, "rid": rng.choice([[rid] * 3, [rid], [rid, "", None], rid])}
    return [
        ask("/generate", body),
        ask("/generate", body, delay=rng.choice([0.0, 0.1])),
        ask("/generate", rng.choice([body, batch]), leave=LONG),
    ]


def pauses(rng: random.Random, facts: Facts) -> list[Shot]:
    """A pause that keeps the requests, and its end."""
    mode = rng.choice(["in_place", "retract"])
    return [ask("/pause_generation", {"mode": mode}, then=ask("/continue_generation", {}))]


def flushes(rng: random.Random, facts: Facts) -> list[Shot]:
    """Of a cache that is in use."""
    query = rng.choice(["", "?timeout=0.5", "?timeout=-1", "?timeout=nan", "?timeout=x"])
    return [http(f"/flush_cache{query}", method=rng.choice(["GET", "POST"]))]


def weights(rng: random.Random, facts: Facts) -> list[Shot]:
    """The same weights again, and some that there are not, or that are read in a way that there is not."""
    wrong = [str(facts.folder), "/nowhere", "", "\0", "x" * 10_000, None, 5]
    path = str(facts.checkpoint) if rng.random() < 0.5 else rng.choice(wrong)
    how = {"load_format": rng.choice(["nothing", "", "\0", 5])} if rng.random() < 0.3 else {}
    return [ask("/update_weights_from_disk", {"model_path": path, **how})]


def profiles(rng: random.Random, facts: Facts) -> list[Shot]:
    """Short ones, a second one before the first is over, and the end of one that may never have begun."""
    body = {"output_dir": str(facts.folder), "num_steps": rng.choice([1, 3, 0, -1, "x"])}
    body |= {"activities": rng.choice([["CPU"], ["GPU"], ["MEM"], ["nothing"], [], None, 5])}
    stop = ask("/stop_profile", {}, delay=rng.choice([0.0, 0.5]))
    return [ask("/start_profile", body), ask("/start_profile", body), stop][rng.randrange(3) :]


# --- requests that bring work of their own ----------------------------------------------------------------------------


def processors(rng: random.Random, facts: Facts) -> list[Shot]:
    """Code of the user's that fails, and texts that are no code."""
    texts = [*(each.to_str() for each in PROCESSORS), *("x", "{}", '{"callable": "80"}', '{"callable": 5}', "[]", DEEP)]
    body = {"text": COUNTING, "custom_logit_processor": rng.choice(texts), "sampling_params": {"max_new_tokens": 8}}
    return [ask("/generate", body)]


def grammars(rng: random.Random, facts: Facts) -> list[Shot]:
    """Wrong ones, huge ones, some that grow as they are compiled, and good ones with stops in their way."""
    kind = rng.choice(sorted(WRONG))
    if rng.random() < 0.3:
        options: dict[str, Any] = rng.choice(GRAMMARS).options
        options = {**options, "min_new_tokens": 30, "stop": ["a", "0"], "temperature": 5.0}
    else:
        options = {kind: rng.choice(WRONG[kind])}
    return [ask("/generate", {"text": COUNTING, "sampling_params": {"max_new_tokens": 40, **options}}, leave=LONG)]


WRONG: dict[str, list[Any]] = {
    "regex": ["(", "[", "*", "a{5,2}", "(?<=a)b", "\\1", "(a|b)*" * 200, "((a{1,50}){1,50}){1,50}", "[^\\d\\D]", "^$"],
    "json_schema": [
        *("{", "[]", "null", '"x"', "{}", '{"type": "nothing"}', '{"$ref": "#/nowhere"}', '{"$ref": "#"}', "true"),
        '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
        json.dumps({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
        json.dumps({"type": "integer", "minimum": 10**30, "maximum": -(10**30)}),
        json.dumps({"type": "string", "pattern": "((a{1,50}){1,50}){1,50}"}),
        json.dumps({"enum": [f"value {i}" for i in range(20_000)]}),
        json.dumps(record(**{f"name{i}": {"type": "integer"} for i in range(2_000)})),
        json.dumps({"type": "object", "properties": {f"n{i}": {} for i in range(40)}}),
        '{"items":' * 500 + "{}" + "}" * 500,
    ],
    "ebnf": ["", "root", 'root ::= "a" root', "root ::= root", 'a ::= "b"', "root ::= b", 'root ::= ("a" | "b")*' * 50],
    "structural_tag": ["", "{}", "[]", '{"type": "structural_tag"}', '{"structures": 5}', '{"format": {"type": "x"}}'],
}


def stops(rng: random.Random, facts: Facts) -> list[Shot]:
    """Stops without number, without sense, or that take forever to look for."""
    given: dict[str, Any] = rng.choice(
        [
            {"stop_regex": rng.choice(["([0-9, ]+)+!", "(.*)*x", "(a|a|.)+$", "(?:.?){30}!", "((", "(?i)1", ""])},
            {"stop_token_ids": rng.choice([list(range(facts.vocabulary)), [2**31], [-1], [2**63], ["a"], [[1]]])},
            {"stop": rng.choice(["", ["1"] * 1000, "x" * 1_000_000, ["", "a"], [[]], "\ud800"])},
        ]
    )
    return [ask("/generate", {"text": COUNTING, "sampling_params": {"max_new_tokens": 64, "temperature": 0, **given}})]


def crowds(rng: random.Random, facts: Facts) -> list[Shot]:
    """One request for many answers."""
    given = {"n": rng.choice([8, 100, 10_000, 2**31, 2**63]), "max_new_tokens": 8}
    many = {"text": ["a"] * rng.choice([1, 100, 2000]), "sampling_params": {"max_new_tokens": 4}}
    return [ask("/generate", rng.choice([{"text": "a", "sampling_params": given}, many]), leave=LONG)]


def faults(rng: random.Random, facts: Facts) -> list[Shot]:
    """Grammars that fail inside the server: the one kind for which a 500 is right, if they could be compiled."""
    where, status = rng.choice([("compile", 400), ("fill", 500), ("accept", 500)])
    sampling = {"regex": planted(where, rng.randrange(0, 6)), "max_new_tokens": 80}
    return [ask("/generate", {"text": COUNTING, "sampling_params": sampling}, expected=status)]


# --- endpoints --------------------------------------------------------------------------------------------------------


def unsupported(rng: random.Random, facts: Facts) -> list[Shot]:
    """What this model cannot do."""
    path = rng.choice("/v1/embeddings /v1/score /v1/rerank /v1/classify /encode /classify /v1/decisions".split())
    body = {"model": "x", "input": "a", "text": "a", "query": "a", "items": ["b"], "documents": ["b"]}
    return [ask(path, body | {rng.choice(sorted(body)): rng.choice(NASTY)})]


def routes(rng: random.Random, facts: Facts) -> list[Shot]:
    """Paths and methods that there are not, and some that are seldom asked for."""
    path = rng.choice(["/", "/x", "/generate", "//", "/%00", "/..%2f..", "/v1/models/x%00", "/" + "a" * 100_000, *RARE])
    return [http(path, rng.choice([b"", b"{}"]), method=rng.choice("GET POST PUT DELETE HEAD PATCH BREW".split()))]


RARE = (
    "/health /ready /model_info /server_info /v1/loads /metrics /get_weights_by_name /weights_checker /v1/models "
    "/add_external_corpus /list_external_corpora /hicache/storage-backend /hicache/storage-backend/clear "
    "/start_expert_distribution_record /stop_expert_distribution_record /dump_expert_distribution_record "
    "/load_lora_adapter /unload_lora_adapter /open_session /close_session /parse_function_call /separate_reasoning "
    "/v1/responses/x /v1/responses/x/cancel /v1/audio/transcriptions /get_hicache_l3_cache_layout /freeze_gc "
    "/release_memory_occupation /resume_memory_occupation /set_trace_level?level=x /pd_role_switch "
    "/docs /openapi.json /destroy_weights_update_group /ping"
).split()

KINDS: dict[str, Kind] = {
    "fields": fields,
    "outer fields": outer_fields,
    "openai": openai,
    "bodies": bodies,
    "prompts": prompts,
    "leavers": leavers,
    "half open": half_open,
    "aborts": aborts,
    "prefixes": prefixes,
    "twins": twins,
    "pauses": pauses,
    "flushes": flushes,
    "weights": weights,
    "profiles": profiles,
    "processors": processors,
    "grammars": grammars,
    "stops": stops,
    "crowds": crowds,
    "faults": faults,
    "unsupported": unsupported,
    "routes": routes,
}
# Kinds that need the files of the server's machine, or the server that the benchmark starts itself.
AT_HOME = ("weights", "profiles", "faults")
