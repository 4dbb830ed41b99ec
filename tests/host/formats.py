"""How models write tool calls, by the host's names of their parsers: what a parser must read, for tests to cut up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
Calls = list[tuple[str, Arguments]]
Render = Callable[[Calls], str]


def text(value: Any) -> str:
    """A value as formats of tags have it: strings as they are."""
    return value if isinstance(value, str) else json_of(value)


def json_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def is_string(value: Any) -> str:
    return "true" if isinstance(value, str) else "false"


def each(call: Callable[[str, Arguments], str], begin: str = "", between: str = "", end: str = "") -> Render:
    """Calls one after the other."""
    return lambda calls: begin + between.join(call(name, arguments) for name, arguments in calls) + end


def numbered(call: Callable[[int, str, Arguments], str], begin: str = "", between: str = "", end: str = "") -> Render:
    """The same for formats that count them."""
    return lambda calls: begin + between.join(call(i, *made) for i, made in enumerate(calls)) + end


def tags(head: str, member: str, tail: str) -> Callable[[str, Arguments], str]:
    """A call with a tag for each argument; {name}, {key}, {value} and {is_string} are filled in."""

    def call(name: str, arguments: Arguments) -> str:
        members = [
            member.format(key=key, value=text(value), is_string=is_string(value)) for key, value in arguments.items()
        ]
        return head.format(name=name) + "".join(members) + tail

    return call


def objects(begin: str, end: str, key: str = "arguments") -> Callable[[str, Arguments], str]:
    """A call as a JSON object."""
    return lambda name, arguments: begin + json_of({"name": name, key: arguments}) + end


def python(name: str, arguments: Arguments) -> str:
    return f"{name}(" + ", ".join(f"{key}={value!r}" for key, value in arguments.items()) + ")"


def gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(member)}" for key, member in value.items()) + "}"
    return "[" + ",".join(map(gemma, value)) + "]" if isinstance(value, list) else json_of(value)


def minimax(value: Any) -> str:
    mark = "]<]minimax[>["
    if isinstance(value, dict):
        return "".join(f"{mark}<{key}>{minimax(member)}{mark}</{key}>" for key, member in value.items())
    return (
        "".join(f"{mark}<item>{minimax(member)}{mark}</item>" for member in value)
        if isinstance(value, list)
        else text(value)
    )


def kimi_k3(index: int, name: str, arguments: Arguments) -> str:
    kinds = {str: "string", int: "number", float: "number", dict: "object", list: "array"}
    members = [
        f'<|open|>argument key="{key}" type="{kinds[type(value)]}"<|sep|>{text(value)}<|close|>argument<|sep|>'
        for key, value in arguments.items()
    ]
    return f'<|open|>call tool="{name}" index="{index + 1}"<|sep|>{"".join(members)}<|close|>call<|sep|>'


def dsml(calls: str, invoke: str, parameter: str) -> Render:
    head, tail = f'<｜DSML｜{invoke} name="{{name}}">\n', f"</｜DSML｜{invoke}>\n"
    member = f'<｜DSML｜{parameter} name="{{key}}" string="{{is_string}}">{{value}}</｜DSML｜{parameter}>\n'
    return each(tags(head, member, tail), f"<｜DSML｜{calls}>\n", "", f"</｜DSML｜{calls}>")


QWEN = each(objects("<tool_call>\n", "\n</tool_call>"), between="\n")
GLM = each(
    tags("<tool_call>{name}\n", "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n", "</tool_call>"),
    between="\n",
)
CODER = each(
    tags("<tool_call>\n<function={name}>\n", "<parameter={key}>\n{value}\n</parameter>\n", "</function>\n</tool_call>"),
    between="\n",
)
INVOKE = tags('<invoke name="{name}">\n', '<parameter name="{key}">{value}</parameter>\n', "</invoke>\n")
BEAM = each(
    tags(
        " to={name}<|channel|>analysis <|constrain|>xml<|message|>",
        '<rfl:parameter name="{key}">\n{value}\n</rfl:parameter>',
        "<|call|>",
    ),
    between="<|end|><|start|>assistant",
)

FORMATS: dict[str, Render] = {
    "apertus2509": each(lambda name, args: json_of({name: args}), "<|tools_prefix|>[", ", ", "]<|tools_suffix|>"),
    "beam": BEAM,
    "cohere_command4": numbered(
        lambda i, name, args: json_of({"tool_call_id": str(i), "tool_name": name, "parameters": args}),
        "<|START_ACTION|>[\n",
        ",\n",
        "\n]<|END_ACTION|>",
    ),
    "deepseekv3": each(
        lambda name, args: (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json_of(args)}\n```<｜tool▁call▁end｜>"
        ),
        "<｜tool▁calls▁begin｜>",
        "\n",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseekv31": each(
        lambda name, args: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json_of(args)}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseekv32": dsml("function_calls", "invoke", "parameter"),
    "deepseekv4": dsml("tool_calls", "invoke", "parameter"),
    "deepseekv41": dsml(" calls", " invoke", " parameter"),
    "dots": each(INVOKE, "<dots_function_call>\n", "", "</dots_function_call>"),
    "gemma4": each(lambda name, args: f"<|tool_call>call:{name}{gemma(args)}<tool_call|>"),
    "gigachat3": each(objects("<|function_call|>", "")),
    "gigachat35": each(
        tags(
            '<｜GCML｜invoke name="{name}">',
            '<｜GCML｜parameter name="{key}" string="{is_string}">{value}</｜GCML｜parameter>',
            "</｜GCML｜invoke>",
        ),
        "<｜GCML｜tool_calls>",
        "",
        "</｜GCML｜tool_calls>",
    ),
    "glm": GLM,
    "glm45": GLM,
    "glm47": each(tags("<tool_call>{name}", "<arg_key>{key}</arg_key><arg_value>{value}</arg_value>", "</tool_call>")),
    "gpt-oss": each(
        lambda name, args: (
            f"<|start|>assistant<|channel|>commentary to=functions.{name}"
            f"<|constrain|>json<|message|>{json_of(args)}<|call|>"
        )
    ),
    "hermes": each(objects("<tool_call>", "</tool_call>"), between="\n"),
    "hunyuan": each(
        tags(
            "<tool_call>{name}<tool_sep>\n",
            "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
            "</tool_call>\n",
        ),
        "<tool_calls>\n",
        "",
        "</tool_calls>",
    ),
    "inkling": each(
        lambda name, args: (
            f"<|message_model|>{name}<|content_invoke_tool_json|>{json_of({'name': name, 'args': args})}<|end_message|>"
        )
    ),
    "interns1": each(objects("<|action_start|> <|plugin|>\n", "<|action_end|>", "parameters"), between="\n"),
    "iquest_q1": each(
        tags(
            "<iquest_tool_call>{name}", "<arg_key>{key}</arg_key><arg_value>{value}</arg_value>", "</iquest_tool_call>"
        )
    ),
    "k2_horizon": each(
        tags(
            "<ifm|tool_call>{name}\n",
            "<ifm|arg_key>{key}</ifm|arg_key>\n<ifm|arg_value>{value}</ifm|arg_value>\n",
            "</ifm|tool_call>",
        ),
        "<ifm|tool_calls>\n",
        "\n",
        "\n</ifm|tool_calls>",
    ),
    "kimi_k2": numbered(
        lambda i, name, args: (
            f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{json_of(args)}<|tool_call_end|>"
        ),
        "<|tool_calls_section_begin|>",
        "",
        "<|tool_calls_section_end|>",
    ),
    "kimi_k3": numbered(kimi_k3, "<|open|>tools<|sep|>", "", "<|close|>tools<|sep|>"),
    "lfm2": each(python, "<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
    "ling3": GLM,
    "llama3": each(objects("", ""), "<|python_tag|>", ";"),
    "mimo": each(
        tags("<tool_call>\n<function={name}>\n", "<parameter={key}>{value}</parameter>\n", "</function>\n</tool_call>"),
        between="\n",
    ),
    "minicpm5": each(
        tags('<function name="{name}">', '<param name="{key}"><![CDATA[{value}]]></param>', "</function>"), between="\n"
    ),
    "minimax-m2": each(INVOKE, "<minimax:tool_call>\n", "", "</minimax:tool_call>"),
    "minimax-m3": each(
        lambda name, args: f']<]minimax[>[<invoke name="{name}">{minimax(args)}]<]minimax[>[</invoke>',
        "]<]minimax[>[<tool_call>",
        "",
        "]<]minimax[>[</tool_call>",
    ),
    "mistral": each(objects("", ""), "[TOOL_CALLS] [", ", ", "]"),
    "muse": each(
        tags(
            '<|start|>assistant to=functions<|message|><atem:function_calls>\n<atem:invoke name="{name}">\n',
            '<atem:parameter name="{key}">{value}</atem:parameter>\n',
            "</atem:invoke>\n</atem:function_calls><|eom|>",
        )
    ),
    "nanbeige": CODER,
    "poolside_v1": GLM,
    "pythonic": each(python, "[", ", ", "]"),
    "qwen": QWEN,
    "qwen25": QWEN,
    "qwen3_coder": CODER,
    "response_template": BEAM,
    "spark25": each(
        tags("<tool_call>{name}\n", "<arg_key>{key}</arg_key><arg_value>{value}</arg_value>\n", "</tool_call>"),
        between="\n",
    ),
    "step3": each(
        tags(
            '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n',
            '<steptml:parameter name="{key}">{value}</steptml:parameter>\n',
            "</steptml:invoke><｜tool_call_end｜>",
        ),
        "<｜tool_calls_begin｜>\n",
        "\n",
        "\n<｜tool_calls_end｜>",
    ),
    "step3p5": CODER,
    "trinity": QWEN,
}

# How words come before a call, where they are framed.
PROSE = {
    "gpt-oss": "<|channel|>analysis<|message|>{}<|end|>",
    "muse": "<|start|>assistant to=user<|message|>{}<|eom|>",
}
