"""Feature by feature beside the host's own code: `python -m bench.compare_stock [--only NAME ...] [--markdown]`.

Both sides' servers answer the same requests, one row of bench/compare_stock/rows.py after the other; a cell is what one
of them was seen to do. A probe that fails says how, a server that ends is started again for the next row. The table as
text (or, with --markdown, as it stands in docs/in-tree.md), then one JSON record. Six minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import requests

from bench.compare_stock.rows import ROWS, Row, settings
from bench.compare_stock.sides import SIDES, NotAnswered, Seen, Setting, Target
from bench.records import new_record
from sglang_llada.progress import say, watched

Table = dict[str, dict[str, Seen]]  # by row and side


def main(argv: list[str] | None = None) -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="rows")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--markdown", action="store_true", help="print the table as a page has it")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = compare({name: ROWS[name] for name in args.only}, args.sides, settings(Path(folder)), Path(folder))
    if args.markdown:
        print("\n".join(markdown(found)))
    for side, (good, judged) in score(found).items():
        print(f"{side}: {good} of {judged}")
    table = {name: {side: asdict(seen) for side, seen in cells.items()} for name, cells in found.items()}
    print(json.dumps({**new_record(), "seconds": time.perf_counter() - begin, "rows": table}))


def compare(rows: dict[str, Row], sides: list[str], how: dict[str, Setting], folder: Path) -> Table:
    """What each side was seen to do, row by row, in the order of the rows; printed as it is seen."""
    found: Table = {name: {} for name in rows}
    for setting in how:
        mine = {name: row for name, row in rows.items() if row.setting == setting}
        if not mine:
            continue
        with both(sides, how[setting], folder / setting.replace(" ", "-")) as targets:
            for name, row in watched(mine.items(), setting, len(mine)):
                turns = [{side: look(row, target) for side, target in targets.items()} for _ in range(row.turns)]
                for side in targets:
                    found[name][side] = seen = middle([turn[side] for turn in turns])
                    say(f"{name:<16}{side:<9}{seen.text}")
    return found


@contextmanager
def both(sides: list[str], setting: Setting, folder: Path) -> Iterator[dict[str, Target]]:
    """The servers of a setting, started at the same time."""
    targets = {side: Target(side, setting, folder / side) for side in sides}
    try:
        for target in targets.values():
            target.launch()
        for target in targets.values():
            target.wait()
        yield targets
    finally:
        for target in targets.values():
            target.close()


def look(row: Row, target: Target) -> Seen:
    """What a probe sees; the target answers again afterwards, unless it does not start."""
    try:
        seen = row.probe(target)
    except NotAnswered as error:
        seen = Seen(str(error), False)
    except requests.RequestException as error:
        seen = Seen(type(error).__name__, False)
    except Exception as error:  # whatever an answer lacks: it is another program's
        seen = Seen(f"an answer without what was asked for ({type(error).__name__}: {error})", False)
    if target.server is not None and not target.answers():
        target.restart()
        if "server ended" not in seen.said:
            seen = Seen(f"{seen.said}; afterwards it answers nobody", False)
    return seen


def middle(turns: list[Seen]) -> Seen:
    """The medians of what one side's turns measured; what the last one saw, if it is not figures."""
    if not all(seen.figures for seen in turns):
        return turns[-1]
    return replace(
        turns[-1], figures=tuple(median(values) for values in zip(*(seen.figures for seen in turns), strict=True))
    )


def score(found: Table) -> dict[str, tuple[int, int]]:
    """By side: of how many rows that can be judged the answer is yes."""
    counts: dict[str, tuple[int, int]] = {}
    for cells in found.values():
        for side, seen in cells.items():
            good, judged = counts.get(side, (0, 0))
            counts[side] = (good + (seen.good is True), judged + (seen.good is not None))
    return counts


def markdown(found: Table) -> list[str]:
    """Lines of a page's table."""
    sides = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(sides)} |", f"|---|{'---|' * len(sides)}"]
    for name, cells in found.items():
        lines.append(f"| {ROWS[name].asked} | {' | '.join(seen.text for seen in cells.values())} |")
    return lines


def read(record: dict[str, Any]) -> Table:
    """The table of a record."""
    return {
        name: {side: Seen(**{**cell, "figures": tuple(cell["figures"])}) for side, cell in cells.items()}
        for name, cells in record["rows"].items()
    }


if __name__ == "__main__":
    sys.exit(main())
