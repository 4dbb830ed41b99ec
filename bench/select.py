"""Time and memory of choosing tokens, without whole logits and with them: `python -m bench.select`.

Positions of a published vocabulary and hidden size, in fp32 on one thread or one device. `select` is ours, whose logits
are never whole, for the best token and for five candidates; `whole logits` goes the way of the host: one product, its
softmax, its largest. Both must choose the same tokens. Extra memory is what a call needs beside hidden states and
weights: on a CPU in a process of its own that returns what it frees at once, on a device by its allocator's count. One
line per number of positions and way, then one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor

from bench.memory import MIB, forget_peak, peak, resident
from bench.records import new_record
from sglang_llada.decode.head import Best, Head
from sglang_llada.decode.select import select

NO_MASK = -1  # the host's way may choose any token, so ours may too


def whole_logits(hidden: Tensor, weight: Tensor) -> Best:
    """The best token of each position, as the host finds it."""
    logits = hidden @ weight.T
    token = logits.argmax(-1, keepdim=True)
    return Best(token, logits.softmax(-1).gather(-1, token))


WAYS: dict[str, Callable[[Tensor, Tensor], Best]] = {
    "select": lambda hidden, weight: select(hidden, Head(weight), NO_MASK),
    "select, 5 candidates": lambda hidden, weight: select(hidden, Head(weight), NO_MASK, 5),
    "whole logits": whole_logits,
}


def main(argv: list[str] | None = None) -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=157_184)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    workload = {name: getattr(args, name) for name in ("vocabulary", "hidden", "positions", "device")}
    times: dict[str, dict[int, list[float]]] = {way: {} for way in WAYS}
    extra: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    weight = numbers(args.vocabulary, args.hidden, args.device)
    print(f"vocabulary {args.vocabulary}, hidden size {args.hidden}, {args.device}: median, spread, extra peak memory")
    for positions in args.positions:
        hidden = numbers(positions, args.hidden, args.device)
        check(hidden, weight)
        for way in WAYS:
            times[way][positions] = milliseconds(way, hidden, weight, args.repeats)
            extra[way][positions] = extra_bytes(way, hidden, weight) / MIB
            print(line(positions, way, times[way][positions], extra[way][positions]), flush=True)
    print(json.dumps({**new_record(), "workload": workload, "milliseconds": times, "extra_mib": extra}))


def numbers(rows: int, width: int, device: str) -> Tensor:
    """Eighths from -1 to 1, [rows, width]: their products add up without rounding, in whatever order."""
    generator = torch.Generator(device).manual_seed(rows)
    return torch.randint(-8, 9, (rows, width), dtype=torch.float32, device=device, generator=generator).div_(8)


@torch.inference_mode()
def check(hidden: Tensor, weight: Tensor) -> None:
    """Every way chooses the same tokens, with the same probabilities."""
    want = whole_logits(hidden, weight)
    for way, choose in WAYS.items():
        got = choose(hidden, weight)
        assert torch.equal(got.token[:, :1], want.token), f"{way} chooses other tokens than whole logits"
        torch.testing.assert_close(got.prob[:, :1], want.prob, rtol=1e-5, atol=0)


@torch.inference_mode()
def milliseconds(way: str, hidden: Tensor, weight: Tensor, repeats: int) -> list[float]:
    """Times of a way's calls, after one that does not count."""
    samples = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        WAYS[way](hidden, weight)
        if hidden.is_cuda:
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - begin))
    return samples[1:]


def extra_bytes(way: str, hidden: Tensor, weight: Tensor) -> int:
    """Most bytes that a call needs beside its arguments."""
    return extra_on_device(way, hidden, weight) if hidden.is_cuda else extra_in_process(way, hidden, weight)


@torch.inference_mode()
def extra_on_device(way: str, hidden: Tensor, weight: Tensor) -> int:
    """The same, on a device."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    WAYS[way](hidden, weight)
    return torch.cuda.max_memory_allocated() - before


def extra_in_process(way: str, hidden: Tensor, weight: Tensor) -> int:
    """The same, of a new process with arguments of the same shapes."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the new process: what it frees goes back to the system
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(grown, way, hidden.shape, weight.shape).result()


@torch.inference_mode()
def grown(way: str, hidden: torch.Size, weight: torch.Size) -> int:
    """By how many bytes a call on arguments of these shapes makes this process grow, for a while."""
    torch.set_num_threads(1)
    arguments = torch.full(hidden, 0.01), torch.full(weight, 0.01)
    WAYS[way](arguments[0], arguments[1][:64])  # what is loaded on first use stays, and is not counted
    before = resident(os.getpid())
    forget_peak(os.getpid())
    WAYS[way](*arguments)
    return peak(os.getpid()) - before


def line(positions: int, way: str, samples: list[float], mib: float) -> str:
    """A row of the table."""
    spread = f"({min(samples):.1f}-{max(samples):.1f})"
    return f"  {positions:5} positions  {way:<22}{median(samples):10.1f} ms {spread:<20}{mib:8.1f} MiB"


if __name__ == "__main__":
    main()
