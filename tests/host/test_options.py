"""The table of everything that a request may ask for is complete, and true."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.host.serving import ROOT, Server, events

pytestmark = pytest.mark.host

TABLE = ROOT / "docs" / "options.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.*?)\|$", re.M)
GENERATE, CHAT, TEXT = "/generate", "/v1/chat/completions", "/v1/completions"
REFUSED: dict[tuple[str, str], list[tuple[str, Any]]] = {  # of a table's field, requests that ask for it
    ("sampling", "beam_width"): [(GENERATE, 2)],
    ("sampling", "watermark"): [(GENERATE, {"enabled": True})],
    ("openai", "watermark"): [(CHAT, {"enabled": True}), (TEXT, {"enabled": True})],
    ("openai", "best_of"): [(TEXT, 3)],
    ("openai", "suffix"): [(TEXT, " the end.")],
    ("openai", "lora_path"): [(CHAT, "some/adapter"), (TEXT, "some/adapter")],
    ("openai", "return_hidden_states"): [(CHAT, True), (TEXT, True)],
    ("openai", "return_routed_experts"): [(CHAT, True), (TEXT, True)],
    ("openai", "return_sampling_mask"): [(CHAT, True)],
    ("openai", "sampling_logprobs_mode"): [(CHAT, "support")],
}


def rows() -> dict[str, list[tuple[str, str, str]]]:
    """Of both tables: field, what becomes of it, and the tests that show it."""
    sampling, openai = TABLE.read_text().split("## Sampling parameters")[1].split("## OpenAI")
    return {"sampling": ROW.findall(sampling), "openai": ROW.findall(openai)}


def test_every_field_of_the_host_has_one_row() -> None:
    found = {name: sorted(field for field, *_ in table) for name, table in rows().items()}
    assert found["sampling"] == sorted(field.name for field in msgspec.structs.fields(SamplingParams))
    assert found["openai"] == sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields})


def test_rows_name_tests_that_exist() -> None:
    """All but those of fields that the host alone reads."""
    for field, what, named in [row for table in rows().values() for row in table]:
        tests = re.findall(r"`(.+?)::(\w+)`", named)
        assert tests or what.startswith(("the host", "the same", "only means", "refused by the host")), field
        for file, test in tests:
            path = ROOT / file if "/" in file else Path(__file__).parent / file
            names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
            assert test in names, f"{field}: {file} has no {test}"


def test_what_the_table_says_is_refused(server: Server) -> None:
    said = {
        (table, field): re.findall(r"`([^`]+)`", what)[-1]
        for table, found in rows().items()
        for field, what, _ in found
        if "refused" in what and "`" in what
    }
    assert said.keys() == REFUSED.keys()
    for (table, field), requests in REFUSED.items():
        for path, value in requests:
            body: dict[str, Any] = {"model": "tiny", "max_tokens": 4, field: value}
            body |= {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
            if path == GENERATE:
                body = {"text": "a", "sampling_params": {"max_new_tokens": 4, field: value}}
            reply = server.post(path, body)
            assert reply.status_code == 400 and said[table, field] in reply.text, (field, path, reply.text)


def test_text_options_of_the_host_work(server: Server) -> None:
    ask = {"text": "<role>HUMAN</role>What is 17 + 25?<|role_end|><role>ASSISTANT</role>"}
    common = {"temperature": 0, "max_new_tokens": 40}
    plain = server.post(GENERATE, ask | {"sampling_params": common}).json()
    for options in ({"skip_special_tokens": False}, {"spaces_between_special_tokens": False}):
        got = server.post(GENERATE, ask | {"sampling_params": common | options | {"no_stop_trim": True}}).json()
        assert got["output_ids"] == plain["output_ids"]
        assert ("<|role_end|>" in got["text"]) == ("skip_special_tokens" in options)
    slow = common | {"stream_interval": 7, "max_new_tokens": 64, "ignore_eos": True, "custom_params": {"threshold": 1}}
    body = ask | {"stream": True, "sampling_params": slow}
    lengths = [len(event["output_ids"]) for event in events(server.post(GENERATE, body, stream=True))]
    steps = [b - a for a, b in zip([0, *lengths], lengths, strict=False)]
    assert lengths[-1] == 64 and all(step >= 7 for step in steps[1:-1]) and len(lengths) > 3
