"""From the tensors of a checkpoint to the parameters of the host's layers, however they are quantised.

The built model is asked which parameters its layers have, after each one's quantisation method made them: those are the
tensors that the checkpoint must hold, under the published names. `weight_packed` of a fused `gate_up_proj` is
`gate_proj.weight_packed` and `up_proj.weight_packed`; `w2_qweight` of stacked experts is `experts.E.down_proj.qweight`
of each. So every quantisation of the host loads, without a list of them here. Splitting and stacking are the host's own
loaders'; what they copy is watched, because some of them take the first part of what is too long.

One rule says what may be absent (`is_optional`), and one what may be left over (llada2/weights.py, `says_nothing`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_llada.llada2.weights import Ledger, as_it_is, canonical, expected

MERGED = ("gate_proj", "up_proj")  # what gate_up_proj is made of, in this order
STACKED = {"w13": (("gate_proj", "w1"), ("up_proj", "w3")), "w2": (("down_proj", "w2"),)}  # and the host's names
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

logger = logging.getLogger(__name__)

Load = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint belongs.

    Attributes:
        module: the layer that wants it.
        param: the parameter that holds it, or this rank's part of it, alone or with others.
        load: puts it there.
        optional: whether it need not come.
    """

    module: nn.Module
    param: nn.Parameter
    load: Load
    optional: bool


def load_tensors(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load a checkpoint or, once the model is loaded, a part of one.

    Raises:
        ConfigError: tensors are unknown, misshapen, doubled or, the first time, missing.
    """
    places, shapes = dict(places_of(model)), expected(model.config)
    ledger = Ledger(
        {name: shapes.get(name) if as_it_is(place.param) else None for name, place in places.items()},
        {name for name, place in places.items() if place.optional},
    )
    first, gone = model.wanted is None, (model.wanted or set()) - places.keys()
    copies = Copies()
    for name, tensor in canonical(tensors):
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue  # some tied checkpoints store the embedding twice
        if name in gone:
            ledger.wrong.append(f"{name} cannot be updated: its quantisation changed its form after it was loaded")
        elif ledger.tick(name, tensor):
            if ledger.shapes[name] is None:
                ledger.wrong += copies.of(name, tensor, places[name])
            else:
                places[name].load(tensor)
    ledger.close(complete=first)
    if first:
        model.wanted = set(places)
        report_short(copies, places)


def places_of(model: Any) -> Iterator[tuple[str, Place]]:
    """The tensors that a model wants, by their canonical names."""
    for path, module in model.named_modules():
        if isinstance(module, BaseLayerWithLoRA):  # the layer that it wraps comes next
            continue
        path = path.removesuffix(".base_layer")
        for leaf, param in module.named_parameters(recurse=False):
            loader = getattr(param, "weight_loader", None)
            if loader is None and isinstance(module, FusedMoE | LinearBase | VocabParallelEmbedding):
                continue  # made by the quantisation method for itself
            optional = is_optional(leaf, param, model.quant_config)
            for name, load in sources(path, leaf, module, partial(loader or default_weight_loader, param), model):
                yield name, Place(module, param, load, optional)


def sources(path: str, leaf: str, module: nn.Module, load: Any, model: Any) -> Iterator[tuple[str, Load]]:
    """What a parameter is made of: the checkpoint's names, and what loads each."""
    if isinstance(module, FusedMoE):
        stack, _, piece = leaf.partition("_")
        routed = model.config.num_experts
        for expert in range(routed + module.num_fused_shared_experts):
            owner = f"{path}.{expert}" if expert < routed else path.removesuffix("experts") + "shared_experts"
            for matrix, shard in STACKED[stack]:
                put = partial(load, weight_name=f"{path}.{leaf}", shard_id=shard, expert_id=expert)
                yield f"{owner}.{matrix}.{piece}", put
    elif isinstance(module, MergedColumnParallelLinear):
        for half, matrix in enumerate(MERGED):
            yield f"{path.removesuffix('gate_up_proj')}{matrix}.{leaf}", partial(load, loaded_shard_id=half)
    elif isinstance(module, RadixAttention):  # the scales of its KV cache
        yield f"{path.removesuffix('.attn')}.{leaf}", load
    else:
        yield f"{path}.{leaf}", load


def is_optional(leaf: str, param: nn.Parameter, quant_config: Any) -> bool:
    """Whether the tensors of a parameter need not come.

    The host marks it so (scales of a KV cache, which are 1 then); or gave it no elements, to swallow what a method has
    no use for; or it is an order of inputs, which is the natural one then unless the checkpoint says it has another.
    """
    ordered = getattr(quant_config, "desc_act", False) and leaf.endswith("g_idx")
    return getattr(param, "_skip_weight_check", False) or param.numel() == 0 or ("g_idx" in leaf and not ordered)


def report_short(copies: Copies, places: dict[str, Place]) -> None:
    """Log which parameters hold more than what came for them: some backends of the host pad theirs."""
    came = {name: copies.filled[place.param.untyped_storage().data_ptr()] for name, place in places.items()}
    short = [name for name, place in places.items() if 0 < came[name] < place.param.numel()]
    if short:
        param = places[short[0]].param
        logger.warning(
            "sglang-llada: the host keeps room that nothing fills in the parameters of %d tensors; "
            "that of %s got %d of %d numbers",
            *(len(short), short[0], came[short[0]], param.numel()),
        )


class Copies(TorchDispatchMode):
    """Watches what the host's loaders copy into parameters: the whole of a tensor or this rank's even share of it."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = 0  # of the parameter that is loaded
        self.taken: list[int] = []  # numbers that were copied into it, copy by copy
        self.written: set[tuple[int, torch.Size]] = set()  # places that have been written to
        self.filled: Counter[int] = Counter()  # how many numbers each parameter was given, by its address
        self.clash = False  # whether another tensor put other numbers there

    def of(self, name: str, tensor: Tensor, place: Place) -> Iterator[str]:
        """Load a tensor whose shape only its layer knows; yields what is wrong with it."""
        shape, held = list(tensor.shape), place.param
        if tensor.dtype in FP8 and as_it_is(held):  # and no scale, which would have been asked for
            yield f"{name} holds numbers of {tensor.dtype}, expected {held.dtype}"
            return
        self.storage, self.taken, self.clash = held.untyped_storage().data_ptr(), [], False
        try:
            with self:
                place.load(tensor)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            yield f"{name} {shape} does not fit into {list(held.shape)}: {str(error) or type(error).__name__}"
            return
        if self.clash:
            yield f"{name} differs from the tensor that shares its place, and one of them would be lost"
        converts = kind(tensor) != kind(held)  # some methods quantise what they load, and copy something else
        if not fits(tensor.numel(), self.taken, place, converts):
            yield f"{name} has shape {shape}, of which {sum(self.taken)} numbers would be loaded"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See every operation of a loader."""
        if func is torch.ops.aten.copy_.default and args[0].untyped_storage().data_ptr() == self.storage:
            into, source = args[:2]
            self.taken.append(source.numel())
            where = (into.data_ptr(), into.shape)
            self.clash |= where in self.written and not torch.equal(into, source.to(into).expand_as(into))
            self.filled[self.storage] += 0 if where in self.written else into.numel()
            self.written.add(where)
        return func(*args, **(kwargs or {}))


def kind(tensor: Tensor) -> str:
    """Of numbers: as they are, of 8 bits, or packed."""
    return "as they are" if as_it_is(tensor) else "of 8 bits" if tensor.dtype in FP8 else "packed"


def fits(size: int, taken: list[int], place: Place, converts: bool) -> bool:
    """Whether what was copied of a tensor of `size` numbers is all of it, or this rank's share."""
    module = place.module
    if size == 1 or place.param.numel() == 0 or converts:
        return True
    if isinstance(module, FusedMoE):  # copies of an expert are whole; those of other ranks are left to them
        if not taken:
            return module.moe_ep_size > 1
        return all(size in (part, part * module.moe_tp_size) for part in taken)
    return size in (sum(taken), sum(taken) * share(module))


def share(module: nn.Module) -> Fraction:
    """How many times as large as this rank's part a tensor is that is split over ranks; KV heads may be copied."""
    if isinstance(module, QKVParallelLinear):
        whole = module.total_num_heads + 2 * module.total_num_kv_heads
        return Fraction(whole, module.num_heads + 2 * module.num_kv_heads)
    return Fraction(get_group_rank_size(module.tp_group)[1] if isinstance(module, LinearBase) else 1)
