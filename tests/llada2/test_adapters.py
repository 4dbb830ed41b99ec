"""Adapters as PEFT writes them: taken whole, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.adapters import (
    CONFIG_FILE,
    PREFIX,
    TARGETS,
    Adapter,
    adapter_of,
    checked,
    load_merged,
    read_adapter,
    shapes_of,
)
from sglang_llada.llada2.weights import load_reference
from tests.adapters import fields, random_tensors, write_adapter
from tests.toy import make_config

CONFIG = make_config()
TINY = Path(__file__).parents[2] / "examples" / "tiny-llada2"
GATE = "model.layers.1.mlp.experts.3.gate_proj.lora_A.weight"


@pytest.mark.parametrize("given", [TARGETS, "all-linear", [f"model.layers.0.attention.{name}" for name in TARGETS]])
def test_what_an_adapter_is(given: Any) -> None:
    assert adapter_of(fields(4) | {"target_modules": given, "lora_alpha": 6}) == Adapter(4, 1.5, frozenset(TARGETS))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; allowed: LORA"),
        ({"r": 0}, "r is 0; allowed: a whole number above 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        (
            {"target_modules": ["dense", "lm_head"]},
            r"target_modules is \['dense', 'lm_head'\]; allowed: query_key_value,",
        ),
        ({"target_modules": "dense|lm_head"}, "target_modules is"),
        ({"target_modules": []}, "target_modules is"),
        ({"target_modules": None}, "target_modules is None"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"dense": 8}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ],
)
def test_what_means_more_than_a_sum_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adapter_of(fields(4, **more))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="r is None.*bias is 'all'"):
        adapter_of(fields(4) | {"r": None, "bias": "all"})


def test_modules_are_those_of_the_network_and_no_others() -> None:
    """Router, norms, embeddings and head take no adapter."""
    shapes = shapes_of(CONFIG, adapter_of(fields(4)))
    assert shapes["model.layers.0.attention.query_key_value.lora_A.weight"] == (4, 64)
    assert shapes["model.layers.0.attention.query_key_value.lora_B.weight"] == (16 * (4 + 2 * 2), 4)
    assert shapes[GATE] == (4, 64) and shapes["model.layers.1.mlp.shared_experts.down_proj.lora_B.weight"] == (64, 4)
    assert not any(word in name for name in shapes for word in ("gate.", "norm", "embed", "lm_head"))
    assert all("attention" in name for name in shapes_of(CONFIG, adapter_of(fields(4, ("dense",)))))


def test_names_of_both_spellings_are_taken() -> None:
    tensors = random_tensors(CONFIG, 2, seed=0)
    other = {name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."): t for name, t in tensors.items()}
    found = [checked(CONFIG, adapter_of(fields(2)), given) for given in (tensors, other)]
    assert found[0].keys() == found[1].keys() == shapes_of(CONFIG, adapter_of(fields(2))).keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({f"{PREFIX}lm_head.lora_A.weight": t[PREFIX + GATE]}),
            "unknown tensor lm_head.lora_A.weight",
        ),
        (lambda t: t.update({PREFIX + GATE: t[PREFIX + GATE][:1]}), rf"{GATE} has shape \[1, 64\], expected \[2, 64\]"),
        (lambda t: t.pop(PREFIX + GATE), f"missing tensor {GATE}"),
        (lambda t: t.update({GATE: t[PREFIX + GATE]}), f"{GATE} comes twice"),
        (lambda t: t.update({PREFIX + GATE: t[PREFIX + GATE].to(torch.int8)}), f"{GATE} holds numbers of torch.int8"),
        (lambda t: t.clear(), "it has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, said: str) -> None:
    tensors = random_tensors(CONFIG, 2, seed=0)
    change(tensors)
    with pytest.raises(ConfigError, match=said):
        checked(CONFIG, adapter_of(fields(2)), tensors)


def test_a_tensor_beside_the_targets_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown tensor .*and 8 more like that|and [0-9]+ more like that"):
        checked(CONFIG, adapter_of(fields(2, ("dense",))), random_tensors(CONFIG, 2, seed=0))


def test_merging_adds_to_the_matrices_that_have_an_adapter(tmp_path: Path) -> None:
    base = load_reference(TINY)

    def wanted(name: str) -> bool:
        return ".layers.2.mlp.experts.5.up_proj." in name

    folder = write_adapter(tmp_path / "adapter", base.config, rank=2, seed=0, targets=("up_proj",), wanted=wanted)
    (a, b), merged = load_file(folder / "adapter_model.safetensors").values(), load_merged(TINY, folder)
    before, after = base.state_dict(), merged.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.2.mlp.experts.5.up_proj.weight"]
    torch.testing.assert_close(after[changed[0]], before[changed[0]] + 2 * b @ a)


def test_a_folder_without_a_configuration_is_no_adapter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=f"has no {CONFIG_FILE}"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields(2)))
    assert read_adapter(tmp_path).rank == 2
