"""The strict weight map: which tensors a checkpoint must have, under which names and in which shapes.

Published checkpoints come in two spellings: plain, and with the prefixes `model.language_model.` and `model.lm_head.`;
either may hold an expert matrix per expert or fused, `mlp.experts.gate_proj` [E, ...]. `canonical` brings all to the
plain, per-expert spelling. Nothing is skipped: a name that is missing, unknown, doubled or misshapen stops the start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import read_config
from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.reference import Llada2ForDiffusion

SCALE = "weight_scale_inv"  # beside a block-quantised weight
SHOWN = 8  # names that an error lists of each kind
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)(?:\.(weight|weight_scale_inv))?$")

Shape = tuple[int, ...]


def expected(config: Llada2Config) -> dict[str, Shape]:
    """Every tensor of a checkpoint, by its canonical name."""
    c, H, I = config, config.hidden_size, config.moe_intermediate_size
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    shapes: dict[str, Shape] = {"model.word_embeddings.weight": (c.vocab_size, H), "model.norm.weight": (H,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, H)
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        shapes[f"{p}.input_layernorm.weight"] = (H,)
        shapes[f"{p}.post_attention_layernorm.weight"] = (H,)
        shapes[f"{p}.attention.query_key_value.weight"] = (heads * c.head_dim, H)
        shapes[f"{p}.attention.query_layernorm.weight"] = (c.head_dim,)
        shapes[f"{p}.attention.key_layernorm.weight"] = (c.head_dim,)
        shapes[f"{p}.attention.dense.weight"] = (H, c.num_attention_heads * c.head_dim)
        if c.is_dense(layer):
            shapes |= _mlp(f"{p}.mlp", H, c.intermediate_size)
            continue
        shapes[f"{p}.mlp.gate.weight"] = (c.num_experts, H)
        if c.moe_router_enable_expert_bias:
            shapes[f"{p}.mlp.gate.expert_bias"] = (c.num_experts,)
        if c.num_shared_experts:
            shapes |= _mlp(f"{p}.mlp.shared_experts", H, c.shared_intermediate_size)
        for expert in range(c.num_experts):
            shapes |= _mlp(f"{p}.mlp.experts.{expert}", H, I)
    return shapes


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def canonical(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under plain, per-expert names; fused expert tensors are split."""
    for name, tensor in tensors:
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        elif name.startswith("model.lm_head."):
            name = name.removeprefix("model.")
        if fused := FUSED.match(name):
            prefix, matrix, leaf = fused.groups()
            for expert, part in enumerate(tensor):
                yield f"{prefix}.{expert}.{matrix}.{leaf or 'weight'}", part
        else:
            yield name, tensor


class Ledger:
    """Ticks off tensors as they come. With `block` = (rows, columns), 8-bit weights may come, and then bring scales."""

    def __init__(self, config: Llada2Config, block: tuple[int, int] | None = None) -> None:
        self.shapes = expected(config)
        self.block = block
        self.scales: set[str] = set()  # those that must come
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def tick(self, name: str, tensor: Tensor) -> bool:
        """Note a tensor; False if it must not be loaded."""
        got, want = tuple(tensor.shape), self._wanted(name)
        if want is None:
            self.wrong.append(f"unknown tensor {name} {list(got)}")
        elif got != want:
            self.wrong.append(f"{name} has shape {list(got)}, expected {list(want)}")
        elif name in self.seen:
            self.wrong.append(f"{name} comes twice")
        elif tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            scale = name.removesuffix("weight") + SCALE
            if self._wanted(scale) is None:
                self.wrong.append(f"{name} is 8 bits wide, but must not be or config.json has no weight_block_size")
            self.scales.add(scale)
        self.seen.add(name)
        return want == got

    def _wanted(self, name: str) -> Shape | None:
        if self.block is not None and name.endswith("." + SCALE):
            weight = self.shapes.get(name.removesuffix(SCALE) + "weight")
            # embeddings, head and router are never quantised
            if weight is None or len(weight) != 2 or not name.startswith("model.layers.") or ".mlp.gate." in name:
                return None
            return tuple(-(-size // block) for size, block in zip(weight, self.block, strict=True))
        return self.shapes.get(name)

    def close(self, *, complete: bool = True) -> None:
        """Raise ConfigError with everything that was wrong; with `complete`, missing tensors are wrong too."""
        missing = [name for name in (*self.shapes, *sorted(self.scales)) if name not in self.seen] if complete else []
        problems = _some(self.wrong) + _some([f"missing tensor {name}" for name in missing])
        if problems:
            raise ConfigError("the checkpoint does not fit its config.json: " + "; ".join(problems))


def _some(messages: list[str]) -> list[str]:
    rest = len(messages) - SHOWN
    return messages[:SHOWN] + ([f"and {rest} more like that"] if rest > 0 else [])


def quantisation_block(config: Any) -> tuple[int, int] | None:
    """Rows and columns of the blocks of a block-quantised checkpoint, from config.json; None if it is not."""
    quantisation = config.to_dict().get("quantization_config") or {}
    block = quantisation.get("weight_block_size")
    return None if block is None else (int(block[0]), int(block[1]))


def check_files(folder: Path) -> None:
    """Raise ConfigError unless a folder's tensors are those that its config.json asks for; reads no weights."""
    config = read_config(folder)
    ledger = Ledger(config, quantisation_block(config))
    for name, tensor in canonical(_headers(folder)):
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            ledger.tick(name, tensor)
    ledger.close()


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint folder, from its safetensors files."""
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def _headers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """As read_tensors, without their data; of their types only whether they are 8 bits wide."""
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    header = tensors.get_slice(name)
                    dtype = torch.float8_e4m3fn if header.get_dtype().startswith("F8") else None
                    yield name, torch.empty(header.get_shape(), dtype=dtype, device="meta")
        except SafetensorError as error:
            raise ConfigError(f"{file} cannot be read, perhaps because it is not complete: {error}") from None


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ConfigError(f"{folder}: there are no .safetensors files")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"{folder}: {index.name} names files that are not there: {', '.join(_some(absent))}")
    return [folder / name for name in names]


def load_reference(path: str | Path, dtype: torch.dtype = torch.float32) -> Llada2ForDiffusion:
    """The reference network with a checkpoint's weights, ready to run."""
    folder = Path(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llada2ForDiffusion(config)
    ledger, state = Ledger(config), {}
    for name, tensor in canonical(read_tensors(folder)):
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # some tied checkpoints store the embedding twice
        if ledger.tick(name, tensor):
            state[name] = tensor.float() if ".mlp.gate." in name else tensor.to(dtype)
    ledger.close()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.word_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval()
