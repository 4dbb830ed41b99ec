"""Several ranks decide what one rank decides: real processes over gloo, the trained checkpoint, held-out prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.conftest import NEW_TOKENS, TINY, Case, compare
from tests.host.serving import serving

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

FLAGS = {
    "tensor": ("--tp-size", "2"),
    "experts": ("--tp-size", "2", "--ep-size", "2"),
    "attention": ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
}


@pytest.mark.parametrize("how", FLAGS)
def test_two_ranks_answer_as_one(how: str, cases: list[Case], tmp_path: Path) -> None:
    with serving(TINY, tmp_path / "log", *FLAGS[how]) as server:
        answers = server.generate_all([case.prompt for case in cases[:100]], NEW_TOKENS, 16)
    compare(cases[:100], answers, f"{how}, 16 at once")
