"""What a step should take on GPUs that this project has not run on: `python -m bench.roofline`.

A model on paper: of each part of a forward the larger of its memory traffic and its arithmetic at the shares of the
peaks below, plus collectives, kernels too small to matter otherwise, and host time. It is fed with the tokens per
forward that were published and the host times that were measured (ours by `python -m bench.step`), is compared with the
published speeds, and says which part dominates where and what each difference from the host's own code should be worth.
One number is fitted, to the published speed of one request: DISTINCT. Last, what was measured of a step on one H200
(bench/results/gpu-h200.txt) is split over ranks: collectives and their bytes are counted, as tests/host/
test_collectives.py counts them of two real ranks, and what all ranks do alike stays. One table each, then one JSON
record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.records import new_record

T = 32
BYTES = 2  # bf16
MEMORY_SHARE, ARITHMETIC_SHARE = 0.75, 0.5  # of the peaks, as good kernels reach them
KERNELS, KERNEL_SECONDS = 14, 2.0e-6  # of a layer in a CUDA graph, and the least that one takes
COLLECTIVE_SECONDS = 9e-6  # the least that an all-reduce takes
# Of a block's positions, as many as choose experts on their own: open ones look alike to the router.
DISTINCT = 14
SOFTMAX_PASSES = 5  # over fp32 logits, where whole logits are made: written, cast, maximum, sum, best


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks per second: bytes of memory, bf16 operations, bytes to the other devices in one direction."""

    memory: float
    arithmetic: float
    link: float


DEVICES = {
    "H100": Device(3.35e12, 0.99e15, 4.5e11),
    "H200": Device(4.8e12, 0.99e15, 4.5e11),
    "B200": Device(8.0e12, 2.25e15, 9.0e11),
    "GH200": Device(4.0e12, 0.99e15, 4.5e11),
    "H20": Device(4.0e12, 0.148e15, 4.5e11),
}


@dataclass(frozen=True, slots=True)
class Model:
    """Shapes; layer 0 is dense."""

    layers: int
    hidden: int
    heads: int
    dense: int
    moe: int
    kv_heads: int = 4
    head: int = 128
    experts: int = 256
    chosen: int = 8
    vocabulary: int = 157_184


MODELS = {
    "mini": Model(layers=20, hidden=2048, heads=16, dense=5120, moe=512),
    "flash": Model(layers=32, hidden=4096, heads=32, dense=9216, moe=1024),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """How steps are made.

    Attributes:
        host: seconds between forwards that the device waits, and of these for each row.
        seals: forwards per block beside its decode steps, for the final KV.
        whole_logits: whether logits of all positions are made and gone over.
        row_seconds: what a decode step takes for each row, where it loops over them.
        fills: blocks of a prompt that one forward may write.
    """

    host: float
    host_row: float
    seals: float
    whole_logits: bool
    row_seconds: float
    fills: int


OURS = Engine(host=80e-6, host_row=6e-6, seals=0, whole_logits=False, row_seconds=0, fills=128)
# 2.1 ms at 16 requests and 2.9 ms at 32, measured on a CPU; its editing steps loop over rows.
STOCK = Engine(host=1.3e-3, host_row=50e-6, seals=1, whole_logits=True, row_seconds=0, fills=1)
EDITING = replace(STOCK, row_seconds=0.4e-3)
CHANGES = {
    "no forward of its own for the final KV": {"seals": 0},
    "no whole logits": {"whole_logits": False},
    "host time": {"host": OURS.host, "host_row": OURS.host_row},
    "all blocks of a prompt in one forward": {"fills": OURS.fills},
}
PUBLISHED = [  # what, model, device, tensor parallel, requests, tokens per forward, prompt, answer, engine, tokens/s
    ("2.1-mini S, GH200, one request", "mini", "GH200", 1, 1, 5.34, 512, 512, EDITING, 614),
    ("2.1-mini S, GH200, 16 requests", "mini", "GH200", 1, 16, 5.34, 512, 512, EDITING, 1904),
    ("2.1-mini S, average, device not stated", "mini", "H200", 1, 1, 5.34, 512, 512, EDITING, 1002.7),
    ("2.0-flash, device not stated", "flash", "H200", 4, 1, 3.08, 512, 512, STOCK, 383),
    ("2.1-flash S, device not stated", "flash", "H200", 4, 1, 5.93, 512, 512, EDITING, 575.6),
    ("in-tree, H20, 4K in, 1.5K out, 128 requests", "mini", "H20", 1, 128, 2.55, 4096, 1536, STOCK, 1024),
]


@dataclass(frozen=True, slots=True)
class Collective:
    """What ranks exchange in a step: `count` times `size` bytes, which each rank has or gives. reduces: or gathers."""

    what: str
    count: int
    size: int
    reduces: bool = True

    def moved(self, ranks: int) -> float:
        """Bytes that each rank sends, all times together."""
        share = 2 * (ranks - 1) / ranks if self.reduces else ranks - 1
        return self.count * self.size * share

    def seconds(self, ranks: int, link: float) -> float:
        """All times together."""
        return self.count * COLLECTIVE_SECONDS + self.moved(ranks) / link


def collectives(
    layers: int, hidden: int, tokens: int, positions: int, element: int = BYTES, candidates: int = 1
) -> list[Collective]:
    """Those of a step with --tp-size, whether experts are split (by it) or distributed (--ep-size).

    Hidden states of all tokens are summed up after the embedding and twice a layer; of the positions that selection
    looks at, in a graph all, each rank gives its record.
    """
    return [
        Collective("embedding", 1, tokens * hidden * element),
        Collective("layers", 2 * layers, tokens * hidden * element),
        Collective("selection", 1, positions * 8 * (candidates + 1), reduces=False),
    ]


@dataclass(frozen=True, slots=True)
class Part:
    """Of a step on one H200, mini's shape: milliseconds at 1 and 32 rows.

    split: whether ranks share it. grows: what it is proportional to, of a model.
    """

    one: float
    many: float
    split: bool
    grows: Callable[[Model], float]


# bench/results/gpu-h200.txt, from the profile. Idle and small kernels are what is left of the wall there.
MEASURED = {
    "experts": Part(3.62, 8.73, True, lambda m: (m.layers - 1) * m.hidden * m.moe),
    "activation of experts": Part(0.47, 0.21, True, lambda m: (m.layers - 1) * m.moe),
    "attention": Part(0.26, 0.34, True, lambda m: m.layers * m.heads),
    "products": Part(0.24, 0.93, True, lambda m: m.layers * m.hidden * (2 * m.heads + 2 * m.kv_heads) * m.head),
    "selection": Part(0.16, 0.73, True, lambda m: m.hidden),
    "routing": Part(0.23, 0.32, False, lambda m: (m.layers - 1) * m.hidden),
    "norms": Part(0.10, 0.24, False, lambda m: m.layers * m.hidden),
    "the rest and idle": Part(0.0, 0.67, False, lambda m: m.layers),
}


def split_step(model: Model, rows: int, ranks: int) -> dict[str, float]:
    """Milliseconds of the parts of a step of 1 or 32 rows, on H200s."""
    mini = MODELS["mini"]
    parts = {}
    for name, part in MEASURED.items():
        here = (part.one if rows == 1 else part.many) * part.grows(model) / part.grows(mini)
        parts[name] = here / ranks if part.split else here
    if ranks > 1:
        link = DEVICES["H200"].link
        exchanged = collectives(model.layers, model.hidden, rows * T, rows * T)
        parts["collectives"] = 1e3 * sum(each.seconds(ranks, link) for each in exchanged)
    return parts


def forward(model: Model, device: Device, tp: int, rows: float, context: float, *, whole: bool) -> dict[str, float]:
    """Seconds of the parts of a forward of so many rows (on average), each with so much context."""
    tokens, H = rows * T, model.hidden
    sparse = model.layers - 1
    attention = model.layers * H * model.head * (2 * model.heads + 2 * model.kv_heads)
    dense = 3 * H * (model.dense + sparse * model.moe)  # the shared experts too
    expert = 3 * H * model.moe
    touched = sparse * model.experts * (1 - (1 - model.chosen / model.experts) ** (DISTINCT * rows))
    kv = 2 * model.layers * model.kv_heads * model.head * context * rows
    logits = tokens * model.vocabulary * 4 * SOFTMAX_PASSES if whole else 0
    parts = {  # bytes, operations
        "dense weights": (BYTES * (attention + dense), 2 * tokens * (attention + dense)),
        "experts": (BYTES * touched * expert, 2 * tokens * sparse * model.chosen * expert),
        "KV": (BYTES * kv, 4 * tokens * context * model.layers * model.heads * model.head),
        "head": (BYTES * model.vocabulary * H + logits, 2 * tokens * model.vocabulary * H),
    }
    seconds = {
        name: max(size / device.memory / MEMORY_SHARE, work / device.arithmetic / ARITHMETIC_SHARE) / tp
        for name, (size, work) in parts.items()
    }
    if tp > 1:
        if whole:
            seconds["head"] += tokens * model.vocabulary * BYTES * (tp - 1) / tp / device.link  # gathered logits
        exchanged = collectives(model.layers, H, round(tokens), round(tokens))
        seconds["collectives"] = sum(each.seconds(tp, device.link) for each in exchanged)
    seconds["small kernels"] = model.layers * KERNELS * KERNEL_SECONDS
    return seconds


def step(
    model: Model, device: Device, tp: int, requests: int, context: float, engine: Engine, per_block: float
) -> dict[str, float]:
    """Seconds of an average decode step with host time; `per_block` steps decide a block, and seals ride with one."""
    rows = requests * (1 if engine.seals else 1 + 1 / per_block)
    parts = forward(model, device, tp, rows, context, whole=engine.whole_logits)
    parts["host"] = engine.host + engine.host_row * requests
    if engine.row_seconds:
        parts["loop over rows"] = engine.row_seconds * requests
    return parts


def speed(
    model: Model,
    device: Device,
    tp: int,
    requests: int,
    per_forward: float,
    prompt: int,
    answer: int,
    engine: Engine,
) -> float:
    """Tokens a second of requests that run together from prompt to end."""
    per_block = T / per_forward
    decode = step(model, device, tp, requests, prompt + answer / 2, engine, per_block)
    blocks = answer / T
    seconds = blocks * (per_block + engine.seals) * sum(decode.values())
    fills = prompt / T  # of each request; the host's prompts wait for one another's blocks, side by side
    rows = max(engine.fills, requests)
    forwards = fills * requests / rows
    if engine.fills > 1:  # whole steps carry them, and only rows beyond a step's own count
        alone = forward(model, device, tp, requests, prompt / 2, whole=False)
        beside = forward(model, device, tp, requests + rows, prompt / 2, whole=False)
        seconds += forwards * (sum(beside.values()) - sum(alone.values()))
    else:
        fill = forward(model, device, tp, rows, prompt / 2, whole=engine.whole_logits)
        seconds += forwards * (sum(fill.values()) + engine.host + engine.host_row * rows)
    return requests * answer / seconds


def main() -> None:
    """Print the tables and the record."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    out: dict[str, Any] = {**new_record(), "published": [], "steps": [], "changes": [], "split": []}
    print("against what was published, tokens/s")
    for what, name, device, tp, requests, per_forward, prompt, answer, engine, said in PUBLISHED:
        got = speed(MODELS[name], DEVICES[device], tp, requests, per_forward, prompt, answer, engine)
        out["published"].append({"what": what, "model": got, "published": said})
        print(f"  {what:<46} model {got:7.0f}  published {said:7.0f}  ratio {got / said:.2f}")
    print("\na decode step at 2,048 tokens of context: milliseconds, and the parts above 5 %")
    for name, tps in (("mini", (1,)), ("flash", (4, 8))):
        per_forward = 2.55 if name == "mini" else 3.08
        for device in ("H100", "H200", "B200"):
            for tp in tps:
                for requests in (1, 8, 32, 128):
                    for label, engine in (("ours", OURS), ("host", STOCK)):
                        args = (MODELS[name], DEVICES[device], tp, requests)
                        parts = step(*args, 2048, engine, T / per_forward)
                        total = sum(parts.values())
                        tokens = speed(*args, per_forward, 1024, 512, engine)
                        out["steps"].append(
                            {"model": name, "device": device, "tp": tp, "requests": requests, "engine": label}
                            | {"seconds": parts, "tokens/s": tokens}
                        )
                        big = sorted(((s / total, p) for p, s in parts.items() if s > 0.05 * total), reverse=True)
                        told = ", ".join(f"{part} {100 * share:.0f} %" for share, part in big)
                        print(
                            f"  {name:<5} {device} TP{tp} {requests:4} requests, {label}: {1e3 * total:6.2f} ms,"
                            f" {tokens:7.0f} tokens/s; {told}"
                        )
    print("\nwhat each change to the host's own code is worth on an H100, tokens/s (prompt 1,024, answer 512)")
    for name, tp, per_forward in (("mini", 1, 2.55), ("flash", 4, 3.08)):
        for requests in (1, 8, 32):
            rest = (MODELS[name], DEVICES["H100"], tp, requests, per_forward, 1024, 512)
            base = speed(*rest, STOCK)
            gains = {what: speed(*rest, replace(STOCK, **change)) / base for what, change in CHANGES.items()}
            gains["all"] = speed(*rest, OURS) / base
            out["changes"].append({"model": name, "tp": tp, "requests": requests, "gains": gains})
            told = "; ".join(f"{what} {gain:.2f}" for what, gain in gains.items())
            print(f"  {name} TP{tp}, {requests} requests ({base:.0f}): {told}")
    print("\na step of so many rows split over H200s, from what one was measured to take: milliseconds, largest parts")
    for name, model in MODELS.items():
        for rows in (1, 32):
            for ranks in (1, 2, 4, 8):
                parts = split_step(model, rows, ranks)
                exchanged = collectives(model.layers, model.hidden, rows * T, rows * T)
                count = sum(each.count for each in exchanged) if ranks > 1 else 0
                moved = sum(each.moved(ranks) for each in exchanged)
                row = {"model": name, "rows": rows, "ranks": ranks, "ms": parts, "collectives": count, "bytes": moved}
                out["split"].append(row)
                total = sum(parts.values())
                told = ", ".join(f"{part} {ms:.2f}" for part, ms in sorted(parts.items(), key=lambda p: -p[1])[:4])
                print(
                    f"  {name:<5} {rows:2} rows, {ranks} ranks: {total:6.2f} ms; {count} collectives,"
                    f" {moved / 1e6:6.1f} MB sent by each rank; {told}"
                )
    print(json.dumps(out))


if __name__ == "__main__":
    main()
