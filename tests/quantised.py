"""Checkpoints quantised as the tools that publish them do: names, shapes and number formats of each.

`quantise(folder, how)` rewrites a plain checkpoint in place, and gives the weights that it stands for afterwards. Every
matrix of every layer is quantised, but for the routers' and the first layer's MLP, which each config leaves out by the
published names; embeddings, head and norms stay as they are. `padded(folder)`
first makes one of the trained small checkpoint whose matrices are large enough for every kernel of the host.

Layouts: block FP8 as DeepSeek published it; compressed-tensors as llm-compressor saves it; ModelOpt's unified export;
GPTQ as AutoGPTQ and GPTQModel save it (zero points less one); AutoAWQ's GEMM version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
LEAST = 1e-5  # so that what is all zeros has a scale
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # by the three bits below the sign
BLOCK, GROUP, FP4_GROUP = 64, 64, 16
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight columns each four bits hold, from the lowest

Parts = dict[str, Tensor]
DENSE = [f"model.layers.0.mlp.{matrix}_proj" for matrix in ("gate", "up", "down")]


@dataclass(frozen=True, slots=True)
class Format:
    """How matrices are stored, and where the checkpoint says so: a field of config.json, or hf_quant_config.json.

    `parts` gets a matrix [N, K] and the largest number of it and of those fused with it; gives its tensors by the last
    part of their names, and the matrix that they stand for.
    """

    parts: Callable[[Tensor, Tensor], tuple[Parts, Tensor]]
    config: dict[str, Any]
    file: str = "config.json"


def fp8_block(weight: Tensor, _: Tensor) -> tuple[Parts, Tensor]:
    tiles = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
    scale = tiles.abs().amax((1, 3), keepdim=True).clamp(min=LEAST) / FP8_MAX
    stored = (tiles / scale).to(torch.float8_e4m3fn)
    meant = (stored.float() * scale).flatten(2).flatten(0, 1)
    return {"weight": stored.flatten(2).flatten(0, 1), "weight_scale_inv": scale.flatten(2).flatten(0, 1)}, meant


def fp8_channel(weight: Tensor, _: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=LEAST) / FP8_MAX
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def fp8_tensor(weight: Tensor, _: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().max() / FP8_MAX
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.02)}, stored.float() * scale


def fp4(weight: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed numbers [N, K / 2], a scale for each group of 16, a scale of all, and what they stand for."""
    whole = largest / (FP8_MAX * FP4_MAX)
    groups = weight.unflatten(1, (-1, FP4_GROUP))  # [N, K / 16, 16]
    scale = (groups.abs().amax(2) / FP4_MAX / whole).to(torch.float8_e4m3fn)
    wide = (scale.float() * whole)[..., None]
    code = (groups / wide.clamp(min=LEAST)).abs()[..., None].sub(FP4).abs().argmin(-1)
    meant = (FP4[code] * groups.sign() * wide).flatten(1)
    nibbles = (code + 8 * (groups < 0)).flatten(1).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale, whole, meant


def nvfp4(weight: Tensor, largest: Tensor) -> tuple[Parts, Tensor]:
    packed, scale, whole, meant = fp4(weight, largest)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": 1 / whole.reshape(1)}
    return parts | {"input_global_scale": torch.tensor([150.0])}, meant


def modelopt_fp4(weight: Tensor, largest: Tensor) -> tuple[Parts, Tensor]:
    packed, scale, whole, meant = fp4(weight, largest)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}
    return parts, meant


def int4(weight: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers 0 to 15 [K, N], zero points and fp16 scales [K / GROUP, N], and what they stand for [N, K]."""
    groups = weight.T.unflatten(0, (-1, GROUP))  # [K / GROUP, GROUP, N]
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = (torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15).clamp(min=LEAST).half().float()
    zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)
    number = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    meant = (number - zero[:, None]) * scale[:, None]
    return number.flatten(0, 1).int(), zero.int(), scale.half(), meant.flatten(0, 1).T.contiguous()


def packed(numbers: Tensor, dim: int, order: list[int]) -> Tensor:
    """Eight numbers of four bits in each int32; `order` says which of eight neighbours each four bits hold."""
    eights = numbers.long().unflatten(dim, (-1, 8)).movedim(dim + 1, -1)[..., order]
    return (eights << torch.arange(0, 32, 4)).sum(-1).to(torch.uint32).view(torch.int32)


def gptq(weight: Tensor, _: Tensor) -> tuple[Parts, Tensor]:
    number, zero, scale, meant = int4(weight, symmetric=True)
    order = list(range(8))
    parts = {"qweight": packed(number, 0, order), "qzeros": packed(zero - 1, 1, order), "scales": scale}
    return parts | {"g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP}, meant


def awq(weight: Tensor, _: Tensor) -> tuple[Parts, Tensor]:
    number, zero, scale, meant = int4(weight, symmetric=False)
    return {"qweight": packed(number, 1, AWQ_ORDER), "qzeros": packed(zero, 1, AWQ_ORDER), "scales": scale}, meant


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    shared = {"type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": shared | weights, "input_activations": shared | inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", *DENSE],
    }


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    """A hf_quant_config.json."""
    excluded = ["lm_head", "model.layers.*.mlp.gate", "model.layers.0.mlp*"]
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": excluded}
    return {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": quantization | more}


EIGHT, FOUR = {"num_bits": 8}, {"num_bits": 4, "strategy": "tensor_group", "group_size": FP4_GROUP}
FORMATS = {
    "block FP8": Format(
        fp8_block,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        | {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate", *DENSE]},
    ),
    "compressed-tensors FP8": Format(
        fp8_channel,
        compressed(
            "float-quantized",
            EIGHT | {"strategy": "channel", "dynamic": False},
            EIGHT | {"strategy": "token", "dynamic": True},
        ),
    ),
    "compressed-tensors NVFP4": Format(
        nvfp4, compressed("nvfp4-pack-quantized", FOUR | {"dynamic": False}, FOUR | {"dynamic": "local"})
    ),
    "ModelOpt FP8": Format(fp8_tensor, modelopt("FP8"), "hf_quant_config.json"),
    "ModelOpt NVFP4": Format(modelopt_fp4, modelopt("NVFP4", group_size=FP4_GROUP), "hf_quant_config.json"),
    "GPTQ": Format(
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
        | {"checkpoint_format": "gptq", "dynamic": {r"-:model\.layers\.0\.mlp\..*": {}}},
    ),
    "AWQ": Format(
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        | {"modules_to_not_convert": ["model.layers.0.mlp"]},
    ),
}


def padded(source: Path, folder: Path) -> None:
    """A copy of the trained checkpoint with hidden size 256 and 8 heads, for 192 and 6, that computes the same.

    What is new is zero: each KV head gets one query head more, and the residual stream 64 dimensions, which norms count
    in; their weights make up for that.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    fields = json.loads((folder / "config.json").read_text())
    old, new, width = fields["hidden_size"], 256, fields["head_dim"]
    query = fields["num_attention_heads"] * width
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("query_key_value.weight"):
            tensor = torch.cat((with_heads(tensor[:query], width), tensor[query:]))
        elif name.endswith("attention.dense.weight"):
            tensor = with_heads(tensor.T, width).T
        elif name.endswith(("layernorm.weight", "norm.weight")) and tensor.shape == (old,):
            tensor = tensor.float() * (old / new) ** 0.5
        for dim, size in enumerate(tensor.shape):
            if size == old:
                tensor = torch.cat(
                    (tensor, tensor.new_zeros(*tensor.shape[:dim], new - old, *tensor.shape[dim + 1 :])), dim
                )
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields | {"hidden_size": new, "num_attention_heads": 8}))


def with_heads(rows: Tensor, width: int) -> Tensor:
    """Rows of 6 heads as those of 8: one of zeros after each third."""
    thirds = rows.unflatten(0, (2, 3 * width))
    return torch.cat((thirds, thirds.new_zeros(2, width, rows.shape[1])), 1).flatten(0, 1)


def quantise(folder: Path, how: str) -> dict[str, Tensor]:
    """Rewrite a checkpoint of fp32 or bf16 weights; gives the weights that it then stands for."""
    form = FORMATS[how]
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in weights.items():
        plain = not name.startswith("model.layers.") or ".mlp.gate." in name or name.removesuffix(".weight") in DENSE
        if weight.dim() == 1 or plain:
            stored[name] = weight if weight.dim() == 1 or ".mlp.gate." in name else weight.bfloat16()
            meant[name] = stored[name].float()
            continue
        fused = [name.replace(old, new) for old, new in (("gate_proj", "up_proj"), ("up_proj", "gate_proj"))]
        largest = torch.stack([weights[each].abs().max() for each in (name, *fused)]).max()
        parts, meant[name] = form.parts(weight, largest)
        stored |= {name.removesuffix("weight") + leaf: part.contiguous() for leaf, part in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if form.file == "config.json":
        fields["quantization_config"] = form.config
    else:
        (folder / form.file).write_text(json.dumps(form.config))
    (folder / "config.json").write_text(json.dumps(fields))
    return meant
