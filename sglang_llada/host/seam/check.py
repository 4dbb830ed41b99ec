"""Which table of seams the installed host fits, looked up before anything is hooked.

The check reads the host's source files and imports none of them: a release that renamed a method or changed its
parameters is reported in about a second, with every difference. It goes by names and signatures, not by the version:
a release that nobody has tried may well fit.
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_llada.errors import HostMismatch
from sglang_llada.host.seam.releases import NEWEST, RELEASES
from sglang_llada.host.seam.rows import CLASS, MISSING, VALUE, Release, Seam

CHECKED = "SGLANG_LLADA_CHECKED"  # in the environment of child processes: the verdict, and the host that it is of
FITS, DIFFERS = "fits", "differs"
UNKNOWN = "of an unknown release"

INSTALL = (
    f"Install a release that it supports ({', '.join(release.version for release in RELEASES)}): "
    f"pip install 'sglang-llada[host]' takes {NEWEST.version}"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """An installed host: its release and the folder of its package."""

    version: str
    root: Path


@dataclass(frozen=True, slots=True)
class Difference:
    """A row of a table that is otherwise in the host, in one sentence."""

    seam: Seam
    sentence: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A host held against the table of a release."""

    release: Release
    differences: tuple[Difference, ...]


def installed_host() -> Host:
    """The host that this Python would import, found without importing it.

    Raises:
        HostMismatch: there is none.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise HostMismatch(f"sglang-llada: SGLang is not installed. {INSTALL}.")
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        version = UNKNOWN
    return Host(version, Path(spec.submodule_search_locations[0]))


def fits(host: Host | None = None) -> bool:
    """Whether the host (the installed one by default) has every name of a table; says so where that needs a word.

    Processes that this one starts need not check the same host again: there are three or more, at a second each.
    """
    host = installed_host() if host is None else host
    this = f"{host.version} {host.root}"
    verdict, _, checked = os.environ.get(CHECKED, "").partition(" ")
    if checked != this:
        nearest = compare(host)[0]
        verdict = DIFFERS if nearest.differences else FITS
        os.environ[CHECKED] = f"{verdict} {this}"
        if nearest.differences:
            logger.warning(
                "sglang-llada does not know SGLang %s: %d of the names that it needs differ from those of %s. LLaDA2 "
                "models are refused; others are served without it. `python -m sglang_llada check` lists what differs",
                host.version,
                len(nearest.differences),
                nearest.release.version,
            )
        elif nearest.release.version != host.version:
            logger.warning(
                "sglang-llada was not tested with SGLang %s; every name that it needs is there as in %s",
                host.version,
                nearest.release.version,
            )
    return verdict == FITS


def mismatch(host: Host | None = None) -> HostMismatch:
    """What whoever wants to serve a LLaDA2 model is told: every difference from the table that comes nearest."""
    host = installed_host() if host is None else host
    nearest = compare(host)[0]
    listed = "\n".join(f"  - {each.sentence}" for each in nearest.differences)
    return HostMismatch(
        f"sglang-llada: SGLang {host.version} is none that it supports, so it serves no LLaDA2 model. What differs "
        f"from {nearest.release.version}:\n{listed}\n{INSTALL}; or a release of sglang-llada that knows this one."
    )


def compare(host: Host, releases: Iterable[Release] = RELEASES) -> list[Comparison]:
    """The host against each table, nearest first; of those that are equally near, its own release, then the newer."""
    known = Sources(host.root)
    with collector_paused():
        found = [Comparison(release, tuple(differences(release.seams, known))) for release in releases]
    return sorted(found, key=lambda each: (len(each.differences), each.release.version != host.version))


def differences(seams: Iterable[Seam], known: Sources) -> Iterator[Difference]:
    """What is different about rows."""
    for seam in seams:
        sentence = difference(seam, known)
        if sentence is not None:
            yield Difference(seam, sentence)


def difference(seam: Seam, known: Sources) -> str | None:
    """What is different about one row."""
    module, _, name = seam.target.partition(":")
    tree = known.tree(module)
    found = None if tree is None else find(tree, name.split("."), known.scopes)
    signature = MISSING if found is None else signature_of(found)
    if signature == seam.signature:
        return None
    if tree is None:
        return f"{seam.target}: module {module} is missing"
    if found is None:
        return f"{seam.target}: {name} is missing from {module}"
    return f"{seam.target}: is {signature}, expected {seam.signature}"


Scopes = dict[ast.AST, dict[str, ast.AST]]  # what modules and classes bind, looked up once per check


class Sources:
    """The syntax trees of a host's modules, each read once whatever the number of tables."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scopes: Scopes = {}
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        """The tree of a module; None if it has no source file."""
        if module not in self._trees:
            self._trees[module] = parse(module, self.root)
        return self._trees[module]


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
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, alias.asname or alias.name
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
