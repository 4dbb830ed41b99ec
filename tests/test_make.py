"""`make venv`: it installs once, and again where the file of dependencies or the wanted release of SGLang changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from sglang_llada.host.seam.releases import NEWEST, RELEASES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment has a Python that notes what it is asked for."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> asked\n')
    python.chmod(0o755)
    return tmp_path


def asked(checkout: Path, *variables: str) -> list[str]:
    """The last argument of every installation, after one more `make venv`."""
    # Not what the make that runs these tests was given.
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "HOST_VERSION")}
    subprocess.run(["make", "venv", *variables], cwd=checkout, env=environ, check=True, capture_output=True)
    return [line.split()[-1] for line in (checkout / "asked").read_text().splitlines()]


def test_a_release_of_the_host_is_installed_once_and_another_one_instead(checkout: Path) -> None:
    newest = asked(checkout)
    assert newest == [f"sglang=={NEWEST.version}"]
    assert asked(checkout) == newest
    earlier = [*newest, "sglang==0.5.22"]
    assert asked(checkout, "HOST_VERSION=0.5.22") == earlier
    assert asked(checkout, "HOST_VERSION=0.5.22") == earlier
    assert asked(checkout) == earlier + newest


def test_changed_dependencies_are_installed(checkout: Path) -> None:
    before = asked(checkout)
    later = (checkout / "pyproject.toml").stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (later, later))
    assert asked(checkout) == before * 2


def test_the_extra_takes_the_releases_that_have_a_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["host"] == [f"sglang>={RELEASES[-1].version},<={NEWEST.version}"]
