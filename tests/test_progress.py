"""Long work says how far it is to whoever watches, and is quiet otherwise."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_llada import progress
from sglang_llada.progress import CLEAR, counter, pace, say, watched

ROOT = Path(__file__).parents[1]
COUNT = 24
EVALUATE = ["examples.tiny_llada2.evaluate", "--n", str(COUNT), "--threshold", "0.95"]
TRAIN = ["examples.tiny_llada2.adapter", "--steps", "2", "--tokens", "256", "--out"]


def read_all(terminal: int) -> str:
    """What was written to a terminal whose programs have all ended."""
    found = b""
    while True:
        try:
            found += os.read(terminal, 1 << 16)
        except OSError:  # Linux says so at the end
            return found.decode()


def test_a_terminal_shows_how_many_how_fast_and_what_remains() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", *EVALUATE]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    told = read_all(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    looks = re.findall(rf": (\d+) of {COUNT}, [\d.]+ a second, \d:\d\d:\d\d left", told)
    assert looks and looks == sorted(looks, key=int), told
    assert told.endswith(CLEAR), "the line goes at the end"
    assert "\r" not in out and json.loads(out.splitlines()[-1])["examples"] == COUNT


def test_a_pipe_gets_results_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", *TRAIN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps" not in done.stderr and "\r" not in done.stderr and done.stdout == ""
    assert (tmp_path / "adapter_model.safetensors").exists()


class Terminal(io.StringIO):
    """A terminal, and the time there."""

    now = 0.0

    def isatty(self) -> bool:
        return True


def sit_down(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Before standard error; within a test, for pytest puts its own in place as each one begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: terminal.now)
    return terminal


def test_the_line_is_not_written_with_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = sit_down(monkeypatch)
    tell = counter("blocks", 1000)
    for count in range(1, 1001):
        terminal.now += 0.01
        tell(count)
    looks = terminal.getvalue().split(CLEAR)[1:]
    assert looks[0] == "blocks: 0 of 1000" and looks[-1] == "" and 90 <= len(looks) <= 110
    assert looks[-2].startswith("blocks: 99") and looks[-2].endswith(" of 1000, 100 a second, 0:00:00 left")


def test_what_remains_is_at_the_pace_so_far() -> None:
    assert pace(0, 5, 3.0) == ""
    assert pace(20, 1000, 40.0) == ", 0.5 a second, 0:32:40 left"


def test_work_that_is_left_takes_its_line_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = sit_down(monkeypatch)
    items = watched("abc", "letters", 3)
    say(next(items))
    items.close()
    assert terminal.getvalue() == f"{CLEAR}letters: 0 of 3{CLEAR}{CLEAR}"
    assert capsys.readouterr().out == "a\n"


def test_off_a_terminal_items_come_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watched(iter("ab"), "letters", 2)) == ["a", "b"]
    say("both")
    assert capsys.readouterr() == ("both\n", "")
