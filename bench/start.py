"""From the command to a server that is ready, by part: `python -m bench.start`.

Each start is the plain launch command. The first of `--repeats` has no kernels that were compiled before (Triton's
cache is a folder of this run), the others have its. Seconds of each part, from the host's log, which has whole seconds
and says when a part ends; of several ranks the last one counts. Our kernels are compiled beside the loading of weights,
and what that took is said, too; `SGLANG_LLADA_COMPILE=0` leaves each to its first launch. Without --model: a model of
LLaDA2.0-mini's shape with random weights, or on a CPU the small checkpoint that ships here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu_steps import TINY, shaped
from bench.records import ROOT, new_record
from tests.host.serving import free_port, ready, stop

# What the host says when a part is over, in order.
PARTS = {
    "imports, arguments": "server_args=",
    "processes, ranks": "Init parallel ends",
    "weights": "Load weight end",
    "pools": "Memory pool end",
    "graphs": r"Capture .* end\.",
    "the rest": "The server is fired up",
}
BESIDE = re.compile(r"kernels: .*; ([\d.]+) s$", re.MULTILINE)
STAMP = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")


def main(argv: list[str] | None = None) -> int:
    """Print a line per start and, last, the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of the server; last")
    args = parser.parse_args(argv)
    out: dict[str, Any] = {**new_record(), "summary": {}}
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        model, flags = args.model, args.flags
        if model is None and torch.cuda.is_available():
            model, flags = shaped(there / "mini"), ["--load-format", "dummy", *flags]
        for n in range(args.repeats):
            name = "first" if n == 0 else f"later {n}"
            log = started(model or TINY, there / f"log{n}", there / "triton", flags)
            out["summary"][name] = found = parts(log.text, log.begin)
            said = ", ".join(f"{part} {seconds:.0f}" for part, seconds in found.items())
            print(f"{name}: ready after {sum(found.values()):.0f} s: {said}", flush=True)
            for seconds in BESIDE.findall(log.text):
                out["summary"][name] |= {"kernels, beside": float(seconds)}
                print(f"{name}: kernels of ours, beside: {seconds} s", flush=True)
    print(json.dumps(out))
    return 0


class Log(NamedTuple):
    """What a server said, and when its command was given, as time.time()."""

    text: str
    begin: float


def started(model: Path, log: Path, cache: Path, flags: list[str]) -> Log:
    """The log of one start."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *flags]
    begin = time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
            start_new_session=True,
        )
    try:
        ready(process, f"http://127.0.0.1:{port}", log)
    finally:
        stop(process)
    return Log(log.read_text(encoding="utf-8", errors="replace"), begin)


def parts(log: str, begin: float) -> dict[str, float]:
    """Seconds of each part that a log has the end of, of a command given at `begin` (as time.time())."""
    found: dict[str, float] = {}
    for part, over in PARTS.items():
        ends = [STAMP.match(line) for line in log.splitlines() if re.search(over, line)]
        times = [datetime.strptime(end[1], "%Y-%m-%d %H:%M:%S").timestamp() for end in ends if end]
        if times:
            found[part] = max(max(times) - begin - sum(found.values()), 0.0)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
