"""Time of drawing tokens on a GPU, and of the logits that they are drawn from: `python -m bench.sampling`.

Positions of a published vocabulary and hidden size in bf16. `kernel` draws as requests on a GPU do, `sorted` as the
definition in torch does; `all tokens` cuts nothing, `cut` by top-k, top-p and min-p. Logits as they are made for
sampled positions, and from a head that is converted to fp32 first. One line per number of positions and part, then one
JSON record. How many of the two ways' tokens are equal is said beside them: rounding may decide a few.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.records import new_record
from sglang_llada.decode.contract import Draws
from sglang_llada.decode.head import Head
from sglang_llada.decode.sampling import draw, draw_sorted
from sglang_llada.decode.whole import whole_logits

V, H, MASK = 157_184, 2048, 156_895  # of LLaDA2.0-mini
CUTS = {"all tokens": (1 << 30, 1.0, 0.0), "top-p 0.9": (1 << 30, 0.9, 0.0), "cut": (1000, 0.9, 0.01)}
Draw = Callable[[Tensor, int, Draws], tuple[Tensor, Tensor]]
WAYS: dict[str, Draw] = {"kernel": draw, "sorted": draw_sorted}


def main(argv: list[str] | None = None) -> int:
    """Print the table and the record; 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 128, 256])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("sampling: torch.cuda sees no accelerator, and the kernel needs one", file=sys.stderr)
        return 2
    out: dict[str, Any] = {**new_record(), "workload": {"vocabulary": V, "hidden": H, "repeats": args.repeats}}
    out["summary"] = [measure(positions, args.repeats) for positions in args.positions]
    print(json.dumps(out))
    return 0


@torch.inference_mode()
def measure(positions: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each part for so many positions, and the share of equal tokens."""
    torch.manual_seed(positions)
    hidden = torch.randn(positions, H, dtype=torch.bfloat16, device="cuda")
    head = Head(torch.randn(V, H, dtype=torch.bfloat16, device="cuda") / H**0.5)
    found: dict[str, Any] = {"positions": positions}
    heads: dict[str, Callable[[Tensor], object]] = {
        "bf16 head": lambda x: whole_logits(x, head, None),
        "fp32 head": lambda x: x.float() @ head.weight.float().T,
    }
    for name, run in heads.items():
        found[name] = milliseconds(run, hidden, repeats)
        print(f"{positions:4} positions  logits, {name}: {median(found[name]):.3f} ms", flush=True)
    logits = whole_logits(hidden, head, None)
    for cut, numbers in CUTS.items():
        how = draws(positions, *numbers)
        kernel, by_sorting = (way(logits.clone(), MASK, how)[0] for way in WAYS.values())
        equal = found[f"{cut}, equal"] = (kernel == by_sorting).double().mean().item()
        for name, way in WAYS.items():
            found[f"{cut}, {name}"] = milliseconds(partial(way, mask_id=MASK, draws=how), logits, repeats)
        shown = ", ".join(f"{name} {median(found[f'{cut}, {name}']):.3f} ms" for name in WAYS)
        print(f"{positions:4} positions  {cut}: {shown}; {equal:.1%} of tokens equal", flush=True)
    return found


def draws(positions: int, top_k: int, top_p: float, min_p: float) -> Draws:
    """The same draw at all positions, each with its own noise."""
    like = torch.ones(positions, device="cuda")
    noise = torch.rand(positions, dtype=torch.float64, device="cuda")
    whole = positions if (top_k >= V, top_p, min_p) == (True, 1, 0) else 0
    return Draws(like, (like * top_k).long(), like * top_p, like * min_p, noise, whole)


def milliseconds(run: Callable[[Tensor], object], x: Tensor, repeats: int) -> list[float]:
    """Times of runs on the device, each with a copy of x that it may spoil, after three to warm up."""
    found = []
    for _ in range(repeats + 3):
        mine = x.clone()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(mine)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found[3:]


if __name__ == "__main__":
    sys.exit(main())
