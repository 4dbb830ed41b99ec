"""What `python -m sglang_llada tune` does: every prompt at every setting, a table, a picture, a record."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_llada.config import VARIANTS
from sglang_llada.errors import ConfigError
from sglang_llada.progress import counter
from sglang_llada.service import Service
from sglang_llada.tune.drive import Ask, Driver, Reply, Setting
from sglang_llada.tune.figures import Figures, figures, name_of, table, unbeaten
from sglang_llada.tune.plot import svg
from sglang_llada.tune.prompts import Prompt

# By the server's algorithm, the most careful first: with threshold 1 one token a step. {} is what the server does by
# itself.
SETTINGS: dict[str, list[Setting]] = {
    "threshold": [{"threshold": 1}, {}, *({"threshold": at} for at in (0.95, 0.9, 0.8, 0.7, 0.5))],
    "joint_threshold": [
        {"threshold": 1},
        {},
        {"mode": "quality"},
        {"mode": "speed"},
        # edits of blocks that are done, which take no step of their own
        *({"window": 2, "max_post_edit_steps": 0, "threshold": at} for at in (0.9, 0.7, 0.5)),
    ],
    "levenshtein": [
        {"threshold": 1},
        {},
        *({"threshold": at} for at in (0.9, 0.7, 0.5, 0.3)),
        {"cumulative_budget": True},
    ],
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: prompts at settings, of which the first is the most careful, so many requests at once."""

    prompts: list[Prompt]
    settings: list[Setting]
    at_once: list[int]
    max_tokens: int

    @property
    def runs(self) -> int:
        """How often all prompts are answered."""
        return len(self.settings) * len(self.at_once)


def settings_for(algorithm: str) -> list[Setting]:
    """Those to try where nobody names any."""
    return SETTINGS[VARIANTS.get(algorithm, (algorithm,))[0]]


def measured(driver: Driver, plan: Plan) -> Iterator[Figures]:
    """The figures of each setting at each number at once, as they come.

    Every prompt is read once before, so that all settings find the same prefix cache; a setting that the server
    refuses is found then, too.
    """
    asks = [driver.ask_of(prompt, plan.max_tokens) for prompt in plan.prompts]
    for setting in plan.settings:
        driver.answer(Ask(asks[0].prompt, 1), setting)
    driver.answers([Ask(ask.prompt, 1) for ask in asks], {}, max(plan.at_once), counter("prompts read", len(asks)))
    careful: list[Reply] = []
    for at_once in plan.at_once:
        for setting in plan.settings:
            said = counter(f"{name_of(setting)}, {at_once} at once", len(asks))
            began = time.perf_counter()
            replies = driver.answers(asks, setting, at_once, said)
            seconds = time.perf_counter() - began
            careful = careful or replies
            yield figures(setting, at_once, plan.prompts, replies, careful, seconds)


def tune(service: Service, plan: Plan, save: Path | None, as_json: bool) -> bool:
    """Measure, print and draw; whether all was measured.

    Whatever ends it, Ctrl-C or a server that is lost, what there is by then is printed.
    """
    if save is not None and save.suffix != ".svg":
        raise ConfigError(f"--save is {str(save)!r}; allowed: a name that ends in .svg")
    facts = service.facts()
    plan = dataclasses.replace(plan, settings=plan.settings or settings_for(facts["algorithm"]))
    rows: list[Figures] = []
    try:
        rows.extend(measured(Driver(service, service.info()["incremental_streaming_output"]), plan))
    except KeyboardInterrupt:
        print(f"\nstopped after {len(rows)} of {plan.runs} runs", file=sys.stderr)
    finally:
        if rows:
            print(json.dumps(record(facts, plan, rows)) if as_json else table(rows))
            if save is not None:
                save.write_text(svg(rows, f"{facts['model']}, {len(plan.prompts)} prompts"), encoding="utf-8")
    return len(rows) == plan.runs


def record(facts: Mapping[str, Any], plan: Plan, rows: Sequence[Figures]) -> dict[str, Any]:
    """All figures as one JSON object."""
    best = unbeaten(rows)
    return {
        "schema": 1,
        **facts,
        "prompts": len(plan.prompts),
        "max_tokens": plan.max_tokens,
        "rows": [{**dataclasses.asdict(row), "unbeaten": row in best} for row in rows],
    }
