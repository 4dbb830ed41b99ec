"""The benchmark of kernels runs, at tiny sizes in the interpreter, and finds every way right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.kernels import ROOT


def test_every_part_at_tiny_sizes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["wrong"] == []
    assert {name.split("/")[0] for name in record["us"]} == {"selection", "decide", "routing", "heads"}
