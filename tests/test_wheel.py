"""The wheel: installed by itself it brings the package, its types and its entry points, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

pytestmark = pytest.mark.slow


def pip(*arguments: object) -> None:
    """Run this Python's pip; nothing is looked up anywhere."""
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tracked files, built as `pip install .` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, since a build leaves its own folders beside the sources.
    for name in ("pyproject.toml", "LICENSE", "sglang_llada", "tests", "bench", "examples"):
        (source / name).symlink_to(ROOT / name)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, and nothing that it would depend on."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sglang_llada").rglob("*.py")}
    sources |= {"sglang_llada/py.typed", "sglang_llada/view/page.html"}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    metadata = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    assert held - metadata == sources
    assert {name.rpartition("/")[2] for name in metadata} >= {"METADATA", "RECORD", "LICENSE", "entry_points.txt"}


def test_the_wheel_asks_for_nothing_unless_the_host_is_wanted(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Requires-Python"].replace(" ", "") in (">=3.11,<3.13", "<3.13,>=3.11")
    required = metadata.get_all("Requires-Dist") or []
    assert all("extra ==" in each for each in required)
    assert any(each.startswith("sglang<") or each.startswith("sglang>") for each in required)


def test_the_host_finds_both_entry_points(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    found = {entry.group: (entry.name, entry.value) for entry in PathDistribution(info).entry_points}
    wanted = {group: next(iter(entries.items())) for group, entries in PROJECT["entry-points"].items()}
    assert found == wanted
    assert set(found) == {"sglang.srt.plugins", "sglang.srt.platforms"}


def test_the_entry_points_of_the_wheel_load_without_anything_beside_it(installed: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from importlib.metadata import entry_points\n"
        "for group in ('sglang.srt.plugins', 'sglang.srt.platforms'):\n"
        "    entry, = (e for e in entry_points(group=group) if e.name == 'sglang_llada')\n"
        "    print(entry.load().__code__.co_filename)"
    )
    # -S: no installed packages, ours in development among them.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(installed)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == [str(installed / "sglang_llada" / "plugin.py")] * 2, done.stderr
