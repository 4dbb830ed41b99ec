"""What only a GPU can tell, part by part: `python -m bench.gpu_report`, ten minutes on one card.

Each part is a command of its own that takes at most two minutes (`--list` shows them), and what it prints is kept in
`--out`/PART.txt, whose last line is a record for `python -m bench.compare`. A part that fails does not keep the others
from running. With --model the host's serving benchmark runs as well, and with --mode-off a second time on the host's
own code.

    python -m bench.gpu_report [--parts tests kernels ...] [--out gpu-report] [--model inclusionAI/LLaDA2.0-mini]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.records import ROOT, new_record

# In the order of what is worth most if time runs out.
PARTS: dict[str, list[str]] = {
    "tests": ["bench.gpu_report", "--run-tests", "tests/gpu/test_kernels.py"],  # our kernels against torch
    "exactness": ["bench.exactness"],  # answers in bf16 against fp32
    "steps": ["bench.gpu_steps", "--sides", "ours"],  # at 1, 8, 32 and 64 requests, first tokens, sampled ones
    "off": ["bench.gpu_steps", "--sides", "off"],  # the host's own code
    "profile": ["bench.gpu_steps", "--sides", "ours", "--requests", "1", "--profile", "1", "32"],
    "kernels": ["bench.kernels", "--seconds", "50"],
    "sampling": ["bench.sampling"],
    "start": ["bench.start"],
    "quantised": ["bench.gpu_report", "--run-tests", "tests/gpu/test_quantised.py"],
    "served": ["bench.gpu_report", "--run-tests", "tests/gpu/test_served.py"],  # servers: some minutes
}
LOAD = ("--dataset-name", "random", "--num-prompts", "256", "--random-input-len", "512", "--random-output-len", "256")


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 2 if there is no GPU, 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of what the parts print")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--list", action="store_true", help="print the commands of the parts")
    parser.add_argument("--model", help="checkpoint for the serving benchmark")
    parser.add_argument("--mode-off", action="store_true", help="benchmark the host's own code beside ours")
    parser.add_argument("--run-tests", type=Path, help="run a file of gpu tests and print a record of its outcomes")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{part:10} python -m {' '.join(command)}" for part, command in PARTS.items()))
        return 0
    if not torch.cuda.is_available():
        print("gpu_report: torch.cuda sees no accelerator, and every part of the report needs one", file=sys.stderr)
        return 2
    if args.run_tests:
        return run_tests(args.run_tests)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in args.parts if run_part(part, PARTS[part], args.out)]
    for mode in ("on", "off")[: 1 + args.mode_off] if args.model else ():
        serve(args.model, mode, args.out / f"serving-{mode}.txt")
    print(f"failed: {', '.join(failed) or 'none'}; what the parts printed is in {args.out}/")
    return int(bool(failed))


def run_part(part: str, command: list[str], out: Path) -> int:
    """Run a command, print what it prints, and keep that; its status."""
    begin, status = time.monotonic(), 0
    print(f"--- {part}", flush=True)
    with (out / f"{part}.txt").open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            print(line[:200].rstrip("\n"), flush=True)
        status = process.wait()
    print(f"--- {part}: {'failed' if status else 'done'} after {time.monotonic() - begin:.0f} s", flush=True)
    return status


def run_tests(file: Path) -> int:
    """Print the outcome of each gpu test of a file and, last, the record; 1 if one failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(file), f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        found = outcomes(report)
    for name, outcome in found.items():
        print(f"{outcome:8} {name}")
    counts = {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    print(json.dumps({**new_record(), "tests": found, "counts": counts}))
    return int(counts["failed"] > 0)


def outcomes(report: Path) -> dict[str, str]:
    """Name to passed, failed or skipped, of pytest's XML report."""
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    return {
        f"{case.get('classname')}::{case.get('name')}": next((kinds[e.tag] for e in case if e.tag in kinds), "passed")
        for case in ElementTree.parse(report).iter("testcase")
    }


def serve(model: str, mode: str, out: Path) -> None:
    """One run of the host's serving benchmark against a server in a mode of ours; keeps its record."""
    from tests.host.serving import launch, ready, stop

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        process, url = launch(Path(model), folder / "log", env={**os.environ, "SGLANG_LLADA": mode})
        stack.callback(stop, process)
        ready(process, url, folder / "log")
        found = folder / "bench.jsonl"
        subprocess.run(
            [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
            + ["--model", model, "--seed", "1", "--output-file", str(found), *LOAD],
            check=True,
        )
        said = json.loads(found.read_text(encoding="utf-8").splitlines()[-1])
        out.write_text(json.dumps({**new_record(), "summary": {mode: said}}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
