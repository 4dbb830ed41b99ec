"""Kernels compiled by a process of their own: what it compiles is what a launch looks for; and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import ROOT

COMMAND = [sys.executable, "-m", "sglang_llada.kernels"]
ROUTE = {"experts": 8, "parts": 3, "groups": 2, "top_groups": 1, "top_k": 2, "normalise": True, "shared": 0.5}
ROTATE = {"heads": 2, "kv_heads": 1, "width": 32, "rotated": 16, "dtype": "bfloat16"}
SHAPE = {"block_size": 32, "tokens": [7], "width": 2048, "rows": 4096, "vocabulary": 4096}
DECISIONS = {**SHAPE, "ranks": 1, "invariant": False, "dtype": "bfloat16"}
# Launches with Triton's driver of a card that is not there, up to where a kernel's code is at hand.
LAUNCH = """
import json, sys
import triton
from sglang_llada import card, kernels

class Found(Exception): ...

def listen(*, cache_hit, **_):
    raise Found(cache_hit)

asked = json.load(sys.stdin)
card.known[kernels.DEVICE] = its = card.Card(tuple(asked["card"][0]), asked["card"][1])
triton.runtime.driver.set_active(kernels.Target(its))
triton.knobs.compilation.listener = listen
for name, keywords in asked["launches"]:
    with kernels.Shapes(), kernels.Bodies():
        try:
            kernels.LAUNCHES[name](**keywords)
        except Found as found:
            print(name, "was there" if found.args[0] else "was compiled")
"""

# Starts a command apart from itself, gives it its input, and waits.
ASK = """
import json, subprocess, sys
command, request = json.loads(input())
process = subprocess.Popen(command, stdin=-1, start_new_session=True, text=True)
process.stdin.write(request)
process.stdin.close()
print(process.pid, flush=True)
input()
"""

pytestmark = pytest.mark.timeout(120)


def run(command: list[str], folder: Path, request: dict[str, Any]) -> str:
    """What a command prints that reads a request, with a folder for Triton to keep kernels in."""
    env = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    return subprocess.run(
        command, input=json.dumps(request), env=env, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


LONG = pytest.mark.long


@pytest.mark.parametrize("capability", [(9, 0), pytest.param((8, 0), marks=LONG), pytest.param((10, 0), marks=LONG)])
def test_a_launch_finds_what_was_compiled(capability: tuple[int, int], tmp_path: Path) -> None:
    request = {"card": [capability, 132], "launches": [("route", ROUTE), ("rotate", ROTATE)]}
    assert run(COMMAND, tmp_path, request).startswith("2 kernels, 2 of them compiled")
    request["launches"].append(("route", ROUTE | {"experts": 16}))
    said = run([sys.executable, "-c", LAUNCH], tmp_path, request)
    assert said.splitlines() == ["route was there", "rotate was there", "route was compiled"]


def test_it_ends_with_who_asked(tmp_path: Path) -> None:
    """Whose last word is what to compile; that takes seconds more."""
    request = {"card": [(9, 0), 132], "launches": [("route", ROUTE), ("decide", DECISIONS)]}
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", ASK], env=env, cwd=ROOT, stdin=-1, stdout=-1, text=True) as asks:
        assert asks.stdin is not None and asks.stdout is not None
        asks.stdin.write(json.dumps([COMMAND, json.dumps(request)]) + "\n")
        asks.stdin.flush()
        child = int(asks.stdout.readline())
        while not list(tmp_path.glob("*/*.cubin")):
            time.sleep(0.01)
        assert runs(child)
        asks.kill()
    end = time.monotonic() + 2
    while runs(child):
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.01)


def runs(process: int) -> bool:
    """Whether a process is there, and not only its end."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"
