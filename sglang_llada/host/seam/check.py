"""Whether the installed host has every name of the table, looked up before anything is hooked.

The check reads the host's source files and imports none of them: a release that renamed a method or changed its
parameters is reported in less than a second, in one message that lists every difference.
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_llada.errors import HostMismatch
from sglang_llada.host.seam.table import CLASS, RELEASE, SEAMS, VALUE, Seam

CHECKED = "SGLANG_LLADA_CHECKED"  # in the environment of child processes: the host that was checked


@dataclass(frozen=True, slots=True)
class Host:
    """An installed host: its release and the folder of its package."""

    version: str
    root: Path


Scopes = dict[ast.AST, dict[str, ast.AST]]  # what modules and classes bind, looked up once per check


def installed_host() -> Host:
    """The host that this Python would import, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise HostMismatch(f"sglang-llada: SGLang is not installed; install sglang=={RELEASE}")
    return Host(importlib.metadata.version("sglang"), Path(spec.submodule_search_locations[0]))


def require(table: Iterable[Seam] = SEAMS, host: Host | None = None) -> None:
    """Raise HostMismatch with every difference between the table and the host (the installed one by default).

    Processes that this one starts need not check the same host again: there are three or more, at a second each.
    """
    host = installed_host() if host is None else host
    checked = f"{host.version} {host.root}"
    if os.environ.get(CHECKED) == checked:
        return
    found = differences(table, host)
    if found:
        listed = "\n".join(f"  - {each}" for each in found)
        raise HostMismatch(
            f"sglang-llada: the installed SGLang is not the release that it was written for, {RELEASE}:\n{listed}\n"
            f"Install sglang=={RELEASE}, or a release of sglang-llada that supports this one."
        )
    os.environ[CHECKED] = checked


def differences(table: Iterable[Seam] = SEAMS, host: Host | None = None) -> list[str]:
    """One sentence for each difference between the table and the host, the host's release first."""
    host = installed_host() if host is None else host
    with collector_paused():
        found = [difference for _, difference in compare(table, host) if difference]
    if host.version != RELEASE:
        found.insert(0, f"release is {host.version}, expected {RELEASE}")
    return found


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection: it would walk millions of syntax tree nodes and take three times as long as the check."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compare(table: Iterable[Seam], host: Host) -> Iterator[tuple[Seam, str | None]]:
    """Each row with what is different about it, or None."""
    trees: dict[str, ast.Module | None] = {}
    known: Scopes = {}
    for seam in table:
        module, _, name = seam.target.partition(":")
        if module not in trees:
            trees[module] = parse(module, host.root)
        yield seam, difference(seam, trees[module], module, name, known)


def difference(seam: Seam, tree: ast.Module | None, module: str, name: str, known: Scopes) -> str | None:
    """What is different about one row."""
    if tree is None:
        return f"{seam.target}: module {module} is missing"
    found = find(tree, name.split("."), known)
    if found is None:
        return f"{seam.target}: {name} is missing from {module}"
    signature = signature_of(found)
    if signature != seam.signature:
        return f"{seam.target}: is {signature}, expected {seam.signature}"
    return None


def parse(module: str, root: Path) -> ast.Module | None:
    """The syntax tree of a host module, None if it has no source file."""
    base = root.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def find(scope: ast.AST, names: list[str], known: Scopes | None = None) -> ast.AST | None:
    """The node that binds a dotted name; of several, the last, as at run time. What scopes bind is kept in `known`."""
    known = {} if known is None else known
    if scope not in known:
        known[scope] = {bound: node for node, bound in bindings(scope)}
    found = known[scope].get(names[0])
    if found is None or len(names) == 1:
        return found
    return find(found, names[1:], known)


def bindings(scope: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What a module or class binds: definitions, assignments, imports, also inside if and try; self.NAME of methods."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
            if isinstance(scope, ast.ClassDef) and not isinstance(node, ast.ClassDef):
                yield from assigned_to_self(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield node, target.id
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from bindings(node)


def assigned_to_self(method: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The attributes that a method assigns to self."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node, node.attr


def signature_of(node: ast.AST) -> str:
    """Canonical signature: parameter names with /, *, * and ** where Python has them; CLASS; VALUE."""
    if isinstance(node, ast.ClassDef):
        return CLASS
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return VALUE
    a = node.args
    parts = [p.arg for p in a.posonlyargs] + ["/"] * bool(a.posonlyargs) + [p.arg for p in a.args]
    if a.vararg:
        parts.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        parts.append("*")
    parts += [p.arg for p in a.kwonlyargs]
    if a.kwarg:
        parts.append(f"**{a.kwarg.arg}")
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}({', '.join(parts)})"
