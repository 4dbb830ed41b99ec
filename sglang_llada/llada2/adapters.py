"""Adapters (LoRA) as PEFT writes them, held against the network: low-rank additions to some of its matrices.

The matrix W of a module becomes W + lora_alpha / r B A (Hu et al., LoRA, 2021, section 4.1), A [r, in] and B [out, r].
Names are the checkpoint's, behind PEFT's prefix; what is unknown, misshapen or half there is an error by name, and so
is every field of adapter_config.json by which an adapter would mean more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import read_json
from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.reference import Llada2ForDiffusion
from sglang_llada.llada2.weights import Ledger, Shape, canonical, expected, load_reference, read_tensors, some

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# Last names of the modules that may have one: in attention, and in feed-forward parts of every kind.
TARGETS = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")
WHOLE = ("all-linear", "all")  # the head is none of the linear layers that PEFT means by it
# Fields that would make more of an adapter than the sum above; their values must say no.
EXTRAS = (
    "use_dora use_rslora use_qalora lora_bias fan_in_fan_out modules_to_save rank_pattern alpha_pattern "
    "layer_replication target_parameters trainable_token_indices alora_invocation_tokens arrow_config"
).split()
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings that change the matrix it is added to, too


@dataclass(frozen=True, slots=True)
class Adapter:
    """What adapter_config.json says.

    Attributes:
        rank: r.
        scaling: what B A is multiplied by.
        targets: last names of its modules, of TARGETS.
    """

    rank: int
    scaling: float
    targets: frozenset[str]


def adapter_of(fields: Mapping[str, Any]) -> Adapter:
    """An adapter by the fields of its adapter_config.json.

    Raises:
        ConfigError: it is none of LoRA, has modules that may have none, or means more than a sum.
    """
    rank, alpha, given = (fields.get(name) for name in ("r", "lora_alpha", "target_modules"))
    names = TARGETS if given in WHOLE else given
    listed = isinstance(names, list | tuple | set) and all(isinstance(name, str) for name in names)
    targets = frozenset(name.rpartition(".")[2] for name in names) if listed and names is not None else frozenset()
    start = fields.get("init_lora_weights")
    rules = [
        (str(fields.get("peft_type")).upper() == "LORA", "peft_type", "LORA"),
        (isinstance(rank, int) and rank > 0, "r", "a whole number above 0"),
        (isinstance(alpha, int | float), "lora_alpha", "a number"),
        (bool(targets) and targets <= {*TARGETS}, "target_modules", f"{', '.join(TARGETS)} in a list, or 'all-linear'"),
        (fields.get("bias") in (None, "none"), "bias", "none"),
        (not str(start).lower().startswith(OTHER_BASE), "init_lora_weights", "one that leaves the checkpoint as it is"),
        *((not fields.get(name), name, "nothing, or false") for name in EXTRAS),
    ]
    wrong = [f"{name} is {fields.get(name)!r}; allowed: {allowed}" for holds, name, allowed in rules if not holds]
    if wrong:
        raise ConfigError(f"{CONFIG_FILE}: {'; '.join(wrong)}")
    assert isinstance(rank, int) and isinstance(alpha, int | float)
    return Adapter(rank, alpha / rank, targets)


def shapes_of(config: Llada2Config, adapter: Adapter) -> dict[str, Shape]:
    """Every tensor that an adapter of this kind may have: `MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    shapes: dict[str, Shape] = {}
    for name, shape in expected(config).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in adapter.targets:
            width, depth = shape
            shapes[f"{module}.lora_A.weight"] = (adapter.rank, depth)
            shapes[f"{module}.lora_B.weight"] = (width, adapter.rank)
    return shapes


def checked(config: Llada2Config, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by the names of shapes_of(); modules may be left out, as PEFT does with some of a kind.

    Raises:
        ConfigError: there are none, or some are unknown, misshapen, doubled or without their other half.
    """
    ledger, found = Ledger(shapes_of(config, adapter)), {}
    for name, tensor in canonical((name.removeprefix(PREFIX), tensor) for name, tensor in tensors.items()):
        if ledger.tick(name, tensor):
            found[name] = tensor
    missing = [f"missing tensor {other}" for other in map(other_half, found) if other not in ledger.seen]
    wrong = some(ledger.wrong) + some(missing)
    if not found and not wrong:
        wrong = ["it has no tensors"]
    if wrong:
        raise ConfigError(f"the adapter does not fit {CONFIG_FILE} and the model: {'; '.join(wrong)}")
    return found


def other_half(name: str) -> str:
    """B's name for A's, and the other way round."""
    return name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")


def read_adapter(folder: Path) -> Adapter:
    """What an adapter's folder says of it; ConfigError as adapter_of(), or if it says nothing."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} has no {CONFIG_FILE}; allowed: an adapter as PEFT saves it")
    return adapter_of(read_json(folder / CONFIG_FILE))


def load_merged(path: str | Path, adapter_path: str | Path) -> Llada2ForDiffusion:
    """The reference network of a checkpoint that an adapter is merged into, fp32."""
    adapter, model = read_adapter(Path(adapter_path)), load_reference(path)
    tensors = checked(model.config, adapter, dict(read_tensors(Path(adapter_path))))
    for module, a, b in pairs(tensors):
        weight = model.get_submodule(module).weight
        assert isinstance(weight, torch.nn.Parameter)
        weight.data += adapter.scaling * b.float() @ a.float()
    return model


def pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module, A and B of checked tensors."""
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            yield name.removesuffix(".lora_A.weight"), tensor, tensors[other_half(name)]
