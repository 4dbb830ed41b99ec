"""What a server says of the process that compiles its kernels."""

from __future__ import annotations

import logging
import threading

import pytest

from sglang_llada.host.engine import compiling
from tests.test_compiling import ROUTE

pytestmark = [pytest.mark.host, pytest.mark.timeout(60)]


@pytest.mark.parametrize(
    ("launch", "level", "said"),
    [
        ("route", "INFO", "kernels: 1 kernels, "),
        ("no such", "WARNING", "kernels are compiled when they are first launched: compiling them before failed: Key"),
    ],
)
def test_a_server_goes_on_and_says_how_it_ended(
    launch: str, level: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, compiling.logger.name):
        compiling.begin({"card": [(9, 0), 132], "launches": [(launch, ROUTE)]})
        (waiting,) = [thread for thread in threading.enumerate() if thread.name == "kernels"]
        waiting.join()
    (record,) = caplog.records
    assert record.levelname == level and record.getMessage().startswith(said)
