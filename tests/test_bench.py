"""Records: what is compared, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import alternatives, compare, curves, roofline


def write(folder: Path, name: str, **changes: Any) -> str:
    body = {"schema": 1, "argv": ["bench/step.py"], "git": name, "environment": {"torch": "2"}, **changes}
    file = folder / name
    file.write_text("a table\n" + json.dumps(body) + "\n")
    return str(file)


def test_figures_are_compared_by_their_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path, "a", milliseconds={"1": [3.0, 1.0, 2.0]}, runs=[{"tokens/s": 5}, {"tokens/s": 7}])
    after = write(tmp_path, "b", milliseconds={"1": [1.0, 1.0, 9.0]}, runs=[{"tokens/s": 12}], more=1)
    assert compare.main([before, after]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:]}
    assert lines["milliseconds/1"] == ["2", "1", "0.500"] and lines["runs/tokens/s"] == ["6", "12", "2.000"]
    assert "more: only after" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"environment": {"torch": "3"}}, "torch '2' and '3'"), ({"argv": ["bench/serve.py"]}, "step.py and serve.py")],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert compare.main([write(tmp_path, "a"), write(tmp_path, "b", **changes)]) == 2
    assert said in capsys.readouterr().err


def test_exponents_are_powers_of_the_size() -> None:
    found = curves.exponents({1: 3.0, 2: 6.0, 8: 24.0, 16: 96.0})
    assert found == pytest.approx({"1 to 2": 1, "2 to 8": 1, "8 to 16": 2, "1 to 16": 1.25})
    assert curves.exponents({1: 3.0}) == {}


@pytest.mark.parametrize("published", roofline.PUBLISHED, ids=lambda each: each[0])
def test_the_model_of_a_step_meets_published_speeds(published: tuple[Any, ...]) -> None:
    _, name, device, *rest, said = published
    got = roofline.speed(roofline.MODELS[name], roofline.DEVICES[device], *rest)
    assert 1 / 1.75 < got / said < 1.75


def test_the_page_of_refusals_has_the_figures_of_the_model() -> None:
    page = (Path(__file__).parents[1] / "docs" / "refusals.md").read_text(encoding="utf-8")
    for table in (alternatives.pipeline, alternatives.prompts):
        for requests in alternatives.REQUESTS:
            cells = [str(requests), *(f"{took:.1f}" for took in table(requests).values())]
            assert f"| {' | '.join(cells)} |" in page
