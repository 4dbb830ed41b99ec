"""What of the GPU report can be checked without a GPU: that it says so, and how it reads pytest's report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import gpu_report

XML = """<testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_kernels" name="test_a"/>
<testcase classname="tests.gpu.test_kernels" name="test_b"><failure message="no">trace</failure></testcase>
<testcase classname="tests.gpu.test_kernels" name="test_c"><skipped message="needs two GPUs"/></testcase>
<testcase classname="tests.gpu.test_served" name="test_d"><error message="setup">trace</error></testcase>
</testsuite></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "report.json")]) == 2
    assert "sees no accelerator" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_outcomes_of_a_pytest_report(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(XML)
    assert list(gpu_report.outcomes(report).values()) == ["passed", "failed", "skipped", "failed"]
