"""What only a GPU can tell, in one file: the `gpu` tests, times of our kernels, and the host's serving benchmark.

    python -m bench.gpu_report --out report.json [--model inclusionAI/LLaDA2.0-mini] [--mode-off]

Without --model the serving benchmark is left out. With --mode-off it runs a second time on the host's own code.
The last line printed is the record that is also written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import kernels
from bench.records import ROOT, new_record

LOAD = ("--dataset-name", "random", "--num-prompts", "256", "--random-input-len", "512", "--random-output-len", "256")


def main(argv: list[str] | None = None) -> int:
    """Write the report; 2 if there is no GPU, 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"), help="where the record is written")
    parser.add_argument("--model", help="checkpoint for the serving benchmark")
    parser.add_argument("--mode-off", action="store_true", help="benchmark the host's own code beside ours")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_report: torch.cuda sees no accelerator, and every part of the report needs one", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        **new_record(),
        "tests": run_tests(),
        "kernels": kernels.main([]),
        "serving": [serve(args.model, mode) for mode in ("on", "off")[: 1 + args.mode_off]] if args.model else [],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, outcome in record["tests"].items():
        print(f"{outcome:8} {name}")
    print(json.dumps(record))
    return int("failed" in record["tests"].values())


def run_tests() -> dict[str, str]:
    """Outcome of each gpu test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"], cwd=ROOT, check=False)
        return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    """Name to passed, failed or skipped, of pytest's XML report."""
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    return {
        f"{case.get('classname')}::{case.get('name')}": next((kinds[e.tag] for e in case if e.tag in kinds), "passed")
        for case in ElementTree.parse(report).iter("testcase")
    }


def serve(model: str, mode: str) -> dict[str, Any]:
    """One run of the host's serving benchmark against a server in a mode of ours."""
    from tests.host.serving import launch, ready, stop

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        process, url = launch(Path(model), folder / "log", env={**os.environ, "SGLANG_LLADA": mode})
        stack.callback(stop, process)
        ready(process, url, folder / "log")
        out = folder / "bench.jsonl"
        subprocess.run(
            [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
            + ["--model", model, "--seed", "1", "--output-file", str(out), *LOAD],
            check=True,
        )
        return {"mode": mode, **json.loads(out.read_text(encoding="utf-8").splitlines()[-1])}


if __name__ == "__main__":
    sys.exit(main())
