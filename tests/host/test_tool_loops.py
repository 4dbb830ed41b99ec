"""Tool loops over HTTP: a model is made to call, is given the result and answers, with the clients that people use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.host.formats import FORMATS, Calls
from tests.host.grammars import record
from tests.host.serving import ROOT, Server, serving

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMAS = {"add": record(a=NUMBER, b=NUMBER), "spell": record(word={"enum": ["KLMN", 'a "b" é', "</tool_call>"]})}
QUESTION = "What is 17 + 25?"
CHOICES = ["required", "add", "spell"]
STREAMS = [False, True]


@pytest.fixture(scope="module", params=["2.0", pytest.param("2.2", marks=pytest.mark.long)])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Servers by the plain command, on a checkpoint with each of the two formats of calls."""
    if request.param == "2.0":
        yield request.getfixturevalue("server")
        return
    log = tmp_path_factory.mktemp("tools") / "log"
    flag = "--constrained-json-disable-any-whitespace"  # with which so small a model likes to fill answers
    with serving(ROOT / "examples" / "tiny-llada2.2", log, flag) as running:
        yield running


def parser_of(asked: Server) -> str:
    """The parser that a server says at its start that it found."""
    [parser] = re.findall(r"--tool-call-parser is (\w+), from the chat template", asked.log.read_text())
    return parser


def test_a_model_that_likes_to_call_is_read_from_a_stream_as_from_the_whole(asked: Server) -> None:
    """What it writes is held to a text, as a larger model would write it: words, and calls at once."""
    client = openai.OpenAI(base_url=asked.url + "/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]
    calls: Calls = [("add", {"a": 17, "b": 25}), ("spell", {"word": 'a "b" é'})]
    for words, wanted in (("I look.\n", calls), ("", calls[1:]), ("No: 1 < 2, <b>a</b> {x}.", [])):
        text = words + (FORMATS[parser_of(asked)](wanted) if wanted else "")
        options: dict[str, Any] = {"model": "tiny", "tools": tools, "temperature": 0, "max_tokens": 400}
        options |= {"messages": [{"role": "user", "content": QUESTION}], "extra_body": {"regex": re.escape(text)}}
        for stop in (None, "17, "):
            whole = client.chat.completions.create(**options, stop=stop).choices[0]
            made = streamed(client, options | {"stop": stop})
            assert made["content"] == (whole.message.content or "")
            if stop is not None and wanted == calls:  # the whole answer drops what it ends in, a stream has brought it
                assert (whole.message.tool_calls, len(made["tool_calls"])) == (None, 1)
                continue
            read = [
                (each["function"]["name"], json.loads(each["function"]["arguments"])) for each in made["tool_calls"]
            ]
            assert read == wanted
            assert [each.function.name for each in whole.message.tool_calls or []] == [name for name, _ in wanted]
            assert made["finish_reason"] == whole.finish_reason == ("tool_calls" if wanted else "stop")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_loop_of_the_openai_client(asked: Server, choice: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=asked.url + "/v1", api_key="none", max_retries=0)
    tools = [
        {"type": "function", "function": {"name": name, "strict": True, "parameters": schema}}
        for name, schema in SCHEMAS.items()
    ]
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    common: dict[str, Any] = {"model": "tiny", "tools": tools, "temperature": 0, "max_tokens": 200}
    forced: dict[str, Any] = {**common, "messages": messages, "tool_choice": named, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**forced).choices[0]
    made = streamed(client, forced) if stream else whole.message.model_dump()
    [call] = made["tool_calls"]
    assert call["function"] == whole.message.tool_calls[0].function.model_dump()
    assert (made["content"] or "", whole.finish_reason) == ("", "tool_calls")
    function = call["function"]
    assert function["name"] in (SCHEMAS if choice == "required" else [choice])
    jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "42"},
    ]
    final = {**common, "messages": messages, "tool_choice": "none"}
    answer = client.chat.completions.create(**final).choices[0]
    assert answer.message.tool_calls is None and answer.finish_reason in ("stop", "length")
    if stream:
        assert streamed(client, final)["content"] == answer.message.content


def streamed(client: openai.OpenAI, options: dict[str, Any]) -> dict[str, Any]:
    """A message as a client puts it together from a stream; what brings something says what was used so far."""
    usage = {"include_usage": True, "continuous_usage_stats": True}
    made: dict[str, Any] = {"content": "", "tool_calls": []}
    for chunk in client.chat.completions.create(**options, stream=True, stream_options=usage):
        for choice in chunk.choices:
            assert chunk.usage is not None or not (choice.delta.content or choice.delta.tool_calls)
            made["content"] += choice.delta.content or ""
            for item in choice.delta.tool_calls or []:
                if item.id is not None:
                    assert item.index == len(made["tool_calls"])
                    made["tool_calls"].append({"id": item.id, "type": "function", "function": {"arguments": ""}})
                    made["tool_calls"][-1]["function"]["name"] = item.function.name
                made["tool_calls"][item.index]["function"]["arguments"] += item.function.arguments or ""
            made["finish_reason"] = choice.finish_reason or made.get("finish_reason")
    assert made["finish_reason"] == "tool_calls" if made["tool_calls"] else made["finish_reason"] in ("stop", "length")
    return made


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_loop_of_the_anthropic_client(asked: Server, choice: str, stream: bool) -> None:
    client = anthropic.Anthropic(base_url=asked.url, api_key="none", max_retries=0)
    tools = [{"name": name, "strict": True, "input_schema": schema} for name, schema in SCHEMAS.items()]
    named = {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    common: dict[str, Any] = {"model": "tiny", "tools": tools, "max_tokens": 200}
    forced = {**common, "messages": messages, "tool_choice": {**named, "disable_parallel_tool_use": True}}
    whole = client.messages.create(**forced)
    made = said(client, forced) if stream else whole
    [call] = made.content
    assert (call.type, made.stop_reason) == ("tool_use", "tool_use")
    assert (call.name, call.input) == (whole.content[0].name, whole.content[0].input)
    assert call.name in (SCHEMAS if choice == "required" else [choice])
    jsonschema.validate(call.input, SCHEMAS[call.name])
    messages += [
        {"role": "assistant", "content": [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "42"}]},
    ]
    final = {**common, "messages": messages, "tool_choice": {"type": "none"}}
    answer = client.messages.create(**final)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    if stream:
        assert [block.model_dump() for block in said(client, final).content] == [
            block.model_dump() for block in answer.content
        ]


def said(client: anthropic.Anthropic, options: dict[str, Any]) -> Any:
    """A message as the client puts it together from a stream."""
    with client.messages.stream(**options) as stream:
        return stream.get_final_message()
