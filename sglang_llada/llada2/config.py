"""The LLaDA2 configuration: what config.json may say, checked before a layer is built.

Field names are those of the published checkpoints (inclusionAI/LLaDA2.0-mini and its successors).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from sglang_llada.errors import ConfigError

MODEL_TYPE = "llada2_moe"
ARCHITECTURE = "LLaDA2MoeModelLM"
MOST_POSITIONS = 63  # of a block: sets of them are numbers of 64 bits


class Llada2Config(PretrainedConfig):
    """Shapes and routing of a LLaDA2 MoE checkpoint.

    Raises:
        ConfigError: a field contradicts another or names something that this package does not implement.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        use_qkv_bias: bool = False,
        use_bias: bool = False,
        use_qk_norm: bool = True,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 32768,
        rope_theta: float = 600000.0,
        rope_scaling: dict[str, Any] | None = None,
        partial_rotary_factor: float = 0.5,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        num_shared_experts: int = 1,
        n_group: int = 8,
        topk_group: int = 4,
        moe_intermediate_size: int = 512,
        moe_shared_expert_intermediate_size: int | None = None,
        first_k_dense_replace: int = 1,
        score_function: str = "sigmoid",
        moe_router_enable_expert_bias: bool = True,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 2.5,
        expert_capacity: int | None = None,
        block_size: int = 32,
        delete_token_id: int | None = None,
        split_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.use_qkv_bias = use_qkv_bias
        self.use_bias = use_bias
        self.use_qk_norm = use_qk_norm
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.partial_rotary_factor = partial_rotary_factor
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_shared_experts = num_shared_experts
        self.n_group = n_group
        self.topk_group = topk_group
        self.moe_intermediate_size = moe_intermediate_size
        self.moe_shared_expert_intermediate_size = moe_shared_expert_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.score_function = score_function
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.expert_capacity = expert_capacity
        self.block_size = block_size
        self.delete_token_id = delete_token_id
        self.split_token_id = split_token_id
        check_rope(
            rope_scaling or kwargs.get("rope_parameters")
        )  # first: transformers raises KeyError for half a scaling
        super().__init__(tie_word_embeddings=tie_word_embeddings, rope_scaling=rope_scaling, **kwargs)
        check(self)

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the fused shared experts."""
        return (self.moe_shared_expert_intermediate_size or self.moe_intermediate_size) * self.num_shared_experts

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain MLP instead of experts."""
        return layer < self.first_k_dense_replace


def check(config: Llada2Config) -> None:
    """Raise ConfigError with every contradiction in the configuration."""
    c = config
    rules = [
        (c.hidden_act == "silu", f"hidden_act is {c.hidden_act!r}; LLaDA2 uses 'silu'"),
        (c.score_function == "sigmoid", f"score_function is {c.score_function!r}; LLaDA2 routes by 'sigmoid'"),
        (not c.use_bias and not c.use_qkv_bias, "use_bias and use_qkv_bias must be false: no LLaDA2 layer has a bias"),
        (c.use_qk_norm, "use_qk_norm must be true: LLaDA2 normalises queries and keys"),
        (
            c.num_attention_heads % c.num_key_value_heads == 0,
            f"num_attention_heads {c.num_attention_heads} is no multiple of "
            f"num_key_value_heads {c.num_key_value_heads}",
        ),
        (c.rotary_dim % 2 == 0, f"rotary dimension {c.rotary_dim} (head_dim x partial_rotary_factor) is odd"),
        (1 <= c.block_size <= MOST_POSITIONS, f"block_size is {c.block_size}; allowed: 1 to {MOST_POSITIONS}"),
        (
            0 <= c.first_k_dense_replace <= c.num_hidden_layers,
            f"first_k_dense_replace {c.first_k_dense_replace} is outside 0 to num_hidden_layers {c.num_hidden_layers}",
        ),
        (
            c.expert_capacity is None or c.num_experts_per_tok <= c.expert_capacity <= c.num_experts,
            f"expert_capacity {c.expert_capacity} is outside num_experts_per_tok {c.num_experts_per_tok} "
            f"to num_experts {c.num_experts}",
        ),
        (
            c.expert_capacity is not None or (c.n_group >= 1 and c.num_experts % c.n_group == 0),
            f"num_experts {c.num_experts} does not split into n_group {c.n_group} equal groups",
        ),
    ]
    wrong = [message for holds, message in rules if not holds]
    if not wrong and c.expert_capacity is None:  # which replaces groups
        group = c.num_experts // c.n_group
        if group < 2:
            wrong.append(f"expert groups of {group}: a group's score is the sum of its two best, so 2 are needed")
        if not 1 <= c.topk_group <= c.n_group:
            wrong.append(f"topk_group {c.topk_group} is outside 1 to n_group {c.n_group}")
        elif not 1 <= c.num_experts_per_tok <= c.topk_group * group:
            wrong.append(
                f"num_experts_per_tok {c.num_experts_per_tok} is outside 1 to {c.topk_group * group}, "
                f"the experts of topk_group {c.topk_group} groups"
            )
    if wrong:
        raise ConfigError("config.json: " + "; ".join(wrong))


def check_rope(scaling: dict[str, Any] | None) -> None:
    """Raise ConfigError if rotary parameters, under either of transformers' names, ask for a scaling."""
    scaling = scaling or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in (None, "default"):
        raise ConfigError(f"config.json: rope_scaling is {scaling}; only plain rotary is implemented")
