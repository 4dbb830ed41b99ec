"""The OpenAI endpoints: what their requests ask for, kept on a model that decides many tokens at once."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from tests.host.grammars import record
from tests.host.serving import Server

pytestmark = pytest.mark.host

COUNTING = "List 13 numbers from 12."
PROMPT = f"<role>HUMAN</role>{COUNTING}<|role_end|><role>ASSISTANT</role>"
PERSON = record(name={"type": "string", "maxLength": 8}, age={"type": "integer", "minimum": 0, "maximum": 150})
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "description": "Says the weather of a place.",
            "parameters": record(place={"type": "string", "maxLength": 12}, days={"enum": [1, 2, 3]}),
        },
    }
    for name in ("weather_now", "weather_then")
]


@pytest.fixture(scope="module")
def compact(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """A bias against white space, with which so small a model fills what grammars of tags allow."""
    return {str(token): -100 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, content: str = COUNTING, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], **{"temperature": 0, **options}
    )


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, **options})


def test_completions_take_text_and_ids_one_or_several(client: openai.OpenAI) -> None:
    one = complete(client, max_tokens=20).choices[0].text
    assert [each.text for each in complete(client, [PROMPT, PROMPT], max_tokens=20).choices] == [one, one]
    ids = complete(client, [70, 71], max_tokens=20).choices[0].text
    assert [each.text for each in complete(client, [[70, 71], [70, 71]], max_tokens=20).choices] == [ids, ids]


def test_lengths_are_kept(client: openai.OpenAI) -> None:
    for options in ({"max_tokens": 9}, {"max_completion_tokens": 9}):
        short = chat(client, **options)
        assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (9, "length")
    brief = chat(client, "What is 1 + 1?", max_tokens=64)
    assert brief.usage.completion_tokens < 30
    for extra in ({"min_tokens": 30}, {"ignore_eos": True}):
        longer = chat(client, "What is 1 + 1?", max_tokens=64, extra_body=extra)
        assert longer.usage.completion_tokens >= 30


def test_seeds_and_copies(client: openai.OpenAI) -> None:
    warm: dict[str, Any] = {"temperature": 6, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    seeded = [chat(client, seed=5, **warm).choices[0].message.content for _ in range(2)]
    assert seeded[0] == seeded[1] != chat(client, seed=6, **warm).choices[0].message.content
    copies = {choice.message.content for choice in chat(client, n=4, **warm).choices}
    assert len(copies) == 4
    assert len({choice.message.content for choice in chat(client, n=3, max_tokens=20).choices}) == 1


def test_stops_of_every_kind(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=60)
    text = whole.choices[0].text
    stop, before = text[6:9], text[: text.index(text[6:9])]
    got = complete(client, max_tokens=60, stop=["nowhere", stop])
    assert (got.choices[0].text, got.choices[0].finish_reason) == (before, "stop")
    assert got.usage.completion_tokens < whole.usage.completion_tokens
    kept = complete(client, max_tokens=60, stop=stop, extra_body={"no_stop_trim": True})
    assert kept.choices[0].text.startswith(before + stop)
    by_regex = complete(client, max_tokens=60, extra_body={"stop_regex": re.escape(stop)})
    assert by_regex.choices[0].text.startswith(before) and by_regex.usage == kept.usage
    ids = complete(client, max_tokens=60, extra_body={"return_token_ids": True}).choices[0].token_ids
    by_id = complete(client, max_tokens=60, extra_body={"stop_token_ids": [ids[3]], "return_token_ids": True})
    assert by_id.choices[0].token_ids == ids[: ids.index(ids[3]) + 1]


def test_token_ids_come_with_the_text(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    extra = {"return_token_ids": True, "return_prompt_token_ids": True}
    text, message = complete(client, max_tokens=20, extra_body=extra), chat(client, max_tokens=20, extra_body=extra)
    assert text.choices[0].prompt_token_ids == tokenizer.encode(PROMPT)
    assert text.choices[0].text == tokenizer.decode(text.choices[0].token_ids)
    assert len(message.choices[0].prompt_token_ids) == message.usage.prompt_tokens
    assert message.choices[0].message.content == tokenizer.decode(message.choices[0].response_token_ids)


def test_a_stream_ends_with_its_usage(client: openai.OpenAI) -> None:
    pieces = list(chat(client, max_tokens=50, stream=True, stream_options={"include_usage": True}))
    whole = chat(client, max_tokens=50)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert not pieces[-1].choices and pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])


def test_response_formats_are_kept(client: openai.OpenAI, compact: dict[str, int]) -> None:
    for temperature in (0, 1):
        common: dict[str, Any] = {"max_tokens": 200, "temperature": temperature, "seed": 3, "logit_bias": compact}
        named = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        jsonschema.validate(json.loads(text_of(chat(client, response_format=named, **common))), PERSON)
        by_text = complete(client, extra_body={"json_schema": json.dumps(PERSON)}, **common)
        jsonschema.validate(json.loads(by_text.choices[0].text), PERSON)
        free = chat(client, "Give me an object.", response_format={"type": "json_object"}, **common)
        if free.choices[0].finish_reason == "stop":  # nothing bounds its length
            assert isinstance(json.loads(text_of(free)), dict)
        tags = {
            "type": "structural_tag",
            "structures": [{"begin": "<person>", "schema": PERSON, "end": "</person>"}],
            "triggers": ["<person>"],
        }
        loose = text_of(chat(client, response_format=tags, **common))
        assert "<person>" not in loose or "</person>" in loose
        tag = {"type": "tag", "begin": "<person>", "content": {"type": "json_schema", "json_schema": PERSON}}
        strict = {"type": "structural_tag", "format": {**tag, "end": "</person>"}}
        inside = re.fullmatch(r"<person>(.*)</person>", text_of(chat(client, response_format=strict, **common)), re.S)
        assert inside is not None
        jsonschema.validate(json.loads(inside[1]), PERSON)
        by_regex = chat(client, extra_body={"regex": r"\d{4}-\d{2}"}, **common)
        assert re.fullmatch(r"\d{4}-\d{2}", text_of(by_regex))
        by_ebnf = chat(client, extra_body={"ebnf": 'root ::= "yes" | "no"'}, **common)
        assert text_of(by_ebnf) in ("yes", "no")


def text_of(answer: Any) -> str:
    content: str = answer.choices[0].message.content
    return content


def test_required_tools_are_called(client: openai.OpenAI, compact: dict[str, int]) -> None:
    for temperature in (0, 1):
        options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        options |= {"max_tokens": 300, "temperature": temperature, "seed": 1, "logit_bias": compact}
        got = chat(client, "Weather in Rome?", **options).choices[0]
        assert got.finish_reason == "tool_calls" and got.message.tool_calls
        [call] = got.message.tool_calls
        assert call.function.name in ("weather_now", "weather_then")
        jsonschema.validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])
        pieces = [p.choices[0].delta for p in chat(client, "Weather in Rome?", stream=True, **options) if p.choices]
        streamed = [each for delta in pieces for each in delta.tool_calls or ()]
        arguments = "".join(each.function.arguments or "" for each in streamed)
        assert json.loads(arguments) == json.loads(call.function.arguments)
    # The prompt lists the tools then, and only then.
    free = {
        how: chat(client, "What is 1 + 1?", tools=TOOLS, tool_choice=how, max_tokens=40) for how in ("auto", "none")
    }
    assert free["auto"].usage.prompt_tokens > free["none"].usage.prompt_tokens
    assert text_of(free["none"]) == text_of(chat(client, "What is 1 + 1?", max_tokens=40))
    assert text_of(free["auto"]) and not free["auto"].choices[0].message.tool_calls


def test_salted_prompts_share_nothing(client: openai.OpenAI) -> None:
    prompt = [75] * 100

    def cached(**extra: str) -> int:
        usage = complete(client, prompt, max_tokens=1, extra_body=extra).usage
        return usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0

    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 96, 0]
    assert [cached(extra_key="c"), cached(extra_key="c"), cached()] == [0, 96, 0]
