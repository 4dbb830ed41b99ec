"""What of the GPU report can be checked without a GPU: its parts are commands, what they print is kept and compared."""

from __future__ import annotations

import importlib
from datetime import datetime
from pathlib import Path

import pytest
import torch

from bench import compare, exactness, gpu_report, start
from bench.gpu_report import PARTS
from sglang_llada.llada2.reference import Generation

XML = """<testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_kernels" name="test_a"/>
<testcase classname="tests.gpu.test_kernels" name="test_b"><failure message="no">trace</failure></testcase>
<testcase classname="tests.gpu.test_kernels" name="test_c"><skipped message="needs two GPUs"/></testcase>
<testcase classname="tests.gpu.test_served" name="test_d"><error message="setup">trace</error></testcase>
</testsuite></testsuites>"""

LOG = """[2026-11-28 10:55:26] server_args={'model_path': 'mini'}
[2026-11-28 10:55:30 TP0] Init parallel ends. elapsed=0.38 s
[2026-11-28 10:55:34 TP1] Init parallel ends. elapsed=0.38 s
[2026-11-28 10:55:50 TP1] Load weight end. elapsed=0.06 s, type=LLaDA2MoeModelLM, avail mem=16.19 GB
[2026-11-28 10:55:52 TP0] Load weight end. elapsed=0.06 s, type=LLaDA2MoeModelLM, avail mem=16.19 GB
[2026-11-28 10:55:53 TP0] Memory pool end. avail mem=15.49 GB
[2026-11-28 10:56:01 TP0] kernels: 24 kernels, 24 of them compiled, the others on disk already; 12.3 s
[2026-11-28 10:56:10 TP0] Capture decode CUDA graph end. Time elapsed: 17.00 s.
[2026-11-28 10:56:12] The server is fired up and ready to roll!
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "report")]) == 2
    assert "sees no accelerator" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_a_command_that_takes_these_options(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, *options = PARTS[part]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main([*options, "--help"])
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_what_a_part_prints_is_kept_and_two_runs_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("before", "after")]
    for folder in folders:
        folder.mkdir()
        assert gpu_report.run_part("roofline", ["bench.roofline"], folder) == 0
    out = capsys.readouterr().out
    assert out.count("--- roofline: done after") == 2
    assert compare.main([str(folder / "roofline.txt") for folder in folders]) == 0
    assert " 1.000" in capsys.readouterr().out
    assert gpu_report.run_part("sampling", ["bench.sampling", "--no-such-option"], folders[0]) == 2
    assert "--- sampling: failed" in capsys.readouterr().out


def test_outcomes_of_a_pytest_report(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(XML)
    assert list(gpu_report.outcomes(report).values()) == ["passed", "failed", "skipped", "failed"]


def test_a_start_is_told_by_part() -> None:
    """The last rank counts."""
    begin = datetime(2026, 11, 28, 10, 55, 16).timestamp()
    found = start.parts(LOG, begin)
    assert found == dict(zip(start.PARTS, (10, 8, 18, 1, 17, 2), strict=True))
    without_graphs = "\n".join(line for line in LOG.splitlines() if "Capture" not in line)
    assert start.parts(without_graphs, begin)["the rest"] == 19
    assert start.BESIDE.findall(LOG) == ["12.3"]


def test_a_difference_is_as_near_as_the_reference_was_to_another_decision() -> None:
    """Two blocks of two tokens, in two steps each; the last block's third step decided what is cut off."""
    want = Generation([5, 6, 7], "stop", 5, [(1, 0.9), (2, 0.9), (1, 0.9)], [0.5, 0.3, 0.2, 0.1, 0.05])
    blocks = [0, 0, 1]
    assert exactness.nearness(want, [5, 6, 7], blocks) is None
    assert exactness.nearness(want, [5, 8, 7], blocks) == 0.3
    assert exactness.nearness(want, [5, 6, 8], blocks) == 0.05
    assert exactness.nearness(want, [5, 6], blocks) == 0.05
