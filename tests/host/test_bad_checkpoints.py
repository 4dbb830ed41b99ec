"""A damaged checkpoint ends the start with one message that names the fault, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.host.serving import launch, session_members, tail
from tests.toy import make_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.timeout(180)]

PATIENCE = 120
UP = "model.layers.0.mlp.up_proj.weight"


def spoil_tensors(folder: Path) -> None:
    """One missing, one extra, one misshapen."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors |= {"model.extra.weight": torch.zeros(3), UP: torch.zeros(2, 2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_groups(folder: Path) -> None:
    edit(folder / "config.json", n_group=3)


def spoil_mask(folder: Path) -> None:
    edit(folder / "config.json", mask_token_id=None)
    edit(folder / "tokenizer_config.json", mask_token=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("<|mask|>", "<|none|>"))


def spoil_quantisation(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "quip"})


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            spoil_tensors,
            ["missing tensor model.norm.weight", "unknown tensor model.extra.weight", f"{UP} has shape [2, 2]"],
        ),
        (spoil_groups, ["num_experts 8 does not split into n_group 3 equal groups"]),
        (spoil_mask, ["the checkpoint has no mask token"]),
        (spoil_quantisation, ["sglang-llada: Unknown quantization method: quip. Must be one of ['fp8',"]),
    ],
)
def test_a_damaged_checkpoint_ends_the_start(tmp_path: Path, spoil: Callable[[Path], None], told: list[str]) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    make_checkpoint(folder)
    spoil(folder)
    process, _ = launch(folder, log)
    try:
        assert process.wait(PATIENCE) != 0
        assert not session_members(process.pid)
    finally:
        if session_members(process.pid, patience=0):
            os.killpg(process.pid, signal.SIGKILL)
    for message in told:
        assert log.read_text(errors="replace").count(message) == 1, tail(log)
