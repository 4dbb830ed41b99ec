"""Thirty grammars as a request names them, and for each an independent judge of texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
from lark import Lark
from lark.exceptions import LarkError


@dataclass(frozen=True, slots=True)
class Grammar:
    """Sampling parameters that ask for it, and whether a whole text conforms."""

    name: str
    options: dict[str, Any]
    conforms: Callable[[str], bool]


def regex(name: str, pattern: str) -> Grammar:
    return Grammar(name, {"regex": pattern}, lambda text: re.fullmatch(pattern, text, re.DOTALL) is not None)


def schema(name: str, body: dict[str, Any]) -> Grammar:
    """A JSON schema, judged by jsonschema."""

    def conforms(text: str) -> bool:
        try:
            jsonschema.validate(json.loads(text), body)
        except (json.JSONDecodeError, jsonschema.ValidationError):
            return False
        return True

    return Grammar(name, {"json_schema": json.dumps(body)}, conforms)


def ebnf(name: str, rules: str, judge: str) -> Grammar:
    """EBNF as xgrammar reads it, judged by Lark's Earley parser from a grammar of its own."""
    parser = Lark(judge, keep_all_tokens=True)

    def conforms(text: str) -> bool:
        try:
            parser.parse(text)
        except LarkError:
            return False
        return True

    return Grammar(name, {"ebnf": rules}, conforms)


def record(**properties: Any) -> dict[str, Any]:
    """The schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD = {"type": "string", "pattern": "^[a-z]{1,6}$"}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
GRAMMARS = [
    regex("word", "[a-z]{3,8}"),
    regex("date", "(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
    regex("time", "([01][0-9]|2[0-3]):[0-5][0-9]"),
    regex("address", r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)"),
    regex("mail", r"[a-z]{1,8}@[a-z]{1,6}\.(com|org|net)"),
    regex("choice", "(yes|no|maybe)"),
    regex("phone", r"\(\d{3}\) \d{3}-\d{4}"),
    regex("price", r"\$(0|[1-9]\d{0,3})\.\d{2}"),
    regex("hexadecimal", "0x[0-9A-F]{4}"),
    regex("list", r"\[\d{1,2}(, \d{1,2}){0,5}\]"),
    regex("uuid", "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    regex("unicode", "(straße|naïve|日本|ñandú)( (straße|naïve|日本|ñandú)){0,2}"),
    regex("greek", "[α-ω]{2,5}"),
    regex("lines", "([a-z]{1,4}\n){2,3}"),
    schema("flat", record(name=WORD, age=SMALL)),
    schema("nested", record(who=record(name=WORD, home=record(city=WORD, number=SMALL)), ok={"type": "boolean"})),
    schema("array", {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 5}),
    schema("array of objects", {"type": "array", "items": record(a=SMALL), "minItems": 1, "maxItems": 3}),
    schema("enum", record(color={"enum": ["red", "green", "blue"]}, size={"enum": ["S", "M", "L"]})),
    schema("constant", record(kind={"const": "tiny"}, value=SMALL)),
    schema("either", {"anyOf": [record(a=SMALL), record(b=WORD)]}),
    schema("null", record(value={"anyOf": [{"type": "null"}, SMALL]})),
    schema("matrix", {"type": "array", "items": {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 2},
                      "minItems": 2, "maxItems": 2}),
    schema("dated", record(day={"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"})),
    schema("unicode keys", record(größe=SMALL, 名=WORD)),
    ebnf(
        "call",
        'root ::= name "(" args ")"\nname ::= "sort" | "reverse" | "count"\nargs ::= arg (", " arg){0,3}\n'
        'arg ::= key "=" value\nkey ::= [a-z]{1,3}\nvalue ::= [0-9]{1,2} | "\'" [a-z]{0,4} "\'"',
        'start: name "(" arg (", " arg)~0..3 ")"\nname: "sort" | "reverse" | "count"\narg: KEY "=" value\n'
        "KEY: /[a-z]{1,3}/\nvalue: /[0-9]{1,2}/ | /'[a-z]{0,4}'/",
    ),
    ebnf(
        "sum",
        'root ::= term (" + " term){1,3} " = " term\nterm ::= [1-9] [0-9]?',
        'start: TERM (" + " TERM)~1..3 " = " TERM\nTERM: /[1-9][0-9]?/',
    ),
    ebnf(
        "nested brackets",
        'root ::= one\none ::= "(" two? ")"\ntwo ::= "[" three? "]"\nthree ::= "{" [ab]{0,3} "}"',
        'start: "(" two? ")"\ntwo: "[" three? "]"\nthree: "{" /[ab]/~0..3 "}"',
    ),
    ebnf(
        "query",
        'root ::= "SELECT " col (", " col){0,2} " FROM " tab (" WHERE " col " = " [0-9]{1,3})?\n'
        'col ::= "a" | "b" | "c"\ntab ::= "t" [1-9]',
        'start: "SELECT " COL (", " COL)~0..2 " FROM " TAB (" WHERE " COL " = " /[0-9]{1,3}/)?\n'
        "COL: /[abc]/\nTAB: /t[1-9]/",
    ),
    ebnf("one word", 'root ::= "yes" | "no"', 'start: "yes" | "no"'),
]  # fmt: skip
