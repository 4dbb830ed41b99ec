"""Times of our kernels on one GPU, against torch and against what the card can do: `python -m bench.kernels`.

    selection: every form of the first kernel (decode/select_triton.py) for several numbers of positions, the way that
        is in use, cuBLAS for the same product alone (what no way through it can beat), and whole logits.
    decide: a step's decisions, selection included, by rows of which half the positions are open.
    routing: router logits and the choice of experts.
    heads: norms, rotation and the write of KV.

Times are medians of CUDA graphs, in which no launch is counted. Every way is first checked against torch on numbers
whose products add up without rounding, tokens and ties included. Forms that `--seconds` leaves no time for are listed.
A table, then one JSON record. Without a GPU: tiny sizes in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.records import new_record
from sglang_llada.config import DecodeConfig
from sglang_llada.decode import decide_triton, select_triton
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.decide import in_torch
from sglang_llada.decode.head import Best, Head, Lowered
from sglang_llada.decode.layout import numbers, pack, record
from sglang_llada.decode.select import best, finish, reduce
from sglang_llada.decode.select_triton import Form
from sglang_llada.llada2.rotary_triton import rotate_and_store
from sglang_llada.llada2.router import products, route, split
from sglang_llada.llada2.router_triton import route as route_by_part

UP = {"upright": True}
FORMS = (  # to choose select_triton.HOPPER from
    Form(32, 128, 64, 4, 5, 2, flat=True, **UP),
    Form(32, 128, 64, 4, 5, 2, **UP),
    Form(32, 128, 64, 4, 3, 3, flat=True, **UP),
    Form(32, 128, 128, 4, 3, 1, flat=True, **UP),
    Form(32, 256, 64, 8, 3, 2, flat=True, **UP),
    Form(32, 64, 128, 4, 4, 2, flat=True, **UP),
    Form(64, 128, 64, 4, 4, 2, flat=True, **UP),
    Form(64, 128, 64, 4, 4, 2, flat=True),
    Form(64, 256, 64, 4, 4, 1, flat=True),
    Form(128, 128, 64, 4, 3, 2, flat=True),
    Form(128, 128, 64, 4, 3, 2),
    Form(128, 128, 64, 8, 4, 1, flat=True),
    Form(128, 256, 64, 8, 4, 1, flat=True),
    Form(128, 256, 64, 8, 4, 1),
    Form(128, 256, 64, 8, 3, 1, flat=True),
    Form(256, 128, 64, 8, 4, 1, flat=True),
)
MASK, T = 3, 32
BLOCKS_PER_FORM = 8  # a form whose tile is smaller by more than this is not tried
REPEATS = 5


class Shape:
    """Sizes of the run: LLaDA2.0-mini's, or tiny ones."""

    def __init__(self, tiny: bool) -> None:
        self.vocabulary, self.hidden = (200, 32) if tiny else (157_184, 2048)
        self.positions = (20,) if tiny else (32, 64, 128, 256, 1024)
        self.rows = (2,) if tiny else (1, 8, 32, 64, 128)
        self.tokens = (5,) if tiny else (32, 256, 1024, 2048)
        self.experts, self.groups, self.top_groups, self.top_k = (16, 4, 2, 4) if tiny else (256, 8, 4, 8)
        self.heads, self.kv_heads, self.width, self.turned = (4, 2, 16, 8) if tiny else (16, 4, 128, 64)
        self.forms = (Form(16, 32, 16, 4, 2, 1, **UP), Form(32, 64, 32, 4, 2, 1, flat=True)) if tiny else FORMS


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=50.0, help="after which no further form is tried")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not select_triton.INTERPRETED:
        sys.exit("bench.kernels: torch.cuda sees no accelerator; TRITON_INTERPRET=1 tries tiny sizes on a CPU")
    shape, until = Shape(device == "cpu"), time.monotonic() + args.seconds
    card = Card(device)
    print(f"{card.name}: copies {card.bandwidth / 1e12:.2f} TB/s, products {card.flops / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for part in args.parts:
            begin = time.monotonic()
            rows += PARTS[part](shape, card, until)
            print(f"  {part}: {time.monotonic() - begin:.1f} s in all", flush=True)
    times = {f"{row['part']}/{row['size']}/{row['way']}": row["us"] for row in rows if "us" in row}
    floors = {f"{row['part']}/{row['size']}": row["floor_us"] for row in rows if "us" in row}
    wrong = [f"{row['part']}/{row['size']}/{row['way']}" for row in rows if not row.get("right", True)]
    card_says = {"name": card.name, "bandwidth": card.bandwidth, "flops": card.flops}
    record = {**new_record(), "card": card_says, "us": times, "floor_us": floors, "wrong": wrong}
    print(json.dumps(record))
    return record


class Card:
    """A device and what it can do at most: bytes copied and bf16 operations a second, as measured here."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
        size, side = (1 << 30, 8192) if device == "cuda" else (1 << 12, 32)
        bytes_ = torch.empty(2, size, dtype=torch.uint8, device=device)
        self.bandwidth = 2 * size / (1e-6 * self.us(lambda: bytes_[0].copy_(bytes_[1])))
        x = torch.randn(side, side, device=device).bfloat16()
        self.flops = 2 * side**3 / (1e-6 * self.us(lambda: x @ x))

    def us(self, call: Callable[[], object], calls: int = 1) -> float:
        """Median microseconds of a call; of several in one graph where it is short."""
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begin)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / calls)
        return median(times)

    def floor(self, read: float, operations: float = 0.0) -> float:
        """Microseconds that bytes and operations cost at least."""
        return 1e6 * max(read / self.bandwidth, operations / self.flops)


def show(part: str, size: int, way: str, us: float, floor: float, right: bool) -> dict[str, Any]:
    """One line of the table, and its row."""
    says = "" if right else "  WRONG"
    print(f"  {part:10} {size:5}  {way:<86}{us:10.1f} us  {us / floor:6.2f} x floor{says}", flush=True)
    return {"part": part, "size": size, "way": way, "us": us, "floor_us": floor, "right": right}


# --- parts --------------------------------------------------------------------------------------------------------


def selection(shape: Shape, card: Card, until: float) -> list[dict[str, Any]]:
    """Forms by number of positions."""
    exact_head, head = (Head(make(shape.vocabulary, shape.hidden, card.device)) for make in (quarters, normal))
    rows = []
    for positions in shape.positions:
        exact, hidden = (make(positions, shape.hidden, card.device) for make in (quarters, normal))
        want = finish(reduce(exact.float(), exact_head, MASK, 1))
        floor = card.floor(head.weight.nbytes, 2.0 * positions * head.weight.numel())
        line = partial(show, "selection", positions, floor=floor)

        def in_use(x: Tensor, head: Head) -> Best:
            return select_triton.select(x, head, MASK, 1, None, None)

        rows.append(line("in use", card.us(partial(in_use, hidden, head)), right=same(in_use(exact, exact_head), want)))
        chunks = head.weight.chunk(8)
        rows.append(line("product alone, cuBLAS, in 8 chunks", card.us(partial(in_chunks, hidden, chunks)), right=True))
        if positions <= 256:
            whole = card.us(lambda x=hidden: best(x @ head.weight.T, MASK))
            rows.append(line("whole logits in torch", whole, right=True))
        left_out = []
        for form in shape.forms:
            if not fits(form, positions):
                continue
            if time.monotonic() > until:
                left_out.append(form)
                continue
            run = partial(in_form, form)
            right = same(run(exact, exact_head), want)
            rows.append(line(str(form), card.us(partial(run, hidden, head)), right=right))
        for form in left_out:
            print(f"  selection  {positions:5}  no time left for {form}", flush=True)
    return rows


def fits(form: Form, positions: int) -> bool:
    """Whether a form is worth a try: its tile is not mostly empty, nor much smaller than the positions."""
    return form.positions < 2 * max(positions, 32) and positions <= BLOCKS_PER_FORM * form.positions


def in_form(form: Form, hidden: Tensor, head: Head) -> Best:
    """Selection with the first kernel in a form."""
    records = select_triton.run_slices(form, hidden, head.weight, None, None, head.first, MASK, 1)
    return Best(*select_triton.finish_records_op(records, None, len(hidden), form.positions, 1))


def in_chunks(hidden: Tensor, chunks: Sequence[Tensor]) -> None:
    """The product in fp32, in chunks, and nothing done with it."""
    for chunk in chunks:
        if hidden.is_cuda:
            torch.mm(hidden, chunk.T, out_dtype=torch.float32)
        else:
            torch.mm(hidden, chunk.T)


def decisions(shape: Shape, card: Card, _until: float) -> list[dict[str, Any]]:
    """Whole decisions by rows, half of their positions open, of two algorithms."""
    head, rows = Head(quarters(shape.vocabulary, shape.hidden, card.device)), []
    for count in shape.rows:
        positions, rng = count * T, random.Random(count)
        hidden = quarters(positions, shape.hidden, card.device)
        table = torch.tensor([a_record(rng) for _ in range(count)], device=card.device)
        ids = torch.full((positions,), MASK, device=card.device)
        arguments = (hidden, ids, table, positions, head, T)
        ours, torchs = partial(decide_triton.decide, *arguments, MASK), partial(in_torch, *arguments, Tokens(MASK))
        right = torch.equal(pack(ours()), pack(torchs()))
        floor = card.floor(head.weight.nbytes, positions * head.weight.numel())
        rows.append(show("decide", count, "kernels", card.us(lambda f=ours: pack(f())), floor, right))
        rows.append(show("decide", count, "torch around selection", card.us(lambda f=torchs: pack(f())), floor, True))
        gathered = partial(decide_triton.gather_wanted, hidden, ids, table, T, positions)
        wanted, spans, place, less, by, *_ = gathered()
        rows.append(show("decide", count, "of it gathering", card.us(gathered, 20), card.floor(hidden.nbytes), True))
        found = select_triton.select(wanted, head, MASK, 1, None, spans[:1], Lowered(less, by))
        last = partial(decide_triton.decide_rows, ids, table, place, found.token, found.prob, T)
        rows.append(
            show("decide", count, "of it the last kernel", card.us(last, 20), card.floor(3 * table.nbytes), True)
        )
    return rows


def a_record(rng: random.Random) -> list[int]:
    """Of a row that begins, of either algorithm, with half of its positions open."""
    params = DecodeConfig.defaults(T, rng.choice(["threshold", "joint_threshold"]))
    is_open = sum(1 << i for i in rng.sample(range(T), T // 2))
    is_open -= (is_open >> 63) << 64
    return record(is_open, 0, numbers(params), [0, 0])


def routing(shape: Shape, card: Card, _until: float) -> list[dict[str, Any]]:
    """Router logits, and experts chosen of them."""
    weight = torch.randn(shape.experts, shape.hidden, device=card.device) * shape.hidden**-0.5
    bias, parts, rows = torch.randn(shape.experts, device=card.device) * 0.1, split(weight), []
    how = (shape.groups, shape.top_groups, shape.top_k, True)
    for tokens in shape.tokens:
        x = normal(tokens, shape.hidden, card.device)
        line = partial(show, "routing", tokens, floor=card.floor(parts.nbytes + x.nbytes + 12 * tokens * shape.experts))
        by_part = products(x, parts)
        logits = x.float() @ weight.T
        close = bool(((by_part.unflatten(-1, (3, -1)).sum(1) - logits).abs() < 1e-4).all())
        names = dict(zip(("num_groups", "top_groups", "top_k", "normalise"), how, strict=True))
        want = route(by_part.unflatten(-1, (3, -1)).flip(1).sum(1), bias, **names)
        weights, ids = route_by_part(by_part, bias, *how, 1.0, 0.4)
        equal = (ids[:, : shape.top_k].long() == want.ids).all(-1).float().mean().item() > 0.999
        rows.append(line("logits in fp32", card.us(partial(in_fp32, x, weight), 20), right=True))
        rows.append(line("logits in three parts", card.us(partial(products, x, parts), 20), right=close))
        chosen = partial(route_by_part, by_part, bias, *how, 1.0, 0.4)
        rows.append(line("choice in one kernel", card.us(chosen, 20), right=equal))
        rows.append(line("choice in torch", card.us(partial(route, logits, bias, **names), 5), right=True))
    return rows


def in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """A router as it was."""
    return x.float() @ weight.T


def heads(shape: Shape, card: Card, _until: float) -> list[dict[str, Any]]:
    """Norms, rotation and the write of KV."""
    rows = []
    for tokens in shape.tokens:
        qkv = normal(tokens, (shape.heads + 2 * shape.kv_heads) * shape.width, card.device)
        norm = normal(2, shape.width, card.device)
        pools = normal(2 * (tokens + T), shape.kv_heads * shape.width, card.device).view(
            2, tokens + T, shape.kv_heads, shape.width
        )
        places = torch.randperm(tokens + T, device=card.device)[:tokens]
        positions = torch.arange(tokens, device=card.device)
        angles = torch.rand(tokens, shape.turned // 2, device=card.device)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        run = partial(rotate_and_store, qkv, positions, norm[0], norm[1], cos_sin, 1e-6, pools[0], pools[1], places)
        q, k = run()
        right = bool(q.isfinite().all()) and torch.equal(pools[0, places].flatten(1), k)
        floor = card.floor(2 * qkv.nbytes + k.nbytes)
        rows.append(show("heads", tokens, "one kernel", card.us(run, 20), floor, right))
    return rows


PARTS = {"selection": selection, "decide": decisions, "routing": routing, "heads": heads}


# --- numbers ------------------------------------------------------------------------------------------------------


def quarters(rows: int, width: int, device: str) -> Tensor:
    """Quarters from -1 to 1 in bf16, [rows, width]; their products add up without rounding, and ties are many."""
    generator = torch.Generator(device).manual_seed(rows)
    return torch.randint(-4, 5, (rows, width), device=device, generator=generator, dtype=torch.int8).bfloat16() / 4


def normal(rows: int, width: int, device: str) -> Tensor:
    """Normal numbers in bf16, [rows, width]; a multiplier with many bits to switch takes its time."""
    return torch.randn(rows, width, device=device, dtype=torch.bfloat16)


def same(got: Best, want: Best) -> bool:
    """Whether tokens are equal and probabilities nearly so."""
    return torch.equal(got.token, want.token) and torch.allclose(got.prob, want.prob, rtol=1e-4, atol=0)


if __name__ == "__main__":
    main()
