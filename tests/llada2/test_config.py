"""config.json: the published defaults, and every contradiction refused by its value."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.config import Llada2Config
from tests.toy import make_config


def test_defaults_are_those_of_llada2_mini() -> None:
    c = Llada2Config()
    assert (c.num_hidden_layers, c.hidden_size, c.intermediate_size) == (20, 2048, 5120)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (16, 4, 128)
    assert (c.num_experts, c.num_experts_per_tok, c.num_shared_experts, c.moe_intermediate_size) == (256, 8, 1, 512)
    assert (c.n_group, c.topk_group, c.routed_scaling_factor, c.norm_topk_prob) == (8, 4, 2.5, True)
    assert (c.vocab_size, c.rope_theta, c.max_position_embeddings, c.block_size) == (157184, 600000.0, 32768, 32)
    assert (c.score_function, c.moe_router_enable_expert_bias, c.expert_capacity) == ("sigmoid", True, None)
    assert [c.is_dense(layer) for layer in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        ({"use_bias": True}, "use_bias"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),  # incomplete
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"partial_rotary_factor": 0.2}, "rotary dimension 3"),
        ({"block_size": 0}, "block_size is 0"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1; allowed: an integer from 0"),
        ({"expert_capacity": 48}, "expert_capacity 48 is outside num_experts_per_tok 3 to num_experts 8"),
        ({"n_group": 3}, "n_group 3"),
        ({"n_group": 0}, "n_group 0"),
        ({"n_group": 8}, "expert groups of 1"),
        ({"topk_group": 5}, "topk_group 5"),
        ({"topk_group": 0}, "topk_group 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is outside 1 to 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; allowed: an integer from 1"),
    ],
)
def test_a_contradiction_is_refused_by_its_value(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_config(**wrong)


def test_contradictions_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"'gelu'.*block_size is 0"):
        make_config(hidden_act="gelu", block_size=0)


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_plain_rotary_is_accepted(scaling: dict[str, Any] | None) -> None:
    assert make_config(rope_scaling=scaling).rope_theta == 10000.0


def test_as_many_experts_as_the_groups_have_are_accepted() -> None:
    assert make_config(num_experts_per_tok=4).num_experts_per_tok == 4


def test_rotary_dim_is_the_turned_part_of_a_head() -> None:
    assert Llada2Config().rotary_dim == 64
    assert make_config(partial_rotary_factor=1.0).rotary_dim == 16


def test_shared_experts_are_one_wide_mlp() -> None:
    assert make_config(num_shared_experts=2).shared_intermediate_size == 64
    assert make_config(num_shared_experts=2, moe_shared_expert_intermediate_size=40).shared_intermediate_size == 80
