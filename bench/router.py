"""How often a router in three parts of bf16 chooses other experts than one in fp32: `python -m bench.router`.

Random tokens and weights of a published shape, on one thread. fp64 is the measure: what fp32 chooses and what the parts
choose are compared with what it chooses, and with each other. Sums of fp32 round in some order, so each
differs from fp64 where two experts are nearly equal; how nearly is listed for the worst. One JSON record at the end.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.records import new_record
from sglang_llada.llada2.router import first_largest, products, route, split, summed

CHUNK = 20_000


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print the counts and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=256)
    args = parser.parse_args(argv)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(args.experts, args.hidden, generator=random) * 4 / args.hidden**0.5
    bias, parts = torch.randn(args.experts, generator=random) * 0.1, split(weight)
    counts = {"fp32 against fp64": 0, "parts against fp64": 0, "parts against fp32": 0}
    gaps: list[float] = []
    for begin in range(0, args.tokens, CHUNK):
        x = torch.randn(min(CHUNK, args.tokens - begin), args.hidden, generator=random).bfloat16()
        exact = x.double() @ weight.double().T
        chosen = {
            "fp64": experts(exact, bias),
            "fp32": experts(x.float() @ weight.T, bias),
            "parts": experts(summed(products(x, parts)), bias),
        }
        for pair in counts:
            one, other = pair.split(" against ")
            differ = (chosen[one] != chosen[other]).any(-1)
            counts[pair] += int(differ.sum())
            if pair == "parts against fp32" and differ.any():
                gaps += nearest(exact[differ], bias, chosen["parts"][differ], chosen["fp32"][differ])
    for pair, count in counts.items():
        print(f"{pair}: {count} of {args.tokens} tokens have other experts")
    print("scores of experts that parts and fp32 chose differently, apart in fp64:", sorted(gaps)[::-1][:10])
    record = {**new_record(), "workload": vars(args), "other experts": counts, "largest gap": max(gaps, default=0.0)}
    print(json.dumps(record))
    return record


def experts(logits: Tensor, bias: Tensor) -> Tensor:
    """Ids of a token's experts, sorted."""
    if logits.dtype == torch.float64:
        return route_double(logits, bias).sort(-1).values
    how = partial(route, num_groups=8, top_groups=4, top_k=8, normalise=True)
    return how(logits, bias).ids.sort(-1).values


def route_double(logits: Tensor, bias: Tensor) -> Tensor:
    """As route, in fp64."""
    biased = logits.sigmoid() + bias.double()
    groups = biased.unflatten(-1, (8, -1))
    best = first_largest(groups.topk(2, dim=-1).values.sum(-1), 4)
    allowed = torch.zeros(*groups.shape[:2], dtype=torch.bool).scatter_(-1, best, True)
    return first_largest(groups.masked_fill(~allowed[..., None], float("-inf")).flatten(-2), 8)


def nearest(exact: Tensor, bias: Tensor, one: Tensor, other: Tensor) -> list[float]:
    """Of each token how far apart in fp64 the scores are of the lowest experts that only one of them chose."""
    scores = exact.sigmoid() + bias.double()
    gaps = []
    for row, a, b in zip(scores, one.tolist(), other.tolist(), strict=True):
        mine, theirs = row[list(set(a) - set(b))], row[list(set(b) - set(a))]
        gaps.append(float((mine.min() - theirs.min()).abs()))
    return gaps


if __name__ == "__main__":
    main()
