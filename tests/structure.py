"""The package in numbers: `python -m tests.structure` prints rooms, circles of imports, long files and long functions.

What is long says why: tests/test_structure.py fails on a file or function without a reason, and on a reason that
nothing needs any more.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.test_imports import FILES, PACKAGE, circles, graph

MOST_LINES, MOST_FUNCTION = 300, 40
LONG_FILES = {
    "blocks/request.py": "the state machine of a request: one table of moves, and each move",
    "config.py": "everything that a user may set, in one place",
    "decode/decide_triton.py": "two kernels and their launches, which share offsets",
    "decode/sampling_triton.py": "the kernels of all passes, which share records",
    "decode/select_triton.py": "selection's kernels in their two forms",
    "host/engine/executor.py": "a forward's inputs and what is read of it, around one object of the host's",
    "host/models/llada2.py": "the network, from embedding to head, as one reads it in the paper",
    "host/requests/bounds.py": "the table of all fields, and what reads it",
    "host/seam/releases/v0_5_23.py": "a table",
    "llada2/attention_triton.py": "one kernel, its merge and its settings by card",
    "llada2/config.py": "each field of config.json",
    "llada2/editing.py": "the reference decode that edits, in one file to be read beside the paper",
    "llada2/reference.py": "the reference network and decode in one file",
}
LONG_FUNCTIONS = {
    "decode/decide.py: in_torch": "a step as a pipeline of selections",
    "decode/decide_triton.py: decide": "a step as a pipeline of launches",
    "decode/decide_triton.py: gather_kernel": "a kernel is one function",
    "decode/decide_triton.py: rows_kernel": "a kernel is one function",
    "decode/levenshtein.py: step": "the paper's rule in its order",
    "decode/sampling_triton.py: bounds_kernel": "a kernel is one function",
    "decode/sampling_triton.py: draws_kernel": "a kernel is one function",
    "decode/sampling_triton.py: pass_over": "a launch with its arguments",
    "decode/sampling_triton.py: slice_kernel": "a kernel is one function",
    "decode/select_triton.py: fold_kernel": "a kernel is one function",
    "decode/select_triton.py: kernel": "a kernel is one function",
    "host/engine/executor.py: launch": "the order in which host and device work is the subject",
    "host/engine/scheduler.py: init_diffusion_llm": "puts the parts together",
    "host/models/llada2.py: __init__": "layers with their arguments",
    "llada2/attention_triton.py: attend": "a launch with its arguments",
    "llada2/attention_triton.py: attend_kernel": "a kernel is one function",
    "llada2/attention_triton.py: merge_kernel": "a kernel is one function",
    "llada2/config.py: contradictions": "one line for each",
    "llada2/editing.py: generate_blocks": "the reference decode, to be read from top to bottom",
    "llada2/editing.py: step": "the paper's rule in its order",
    "llada2/reference.py: generate": "the reference decode, to be read from top to bottom",
    "llada2/rotary_triton.py: kernel": "a kernel is one function",
    "llada2/rotary_triton.py: rotate_and_store": "a launch with its arguments",
    "llada2/router_triton.py: kernel": "a kernel is one function",
    "llada2/router_triton.py: route_kernel": "a kernel is one function",
}


def long_files() -> dict[str, int]:
    """Lines of the files that have more than MOST_LINES."""
    lines = {str(path): len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    return {path: count for path, count in lines.items() if count > MOST_LINES}


def long_functions() -> dict[str, int]:
    """Lines of the functions that have more than MOST_FUNCTION, the longest of a name in a file."""
    found: dict[str, int] = {}
    for path in FILES:
        for name, count in functions((PACKAGE / path).read_text(encoding="utf-8")):
            if count > MOST_FUNCTION:
                found[f"{path}: {name}"] = max(count, found.get(f"{path}: {name}", 0))
    return found


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def room(path: Path) -> str:
    """Its folder, of host/ the one below that."""
    folders = path.parts[:-1]
    return "/".join(folders[: 2 if folders[:1] == ("host",) else 1]) or "."


def main() -> int:
    """Print it all."""
    lines, files = Counter[str](), Counter[str]()
    for path in FILES:
        lines[room(path)] += len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
        files[room(path)] += 1
    print(f"{'room':<16}{'files':>6}{'lines':>8}")
    for name in sorted(files):
        print(f"{name:<16}{files[name]:>6}{lines[name]:>8}")
    print(f"\ncircles of imports: {len(circles(graph()))}")
    for title, found, reasons in (
        (f"files over {MOST_LINES} lines", long_files(), LONG_FILES),
        (f"functions over {MOST_FUNCTION} lines", long_functions(), LONG_FUNCTIONS),
    ):
        print(f"\n{title}: {len(found)}")
        for name, count in sorted(found.items()):
            print(f"{name:<48}{count:>5}  {reasons.get(name, 'NO REASON')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
