"""Our Triton kernels compiled for a server before it launches them: `python -m sglang_llada.kernels`.

Triton compiles a kernel when it is first launched with arguments of a kind, which takes seconds, and keeps it on disk.
This process goes through the launches of a server with tensors of which nothing but shapes exists and a driver that
only says for what to compile, notes what each kernel would be compiled for, and compiles that, some at once. A server
finds it on disk then; what it needs before, it compiles for itself. No device is touched, so that it may run beside a
server's loading of weights, or where there is none.

Standard input is JSON: `card` (card.Card), and `launches`, a list of pairs of a name in LAUNCHES and its keywords.
Printed is what was done, in a line.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from sglang_llada import card as cards
from sglang_llada.card import Card
from sglang_llada.decode import select_triton
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.decide import decide as decide_step
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import layout_of
from sglang_llada.decode.sampling import warm_up
from sglang_llada.llada2 import attention_triton, rotary_triton, router_triton

DEVICE = torch.device("cuda", 0)
MANY = 1 << 15  # positions: more than any limit of few
MOST_THREADS = 8  # the most kernels that are compiled at once
KINDNESS = 10  # to what else runs, as nice(1) counts
DIES_WITH_PARENT = 1  # prctl(2): PR_SET_PDEATHSIG


# Launches. Sizes that kernels are not compiled for (positions, rows, places) are the fewest that will do.


def attend(*, block_size: int, heads: int, kv_heads: int, width: int, dtype: str, kv_dtype: str) -> None:
    """Attention, whole and split."""
    q = empty(block_size, heads, width, dtype=dtype)
    keys, values = (empty(block_size, kv_heads, width, dtype=kv_dtype) for _ in range(2))
    settings = attention_triton.settings_for(q.element_size(), cards.card_of(DEVICE).capability)
    for splits in (1, 2):
        attention_triton.attend(
            q,
            keys,
            values,
            empty(1, block_size, dtype="int32"),
            empty(1, dtype="int64"),
            empty(1, dtype="int64"),
            on=attention_triton.Device.make(settings, splits * kv_heads * block_size, width, DEVICE),
            block=block_size,
            scale=1.0,
            splits=splits,
        )


def rotate(*, heads: int, kv_heads: int, width: int, rotated: int, dtype: str) -> None:
    """Norms, rotation and the write of KV."""
    places, norm = empty(1, dtype="int64"), empty(width, dtype=dtype)
    k_pool, v_pool = (empty(1, kv_heads, width, dtype=dtype) for _ in range(2))
    qkv, angles = empty(1, (heads + 2 * kv_heads) * width, dtype=dtype), empty(1, rotated, dtype="float32")
    rotary_triton.rotate_and_store(qkv, places, norm, norm, angles, 1e-6, k_pool, v_pool, places)


def route(
    *, experts: int, parts: int, groups: int, top_groups: int, top_k: int, normalise: bool, shared: float
) -> None:
    """Routing by token."""
    by_part, bias = empty(1, parts * experts, dtype="float32"), empty(experts, dtype="float32")
    router_triton.route(by_part, bias, groups, top_groups, top_k, normalise, 1.0, shared)


def route_blocks(*, experts: int, block_size: int, capacity: int, top_k: int, normalise: bool) -> None:
    """Routing by block."""
    logits, bias = empty(block_size, experts, dtype="float32"), empty(experts, dtype="float32")
    router_triton.route_blocks(logits, bias, block_size, capacity, top_k, normalise)


def decide(
    *,
    block_size: int,
    tokens: list[int],
    width: int,
    rows: int,
    vocabulary: int,
    ranks: int,
    invariant: bool,
    dtype: str,
) -> None:
    """What selects, draws and decides: for few positions, for many, and of logits that are there already.

    tokens: contract.Tokens. rows, ranks: of the head on this rank, and how many share it.
    """
    its = Tokens(*tokens)
    record = layout_of(block_size, its).record
    head = Head(empty(rows, width, dtype=dtype), slots=rows, vocabulary=vocabulary, invariant=invariant)
    for most in select_triton.forms_for(head.weight.element_size(), cards.card_of(DEVICE)):
        count = min(most, MANY)
        blocks = triton.cdiv(count, block_size)
        decide_step(
            empty(blocks * block_size, width, dtype=dtype),
            empty(blocks * block_size, dtype="int64"),
            empty(blocks, record.stop - record.start, dtype="int64"),
            count,
            head=head,
            block_size=block_size,
            tokens=its,
            exchange=None if ranks == 1 else lambda mine: [mine] * ranks,
            drawing=count,
        )
    warm_up(vocabulary, its.mask, DEVICE)


LAUNCHES: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (attend, rotate, route, route_blocks, decide)
}


def empty(*shape: int, dtype: str) -> Tensor:
    """A tensor of the device, of a dtype by its name in torch."""
    return torch.empty(*shape, dtype=getattr(torch, dtype), device=DEVICE)


# Without a device.


class Target(DriverBase):  # type: ignore[misc]  # Triton has no types
    """Triton's driver of a card that is not there, as far as compiling asks for one."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        major, minor = card.capability
        self.target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Asked for by who launches."""
        raise NotImplementedError

    get_active_torch_device = get_benchmarker = map_python_to_cpp_type


class Shapes(FakeTensorMode):
    """Tensors of a device that is not touched."""

    avoid_device_init = True


class Bodies(TorchDispatchMode):
    """Our operators do what they do on a device, instead of telling shapes only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "sglang_llada":
            return func(*args, **(kwargs or {}))
        with self:
            return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))


Kernels = dict[tuple[str, str], Any]  # by name and what they are compiled for, as Triton writes it down


def kernels_of(launches: Iterable[tuple[str, dict[str, Any]]]) -> Kernels:
    """What the launches would compile."""
    found: Kernels = {}
    bodies: Any = Bodies
    with triton.knobs.runtime.scope(), Shapes(), bodies(), warnings.catch_warnings():
        triton.knobs.runtime.jit_cache_hook = noting(found)
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # which is 0
        for name, keywords in launches:
            LAUNCHES[name](**keywords)
    return found


def noting(found: Kernels) -> Callable[..., bool]:
    """A hook of Triton's, which then neither compiles nor launches a kernel that it would have to compile."""

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[f"{fn.module}.{fn.name}", compile["specialization_data"]] = fn.jit_function
        return True

    return note


def main() -> int:
    """Compile what standard input says."""
    end_with_parent()
    os.nice(KINDNESS)
    begin, asked = time.monotonic(), json.load(sys.stdin)
    capability, multiprocessors = asked["card"]
    card = cards.known[DEVICE] = Card(tuple(capability), multiprocessors)
    triton.runtime.driver.set_active(Target(card))
    kernels = kernels_of(asked["launches"])
    compiled: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(kernel.preload, data) for (_, data), kernel in kernels.items()]
        for task in tasks:
            task.result()
    seconds = time.monotonic() - begin
    print(f"{len(kernels)} kernels, {sum(compiled)} of them compiled, the others on disk already; {seconds:.1f} s")
    return 0


def end_with_parent() -> None:
    """Nobody waits for this once who has asked is gone."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main())
