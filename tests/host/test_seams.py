"""The seam check: green on the installed host, red on a doctored one, and a server that refuses to start on it."""

from __future__ import annotations

import ast
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_llada.errors import HostMismatch
from sglang_llada.host.seam import check
from sglang_llada.host.seam.check import Host, differences
from sglang_llada.host.seam.table import SEAMS, Kind, Seam

pytestmark = pytest.mark.host

SCHEDULER = "sglang.srt.managers.scheduler"
ARGUMENTS = "sglang.srt.arg_groups.serving_hook"


def source_file(module: str, root: Path) -> Path:
    """Where a host module lies under a host folder."""
    base = root.joinpath(*module.split(".")[1:])
    return base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"


@pytest.fixture
def copy(tmp_path: Path) -> Host:
    """A host of only those files that the table names, to be doctored."""
    installed = check.installed_host()
    for module in {seam.target.partition(":")[0] for seam in SEAMS}:
        original = source_file(module, installed.root)
        target = tmp_path / original.relative_to(installed.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, target)
    return dataclasses.replace(installed, root=tmp_path)


def doctor(host: Host, module: str, old: str, new: str) -> None:
    """Replace text in one host file; the text must be there."""
    file = source_file(module, host.root)
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_installed_host_fits() -> None:
    assert differences() == []


def test_a_host_is_checked_once_for_a_process_and_its_children(copy: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(check.CHECKED, raising=False)
    checked: list[Host] = []
    monkeypatch.setattr(check, "differences", lambda table, host: checked.append(host) or [])
    check.require()
    check.require()
    check.require(host=copy)
    assert checked == [check.installed_host(), copy]


def test_untouched_copy_fits(copy: Host) -> None:
    assert differences(host=copy) == []


def test_targets_are_unique_and_explained() -> None:
    assert len({seam.target for seam in SEAMS}) == len(SEAMS)
    assert all(seam.why and seam.until and seam.target.startswith("sglang.") for seam in SEAMS)


def test_renamed_function_is_found(copy: Host) -> None:
    doctor(copy, ARGUMENTS, "def handle_missing_default_values(", "def handle_absent_values(")
    assert differences(host=copy) == [
        f"{ARGUMENTS}:handle_missing_default_values: handle_missing_default_values is missing from {ARGUMENTS}"
    ]


def test_renamed_class_is_found_in_every_row_of_it(copy: Host) -> None:
    doctor(copy, SCHEDULER, "class Scheduler(", "class BatchScheduler(")
    rows = [seam for seam in SEAMS if seam.target.startswith(f"{SCHEDULER}:Scheduler")]
    assert len(differences(host=copy)) == len(rows) >= 2


def test_changed_signature_is_found(copy: Host) -> None:
    doctor(
        copy, ARGUMENTS, "def handle_missing_default_values(server_args: Any)", "def handle_missing_default_values(cfg)"
    )
    assert differences(host=copy) == [f"{ARGUMENTS}:handle_missing_default_values: is (cfg), expected (server_args)"]


def test_missing_module_is_found(copy: Host) -> None:
    source_file(ARGUMENTS, copy.root).unlink()
    assert differences(host=copy) == [f"{ARGUMENTS}:handle_missing_default_values: module {ARGUMENTS} is missing"]


def test_function_that_became_a_class_is_found() -> None:
    assert check.signature_of(ast.parse("class f: pass").body[0]) == "class"


def test_other_release_is_found_even_if_every_row_fits(copy: Host) -> None:
    assert differences(host=dataclasses.replace(copy, version="0.5.24")) == [
        f"release is 0.5.24, expected {check.RELEASE}"
    ]


def test_require_lists_every_difference_in_one_message(copy: Host) -> None:
    doctor(copy, ARGUMENTS, "def handle_missing_default_values(", "def handle_absent_values(")
    source_file(SCHEDULER, copy.root).unlink()
    host = dataclasses.replace(copy, version="0.6.0")
    with pytest.raises(HostMismatch) as error:
        check.require(host=host)
    assert len(differences(host=host)) >= 4
    assert all(difference in str(error.value) for difference in differences(host=host))
    assert f"Install sglang=={check.RELEASE}" in str(error.value)


def test_a_mismatch_passes_through_the_handlers_of_the_host() -> None:
    assert not issubclass(HostMismatch, Exception)
    assert issubclass(HostMismatch, SystemExit)


@pytest.mark.parametrize(
    ("source", "signature"),
    [
        ("def f(): pass", "()"),
        ("def f(a, b: int = 3, *, c: str = 'x', **rest) -> None: pass", "(a, b, *, c, **rest)"),
        ("def f(a, /, b, *args, c): pass", "(a, /, b, *args, c)"),
        ("async def f(self): pass", "async (self)"),
        ("@staticmethod\ndef f(a): pass", "(a)"),
        ("class f(Base): pass", "class"),
        ("f = 3", "value"),
        ("f: int", "value"),
    ],
)
def test_signatures_have_one_form(source: str, signature: str) -> None:
    found = check.find(ast.parse(source), ["f"])
    assert found is not None
    assert check.signature_of(found) == signature


@pytest.mark.parametrize(
    ("source", "name", "signature"),
    [
        ("def f(a): pass\ndef f(b): pass", "f", "(b)"),
        ("if x:\n    def f(a): pass\nelse:\n    f = None", "f", "value"),
        ("try:\n    f = 1\nexcept ImportError:\n    def f(): pass", "f", "()"),
        ("class C:\n    class D:\n        def f(self): pass", "C.D.f", "(self)"),
        ("class C:\n    def g(self):\n        self.f = 1", "C.f", "value"),
        ("class C:\n    def g(self):\n        self.f, x = 1, 2", "C.f", "value"),
    ],
)
def test_names_are_found_where_python_would_bind_them(source: str, name: str, signature: str) -> None:
    found = check.find(ast.parse(source), name.split("."))
    assert found is not None
    assert check.signature_of(found) == signature


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("class C:\n    def g(self):\n        x = self.f", "C.f"),
        ("class C:\n    def g(self):\n        f = 1", "C.f"),
        ("def g():\n    f = 1", "f"),
        ("class C(Base): pass", "C.f"),
    ],
)
def test_names_that_are_only_read_or_local_are_not_found(source: str, name: str) -> None:
    assert check.find(ast.parse(source), name.split(".")) is None


def test_rows_can_be_checked_without_the_table(copy: Host) -> None:
    row = Seam("sglang.srt.dllm.config:DllmConfig.nothing", Kind.USE, "(self)", "why", "until")
    assert differences([row], copy) == [f"{row.target}: DllmConfig.nothing is missing from sglang.srt.dllm.config"]


HOST_ROOM = Path(check.__file__).parents[1]
PLUGIN = HOST_ROOM.parent / "plugin.py"
NAMED = {seam.target for seam in SEAMS}
SCHEDULER_CLASSES = (f"{SCHEDULER}:Scheduler", "sglang.srt.dllm.mixin.scheduler:SchedulerDllmMixin")


def imported(source: str) -> set[tuple[str, str]]:
    """(module, name) of every import of the host."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sglang"
        for alias in node.names
    }


def has_row(module: str, name: str) -> bool:
    """Whether a row names an import or a member of it, in the module that it is imported from or one below."""
    for target in NAMED:
        defined_in, _, member = target.partition(":")
        if defined_in == f"{module}.{name}":  # the import is a module
            return True
        if member.split(".")[0] == name and f"{defined_in}.".startswith(f"{module}."):
            return True
    return False


@pytest.mark.parametrize("file", [*sorted(HOST_ROOM.rglob("*.py")), PLUGIN], ids=lambda f: f.name)
def test_every_import_of_the_host_has_a_row(file: Path) -> None:
    assert {pair for pair in imported(file.read_text(encoding="utf-8")) if not has_row(*pair)} == set()


def test_an_import_without_a_row_would_be_found() -> None:
    (pair,) = imported("from sglang.srt.managers.scheduler import run_scheduler_process")
    assert not has_row(*pair)
    assert not has_row("sglang.srt.managers.sched", "Scheduler")


def test_everything_that_our_scheduler_takes_from_the_host_has_a_row() -> None:
    """What it overrides and what it reads from self without defining or assigning it."""
    tree = ast.parse((HOST_ROOM / "engine" / "scheduler.py").read_text(encoding="utf-8"))
    ours = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LladaScheduler")
    methods = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)}
    on_self = [
        node
        for node in ast.walk(ours)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    names = methods | {node.attr for node in on_self} | taken_by_its_parts()
    ours_alone = {name for name in names if not bound_by_host(name)}
    defined_here = methods | {node.attr for node in on_self if isinstance(node.ctx, ast.Store)}
    assert {n for n in names - ours_alone if not any(f"{c}.{n}" in NAMED for c in SCHEDULER_CLASSES)} == set()
    assert ours_alone <= defined_here  # nothing is read that neither side has
    assert {"event_loop_normal", "validate_dllm_request", "waiting_queue"} <= names - ours_alone


def taken_by_its_parts() -> set[str]:
    """What the other files of the room read of the scheduler, which they know as their host."""
    return {
        node.attr
        for file in (HOST_ROOM / "engine").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "host"
    }


def bound_by_host(name: str) -> bool:
    """Whether the host's scheduler or its diffusion part has a member of this name."""
    root = check.installed_host().root
    for target in SCHEDULER_CLASSES:
        module, _, owner = target.partition(":")
        tree = TREES.setdefault(module, check.parse(module, root))
        assert tree is not None
        if check.find(tree, [owner, name], SCOPES) is not None:
            return True
    return False


TREES: dict[str, ast.Module | None] = {}
SCOPES: check.Scopes = {}


def test_check_takes_less_than_a_few_seconds() -> None:
    begin = time.process_time()
    differences()
    assert time.process_time() - begin < 3
    assert gc.isenabled()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("def handle_absent_values(", f"handle_missing_default_values is missing from {ARGUMENTS}"),
        (
            "def handle_missing_default_values(extra, ",
            "handle_missing_default_values: is (extra, server_args), expected (server_args)",
        ),
    ],
)
def test_server_and_check_refuse_a_doctored_host(tmp_path: Path, changed: str, said: str) -> None:
    overlay(tmp_path, check.installed_host().root, Path("srt/arg_groups/serving_hook.py"))
    doctor(
        Host(check.RELEASE, tmp_path / "sglang"),
        ARGUMENTS,
        "def handle_missing_default_values(",
        changed,
    )
    server, checked = (
        subprocess.run(
            [sys.executable, "-m", *command],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        for command in (
            ["sglang.launch_server", "--model-path", str(tmp_path / "no-model")],
            ["sglang_llada", "check"],
        )
    )
    assert server.returncode == 1
    assert "the installed SGLang is not the release that it was written for" in server.stderr
    assert said in server.stderr
    assert "no-model" not in server.stderr  # it never came to look for the model
    assert checked.returncode == 1
    assert said in checked.stdout + check.stderr


def overlay(folder: Path, package: Path, changed: Path) -> None:
    """A package under `folder` made of links to the installed one, with a real copy of one file."""
    inner = folder / package.name
    inner.mkdir()
    if len(changed.parts) == 1:
        shutil.copyfile(package / changed, inner / changed)
    else:
        overlay(inner, package / changed.parts[0], Path(*changed.parts[1:]))
    for child in package.iterdir():
        if child.name not in (changed.parts[0], "__pycache__"):
            (inner / child.name).symlink_to(child)
