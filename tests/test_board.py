"""The Grafana board and the alerts: types, queries and places, without a Grafana or a Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).parents[1] / "docs"
BOARD = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
[RULES] = map(
    yaml.safe_load,
    re.findall(r"```yaml\n(groups:.*?)```", (DOCS / "operations.md").read_text(encoding="utf-8"), re.S),
)
INSTALL = "is not installed; `pip install '.[test]'` brings it"


def queries() -> list[str]:
    """Every query of the board, as Grafana sends it."""
    asked = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return [re.sub(r"\$__(rate_)?interval", "5m", each).replace("$model", ".*") for each in asked]


def alerts() -> list[dict[str, Any]]:
    """Every rule of the page."""
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Where something is not, or is another thing, in what was kept of it."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept[key], f"{where}/{key}") if key in kept else [f"{where}/{key}"]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, pair in enumerate(zip(given, kept, strict=True)):
            yield from lost(*pair, f"{where}/{i}")
    elif given != kept:
        yield where


def lost_by_grafanas_types(board: dict[str, Any]) -> list[str]:
    """What Grafana's own types, read and written again, do not keep of a board: names that it does not know."""
    dashboard = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason=f"grafana-foundation-sdk {INSTALL}"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()  # types of panels and of queries
    return list(lost(board, json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(board)))))


def test_grafanas_own_types_keep_all_of_the_board() -> None:
    assert lost_by_grafanas_types(BOARD) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda board: board.update(tittle="a"), "/tittle"),
        (lambda board: board["panels"][0].update(gridpos={}), "/panels/0/gridpos"),
        (lambda board: board["panels"][0]["targets"][0].update(query="a"), "/panels/0/targets/0/query"),
        (
            lambda board: board["panels"][0]["fieldConfig"]["defaults"].update(units="s"),
            "/panels/0/fieldConfig/defaults/units",
        ),
    ],
)
def test_a_name_that_grafana_does_not_know_is_found(change: Any, where: str) -> None:
    board = json.loads(json.dumps(BOARD))
    change(board)
    assert lost_by_grafanas_types(board) == [where]


def test_panels_have_places_of_their_own_and_the_chosen_source() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, "a row of Grafana's has 24 columns"
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "model"}


def test_every_query_is_promql() -> None:
    promql = pytest.importorskip("promql_parser", reason=f"promql-parser {INSTALL}")
    assert len(queries()) > 20 and len(alerts()) > 5
    for query in [*queries(), *(alert["expr"] for alert in alerts())]:
        promql.parse(query)
    with pytest.raises(ValueError, match="unexpected end of input|unclosed"):
        promql.parse("sum(rate(sglang:llada_steps_total[5m])")


def test_alerts_have_what_prometheus_asks_for() -> None:
    assert RULES.keys() == {"groups"} and all(group.keys() == {"name", "rules"} for group in RULES["groups"])
    for alert in alerts():
        assert alert.keys() == {"alert", "expr", "for", "annotations"}
        assert re.fullmatch(r"[A-Za-z]+", alert["alert"]) and re.fullmatch(r"\d+[smh]", alert["for"])
        assert alert["annotations"].keys() == {"summary"}
    assert len({alert["alert"] for alert in alerts()}) == len(alerts())
