"""What parallelism that is refused would bring, on paper: `python -m bench.alternatives`.

With the model of bench.roofline, on H100s, at 2,048 tokens of context: milliseconds in which each of so many requests
has one decode step. Pipeline parallelism beside the same GPUs as one server and as two; two-batch overlap at its best,
which hides every collective; prompts in steps, which disaggregation would keep out; a further row of a request, which
is what a guess of the block behind would cost. One table each, then one JSON record.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from bench.records import new_record
from bench.roofline import DEVICES, MODELS, Device, Model, forward

CONTEXT = 2048
NODE = DEVICES["H100"]
NETWORK = 5e10  # bytes a second of a GPU in one direction, to those of another node
REQUESTS = (1, 8, 32, 128)
FILLS = 64  # FILL rows of a step that is full of prompts beside decode rows: a quarter of 8,192 tokens


def ms(model: Model, tp: int, rows: float, device: Device = NODE) -> float:
    """Milliseconds of a forward."""
    return 1e3 * sum(forward(model, device, tp, rows, CONTEXT, whole=False).values())


def pipeline(requests: int) -> dict[str, float]:
    """Flash on two nodes of eight; two stages work on two halves of the requests in turn."""
    flash = MODELS["flash"]
    stage = replace(flash, layers=flash.layers // 2)
    half = max(requests / 2, 1)
    return {
        "--tp-size 8 on one": ms(flash, 8, requests),
        "--tp-size 16": ms(flash, 16, requests, replace(NODE, link=NETWORK)),
        "two stages of 8": 2 * ms(stage, 8, half),
        "two servers of 8": ms(flash, 8, half),
    }


def overlap(requests: int) -> dict[str, float]:
    """Flash on eight: the halves of a step take turns, and each one's collectives run beside the other's layers."""
    flash = MODELS["flash"]
    parts = forward(flash, NODE, 8, requests / 2, CONTEXT, whole=False)
    exchange = parts.pop("collectives")
    return {"as it is": ms(flash, 8, requests), "two halves": 2e3 * max(sum(parts.values()), exchange)}


def prompts(requests: int) -> dict[str, float]:
    """Mini on one: steps with and without FILL rows."""
    mini = MODELS["mini"]
    return {"decode rows": ms(mini, 1, requests), f"and {FILLS} FILL rows": ms(mini, 1, requests + FILLS)}


def guesses(requests: int) -> dict[str, float]:
    """Mini on one: a row for each request, and two."""
    mini = MODELS["mini"]
    return {"one row each": ms(mini, 1, requests), "two rows each": ms(mini, 1, 2 * requests)}


TABLES = {
    "pipeline parallelism: flash": pipeline,
    "two-batch overlap: flash on 8": overlap,
    "disaggregation: mini": prompts,
    "speculation: mini": guesses,
}


def main() -> None:
    """Print the tables and the record."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    out: dict[str, Any] = new_record()
    for what, of in TABLES.items():
        print(what)
        out[what] = {requests: of(requests) for requests in REQUESTS}
        for requests, row in out[what].items():
            print(f"  {requests:4} requests: " + ", ".join(f"{how} {took:.1f}" for how, took in row.items()))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
