"""Two records of one benchmark side by side: `python -m bench.compare BEFORE AFTER`.

Each file ends with a record, as the benchmarks print it. Figures are compared by their medians; records of different
benchmarks, or made in different environments, are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

HEAD = ("schema", "argv", "git", "environment")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 2 if the records cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    before, after = (record(file) for file in (args.before, args.after))
    if why := differ(before, after):
        print(f"bench.compare: {why}", file=sys.stderr)
        return 2
    old, new = (dict(figures(each)) for each in (before, after))
    print(f"{before['git']} -> {after['git']}")
    for name in old.keys() | new.keys():
        if name not in old or name not in new:
            print(f"  {name}: only {'before' if name in old else 'after'}")
    for name in old:
        if name in new:
            ratio = f"{new[name] / old[name]:.3f}" if old[name] else ""
            print(f"  {name:<70} {old[name]:12.4g} {new[name]:12.4g} {ratio:>8}")
    return 0


def record(file: Path) -> dict[str, Any]:
    """The last line of a file."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    return found


def differ(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Why two records cannot be compared; empty if they can."""
    names = [Path(each["argv"][0]).name for each in (before, after)]
    if names[0] != names[1]:
        return f"records of {names[0]} and {names[1]}"
    changed = [
        f"{key} {before['environment'].get(key)!r} and {after['environment'].get(key)!r}"
        for key in before["environment"].keys() | after["environment"].keys()
        if before["environment"].get(key) != after["environment"].get(key)
    ]
    return f"made in different environments: {'; '.join(sorted(changed))}" if changed else ""


def figures(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record by its path; the median where there are several of one kind."""
    if isinstance(node, bool) or node is None or isinstance(node, str):
        return
    if isinstance(node, int | float):
        yield path, float(node)
    elif isinstance(node, dict):
        for key, value in node.items():
            if path or key not in HEAD:
                yield from figures(value, f"{path}/{key}" if path else key)
    elif node and all(isinstance(each, int | float) for each in node):
        yield path, float(median(node))
    elif node and all(isinstance(each, dict) for each in node):
        keys = dict.fromkeys(key for each in node for key in each)
        if all(isinstance(each.get(key, 0.0), int | float) for each in node for key in keys):
            for key in keys:  # runs of one workload
                yield f"{path}/{key}", float(median(each[key] for each in node if key in each))
        else:
            for i, each in enumerate(node):
                yield from figures(each, f"{path}/{i}")


if __name__ == "__main__":
    sys.exit(main())
