"""A block-quantised checkpoint: which matrices stay 8 bits wide in the host's layers, and that none is misplaced.

Loading is as far as a CPU goes: the host multiplies such matrices with kernels for devices only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.weights import check_files
from tests.host.ranks import run_ranks
from tests.toy import make_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("few_threads")]

BLOCK = 32
SCALE = "_scale_inv"


def quantise(folder: Path) -> dict[str, Tensor]:
    """Turn a checkpoint into a quantised one, as the published are; gives the weights that it now stands for."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or not name.startswith("model.layers.") or ".mlp.gate." in name:
            stored[name] = meant[name] = weight
            continue
        tiles = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        stored[name] = (tiles / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        stored[name + SCALE] = scale.flatten(2).flatten(0, 1).contiguous()
        meant[name] = widened(stored[name], stored[name + SCALE])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def widened(weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 of a quantised matrix and its scales, both possibly stacked over experts."""
    return weight.float() * scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)


def kept(runner: Any) -> dict[str, Any]:
    """The parameters of the host's model."""
    return {name: param.detach().clone() for name, param in runner.model.named_parameters()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A quantised folder and its weights; sizes are multiples of a block."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32}
    make_checkpoint(tmp_path, num_attention_heads=4, head_dim=16, **sizes)
    return tmp_path, quantise(tmp_path)


def test_every_matrix_lands_in_its_place_in_8_bits(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = checkpoint
    (params,) = run_ranks(kept, folder, 1, "--dtype", "bfloat16")
    wide = {name for name, param in params.items() if param.dtype == torch.float8_e4m3fn}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}"
        experts = [f"{prefix}.mlp.experts.{e}" for e in range(8)]
        gate_up = [[meant[f"{e}.{matrix}_proj.weight"] for matrix in ("gate", "up")] for e in experts]
        pairs = {
            f"{prefix}.attention.query_key_value.weight": meant[f"{prefix}.attention.query_key_value.weight"],
            f"{prefix}.attention.dense.weight": meant[f"{prefix}.attention.dense.weight"],
            f"{prefix}.mlp.experts.w13_weight": torch.stack([torch.cat(pair) for pair in gate_up]),
            f"{prefix}.mlp.experts.w2_weight": torch.stack([meant[f"{e}.down_proj.weight"] for e in experts]),
        }
        for name, want in pairs.items():
            assert name in wide
            torch.testing.assert_close(widened(params[name], params[name + SCALE]), want)
    high = {name: param.dtype for name, param in params.items() if name not in wide and not name.endswith(SCALE)}
    assert {dtype for name, dtype in high.items() if ".mlp.gate." in name} == {torch.float32}
    others = {name for name in high if ".mlp.gate." not in name}
    assert all("norm" in name or "word_embeddings" in name or "lm_head" in name for name in others)


def test_a_missing_scale_is_named(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = checkpoint
    name = "model.layers.1.attention.dense.weight" + SCALE
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"missing tensor {name}"):
        check_files(folder)
