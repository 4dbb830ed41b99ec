"""The table beside the host's own code: a probe that fails is told and nothing else fails, and the page has its record.

Where tests that take minutes run, some rows are asked of both sides, else of ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.compare_stock import __main__ as command
from bench.compare_stock.rows import ROWS, Row, settings
from bench.compare_stock.sides import SIDES, NotAnswered, Seen, last_words, sentence
from tests.host.serving import ROOT
from tests.sizes import size

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

RECORD = ROOT / "bench" / "results" / "compare-stock.txt"


def target(*answers: bool) -> Any:
    """A server that answers or does not, when it is asked whether it does, and counts how often it is started again."""
    told, started = iter(answers), []
    return SimpleNamespace(
        server=object(), answers=lambda: next(told), restart=lambda: started.append(1), started=started
    )


def raises(error: Exception) -> Row:
    def probe(_: Any) -> Seen:
        raise error

    return Row("", probe)


def test_what_both_sides_were_asked_is_told_whatever_they_did(tmp_path: Path) -> None:
    names = ["temperature", "bad id", "damaged"]
    sides = size(["here"], list(SIDES))
    found = command.compare({name: ROWS[name] for name in names}, sides, settings(tmp_path), tmp_path)
    assert list(found) == names and all(list(cells) == sides for cells in found.values())
    assert all(found[name]["here"].good for name in names)
    assert found["bad id"]["here"].said.startswith("HTTP 400: input_ids holds -1")
    if "in-tree" in sides:
        assert found["bad id"]["in-tree"].text == "no: server ended: IndexError: index out of range in self"
        assert found["temperature"]["in-tree"].text == "no: 1 different answers of 6"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotAnswered("HTTP 500: x"), "no: HTTP 500: x"),
        (KeyError("meta_info"), "no: an answer without what was asked for (KeyError: 'meta_info')"),
    ],
)
def test_a_probe_that_fails_is_a_row_that_says_so(error: Exception, said: str) -> None:
    server = target(True)
    assert command.look(raises(error), server).text == said and not server.started


def test_a_server_that_answers_no_more_is_started_again_and_the_row_says_so() -> None:
    server = target(False)
    seen = command.look(Row("", lambda _: Seen("all well", True)), server)
    assert seen.text == "no: all well; afterwards it answers nobody" and len(server.started) == 1
    assert command.look(raises(NotAnswered("server ended: why")), target(False)).said == "server ended: why"


def test_a_server_that_does_not_start_is_not_tried_again() -> None:
    server = target()
    server.server = None
    assert command.look(raises(NotAnswered("does not start: why")), server).said == "does not start: why"
    assert not server.started


def test_figures_of_several_turns_are_their_medians() -> None:
    turns = [Seen("{:.0f} of {:.0f}", figures=(value, -value)) for value in (5.0, 1.0, 2.0)]
    assert command.middle(turns).text == "2 of -2"
    assert command.middle([Seen("a"), Seen("{b}", True)]).text == "yes: {b}"


def test_what_an_error_says_is_found(tmp_path: Path) -> None:
    assert sentence('{"error": {"message": "a | b"}}') == "a / b"
    assert sentence("<html>" + "x" * 500).endswith("...") and len(sentence("y" * 500)) < 120
    log = tmp_path / "log"
    log.write_text("ValueError: first\nmore\n[12:00] sglang-llada: second\n")
    assert last_words(log) == "sglang-llada: second"


def test_the_page_has_the_table_of_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8").splitlines()[-1])
    found = command.read(record)
    assert {name: {side: asdict(seen) for side, seen in cells.items()} for name, cells in found.items()} == {
        name: {side: {**cell, "figures": tuple(cell["figures"])} for side, cell in cells.items()}
        for name, cells in record["rows"].items()
    }
    assert list(found) == list(ROWS), "run python -m bench.compare_stock --markdown again"
    (there, asked), (good, judged) = (command.score(found)[side] for side in SIDES)
    told = f"of {judged} things that a client may want, {good} are as they should be here; of the {asked} of them"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert told in readme and f"on a CPU, {there} are there" in readme
    table = "\n".join(command.markdown(found))
    assert table in (ROOT / "docs" / "in-tree.md").read_text(encoding="utf-8")
