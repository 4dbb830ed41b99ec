"""Time of drawing tokens on a GPU beside that of choosing the best ones: `python -m bench.sampling`.

Positions of a published vocabulary and hidden size in bf16. `head` draws as requests do, from logits that are never
whole; `logits` as requests do that change theirs, the product included; `best` is selection of the same positions.
`all tokens` cuts nothing and is one pass over the head; `cut` is six of them where the logits are random, and fewer
where a model is sure. One line per number of positions and way, then one JSON record. How many of the two ways' tokens
are equal is said beside them: rounding may decide a few.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.records import new_record
from sglang_llada.config import Sampling
from sglang_llada.decode.contract import Draws
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import drawing
from sglang_llada.decode.noise import hashed
from sglang_llada.decode.sampling import draw, draw_whole
from sglang_llada.decode.select import select
from sglang_llada.decode.whole import whole_logits

V, H, MASK = 157_184, 2048, 156_895  # of LLaDA2.0-mini
CUTS = {"all tokens": (1 << 30, 1.0, 0.0), "top-p 0.9": (1 << 30, 0.9, 0.0), "cut": (1000, 0.9, 0.01)}


def main(argv: list[str] | None = None) -> int:
    """Print the table and the record; 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 128, 256])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("sampling: torch.cuda sees no accelerator, and the kernels need one", file=sys.stderr)
        return 2
    out: dict[str, Any] = {**new_record(), "workload": {"vocabulary": V, "hidden": H, "repeats": args.repeats}}
    out["summary"] = [measure(positions, args.repeats) for positions in args.positions]
    print(json.dumps(out))
    return 0


@torch.inference_mode()
def measure(positions: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each way for so many positions, and the share of equal tokens."""
    torch.manual_seed(positions)
    hidden = torch.randn(positions, H, dtype=torch.bfloat16, device="cuda")
    head = Head(torch.randn(V, H, dtype=torch.bfloat16, device="cuda") / H**0.5)
    found: dict[str, Any] = {"positions": positions}
    found["best"] = milliseconds(lambda: select(hidden, head, MASK), repeats)
    print(f"{positions:4} positions  best: {median(found['best']):.3f} ms", flush=True)
    for cut, numbers in CUTS.items():
        how = draws(positions, Sampling(1.0, *numbers, 0))
        spans = torch.tensor([0, 0 if bool(how.cut[0]) else positions, positions], dtype=torch.int32, device="cuda")
        ways = {
            "head": lambda how=how, spans=spans: draw(hidden, head, MASK, how, spans=spans),
            "logits": lambda how=how: draw_whole(whole_logits(hidden, head, None), MASK, how),
        }
        tokens = [way().token for way in ways.values()]
        equal = found[f"{cut}, equal"] = (tokens[0] == tokens[1]).double().mean().item()
        for name, way in ways.items():
            found[f"{cut}, {name}"] = milliseconds(way, repeats)
        shown = ", ".join(f"{name} {median(found[f'{cut}, {name}']):.3f} ms" for name in ways)
        print(f"{positions:4} positions  {cut}: {shown}; {equal:.1%} of tokens equal", flush=True)
    return found


def draws(positions: int, how: Sampling) -> Draws:
    """The same way to draw at all positions, each with its own noise."""
    bits = torch.tensor([drawing(how)[1:]] * positions, device="cuda")
    at = torch.arange(positions, device="cuda")
    return Draws(hashed(at * 0, at, at * 0), *bits.view(torch.float64).float().T.contiguous())


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Times of runs on the device, after three to warm up."""
    found = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found[3:]


if __name__ == "__main__":
    sys.exit(main())
