"""The import rule: errors, config <- {decode | blocks | llada2} <- host <- plugin, __main__.

Only the last three see SGLang. The rule is read from the syntax tree, so that imports inside functions count too and
nothing has to be installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = Path(__file__).parent.parent / "sglang_llada"
ANY = frozenset({"*"})


@dataclass(frozen=True, slots=True)
class Rule:
    """What a room may import beside the standard library and itself."""

    rooms: frozenset[str]
    packages: frozenset[str] = frozenset()


BASE = frozenset({"errors", "config", "__init__"})
PURE = BASE | {"decode", "blocks", "llada2", "accelerator"}
RULES = {
    "__init__": Rule(frozenset()),
    "errors": Rule(frozenset()),
    "config": Rule(frozenset({"errors"})),
    "accelerator": Rule(BASE, frozenset({"torch"})),
    "blocks": Rule(BASE),
    "decode": Rule(BASE, frozenset({"torch", "triton"})),
    "llada2": Rule(BASE, frozenset({"torch", "triton", "transformers", "safetensors", "tokenizers"})),
    "host": Rule(PURE, ANY),
    "plugin": Rule(PURE | {"host"}, ANY),
    "__main__": Rule(PURE | {"host", "plugin"}, ANY),
}


def room_of(module: list[str]) -> str:
    """The room of a dotted name under the package, given without the package."""
    return module[0] if module else "__init__"


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports; a name from a package counts as a module of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "sglang_llada" else [module]
            yield from ((node.lineno, name) for name in names)


def violations(path: PurePosixPath, source: str) -> list[str]:
    """What a file, named relative to the package, imports against the rule."""
    room = room_of([path.parts[0].removesuffix(".py")])
    rule = RULES.get(room)
    if rule is None:
        return [f"{path}: a new room; give it a rule"]
    found = []
    for line, name in imported(ast.parse(source)):
        top, *rest = name.split(".")
        if top == "sglang_llada":
            target = room_of(rest)
            # `from sglang_llada import __version__` and the like name what __init__ defines.
            known = target in RULES or target.startswith("__")
            allowed = known and (target == room or target in rule.rooms or target.startswith("__version"))
        else:
            allowed = top in sys.stdlib_module_names or top in rule.packages or rule.packages == ANY
        if not allowed:
            found.append(f"{path}:{line}: {room} may not import {name}")
    return found


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_the_import_rule(path: Path) -> None:
    assert violations(PurePosixPath(path), (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("decode/x.py", "import sglang"),
        ("llada2/x.py", "from sglang.srt.utils import x"),
        ("llada2/x.py", "def f():\n    import sglang.srt"),
        ("config.py", "import torch"),
        ("errors.py", "from sglang_llada import config"),
        ("errors.py", "import sglang_llada.config"),
        ("blocks/x.py", "import torch"),
        ("blocks/x.py", "import numpy"),
        ("blocks/x.py", "from sglang_llada.decode import step"),
        ("blocks/x.py", "from ..decode import step"),
        ("decode/x.py", "from sglang_llada.llada2 import config"),
        ("decode/x.py", "from sglang_llada import host"),
        ("host/x.py", "from sglang_llada.plugin import register"),
        ("accelerator.py", "import sglang.srt.platforms"),
        ("extra/x.py", "import os"),
    ],
)
def test_planted_violation_is_found(path: str, source: str) -> None:
    assert len(violations(PurePosixPath(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("host/x.py", "import sglang.srt, torch\nfrom sglang_llada.blocks import Request"),
        (
            "blocks/x.py",
            "import enum\nfrom sglang_llada.errors import IntegrityError\nfrom sglang_llada.blocks import y",
        ),
        ("decode/x.py", "import torch\nfrom sglang_llada.config import DecodeConfig"),
        ("plugin.py", "def f():\n    from sglang_llada.host import seams"),
        ("__main__.py", "import sglang_llada\nfrom sglang_llada import plugin"),
    ],
)
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert violations(PurePosixPath(path), source) == []
