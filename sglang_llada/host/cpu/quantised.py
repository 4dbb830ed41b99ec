"""Quantised matrices on our CPU platform: loaded as the host's methods store them, multiplied as what they stand for.

The host has no kernels for them that run without a device (those of its own CPU engine are not in the released wheel).
So a layer keeps its parameters as they came, which updates of weights need, and beside them the matrix that they stand
for, made again after each load. Activations are not quantised. What is known here is how numbers are laid out, by the
names of the parts: `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_llada.errors import ConfigError

FP8_MAX = 448.0
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
EIGHTS = torch.arange(0, 32, 4)  # where in 32 bits eight numbers of four bits are
AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where each of eight neighbours is among them

Parts = dict[str, Tensor]
Form = Callable[[Parts, Any], Tensor]  # of a matrix's parts and its layer's method: the matrix [..., N, K], fp32


def rounded(p: Parts, method: Any) -> Tensor:
    """Weights that are quantised as they are loaded: FP8 of each row."""
    scale = p["weight"].float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (p["weight"] / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_blocks(p: Parts, method: Any) -> Tensor:
    """A scale for each block of rows and columns."""
    rows, columns = method.quant_config.weight_block_size
    scale = p["weight_scale_inv"].float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    height, width = p["weight"].shape[-2:]
    return p["weight"].float() * scale[..., :height, :width]


def fp8(p: Parts, method: Any) -> Tensor:
    """A scale for each row [..., N, 1], or for each of the matrices that are fused [..., n]."""
    weight, scale = p["weight"].float(), p["weight_scale"].float()
    if scale.dim() < weight.dim():
        scale = scale.view(*weight.shape[:-2], -1)
        scale = scale.repeat_interleave(-(-weight.shape[-2] // scale.shape[-1]), -1)[..., : weight.shape[-2], None]
    return weight * scale


def nvfp4(p: Parts, method: Any) -> Tensor:
    """Groups of 16, whose scales one number divides."""
    return fp4(p["weight_packed"], p["weight_scale"], 1 / p["weight_global_scale"])


def modelopt_fp4(p: Parts, method: Any) -> Tensor:
    """The same, and the number multiplies."""
    return fp4(p["weight"], p["weight_scale"], p["weight_scale_2"])


def fp4(packed: Tensor, scale: Tensor, whole: Tensor) -> Tensor:
    """Two numbers in a byte, the first in the lower half."""
    numbers = FP4[torch.stack((packed & 15, packed >> 4), -1).long()].flatten(-2)  # [..., N, K]
    return fp8({"weight": numbers * scale.float().repeat_interleave(16, -1), "weight_scale": whole}, None)


def gptq(p: Parts, method: Any) -> Tensor:
    """Eight rows in 32 bits; zero points less one; groups of inputs in any order."""
    numbers = nibbles(p["qweight"]).movedim(-1, -2).flatten(-3, -2)  # [..., K, N]
    zeros = nibbles(p["qzeros"]).flatten(-2) + 1
    group = -(-numbers.shape[-2] // zeros.shape[-2])
    if not method.quant_config.desc_act:
        return ((numbers - spread(zeros, group)) * spread(p["scales"].float(), group)).mT
    order = p["g_idx"].long()[..., None].expand(*numbers.shape)
    return ((numbers - zeros.gather(-2, order)) * p["scales"].float().gather(-2, order)).mT


def awq(p: Parts, method: Any) -> Tensor:
    """Eight columns in 32 bits, in an order of their own."""
    numbers, zeros = (nibbles(p[name])[..., AWQ_ORDER].flatten(-2) for name in ("qweight", "qzeros"))
    group = -(-numbers.shape[-2] // zeros.shape[-2])
    return ((numbers - spread(zeros, group)) * spread(p["scales"].float(), group)).mT


def nibbles(packed: Tensor) -> Tensor:
    """Eight numbers of four bits, from the lowest: [..., 8]."""
    return packed[..., None] >> EIGHTS & 15


def spread(groups: Tensor, size: int) -> Tensor:
    """A number for each group of inputs as one for each input."""
    return groups.repeat_interleave(size, -2)


# By the parts that a matrix has; parts that say how activations would be quantised are left aside.
FORMS: dict[tuple[str, ...], Form] = {
    ("weight",): rounded,
    ("weight", "weight_scale"): fp8,
    ("weight", "weight_scale_inv"): fp8_blocks,
    ("weight_global_scale", "weight_packed", "weight_scale"): nvfp4,
    ("weight", "weight_scale", "weight_scale_2"): modelopt_fp4,
    ("g_idx", "qweight", "qzeros", "scales"): gptq,
    ("qweight", "qzeros", "scales"): awq,
}
ASIDE = ("input_scale", "input_global_scale", "blockscale_swizzled")


@lru_cache
def on_cpu(config: type[Any]) -> type[Any]:
    """A quantisation config of the host whose layers are run here, in any dtype."""

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.utils import MoeRunnerBackend
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
        from sglang.srt.layers.quantization.utils import get_dynamic_override
        from sglang.srt.runtime_context import get_flags

        # GPTQ's way to leave layers out, which the host's method for its CPU engine does not read.
        if getattr(self, "dynamic", None) and get_dynamic_override(self, layer_name=prefix) is False:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        with get_flags().moe.override(runner_backend=MoeRunnerBackend.MARLIN):  # weights only: asks for no device
            return take_over(config.get_quant_method(self, layer, prefix), layer)

    members = {
        "get_quant_method": get_quant_method,
        "get_supported_act_dtypes": lambda self: [torch.float32, torch.bfloat16, torch.float16],
        "_check_scheme_supported": lambda self, *args, **kwargs: False,  # compressed-tensors would ask the device
    }
    return type(config.__name__, (config,), members)


def take_over(method: Any, layer: Any) -> Any:
    """Let a method of the host create and load a layer's parameters, and run the layer here."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    if method is None or type(method).__name__.startswith("Unquantized"):
        return method
    if isinstance(layer, FusedMoE):
        method.process_weights_after_loading = lambda layer: widen_experts(layer, method)
        method.create_moe_runner = lambda layer, config: None
        method.get_moe_runner_backend = lambda layer: None
        method.apply = run_experts
    elif isinstance(layer, LinearBase):
        method.process_weights_after_loading = lambda layer: widen_linear(layer, method)
        method.apply = run_linear
    return method


@dataclass(frozen=True, slots=True)
class WideExperts:
    """What cpu_experts.py reads of an expert layer."""

    w13_weight: Tensor
    w2_weight: Tensor
    should_fuse_routed_scaling_factor_in_topk: bool


def widen_linear(layer: Any, method: Any) -> None:
    """Make the matrix of a linear layer from its parts."""
    layer.wide = widened(parts_of(layer), method, layer.params_dtype)


def widen_experts(layer: Any, method: Any) -> None:
    """Make the stacked matrices of an expert layer from their parts."""
    w13, w2 = (widened(parts_of(layer, stack), method, layer.params_dtype) for stack in ("w13_", "w2_"))
    layer.wide = WideExperts(w13, w2, layer.should_fuse_routed_scaling_factor_in_topk)


def parts_of(layer: Any, stack: str = "") -> Parts:
    """The parameters of a layer that make up a matrix, or of an expert layer those of one stack."""
    named = layer.named_parameters(recurse=False)
    return {name.removeprefix(stack): param.data for name, param in named if name.startswith(stack)}


def widened(parts: Parts, method: Any, dtype: torch.dtype) -> Tensor:
    """The matrix that parts stand for."""
    parts = {name: part for name, part in parts.items() if name not in ASIDE}
    form = FORMS.get(tuple(sorted(parts)))
    if form is None:
        known = "; ".join(", ".join(names) for names in FORMS)
        raise ConfigError(
            f"a matrix made of {', '.join(sorted(parts))} ({type(method).__name__}) cannot be multiplied on this CPU "
            f"platform; allowed: {known}"
        )
    return form(parts, method).to(dtype)


def run_linear(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A quantised linear layer."""
    return F.linear(x, layer.wide, bias)


def run_experts(layer: Any, dispatch_output: Any) -> Any:
    """A quantised expert layer."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    from sglang_llada.host.cpu.experts import experts_forward

    x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
    return StandardCombineInput(hidden_states=experts_forward(layer.wide, x, topk, layer.moe_runner_config))
