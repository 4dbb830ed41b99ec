"""Published checkpoints: each config.json is read right, and files of the published sizes are what it asks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import read_facts
from sglang_llada.llada2.config import Llada2Config, remarks
from sglang_llada.llada2.report import report
from sglang_llada.llada2.weights import check_files, load_reference
from tests.published.layout import EXAMPLES, HERE, LAYOUTS, published, write, write_full_tokenizer, write_headers

UNI = "LLaDA2.0-Uni"
SHAPES = {"mini": (2048, 20, 16), "flash": (4096, 32, 32)}  # hidden, layers, heads


def config_of(name: str, **changes: Any) -> Llada2Config:
    """A published config.json with changes; None takes a field out."""
    fields = published(name) | changes
    return Llada2Config(**{key: value for key, value in fields.items() if value is not None and key != "model_type"})


def test_there_is_a_layout_of_every_published_configuration() -> None:
    assert {file.name.removesuffix(".config.json") for file in HERE.glob("*.json")} == {*LAYOUTS, UNI}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_configuration_is_read_as_it_stands(name: str) -> None:
    c, fields = config_of(name), published(name)
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == SHAPES["flash" if "flash" in name else "mini"]
    assert c.rope_theta == (3_000_000 if "2.2" in name else 600_000)
    assert (c.rotary_dim, c.partial_rotary_factor, c.rope_parameters) == (64, 0.5, None)
    assert (c.eos_token_id, c.mask_token_id, c.pad_token_id) == (None, None, 156892)
    assert (c.block_size, c.expert_capacity) == (32, 48 if "2.2" in name else None)
    assert c.max_position_embeddings == fields["max_position_embeddings"]
    assert remarks(fields) == []


def test_the_layout_of_20_has_48_fields() -> None:
    assert len(published("LLaDA2.0-flash")) == 48
    assert not {"eos_token_id", "bos_token_id", "mask_token_id", "block_size"} & published("LLaDA2.0-flash").keys()


def test_a_model_of_images_is_refused_in_a_sentence_that_says_why() -> None:
    with pytest.raises(
        ConfigError, match=r"^config.json: image_token_offset is 157184: this is a model of text and im"
    ):
        config_of(UNI)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rotary_dim": 128}, r"rotary_dim is 128, but head_dim 128 x partial_rotary_factor 0.5 is 64.0"),
        ({"norm_head": True}, "norm_head is True; allowed: False"),
        ({"norm_softmax": True}, "norm_softmax is True; allowed: False"),
        ({"use_sliding_window": True}, "use_sliding_window is True; allowed: False"),
        ({"router_dtype": "bf16"}, "router_dtype is 'bf16'; allowed: 'fp32' or 'float32'"),
        ({"using_split_qkv_in_self_attention": True}, "using_split_qkv_in_self_attention is True; allowed: False"),
        ({"use_rmsnorm": False}, "use_rmsnorm is False; allowed: True"),
        ({"num_experts": "256"}, "num_experts is '256'; allowed: an integer from 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; allowed: true or false"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; allowed: an integer from 1"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id is \[1, '2'\]; allowed: an integer or a list of integers"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta is 600000 but rope_parameters.rope_theta is 5000000.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 1.0}},
            "partial_rotary_factor is 0.5 but rope_parameters.partial_rotary_factor is 1.0",
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, "mrope_section.*only plain rotary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters.full_attention is .*yarn"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; allowed: a mapping"),
        ({"rope_theta": "600000"}, "rope_theta is '600000'; allowed: a number"),
    ],
)
def test_what_contradicts_what_is_computed_is_refused_with_both_values(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_of("LLaDA2.0-mini", **wrong)


PLAIN = {"rope_type": "default", "rope_theta": 7e6, "partial_rotary_factor": 0.25}
NOWHERE = {"rope_theta": None, "partial_rotary_factor": None, "rotary_dim": None}


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_parameters": PLAIN},
        {"rope_scaling": PLAIN},
        {"rope_scaling": {"type": "default", "rope_theta": 7e6, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"full_attention": PLAIN}},
        {"rope_parameters": {"rope_theta": 7_000_000}, "partial_rotary_factor": 0.25},
        {"rope_theta": 7e6, "rotary_dim": 32},
        {"rope_theta": 7e6, "partial_rotary_factor": 0.25, "rope_parameters": PLAIN, "rope_scaling": PLAIN},
    ],
)
def test_rotary_base_and_factor_are_read_wherever_they_stand(stated: dict[str, Any]) -> None:
    c = config_of("LLaDA2.0-mini", **NOWHERE | stated)
    assert (c.rope_theta, c.partial_rotary_factor, c.rotary_dim) == (7e6, 0.25, 32)


def test_a_configuration_that_is_saved_again_says_the_same(tmp_path: Path) -> None:
    c = config_of("LLaDA2.2-mini-rope-parameters-only")
    c.save_pretrained(tmp_path)
    again = Llada2Config(**json.loads((tmp_path / "config.json").read_text()))
    assert again.to_dict() == c.to_dict()


def test_what_nobody_knows_is_named_once_and_so_is_what_is_guessed() -> None:
    fields = published("LLaDA2.0-mini") | {"new_trick": 1, "other_trick": None, "rope_theta": None, "n_group": None}
    assert remarks(fields) == [
        "config.json: nothing is known of new_trick, other_trick, which changes nothing here",
        "config.json does not say n_group, rope_theta; taken as in LLaDA2.0-mini: n_group 8, rope_theta 600000.0",
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_that_config_leaves_out_come_from_the_tokenizer(name: str, tmp_path: Path) -> None:
    facts, trained = read_facts(write(name, tmp_path)), read_facts(EXAMPLES / LAYOUTS[name].trained)
    assert facts == trained


@pytest.mark.parametrize("name", ["LLaDA2.0-mini", "LLaDA2.2-mini", "dFactory-mini-merged"])
def test_tensors_of_a_layout_are_the_trained_ones(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path)
    check_files(folder)
    got, want = load_reference(folder), load_reference(EXAMPLES / LAYOUTS[name].trained)
    for tensor, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[tensor], value.bfloat16().float()) or (
            "expert_bias" in tensor and torch.equal(got.state_dict()[tensor], value)
        )
    assert (got.config.rope_theta, got.config.rotary_dim) == (want.config.rope_theta, want.config.rotary_dim)


@pytest.mark.parametrize(
    ("name", "shards", "tensors", "size"),
    [("LLaDA2.1-mini", 8, 14_813, 32_511_296_512), ("LLaDA2.1-flash", 32, 24_161, 205_779_426_304)],
)
def test_files_of_the_published_size_are_what_config_asks_for(
    name: str, shards: int, tensors: int, size: int, tmp_path: Path
) -> None:
    assert write_headers(name, tmp_path, shards) == size
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == tensors
    check_files(tmp_path)


@pytest.fixture(scope="module")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of the published size."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_full_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["LLaDA2.0-flash", "LLaDA2.1-mini", "LLaDA2.2-mini-rope-parameters-only", "LLaDA2.2-flash"]
)
def test_the_report_says_what_is_read_and_where_it_stands(name: str, full_tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(full_tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(published(name)))
    out = report(str(folder), folder)
    said = dict(out.facts)
    assert out.refusals == [] and out.remarks == []
    assert said["mask"] == "156895 (token <|mask|> of the tokenizer)"
    assert said["stops"] == "156892 (eos_token of the tokenizer); 156900 (token <|role_end|> of the tokenizer)"
    assert said["pad"] == "156892 (pad_token_id of config.json, pad_token of the tokenizer)"
    algorithm = "levenshtein" if "2.2" in name else "joint_threshold" if "2.1" in name else "threshold"
    assert said["algorithm"].startswith(f"{algorithm} (--dllm-algorithm ")
    assert said["rotary"].startswith("base 3,000,000 (" if "2.2" in name else "base 600,000 (rope_theta)")
    assert ("rope_parameters.rope_theta" in said["rotary"]) == ("rope_parameters" in published(name))
    assert said["routing"].startswith("8 of 256 experts, of the 48" if "2.2" in name else "8 of 256 experts, of the 4")
    assert said["template"] == "tokenizer_config.json"
    assert said["weights"] == "no files here, so tensors are not checked"


def test_the_report_counts_tensors(tmp_path: Path) -> None:
    said = dict(report("mine", write("dFactory-mini-merged", tmp_path)).facts)
    assert said["weights"].startswith("3 of 3 files here")
    assert said["tensors"] == "54, as config.json asks"


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_class(folder: Path) -> None:
    change(folder / "config.json", architectures=["LlamaForCausalLM"])


def spoil_rotary(folder: Path) -> None:
    change(folder / "config.json", rotary_dim=4)


def spoil_scaling(folder: Path) -> None:
    change(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def spoil_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


def spoil_stop(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=400)


def spoil_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_class, "architectures is ['LlamaForCausalLM']; allowed: ['LLaDA2MoeModelLM']"),
        (spoil_rotary, "rotary_dim is 4, but head_dim 32 x partial_rotary_factor 0.5 is 16.0"),
        (spoil_scaling, "rope_scaling is {'rope_type': 'yarn', 'factor': 4.0}; only plain rotary is implemented"),
        (spoil_tokenizer, "the tokenizer cannot be read: "),
        (spoil_generation, "generation_config.json holds []; needed is a JSON object"),
        (spoil_stop, "stop token id 400 (eos_token_id of config.json) is outside the vocabulary of 400"),
        (spoil_shard, "names files that are not there: model-00002-of-00003.safetensors"),
    ],
)
def test_the_report_says_what_a_start_would_refuse(spoil: Any, told: str, tmp_path: Path) -> None:
    folder = write("LLaDA2.0-mini", tmp_path)
    spoil(folder)
    assert [told in refusal for refusal in report(str(folder), folder).refusals] == [True]


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    folder = write("LLaDA2.0-mini", tmp_path)
    spoil_config(folder)
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        report(str(folder), folder)
