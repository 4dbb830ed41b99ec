"""What a server says of the process that compiles its kernels."""

from __future__ import annotations

import logging
import threading

import pytest

from sglang_llada.host.engine import compiling
from tests.test_compiling import COMMAND

pytestmark = [pytest.mark.host, pytest.mark.timeout(60)]

FAILED = "kernels are compiled when they are first launched: compiling them before failed: "


@pytest.mark.parametrize(
    ("module", "level", "said"),
    [
        ("json.tool", "INFO", 'kernels: {\n    "card": ['),  # which says what it is told
        ("no_such", "WARNING", FAILED),
    ],
)
def test_a_server_goes_on_and_says_how_it_ended(
    module: str, level: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert COMMAND[-1] == compiling.MODULE
    monkeypatch.setattr(compiling, "MODULE", module)
    with caplog.at_level(logging.INFO, compiling.logger.name):
        compiling.begin({"card": [(9, 0), 132], "launches": []})
        (waiting,) = [thread for thread in threading.enumerate() if thread.name == "kernels"]
        waiting.join()
    (record,) = caplog.records
    assert record.levelname == level and record.getMessage().startswith(said)


def test_a_server_goes_on_where_no_process_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = object()  # of which nothing can be read
    monkeypatch.setattr(compiling, "is_wanted", lambda: True)
    assert compiling.compile_beside(model, None) is model
    (record,) = caplog.records
    assert record.getMessage().startswith(FAILED)
