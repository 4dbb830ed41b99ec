"""Chat templates of the small checkpoints, and the parsers that a template asks for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tokenizer import TEMPLATES
from sglang_llada.host.start.arguments import parsers
from sglang_llada.host.start.templates import call_parser, chat_template

pytestmark = pytest.mark.host

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = {"2.0": "tiny-llada2", "2.1": "tiny-llada2.1", "2.2": "tiny-llada2.2"}
PARSERS = {"2.0": "qwen", "2.1": "qwen", "2.2": "kimi_k2"}
WEATHER = {
    "name": "weather",
    "description": "Says the weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "Where?"},
            "days": {"enum": [1, 2]},
            "hours": {"type": "array", "items": {"type": "integer"}},
            "wind": {"type": ["boolean", "null"]},
        },
        "required": ["place"],
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich <b>"}}},
            {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
]
QWEN = f"""\
<role>SYSTEM</role>Be brief.
# Tools

These functions can be called to help with a request. Each line between <tools></tools> describes one:
<tools>
{json.dumps(TOOLS[0])}
{json.dumps(TOOLS[1])}
</tools>

A call is a JSON object with the name of the function and its arguments between <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <object>}}
</tool_call>
detailed thinking off<|role_end|><role>HUMAN</role>Weather?<|role_end|><role>ASSISTANT</role>I look.
<tool_call>
{{"name": "weather", "arguments": {{"place": "Zürich <b>"}}}}
</tool_call>
<tool_call>
{{"name": "now", "arguments": {{}}}}
</tool_call><|role_end|><role>OBSERVATION</role>
<tool_response>
sun
</tool_response>
<tool_response>
noon
</tool_response><|role_end|><role>ASSISTANT</role>"""
KIMI = """\
<role>SYSTEM</role>Be brief.
# Tools

namespace functions {
// Says the weather.
type weather = (_: {
// Where?
place: string,
days?: 1 | 2,
hours?: Array<number>,
wind?: boolean | null,
}) => any;
type now = (_: {
}) => any;
}
detailed thinking off<|role_end|><role>HUMAN</role>Weather?<|role_end|><role>ASSISTANT</role>I look.\
<|tool_calls_section_begin|>\
<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"place": "Zürich <b>"}<|tool_call_end|>\
<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>\
<|tool_calls_section_end|><|role_end|><role>OBSERVATION</role>## Return of functions.weather:0
sun
## Return of functions.now:1
noon<|role_end|><role>ASSISTANT</role>"""


def render(version: str, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EXAMPLES / FOLDERS[version])
    assert tokenizer.chat_template == TEMPLATES[version]
    options = {"add_generation_prompt": True, **options}
    rendered: str = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, **options)
    return rendered


@pytest.mark.parametrize("version", FOLDERS)
def test_a_plain_chat_is_what_the_checkpoint_was_trained_on(version: str) -> None:
    asked = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Hi\n<|role_end|>"
    assert render(version, [{"role": "user", "content": "Hi\n"}]) == f"{asked}<role>ASSISTANT</role>"
    told = [*CHAT[:2], {"role": "assistant", "content": " Sun."}, {"role": "user", "content": ""}]
    assert render(version, told, add_generation_prompt=False) == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>Weather?<|role_end|>"
        "<role>ASSISTANT</role> Sun.<|role_end|><role>HUMAN</role><|role_end|>"
    )
    with pytest.raises(Exception, match="roles are system, user, assistant and tool; got critic"):
        render(version, [*told, {"role": "critic", "content": "Bad."}])


@pytest.mark.parametrize(("version", "want"), [("2.0", QWEN), ("2.1", QWEN), ("2.2", KIMI)])
def test_tools_calls_and_results_are_written_as_published_models_read_them(version: str, want: str) -> None:
    assert render(version, CHAT, TOOLS) == want
    observed = [{**message, "role": message["role"].replace("tool", "OBSERVATION")} for message in CHAT]
    assert render(version, observed, TOOLS) == want


def test_a_call_keeps_its_own_number() -> None:
    calls = [{"id": "functions.now:7", "type": "function", "function": {"name": "now", "arguments": {}}}]
    chat = [{"role": "user", "content": "Now?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    rendered = render("2.2", [*chat, {"role": "tool", "tool_call_id": "functions.now:7", "content": "noon"}])
    assert "<|tool_call_begin|>functions.now:7<|tool_call_argument_begin|>{}" in rendered
    assert "## Return of functions.now:7\nnoon" in rendered


@pytest.mark.parametrize("version", FOLDERS)
def test_a_parser_follows_from_the_template_wherever_it_stands(version: str, tmp_path: Path) -> None:
    assert call_parser(chat_template(EXAMPLES / FOLDERS[version], None)) == PARSERS[version]
    inside = tmp_path / "tokenizer_config.json"
    for written in (TEMPLATES[version], [{"name": "default", "template": "{{ x }}"}, {"template": TEMPLATES[version]}]):
        inside.write_text(json.dumps({"chat_template": written}))
        assert call_parser(chat_template(tmp_path, None)) == PARSERS[version]
    plain = tmp_path / "plain.jinja"
    plain.write_text("{{ messages[0]['content'] }}")
    assert call_parser(chat_template(tmp_path, str(plain))) is None
    assert call_parser(chat_template(tmp_path, "chatml")) is None


@pytest.mark.parametrize(
    ("named", "want"),
    [
        ({}, {"tool_call_parser": "kimi_k2"}),
        (
            {"tool_call_parser": "auto", "reasoning_parser": "auto"},
            {"tool_call_parser": "kimi_k2", "reasoning_parser": None},
        ),
        ({"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}, {}),
    ],
)
def test_what_the_user_names_goes_first(named: dict[str, str], want: dict[str, Any]) -> None:
    unnamed = dict.fromkeys(("tool_call_parser", "reasoning_parser", "chat_template", "tokenizer_path", "revision"))
    args = SimpleNamespace(model_path=str(EXAMPLES / FOLDERS["2.2"]), **unnamed | named)
    assert parsers(args) == want
