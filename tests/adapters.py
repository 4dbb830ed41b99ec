"""Random adapters (LoRA), as PEFT would save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sglang_llada.llada2.adapters import CONFIG_FILE, PREFIX, TARGETS, adapter_of, shapes_of
from sglang_llada.llada2.config import Llada2Config

STRENGTH = 0.6  # of what is added to a matrix: other answers, which are answers still


def fields(rank: int, targets: Collection[str] = TARGETS, **more: Any) -> dict[str, Any]:
    """Fields of adapter_config.json, some of which only PEFT reads."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "rank_pattern": {},
        "task_type": "CAUSAL_LM",
        **more,
    }


def random_tensors(
    config: Llada2Config, rank: int, seed: int, targets: Collection[str] = TARGETS, strength: float = STRENGTH
) -> dict[str, Tensor]:
    """Both halves for every module, by PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        PREFIX + name: torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if ".lora_A." in name else strength)
        for name, shape in shapes_of(config, adapter_of(fields(rank, targets))).items()
    }


def write_adapter(
    folder: Path,
    config: Llada2Config,
    *,
    rank: int,
    seed: int,
    targets: Collection[str] = TARGETS,
    strength: float = STRENGTH,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Path:
    """A folder with an adapter whose tensors are `wanted` by their names."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(fields(rank, targets)))
    tensors = random_tensors(config, rank, seed, targets, strength)
    save_file({name: tensor for name, tensor in tensors.items() if wanted(name)}, folder / "adapter_model.safetensors")
    return folder
