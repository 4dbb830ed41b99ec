"""Patches apply to the pinned release."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sglang_llada.host.seam import check
from tests.host.serving import ROOT

pytestmark = pytest.mark.host


@pytest.mark.parametrize("patch", sorted((ROOT / "patches").glob("*.diff")), ids=lambda file: file.stem)
def test_a_patch_applies(patch: Path, tmp_path: Path) -> None:
    for name in re.findall(r"^--- a/(\S+)", patch.read_text(), re.M):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(check.installed_host().root).parent / name, tmp_path / name)
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=tmp_path, check=True)
