"""Adapters (LoRA) on our CPU platform: the host's pool and layers, with products by torch.

The host's layers hand their input to a backend; its own ones run kernels of a GPU, or pin memory. This one adds to a
layer's output, for each adapter of a batch, what it makes of the rows that have it. Routed experts have a layer of
their own here, as they have without adapters (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
from sglang.srt.lora.utils import get_batch_token_counts
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sglang_llada.host.backends import CPU_ADAPTERS
from sglang_llada.host.cpu.experts import experts_forward


def register() -> None:
    """Make `--lora-backend llada_rows` resolve."""
    register_lora_backend(CPU_ADAPTERS)(lambda: CpuAdapters)


class Unpinned(TorchFunctionMode):
    """While it is entered, no memory is pinned: the host's layers do so whatever the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return args[0] if func is Tensor.pin_memory else func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Share:
    """Those tokens of a batch that have one adapter.

    Attributes:
        slot: where the pool holds it.
        rank, scaling: as it has them.
        tokens: int64 [n], where they stand in the batch.
    """

    slot: int
    rank: int
    scaling: float
    tokens: Tensor


@dataclass(slots=True)
class Batch:
    """A batch's adapters; the flags are written by the host's manager."""

    shares: list[Share]
    has_active_lora: bool = False
    is_prefill: bool = False


class CpuAdapters(BaseLoRABackend):
    """The host's backend of adapters, by torch; see the module."""

    name = CPU_ADAPTERS

    def __init__(self, max_loras_per_batch: int, device: torch.device, **kwargs: Any) -> None:
        super().__init__(max_loras_per_batch, device)

    def prepare_lora_batch(
        self, forward_batch: Any, weight_indices: list[int], lora_ranks: list[int], scalings: list[float], *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Note which tokens have which adapter.

        Args:
            weight_indices: the slot of each row, all of which have as many tokens.
            lora_ranks, scalings: of each slot; a rank of 0 is no adapter.
        """
        count, _ = get_batch_token_counts(forward_batch)
        slots = torch.tensor(weight_indices).repeat_interleave(count // max(len(weight_indices), 1))
        shares = [
            Share(slot, lora_ranks[slot], scalings[slot], (slots == slot).nonzero().flatten())
            for slot in sorted(set(weight_indices))
            if lora_ranks[slot]
        ]
        self.batch_info: Any = Batch(shares)

    def forward_with_base(
        self, layer: Any, x: Tensor, base_fn: Callable[[], Tensor], lora_a: Tensor, lora_b: Tensor, output_offset: Any,
        offsets: tuple[int, ...], *, all_reduce: Callable[[Tensor], Tensor] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """A linear layer's output for x [N, in], of its own and of the adapters of its rows.

        Args:
            lora_a: [slots, matrices x r, in], of the matrices that the layer fuses, from the first row on.
            lora_b: [slots, out, r].
            offsets: where in `out` each of those matrices begins, and the last ends.
            all_reduce: sums over ranks, if that is not left to the caller.
        """
        out = base_fn()
        for share in self.batch_info.shares:
            matrices = len(offsets) - 1
            inner = F.linear(x[share.tokens], lora_a[share.slot, : matrices * share.rank]) * share.scaling
            b = lora_b[share.slot, :, : share.rank].split([end - begin for begin, end in pairwise(offsets)])
            parts = [F.linear(part, matrix) for part, matrix in zip(inner.chunk(matrices, -1), b, strict=True)]
            out[share.tokens] += torch.cat(parts, -1)
        return out if all_reduce is None else all_reduce(out)


class ExpertsWithAdapters(FusedMoEWithLoRA):
    """The host's layer of routed experts with adapters, of which the pool knows how to fill it, run by torch."""

    def __init__(self, base_layer: Any, lora_backend: CpuAdapters) -> None:
        """Without what the host's makes ready for a GPU."""
        BaseLayerWithLoRA.__init__(self, base_layer, lora_backend)
        self.tp_size, self.tp_rank = base_layer.moe_tp_size, base_layer.moe_tp_rank
        self.intermediate_size_per_partition = base_layer.intermediate_size_per_partition
        self._uses_interleaved_gate_up = False

    def forward(self, hidden_states: Tensor, topk_output: Any, **kwargs: Any) -> Tensor:
        """As the layer without adapters, with theirs added to both products of each expert."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        base = self.base_layer
        sent = base.dispatcher.dispatch(hidden_states=hidden_states, topk_output=topk_output)
        layer = getattr(base, "wide", base)  # the host's layer, where it is quantised what it stands for
        added = AddedToExperts(self, self.lora_backend.batch_info.shares)
        out = experts_forward(layer, sent.hidden_states, sent.topk_output, base.moe_runner_config, added)
        result: Tensor = base.dispatcher.combine(combine_input=StandardCombineInput(hidden_states=out))
        return result


@dataclass(frozen=True, slots=True)
class AddedToExperts:
    """What a batch's adapters add to the experts of one layer, which pads them to the largest rank, R, with zeros.

    `layer` has gate_up_lora_a_weights [slots, E, 2 R, H], gate_up_lora_b_weights [slots, E, 2 I, R],
    down_lora_a_weights [slots, E, R, I] and down_lora_b_weights [slots, E, H, R]; the pool scales the second of a pair.
    """

    layer: Any
    shares: list[Share]

    def of(self, expert: int, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """For each adapter among tokens int64 [n]: where in them it is, and the expert's matrices."""
        gate_up = self.layer.gate_up_lora_a_weights, self.layer.gate_up_lora_b_weights
        down = self.layer.down_lora_a_weights, self.layer.down_lora_b_weights
        for share in self.shares:
            rows = torch.isin(tokens, share.tokens).nonzero().flatten()
            if len(rows):
                a13, b13, a2, b2 = (matrix[share.slot, expert] for matrix in (*gate_up, *down))
                yield rows, a13, b13, a2, b2
