"""The seam check: green on the installed host, red on a doctored one, where LLaDA2 is refused and others go on."""

from __future__ import annotations

import ast
import dataclasses
import gc
import json
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from sglang_llada.errors import HostMismatch
from sglang_llada.host.seam import check
from sglang_llada.host.seam.check import Host
from sglang_llada.host.seam.releases import NEWEST, RELEASES
from sglang_llada.host.seam.rows import MISSING, VALUE, Kind, Release, Seam
from tests.host import warm

pytestmark = pytest.mark.host

SCHEDULER = "sglang.srt.managers.scheduler"
ARGUMENTS = "sglang.srt.arg_groups.serving_hook"
FACTS = "sglang.srt.dllm.config"
TINY = Path(__file__).parents[2] / "examples" / "tiny-llada2"


@cache
def in_use() -> Release:
    """The release whose table the installed host fits, or comes nearest to."""
    return check.compare(check.installed_host())[0].release


def differences(host: Host) -> list[str]:
    """What differs from the table that is in use, in sentences."""
    (comparison,) = check.compare(host, [in_use()])
    return [each.sentence for each in comparison.differences]


def source_file(module: str, root: Path) -> Path:
    """Where a host module lies under a host folder."""
    base = root.joinpath(*module.split(".")[1:])
    return base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"


@pytest.fixture
def copy(tmp_path: Path) -> Host:
    """A host of only those files that the table names, to be doctored."""
    installed = check.installed_host()
    for module in {seam.target.partition(":")[0] for seam in in_use().seams}:
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


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict of an earlier check."""
    monkeypatch.setenv(check.CHECKED, "")


def test_installed_host_fits(caplog: pytest.LogCaptureFixture) -> None:
    assert differences(check.installed_host()) == []
    assert check.fits()
    assert caplog.messages == []
    assert in_use().version == check.installed_host().version


@pytest.mark.parametrize("fit", [True, False])
def test_a_host_is_checked_once_for_a_process_and_its_children(
    copy: Host, monkeypatch: pytest.MonkeyPatch, fit: bool
) -> None:
    checked: list[Host] = []
    differing = () if fit else (check.Difference(NEWEST.seams[0], "gone"),)

    def compare(host: Host) -> list[check.Comparison]:
        checked.append(host)
        return [check.Comparison(NEWEST, differing)]

    monkeypatch.setattr(check, "compare", compare)
    assert [check.fits(), check.fits(), check.fits(copy)] == [fit] * 3
    assert checked == [check.installed_host(), copy]


def test_untouched_copy_fits(copy: Host) -> None:
    assert differences(copy) == []


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.version)
def test_targets_are_unique_and_explained(release: Release) -> None:
    assert len({seam.target for seam in release.seams}) == len(release.seams)
    assert all(seam.why and seam.until and seam.target.startswith("sglang.") for seam in release.seams)


def test_releases_are_named_once_newest_first() -> None:
    versions = [tuple(map(int, release.version.split("."))) for release in RELEASES]
    assert versions == sorted(set(versions), reverse=True)
    assert all(seam.signature != MISSING for seam in NEWEST.seams)


def test_a_table_says_what_differs_and_nothing_else() -> None:
    row = Seam("sglang.a:b", Kind.USE, "(c)", "why", "until")
    more = Seam("sglang.a:d", Kind.USE, VALUE, "why", "until")
    earlier = Release("2", (row,)).but("1", {row.target: MISSING}, (more,))
    assert earlier == Release("1", (dataclasses.replace(row, signature=MISSING), more))
    for idle in ({row.target: "(c)"}, {"sglang.a:x": MISSING}):
        with pytest.raises(ValueError, match="1 does not differ from 2 in sglang.a:"):
            Release("2", (row,)).but("1", idle)


def test_the_table_that_fits_is_in_use_whatever_the_version(copy: Host) -> None:
    for version in ("0.5.24", check.UNKNOWN):
        first, *others = check.compare(dataclasses.replace(copy, version=version))
        assert (first.release, first.differences) == (in_use(), ())
        assert all(other.differences for other in others)


def test_of_tables_that_fit_alike_the_hosts_own_comes_first(copy: Host) -> None:
    later, same = Release("3", in_use().seams), Release("2", in_use().seams)
    for version, first in {"2": same, "3": later, "4": later}.items():
        assert check.compare(dataclasses.replace(copy, version=version), [later, same])[0].release == first


def test_an_unknown_release_that_fits_starts_with_one_warning(copy: Host, caplog: pytest.LogCaptureFixture) -> None:
    host = dataclasses.replace(copy, version="0.5.24")
    assert check.fits(host)
    assert check.fits(host)
    (said,) = caplog.messages
    assert "SGLang 0.5.24" in said
    assert in_use().version in said


def test_a_host_that_fits_no_table_starts_with_one_warning(copy: Host, caplog: pytest.LogCaptureFixture) -> None:
    doctor(copy, ARGUMENTS, "def handle_missing_default_values(", "def handle_absent_values(")
    assert not check.fits(copy)
    assert not check.fits(copy)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 of the names" in record.getMessage()
    assert "LLaDA2 models are refused" in record.getMessage()


def test_a_name_that_a_release_lacks_is_found_where_it_has_it(copy: Host) -> None:
    row = Seam(f"{ARGUMENTS}:handle_missing_default_values", Kind.USE, MISSING, "why", "until")
    (sentence,) = sentences([row], copy)
    assert sentence == f"{row.target}: is (server_args), expected missing"
    assert sentences([dataclasses.replace(row, target="sglang.srt.nothing:name")], copy) == []


def test_a_host_without_metadata_is_of_an_unknown_release(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise check.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(check.importlib.metadata, "version", absent)
    assert check.installed_host().version == check.UNKNOWN


def test_without_a_host_the_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostMismatch, match=r"SGLang is not installed.*pip install 'sglang-llada\[host\]'"):
        check.fits()


def sentences(rows: list[Seam], host: Host) -> list[str]:
    """What differs from some rows."""
    return [each.sentence for each in check.differences(rows, check.Sources(host.root))]


def test_renamed_function_is_found(copy: Host) -> None:
    doctor(copy, ARGUMENTS, "def handle_missing_default_values(", "def handle_absent_values(")
    assert differences(copy) == [
        f"{ARGUMENTS}:handle_missing_default_values: handle_missing_default_values is missing from {ARGUMENTS}"
    ]


def test_renamed_class_is_found_in_every_row_of_it(copy: Host) -> None:
    doctor(copy, SCHEDULER, "class Scheduler(", "class BatchScheduler(")
    named = [seam for seam in in_use().seams if seam.target.startswith(f"{SCHEDULER}:Scheduler")]
    rows = [seam for seam in named if seam.signature != MISSING]
    assert len(differences(copy)) == len(rows) >= 2


def test_changed_signature_is_found(copy: Host) -> None:
    doctor(
        copy, ARGUMENTS, "def handle_missing_default_values(server_args: Any)", "def handle_missing_default_values(cfg)"
    )
    assert differences(copy) == [f"{ARGUMENTS}:handle_missing_default_values: is (cfg), expected (server_args)"]


def test_missing_module_is_found(copy: Host) -> None:
    source_file(ARGUMENTS, copy.root).unlink()
    assert differences(copy) == [f"{ARGUMENTS}:handle_missing_default_values: module {ARGUMENTS} is missing"]


def test_function_that_became_a_class_is_found() -> None:
    assert check.signature_of(ast.parse("class f: pass").body[0]) == "class"


def test_a_refusal_lists_every_difference_in_one_message(copy: Host) -> None:
    doctor(copy, ARGUMENTS, "def handle_missing_default_values(", "def handle_absent_values(")
    source_file(SCHEDULER, copy.root).unlink()
    host = dataclasses.replace(copy, version="0.6.0")
    said = str(check.mismatch(host))
    assert len(differences(host)) >= 4
    assert all(difference in said for difference in differences(host))
    assert "SGLang 0.6.0" in said
    assert all(release.version in said for release in RELEASES)


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
    assert sentences([row], copy) == [f"{row.target}: DllmConfig.nothing is missing from sglang.srt.dllm.config"]


HOST_ROOM = Path(check.__file__).parents[1]
PLUGIN = HOST_ROOM.parent / "plugin.py"
NAMED = {seam.target for release in RELEASES for seam in release.seams}
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


def test_check_reads_each_file_once_whatever_the_number_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the collector, which would walk its millions of nodes."""
    read: list[str] = []
    parse = check.parse

    def counted(module: str, root: Path) -> ast.Module | None:
        assert not gc.isenabled()
        read.append(module)
        return parse(module, root)

    monkeypatch.setattr(check, "parse", counted)
    check.compare(check.installed_host())
    modules = {seam.target.partition(":")[0] for table in RELEASES for seam in table.seams}
    assert sorted(read) == sorted(modules)
    assert gc.isenabled()


# Two hosts that work by themselves: one without a name that we hook, one with a function that takes more than it did.
DOCTORED = {
    FACTS: ("def from_server_args(", "def of_server_args(", f"DllmConfig.from_server_args is missing from {FACTS}"),
    ARGUMENTS: (
        "def handle_missing_default_values(server_args: Any)",
        "def handle_missing_default_values(server_args: Any, extra: Any = None)",
        "handle_missing_default_values: is (server_args, extra), expected (server_args)",
    ),
}


def doctored(folder: Path, module: str) -> str:
    """Make a doctored host under a folder; what the check says of it."""
    old, new, said = DOCTORED[module]
    installed = check.installed_host().root
    overlay(folder, installed, source_file(module, installed).relative_to(installed))
    doctor(Host(in_use().version, folder / "sglang"), module, old, new)
    return said


def on(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the host under a folder."""
    paths = os.pathsep.join((str(folder), str(HOST_ROOM.parents[1])))
    return warm.run_python(list(command), warm.environment() | {"PYTHONPATH": paths}, folder)


@pytest.mark.slow
@pytest.mark.parametrize("module", DOCTORED)
def test_a_doctored_host_serves_no_llada2_model(tmp_path: Path, module: str) -> None:
    said = doctored(tmp_path, module)
    server = on(tmp_path, "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code")
    assert server.returncode == 1
    assert "so it serves no LLaDA2 model" in server.stderr
    assert f"  - {module}:" in server.stderr
    assert said in server.stderr
    assert server.stderr.count("LLaDA2 models are refused") == 1
    checked = on(tmp_path, "-m", "sglang_llada", "check")
    assert checked.returncode == 1
    assert said in checked.stdout
    assert "in use: none" in checked.stdout


OTHER = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
from sglang.srt.dllm.algorithm import algo_name_to_cls
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
server_args = ServerArgs(model_path=sys.argv[1], device="cpu")
server_args.resolve_once()
ours = [cls.__module__ for cls in (Scheduler, type(current_platform), *algo_name_to_cls.values())]
print(json.dumps({
    "hooks": [target for target, hooks in HookRegistry._hooks.items() if "sglang_llada" in str(hooks)] + list(_HOOKS),
    "ours": [module for module in ours if module.startswith("sglang_llada")],
    "device": resolving_view(server_args).device,
}))
"""


@pytest.mark.slow
def test_a_doctored_host_takes_another_model_as_if_we_were_not_there(tmp_path: Path) -> None:
    doctored(tmp_path, ARGUMENTS)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 99, **sizes}
    model = tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    done = on(tmp_path, "-c", OTHER, str(model))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("LLaDA2 models are refused") == 1
    assert json.loads(done.stdout.splitlines()[-1]) == {"hooks": [], "ours": [], "device": "cpu"}


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
