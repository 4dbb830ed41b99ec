"""The strict weight map: nothing missing, unknown, misshapen or doubled gets past, whatever the spelling."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.weights import Ledger, canonical, check_files, expected, load_reference
from tests.toy import make_checkpoint, make_config, make_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def state(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_reference(folder).state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def prefixed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        inner = name.removeprefix("model.")
        yield (f"model.language_model.{inner}" if inner != name else f"model.{name}"), tensor


def fused(tensors: dict[str, Tensor], leaf: str = "") -> dict[str, Tensor]:
    stacks: dict[str, list[Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if found := re.match(r"(.*\.mlp\.experts)\.\d+\.(\w+)\.weight$", name):
            stacks.setdefault(f"{found[1]}.{found[2]}{leaf}", []).append(tensor)
        else:
            rest[name] = tensor
    return rest | {name: torch.stack(parts) for name, parts in stacks.items()}


def assert_loads(folder: Path, state: dict[str, Tensor]) -> None:
    got = load_reference(folder).state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_shared_experts": 0},
        {"first_k_dense_replace": 3},
        {"moe_router_enable_expert_bias": False},
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 40},
    ],
)
def test_expected_is_the_reference_network(overrides: dict[str, int]) -> None:
    config = make_config(**overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in make_model(config).state_dict().items()}
    assert expected(config) == shapes


def test_a_missing_tensor_is_refused(folder: Path, state: dict[str, Tensor]) -> None:
    del state[UP]
    write(folder, state)
    with pytest.raises(ConfigError, match=f"missing tensor {UP}"):
        load_reference(folder)


def test_an_unknown_tensor_is_refused(folder: Path, state: dict[str, Tensor]) -> None:
    write(folder, state | {"model.layers.9.extra": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"unknown tensor model\.layers\.9\.extra \[3\]"):
        load_reference(folder)


def test_a_misshapen_tensor_is_refused(folder: Path, state: dict[str, Tensor]) -> None:
    write(folder, state | {UP: state[UP].T})
    with pytest.raises(ConfigError, match=re.escape(f"{UP} has shape [64, 96], expected [96, 64]")):
        load_reference(folder)


def test_a_doubled_tensor_is_refused(folder: Path, state: dict[str, Tensor]) -> None:
    write(folder, state | {"model.language_model.norm.weight": state["model.norm.weight"].clone()})
    with pytest.raises(ConfigError, match="model.norm.weight comes twice"):
        load_reference(folder)


def test_an_expert_too_many_in_a_fused_tensor_is_refused(folder: Path, state: dict[str, Tensor]) -> None:
    tensors = fused(state)
    name = "model.layers.1.mlp.experts.up_proj"
    write(folder, tensors | {name: torch.cat((tensors[name], tensors[name][:1]))})
    with pytest.raises(ConfigError, match=r"unknown tensor model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight"):
        load_reference(folder)


def test_all_faults_come_in_one_message_that_stays_short(folder: Path, state: dict[str, Tensor]) -> None:
    kept = {name: tensor for name, tensor in state.items() if ".mlp.experts." not in name}  # 2 x 8 x 3 are missing
    write(folder, kept | {"extra": torch.zeros(1), UP: torch.zeros(2, 2)})
    with pytest.raises(ConfigError) as error:
        load_reference(folder)
    message = str(error.value)
    assert "unknown tensor extra [1]" in message
    assert f"{UP} has shape [2, 2]" in message
    assert message.count("missing tensor") == 8
    assert "and 40 more like that" in message


@pytest.mark.parametrize("leaf", ["", ".weight"])
def test_both_spellings_load_equal(folder: Path, state: dict[str, Tensor], leaf: str) -> None:
    for tensors in (dict(prefixed(state)), fused(state, leaf), dict(prefixed(fused(state, leaf)))):
        write(folder, tensors)
        assert_loads(folder, state)


def test_an_index_says_which_files_to_read(folder: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    write(folder, {"stale": torch.zeros(1)})  # not in the index, so not read
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_loads(folder, state)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \.safetensors files"):
        load_reference(folder)


def test_a_file_of_the_index_that_is_not_there_is_named(folder: Path, state: dict[str, Tensor]) -> None:
    index = {"weight_map": {name: f"{name[0]}.safetensors" for name in state}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names files that are not there: l\.safetensors, m\.safetensors"):
        check_files(folder)


def test_a_file_that_is_cut_short_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        check_files(folder)


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_embeddings_are_the_head(folder: Path, state: dict[str, Tensor], stored_twice: bool) -> None:
    make_config(tie_word_embeddings=True).save_pretrained(folder)
    embeddings = state["model.word_embeddings.weight"]
    head = {"lm_head.weight": embeddings.clone()} if stored_twice else {}
    write(folder, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"} | head)
    assert torch.equal(load_reference(folder).lm_head.weight, embeddings)


def test_the_router_stays_fp32(folder: Path) -> None:
    model = load_reference(folder, torch.bfloat16).state_dict()
    assert model["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert model["model.layers.1.mlp.gate.expert_bias"].dtype == torch.float32
    assert model[UP].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "block", "fits"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (3, 2), (32, 48), True),  # [96, 64], rounded up
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (3, 1), (32, 48), False),
        ("model.layers.1.mlp.experts.7.down_proj.weight_scale_inv", (2, 1), (32, 48), True),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (3, 2), None, False),
        ("model.layers.0.input_layernorm.weight_scale_inv", (2,), (32, 48), False),
        ("model.layers.1.mlp.gate.weight_scale_inv", (1, 2), (32, 48), False),
        ("model.word_embeddings.weight_scale_inv", (9, 2), (32, 48), False),
        ("model.layers.8.mlp.up_proj.weight_scale_inv", (3, 2), (32, 48), False),
    ],
)
def test_scales_belong_to_quantised_matrices(
    name: str, shape: tuple[int, ...], block: tuple[int, int] | None, fits: bool
) -> None:
    assert Ledger(make_config(), block).tick(name, torch.empty(shape)) is fits


def test_fused_scales_are_split_by_expert() -> None:
    names = [
        name for name, _ in canonical([("model.layers.1.mlp.experts.up_proj.weight_scale_inv", torch.ones(2, 1, 1))])
    ]
    assert names == [f"model.layers.1.mlp.experts.{e}.up_proj.weight_scale_inv" for e in range(2)]


def test_8_bit_weights_need_their_scales_and_a_declaration() -> None:
    name, weight = "model.layers.0.mlp.up_proj.weight", torch.empty(96, 64, dtype=torch.float8_e4m3fn)
    declared, undeclared = Ledger(make_config(), (32, 32)), Ledger(make_config())
    assert declared.tick(name, weight) and undeclared.tick(name, weight)
    with pytest.raises(ConfigError, match=f"missing tensor .*{name}_scale_inv|and .* more like that"):
        declared.close()
    assert declared.scales == {f"{name}_scale_inv"}
    with pytest.raises(ConfigError, match=f"{name} is 8 bits wide"):
        undeclared.close(complete=False)
