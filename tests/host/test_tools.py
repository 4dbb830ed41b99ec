"""Tool calls and thinking: a stream gives what the whole answer gives, for every parser of the host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice
from sglang.srt.function_call.json_array_parser import JsonArrayParser
from sglang.srt.parser.beam import BEAM_RESPONSE_TEMPLATE
from transformers import PreTrainedTokenizerFast

from sglang_llada.host.requests.grammar import bound_tags
from sglang_llada.host.requests.tools import READINGS, PiecewiseCalls, PiecewiseThinking
from tests.host.formats import FORMATS, PROSE, Calls, json_of
from tests.host.serving import ROOT

pytestmark = pytest.mark.host

KINDS = {
    "weather": {"place": "string", "days": "integer", "where": "object"},
    "add": {"a": "integer", "b": "integer"},
}
TOOLS = [
    Tool(
        type="function",
        function={
            "name": name,
            "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in members.items()}},
        },
    )
    for name, members in KINDS.items()
]
ROME: Calls = [("add", {"a": 1, "b": 22})]
NESTED: Calls = [
    ("weather", {"place": 'Zürich "Mitte" \\ 雪 STOP\n[1] {x}', "days": 3, "where": {"tags": ["a, b", {"ok": "é"}]}})
]
ANSWERS: dict[str, tuple[str, Calls]] = {
    "prose and a call": ("I look.\n", ROME),
    "a call alone": ("", ROME),
    "nested arguments": ("I say: 1 < 2. ", NESTED),
    "two calls": ("Both.", [*NESTED, *ROME]),
    "two calls of one tool": ("", [*ROME, ("add", {"a": 2, "b": 3})]),
    "no call": ("No: 1 < 2, <b>a</b>\n\nand {x} ", []),
    "no call, in brackets": ("No: a[3] is 4.\n", []),
}
# What a detector of the host gets wrong token by token too, which nothing can take back.
FAULTS = {
    ("mistral", "no call, in brackets"): "takes each ] of a text for the end of calls",
    ("gigachat3", "two calls"): "reads one call, as the whole answer too",
    ("gigachat3", "two calls of one tool"): "reads one call, as the whole answer too",
}
DISTINCT = list({detector: name for name, detector in PiecewiseCalls.ToolCallParserEnum.items()}.values())
SIZE = 20  # characters, of some tokens


def parser_of(name: str) -> PiecewiseCalls:
    tokenizer = SimpleNamespace(response_template=BEAM_RESPONSE_TEMPLATE) if name == "response_template" else None
    return PiecewiseCalls(TOOLS, name, tokenizer=tokenizer)


def cuts(answer: str) -> Iterator[list[str]]:
    """An answer in one piece, in characters, and in pieces that are cut at every place in turn."""
    yield [answer]
    yield list(answer)
    for first in range(1, SIZE + 1):
        yield [answer[:first], *(answer[at : at + SIZE] for at in range(first, len(answer), SIZE))]


def whole(name: str, answer: str) -> tuple[str, Calls]:
    """As the host reads an answer that is not streamed."""
    parser = parser_of(name)
    if not parser.has_tool_call(answer):
        return answer, []
    said, calls = parser.parse_non_stream(answer)
    return said, [(call.name or "", json.loads(call.parameters)) for call in calls]


def streamed(name: str, pieces: list[str]) -> tuple[str, Calls]:
    """What a client puts together from a stream."""
    parser = parser_of(name)
    said, calls = "", dict[int, list[str]]()
    for more, items in [*map(parser.parse_stream_chunk, pieces), parser.parse_stream_end()]:
        said += more
        for item in items:
            if item.name:
                assert item.tool_index == len(calls), "calls are numbered in their order"
                calls[item.tool_index] = [item.name, ""]
            calls[item.tool_index][1] += item.parameters
    assert parser.detector.prev_tool_call_arr == []  # the host adds nothing
    return said, [(called, read(arguments)) for called, arguments in calls.values()]


def read(arguments: str) -> Any:
    """Arguments, or what a broken detector gave for some."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def test_every_parser_of_the_host_has_a_format() -> None:
    assert FORMATS.keys() == PiecewiseCalls.ToolCallParserEnum.keys()


@pytest.mark.parametrize("name", DISTINCT)
def test_a_stream_gives_the_calls_and_the_text_of_the_whole_answer_wherever_it_is_cut(name: str) -> None:
    for title, (prose, calls) in ANSWERS.items():
        framed = PROSE[name].format(prose) if prose and calls and name in PROSE else prose
        answer = framed + (FORMATS[name](calls) if calls else "")
        want = whole(name, answer)
        wrong = [pieces for pieces in cuts(answer) if streamed(name, pieces) != want]
        if (name, title) in FAULTS:
            assert wrong, f"{name} reads {title!r} now: it is no fault any more"
            continue
        assert want[1] == calls or name in ("gemma4", "minimax-m3"), (title, want)
        assert not wrong, (title, wrong[0], streamed(name, wrong[0]), want)


def test_required_calls_without_a_format_of_their_own_are_read_wherever_they_are_cut() -> None:
    """The host asks for JSON where a parser has no grammar, and reads it with a parser that is not in its registry."""
    for calls in (ROME, [*NESTED, *ROME]):
        answer = json_of([{"name": name, "parameters": arguments} for name, arguments in calls])
        for pieces in cuts(answer):
            parser = JsonArrayParser()
            results = [*(parser.parse_streaming_increment(piece, TOOLS) for piece in pieces), parser.finish(TOOLS)]
            items = [item for result in results for item in result.calls]
            assert [item.name for item in items if item.name] == [name for name, _ in calls]
            for index, (_, arguments) in enumerate(calls):
                assert json.loads("".join(i.parameters for i in items if i.tool_index == index)) == arguments


@pytest.mark.parametrize("name", ["qwen", "kimi_k2"])
def test_an_answer_that_ends_inside_a_call_has_brought_the_beginning_of_it(name: str) -> None:
    answer = "I look.\n" + FORMATS[name](NESTED)
    cut = answer[: answer.index("STOP")]
    said, [(called, arguments)] = streamed(name, [cut])
    assert (said, called) == (whole(name, cut)[0], "weather")
    assert isinstance(arguments, str)
    assert arguments.startswith('{"place": "Zürich') and json_of(NESTED[0][1]).startswith(arguments)


def test_what_is_no_call_after_all_is_text() -> None:
    for answer in ('<tool_call>\n["add"]\n</tool_call>', "<tool_call>\n3\n</tool_call>"):
        assert streamed("qwen", list(answer)) == (answer, [])


@pytest.mark.parametrize("name", ["qwen", "kimi_k2"])
@pytest.mark.parametrize("line", ["return x * 2  # twice", '<div class="a"><p>text</p></div>'])
def test_long_arguments_come_bit_by_bit_and_cost_no_more_than_in_proportion(name: str, line: str) -> None:
    """Detectors read a call from its beginning with each piece; what they read in all is counted, and bounded."""
    arguments = {"place": f"{line}\n" * 600}
    answer = FORMATS[name]([("weather", arguments)])
    parser = parser_of(name)
    detect, read = parser.detector.parse_streaming_increment, 0

    def counted(piece: str, tools: list[Tool]) -> Any:
        nonlocal read
        read += len(parser.detector._buffer) + len(piece)
        return detect(piece, tools)

    parser.detector.parse_streaming_increment = counted
    bits = []
    for at in range(0, len(answer), SIZE):
        bits += [item.parameters for item in parser.parse_stream_chunk(answer[at : at + SIZE])[1] if item.parameters]
    assert len(bits) > 20
    bits += [item.parameters for item in parser.parse_stream_end()[1]]
    assert json.loads("".join(bits)) == arguments
    assert read < READINGS * (len(answer) + READINGS)


THOUGHTS = {
    "thinks": "{start}I think: 1 < 2.\n<b>Hm</b>{end}\n\nAnswer: 4 < 5.",
    "thinks, told to": "I think: 1 < 2.\n<b>Hm</b>{end}\n\nAnswer: 4 < 5.",
    "does not think": "Answer: 4 < 5, <b>a</b>\n",
}
THINKING_FAULTS = {
    ("cohere_command4", "thinks"): "keeps the mark that its template writes",
    ("gemma4", "thinks"): "looks for a word behind the mark",
}


@pytest.mark.parametrize("name", PiecewiseThinking.DetectorMap)
def test_a_stream_gives_the_thoughts_of_the_whole_answer_wherever_it_is_cut(name: str) -> None:
    tokenizer = SimpleNamespace(response_template=BEAM_RESPONSE_TEMPLATE) if name == "response_template" else None

    def parser() -> PiecewiseThinking:
        return PiecewiseThinking(name, tokenizer=tokenizer)

    detector = parser().detector
    for title, thought in THOUGHTS.items():
        answer = thought.format(start=detector.think_start_token, end=detector.think_end_token)
        want = tuple(part or "" for part in parser().parse_non_stream(answer))
        wrong = []
        for pieces in cuts(answer):
            reader = parser()
            parts = [*map(reader.parse_stream_chunk, pieces), reader.parse_stream_end()]
            if (got := tuple("".join(part or "" for part in texts) for texts in zip(*parts, strict=True))) != want:
                wrong.append((pieces, got))
        if (name, title) in THINKING_FAULTS:
            assert wrong, f"{name} reads {title!r} now: it is no fault any more"
        else:
            assert not wrong, (title, wrong[0], want)


@pytest.mark.parametrize("name", ["qwen", "kimi_k2"])
@pytest.mark.parametrize("spaces", [True, False])
def test_a_server_that_wants_no_runs_of_white_space_in_json_has_none_in_calls(name: str, spaces: bool) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "examples" / "tiny-llada2.2")
    backend = XGrammarGrammarBackend(tokenizer, len(tokenizer), [tokenizer.eos_token_id], any_whitespace=spaces)
    strict = [tool.model_copy(update={"function": tool.function.model_copy(update={"strict": True})}) for tool in TOOLS]
    kind, tag = PiecewiseCalls(strict, name).get_structure_constraint("required") or ("", "")
    assert kind == "structural_tag"
    for separators, allowed in (((",", ":"), True), ((", ", ": "), True), ((",  ", ": "), spaces)):
        (_, key), _ = bound_tags(backend, tag.model_dump_json(by_alias=True))
        grammar = backend.dispatch_structural_tag(key)
        call = FORMATS[name](ROME).replace(json_of(ROME[0][1]), json.dumps(ROME[0][1], separators=separators))
        call = call.replace(
            '"name": "add", "arguments": ', '"name":"add", "arguments":'
        )  # what the grammar begins with
        assert grammar.matcher.accept_string(call) is allowed, call


@pytest.mark.parametrize("name", ["qwen", "kimi_k2", "hermes"])
def test_a_call_by_name_is_held_to_that_name(name: str) -> None:
    choice = ToolChoice(function={"name": "add"})
    kind, tag = PiecewiseCalls(TOOLS, name).get_structure_constraint(choice) or ("", "")
    written = tag.model_dump_json()
    assert kind == "structural_tag" and "add" in written and "weather" not in written
