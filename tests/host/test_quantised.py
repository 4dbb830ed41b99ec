"""Quantised checkpoints of every kind: that each tensor lands in its place in the host's layers, and what is answered.

Layers are built as for a GPU, in one process for all kinds (tests/host/pretend.py). Answers are given by servers on the
CPU, which multiply by what the matrices stand for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.weights import check_files
from tests.host.pretend import for_a_gpu
from tests.quantised import FORMATS, quantise
from tests.toy import make_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

# As every kernel of the host wants them: multiples of 128.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 256}
SIZES |= {"moe_intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
SIZES |= {"num_experts": 4, "n_group": 2, "num_experts_per_tok": 2}
BY_COLUMN = ("qweight", "qzeros", "scales")  # matrices that are stored [K, N]
UP, EXPERT = "model.layers.0.mlp.up_proj.", "model.layers.1.mlp.experts.3.down_proj."
OWN = (
    "_scale",
    "sort_indices",
    "_swizzled",
)  # ends of parameters that come from no tensor here: KV scales, and made ones


# --- in the process that pretends -----------------------------------------------------------------------------------


def placed(model: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint; what is not where it belongs, and what checkpoints with faults are told."""
    tensors = load_file(folder / "model.safetensors")
    model.load_weights(tensors.items())
    params, wanted = dict(model.named_parameters()), assembled(tensors)
    return {
        "misplaced": [name for name, want in wanted.items() if not is_held(params[name], want)],
        "from nowhere": [name for name in params if name not in wanted and not name.endswith(OWN)],
        "methods": sorted({type(module.quant_method).__name__ for module in model.modules() if has_method(module)}),
        "told": {fault: told(model, change(dict(tensors))) for fault, change in FAULTS.items()},
        "router": {str(param.dtype) for name, param in params.items() if ".mlp.gate." in name},
    }


def has_method(module: Any) -> bool:
    return getattr(module, "quant_method", None) is not None


def assembled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the host's fused and stacked parameters must hold."""
    groups: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", name)]):
        fused = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
        stacked = re.sub(r"experts\.\d+\.gate_up_proj\.", "experts.w13_", fused)
        stacked = re.sub(r"experts\.\d+\.down_proj\.", "experts.w2_", stacked)
        groups.setdefault(stacked, []).append(tensors[name])
    return {name: joined(name, parts) for name, parts in groups.items()}


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """Parts of a parameter, fused in twos where it is gate and up, and stacked where it is experts'."""
    dim = 1 if name.rpartition(".")[2].removeprefix("w13_").removeprefix("w2_") in BY_COLUMN else 0
    parts = [part.reshape(1) if part.numel() == 1 else part for part in parts]
    if "gate_up_proj" in name or ".w13_" in name:
        alike = name.endswith("g_idx")  # kept once
        parts = [a if alike else torch.cat((a, b), dim) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return torch.stack(parts) if ".experts." in name else parts[0]


def is_held(param: Tensor, want: Tensor) -> bool:
    """Whether a parameter holds numbers; one that is the same for fused matrices may be held once, or for each."""
    want = want.to(param.dtype)
    if want.shape[-1:] == (1,) and want.dim() > param.dim():
        want = want.squeeze(-1)
    if param.dim() < want.dim():
        param = param.unsqueeze(-1)
    return bool((param.float() == want.float()).all()) and param.numel() >= want.numel() // 2


def told(model: Any, tensors: dict[str, Tensor]) -> str:
    model.wanted = None  # as if nothing had been loaded
    try:
        model.load_weights(tensors.items())
    except ConfigError as error:
        return str(error)
    return ""


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != a_scale(tensors)}


def a_scale(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.startswith(EXPERT) and "scale" in name)


def longer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices whose first part would fit."""
    names = [name for name in tensors if name.startswith((UP, EXPERT)) and tensors[name].dim() == 2]
    return tensors | {
        name: torch.cat((tensors[name].view(torch.uint8),) * 2).view(tensors[name].dtype) for name in names
    }


FAULTS = {
    "missing": without,
    "unknown": lambda tensors: tensors | {UP + "zero_point": torch.ones(3)},
    "longer": longer,
    "router": lambda tensors: tensors | {"model.layers.1.mlp.gate.weight_scale": torch.ones(4, 1)},
}


# --- in the test's process ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each kind what became of it."""
    folders = [tmp_path_factory.mktemp("quantised") for _ in FORMATS]
    for how, folder in zip(FORMATS, folders, strict=True):
        make_checkpoint(folder, **SIZES)
        quantise(folder, how)
        check_files(folder)
    return dict(zip(FORMATS, for_a_gpu(placed, folders), strict=True))


@pytest.mark.parametrize("how", FORMATS)
def test_every_tensor_lands_in_its_place(how: str, loaded: dict[str, dict[str, Any]]) -> None:
    found = loaded[how]
    print(how, found["methods"])
    assert found["misplaced"] == [] and found["from nowhere"] == []
    assert found["router"] == {"torch.float32"}


@pytest.mark.parametrize("how", FORMATS)
def test_what_is_missing_unknown_or_misshapen_is_named(how: str, loaded: dict[str, dict[str, Any]]) -> None:
    said = loaded[how]["told"]
    assert f"missing tensor {EXPERT}" in said["missing"]
    assert f"unknown tensor {UP}zero_point [3]" in said["unknown"]
    assert "unknown tensor model.layers.1.mlp.gate.weight_scale" in said["router"]
    assert UP in said["longer"] and EXPERT in said["longer"]
