"""Products whose rows do not depend, to the last bit, on the rows beside them: deterministic inference on the CPU.

How a matrix library sums up a product follows from its number of rows. Here each product is made of products of TILE
rows, the last one padded, whose results do not depend on where a row stands in them. The host overrides the same
operator of torch on a GPU, with kernels of Triton; for a CPU it has nothing and ends with an error.

All else that a forward does on the CPU goes row by row anyway: norms, softmax, attention of a row, sums over experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

TARGET = "sglang.srt.batch_invariant_ops.batch_invariant_ops.enable_batch_invariant_mode"
TILE = 32

LIBRARY: list[torch.library.Library] = []  # what enable() has overridden lasts as long as this does


def install() -> None:
    """Hook the host's function, which a model runner calls with --enable-deterministic-inference."""
    HookRegistry.register(TARGET, enable, HookType.AROUND)


def enable(original: Callable[..., None], enable_bmm: bool = True) -> None:
    """In place of the host's: from now on, in this process, torch.mm on the CPU is mm()."""
    if not LIBRARY:
        LIBRARY.append(torch.library.Library("aten", "IMPL"))
        LIBRARY[0].impl("mm", mm, "CPU", allow_override=True)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of [N, K] and [K, M], TILE rows at a time."""
    rows = a.shape[0]
    padded = F.pad(a, (0, 0, 0, -rows % TILE))
    out = a.new_empty(padded.shape[0], b.shape[1])
    for tile, part in zip(padded.split(TILE), out.split(TILE), strict=True):
        torch.mm(tile, b, out=part)  # another operator to torch, which is as it was
    return out[:rows]
