"""`python -m sglang_llada`: what it prints and with which status it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sglang_llada
from sglang_llada.__main__ import main
from sglang_llada.host.seam import check
from sglang_llada.host.seam.releases import RELEASES
from sglang_llada.host.seam.rows import Kind, Seam

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_LLADA", "SGLANG_PLUGINS", "SGLANG_PLATFORM"):
        monkeypatch.delenv(name, raising=False)


def test_env_names_versions_mode_and_standing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert facts["sglang-llada"] == sglang_llada.__version__
    assert facts["sglang"] == check.installed_host().version
    assert facts["mode"] == "on (SGLANG_LLADA)"
    assert facts["plugin"] == "active"
    assert "platform" in facts


def test_env_refuses_an_unknown_mode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SGLANG_LLADA", "maybe")
    assert main(["env"]) == 1
    assert "SGLANG_LLADA is 'maybe'" in capsys.readouterr().err


def test_check_holds_the_host_against_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    version = check.installed_host().version
    assert f"table of {version}: 0 of " in out
    assert all(f"table of {release.version}: " in out for release in RELEASES)
    assert "expected missing" in out or "is missing" in out  # of the other tables
    assert f"in use: the table of {version}" in out
    assert "plugin is active" in out


def test_check_shows_what_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = Seam("sglang.srt.gone:Thing", Kind.HOOK, "(self)", "the reason", "until")
    tables = [release.but(release.version, {}, (row,)) for release in RELEASES]
    monkeypatch.setattr(check.compare, "__defaults__", (tables,))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "module sglang.srt.gone is missing" in out
    assert "the reason" in out
    assert f": 1 of {len(check.compare(check.installed_host())[0].release.seams)} seams differ" in out
    assert "in use: none, so LLaDA2 models are refused" in out


def test_check_without_a_host_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert main(["check"]) == 1
    assert "SGLang is not installed. Install a release that it supports" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("SGLANG_PLUGINS", "other, another"), ("SGLANG_PLATFORM", "other")],
)
def test_check_reports_that_the_host_leaves_us_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["check"]) == 1
    assert f"excluded: {name} is '{value}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("SGLANG_PLUGINS", "other, sglang_llada"), ("SGLANG_PLATFORM", "sglang_llada")]
)
def test_being_named_is_not_being_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["check"]) == 0
    assert "plugin is active" in capsys.readouterr().out


def test_algorithms_show_defaults_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms"]) == 0
    out = capsys.readouterr().out
    assert "threshold  (--dllm-algorithm Threshold, LowConfidence)" in out
    assert "default 0.95, 0.0 to 1.0" in out
    assert "default block size, 1 to block size" in out


def test_check_imports_nothing_of_the_host() -> None:
    script = (
        "import sys; from sglang_llada.__main__ import main; main(['check']); main(['algorithms']);"
        "sys.exit('sglang' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0
