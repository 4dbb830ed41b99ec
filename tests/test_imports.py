"""The import rule: errors, config, card <- {decode | blocks | llada2} <- kernels, host <- plugin, __main__.

Only the last three see SGLang. Inside host/ imports go one way, too, from room to room and from file to file. The rule
is read from the syntax tree, so that imports inside functions count too and
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
PURE = BASE | {"card", "decode", "blocks", "llada2", "accelerator"}
RULES = {
    "__init__": Rule(frozenset()),
    "errors": Rule(frozenset()),
    "config": Rule(frozenset({"errors"})),
    "options": Rule(BASE),
    "progress": Rule(frozenset()),
    "service": Rule(BASE),
    "view": Rule(BASE | {"service"}, frozenset({"PIL"})),  # for GIFs
    "tune": Rule(BASE | {"progress", "service", "options", "view"}),
    "accelerator": Rule(BASE, frozenset({"torch"})),
    "card": Rule(frozenset(), frozenset({"torch"})),
    "blocks": Rule(BASE),
    "decode": Rule(BASE | {"card"}, frozenset({"torch", "triton"})),
    "llada2": Rule(BASE, frozenset({"torch", "triton", "transformers", "safetensors", "tokenizers"})),
    "kernels": Rule(BASE | {"card", "decode", "llada2"}, frozenset({"torch", "triton"})),
    "host": Rule(PURE, ANY),
    "plugin": Rule(PURE | {"host"}, ANY),
    "__main__": Rule(PURE | {"host", "plugin", "options", "service", "tune", "view"}, ANY),
}


# Rooms of host/: each may import those before it. A file beside the rooms counts as one.
HOST = (
    "earlier",
    "backends",
    "hub",
    "facts",
    "operations",
    "attention",
    "cpu",
    "models",
    "start",
    "requests",
    "engine",
    "replay",
    "seam",
)


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


def host_violations(path: PurePosixPath, source: str) -> list[str]:
    """What a file of host/, named relative to it, imports of a room that is not before its own."""
    room = path.parts[0].removesuffix(".py")
    if room == "__init__":
        return []
    if room not in HOST:
        return [f"{path}: a new room; give it a place in HOST"]
    allowed = HOST[: HOST.index(room) + 1]
    targets = [(line, name.split(".")[2]) for line, name in imported_of_host(source)]
    return [f"{path}:{line}: {room} may not import {target}" for line, target in targets if target not in allowed]


def imported_of_host(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of the package's host/, down to the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith(f"{HOST_ROOM}."))
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{HOST_ROOM}."):
            yield from ((node.lineno, file_of(node.module or "", alias.name)) for alias in node.names)


HOST_ROOM = "sglang_llada.host"


def file_of(module: str, name: str) -> str:
    """The module that `from module import name` loads: the name may be one of its files or of its members."""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    is_module = (folder / name).is_dir() or (folder / f"{name}.py").is_file()
    return f"{module}.{name}" if is_module else module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports, each as the way round it; one for every file that closes one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(file: str, way: list[str]) -> None:
        if file in way:
            found.append(way[way.index(file) :])
        elif file not in done:
            for other in sorted(graph.get(file, ())):
                visit(other, [*way, file])
            done.add(file)

    for file in sorted(graph):
        visit(file, [])
    return found


def graph() -> dict[str, set[str]]:
    """Of each file, as a module, the files of the package that it imports."""
    return {
        module_of(PurePosixPath(path)): {
            file_of(node.module, alias.name)
            for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sglang_llada")
            for alias in node.names
        }
        for path in FILES
        if path.name != "__init__.py"
    }


def module_of(path: PurePosixPath) -> str:
    """The dotted name of a file that is named relative to the package."""
    parts = ("sglang_llada", *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_the_import_rule(path: Path) -> None:
    assert violations(PurePosixPath(path), (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_imports_inside_the_host_room_go_one_way() -> None:
    found = [
        violation
        for path in FILES
        if path.parts[0] == "host"
        for violation in host_violations(PurePosixPath(*path.parts[1:]), (PACKAGE / path).read_text(encoding="utf-8"))
    ]
    assert found == []


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circles(graph()) == []


def test_planted_circles_and_ways_back_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    back = "from sglang_llada.host.engine import rows"
    assert host_violations(PurePosixPath("requests/x.py"), back) == ["requests/x.py:1: requests may not import engine"]
    inside = "def f():\n    from sglang_llada.host.seam.install import install"
    assert len(host_violations(PurePosixPath("engine/x.py"), inside)) == 1
    assert host_violations(PurePosixPath("engine/x.py"), "from sglang_llada.host import facts") == []
    assert len(host_violations(PurePosixPath("extra/x.py"), "import os")) == 1


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
