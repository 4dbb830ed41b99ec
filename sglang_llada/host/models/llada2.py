"""The LLaDA2 MoE network in the host's layers, for any parallelism and quantisation that they know.

Unlike the host's own class, the forward ends with hidden states: logits exist only where the executor asks for them, at
open positions. Attention layers are ENCODER_ONLY, which every backend takes as "not causal"; the end of what a row sees
is its sequence length, so a row sees all blocks up to its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.distributed.parallel_state import get_attn_tp_group, get_tp_group
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary import append_stages, declare_attn, declare_ffn, is_dense_ffn_fully_dp
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import (
    TopKOutputFormat,
    build_precomputed_topk_output,
    precomputed_topk_postprocess_is_noop,
)
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.models.utils import WeightsMapper, apply_qk_norm
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_exec, get_lora, get_parallel
from sglang.srt.utils import add_prefix, make_pp_layers
from torch import Tensor, nn

from sglang_llada.decode.head import Exchange, Head
from sglang_llada.errors import ConfigError
from sglang_llada.host.models.parts.loading import load_tensors
from sglang_llada.host.models.parts.topk import HostTopK
from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.router import products, router_of, split, summed
from sglang_llada.llada2.weights import PREFIXES, as_it_is


class Attention(nn.Module):
    """Fused query, key and value; per-head norms; rotary on the first part of each head."""

    def __init__(self, c: Llada2Config, layer_id: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        ranks = get_parallel().attn_tp_size
        self.heads = c.num_attention_heads // ranks
        self.kv_heads = max(1, c.num_key_value_heads // ranks)
        self.head_dim = c.head_dim
        self.query_key_value = QKVParallelLinear(
            c.hidden_size,
            c.head_dim,
            c.num_attention_heads,
            c.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("query_key_value", prefix),
            parallel_group="attn_tp",
        )
        self.query_layernorm = RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.key_layernorm = RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.dense = RowParallelLinear(
            c.num_attention_heads * c.head_dim,
            c.hidden_size,
            bias=False,
            quant_config=quant_config,
            reduce_results=False,
            prefix=add_prefix("dense", prefix),
            parallel_group="attn_tp",
        )
        self.rotary_emb = get_rope(
            c.head_dim,
            rotary_dim=c.rotary_dim,
            max_position=c.max_position_embeddings,
            base=c.rope_theta,
            rope_scaling=None,
        )
        self.attn = RadixAttention(
            self.heads,
            c.head_dim,
            c.head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            layer_id=layer_id,
            attn_type=AttentionType.ENCODER_ONLY,
            quant_config=quant_config,  # by which a checkpoint may bring scales of the KV cache
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, positions: Tensor, x: Tensor, forward_batch: Any) -> Tensor:
        """x [N, H]; N may be 0 on an idle rank."""
        if x.shape[0] == 0:
            return x
        qkv, _ = self.query_key_value(x)
        kv_size = self.kv_heads * self.head_dim
        q, k, v = qkv.split([self.heads * self.head_dim, kv_size, kv_size], dim=-1)
        pool = get_token_to_kv_pool()
        if self.in_one_kernel(qkv, pool):
            q, k = self.turn_and_write(positions, qkv, pool, forward_batch)
        else:
            norms = {"q_norm": self.query_layernorm, "k_norm": self.key_layernorm}
            q, k = apply_qk_norm(q=q, k=k, **norms, head_dim=self.head_dim)
            q, k = self.rotary_emb(positions, q, k)
            self.write(k, v, forward_batch)
        out, _ = self.dense(self.attn(q, k, v, forward_batch, save_kv_cache=False))
        return out

    def in_one_kernel(self, qkv: Tensor, pool: Any) -> bool:
        """Whether norms, rotation and the write of KV are one kernel: the pool must hold KV as it is, by token."""
        return (
            has_kernels()
            and type(pool) is MHATokenToKVPool
            and pool.store_dtype == qkv.dtype
            and pool.get_key_buffer(self.attn.layer_id).dim() == 3
            and self.attn.k_scale is None
            and type(self.rotary_emb) is RotaryEmbedding
            and self.query_layernorm.variance_epsilon == self.key_layernorm.variance_epsilon
        )

    def turn_and_write(self, positions: Tensor, qkv: Tensor, pool: Any, forward_batch: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys ready for attention; KV is written."""
        from sglang_llada.llada2.rotary_triton import rotate_and_store

        q, k = rotate_and_store(
            qkv,
            positions,
            self.query_layernorm.weight,
            self.key_layernorm.weight,
            self.rotary_emb.cos_sin_cache,
            self.query_layernorm.variance_epsilon,
            pool.get_key_buffer(self.attn.layer_id),
            pool.get_value_buffer(self.attn.layer_id),
            KVWriteLoc.for_layer(forward_batch, self.attn).loc,
        )
        return q, k

    def write(self, k: Tensor, v: Tensor, forward_batch: Any) -> None:
        """Write the KV of all rows before any row reads.

        A row reads what earlier rows of its request write in the same forward. Some backends write after they have
        read (FlashInfer with ragged wrappers, which it always takes in a CUDA graph of diffusion rows), so this is not
        left to them.
        """
        k, v = k.view(-1, self.kv_heads, self.head_dim), v.view(-1, self.kv_heads, self.head_dim)
        if self.attn.k_scale is not None:  # the pool would scale what attention still needs
            k, v = k.clone(), v.clone()
        loc = KVWriteLoc.for_layer(forward_batch, self.attn)
        get_token_to_kv_pool().set_kv_buffer(self.attn, loc, k, v, self.attn.k_scale, self.attn.v_scale)


class MLP(nn.Module):
    """SwiGLU, dense or shared; the caller reduces over ranks."""

    def __init__(self, hidden: int, width: int, quant_config: Any, prefix: str, parallel_group: str = "tp") -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [width] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
            parallel_group=parallel_group,
        )
        self.down_proj = RowParallelLinear(
            width,
            hidden,
            bias=False,
            quant_config=quant_config,
            reduce_results=False,
            prefix=add_prefix("down_proj", prefix),
            parallel_group=parallel_group,
        )
        self.act = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H]."""
        if x.shape[0] == 0:
            return x
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act(gate_up))
        return out


class Router(nn.Module):
    """Router logits in fp32 whatever the model's dtype: a bf16 router changes which experts are chosen."""

    def __init__(self, c: Llada2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, dtype=torch.float32), requires_grad=False)
        bias = torch.zeros(c.num_experts, dtype=torch.float32)
        if c.moe_router_enable_expert_bias:
            self.expert_bias = nn.Parameter(bias, requires_grad=False)
        else:
            self.register_buffer("expert_bias", bias, persistent=False)

        self.parts: Tensor | None = None

    def derive(self) -> None:
        """Split the weight as it is now, where products of bf16 are faster; in place, because graphs read the parts."""
        if not has_kernels():
            return
        parts = split(self.weight)
        self.parts = parts if self.parts is None else self.parts.copy_(parts)

    def by_part(self, x: Tensor) -> Tensor | None:
        """Logits by part (router.products) of x [N, H]; None where there is no gain."""
        if self.parts is None or x.dtype != torch.bfloat16:
            return None
        return products(x, self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Logits fp32 [N, E] of x [N, H]."""
        by_part = self.by_part(x)
        return F.linear(x.float(), self.weight) if by_part is None else summed(by_part)


class MoE(nn.Module):
    """Routed and shared experts; the caller reduces over ranks."""

    def __init__(self, c: Llada2Config, layer_id: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.gate = Router(c)
        self.route = router_of(c)
        grouped: dict[str, Any] = {
            "use_grouped_topk": True,
            "num_expert_group": c.n_group,
            "topk_group": c.topk_group,
            "correction_bias": self.gate.expert_bias.data,
            "scoring_func": "sigmoid",
        }
        self.topk = HostTopK(
            top_k=c.num_experts_per_tok,
            layer_id=layer_id,
            renormalize=c.norm_topk_prob,
            routed_scaling_factor=c.routed_scaling_factor,
            **(grouped if c.expert_capacity is None else {"custom_routing_function": self.by_block}),
        )
        # A shared expert is one more expert that every token visits, where that is possible.
        self.joined = int(joins_shared_expert(c, quant_config))
        if self.joined:
            from sglang_llada.host.models.parts.experts import joined  # its module of the host's is for GPUs

            joined(c.num_experts)
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=c.num_experts + self.joined + get_exec().moe.ep_num_redundant_experts,
            num_fused_shared_experts=self.joined,
            top_k=c.num_experts_per_tok + self.joined,
            layer_id=layer_id,
            hidden_size=c.hidden_size,
            intermediate_size=c.moe_intermediate_size,
            quant_config=quant_config,
            routed_scaling_factor=c.routed_scaling_factor,
            prefix=add_prefix("experts", prefix),
        )
        # The scaling factor is applied once: by the runner, or here where the runner leaves it to the router.
        self.topk.topk_config.apply_routed_scaling_factor_on_output = (
            self.experts.should_fuse_routed_scaling_factor_in_topk
        )
        self.topk.bind(self.experts)
        self.shared_experts = (
            MLP(c.hidden_size, c.shared_intermediate_size, quant_config, add_prefix("shared_experts", prefix))
            if c.num_shared_experts and not self.joined
            else None
        )
        # The weights of routed experts and of a shared one among them, as whoever sums them up expects.
        scaled = self.experts.should_fuse_routed_scaling_factor_in_topk
        self.scale = c.routed_scaling_factor if scaled else 1.0
        self.shared_weight = self.joined * self.scale / c.routed_scaling_factor
        self.groups: tuple[int, int, int, bool] | None = None  # where routing is one kernel of ours
        if routes_in_one(c) and self.topk.topk_config.output_format is TopKOutputFormat.STANDARD:
            self.groups = c.n_group, c.topk_group, c.num_experts_per_tok, c.norm_topk_prob

    def by_block(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Block routing, as the host's TopK calls it; tokens come in whole blocks, because a row is one."""
        routing = self.route(gating_output, self.gate.expert_bias)
        return routing.weights, routing.ids.int()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H]."""
        shared = None if self.shared_experts is None else self.shared_experts(x)
        routed = self.experts(x, self.choose(x))
        return routed if shared is None else routed + shared

    def choose(self, x: Tensor) -> Any:
        """The experts of x [N, H] and their weights, as the expert layer takes them."""
        config = self.topk.topk_config
        if self.groups is not None and precomputed_topk_postprocess_is_noop(config, *self.topk.routing_inputs()):
            by_part = self.gate.by_part(x)
            if by_part is not None:
                bias = self.gate.expert_bias
                from sglang_llada.llada2.router_triton import route

                weights, ids = route(by_part, bias, *self.groups, self.scale, self.shared_weight)
                return build_precomputed_topk_output(weights, ids, config, self.topk.layer_id)
        chosen = self.topk(x, self.gate(x))
        if not self.joined:
            return chosen
        weights, ids = chosen.topk_weights, chosen.topk_ids
        weights = torch.cat((weights, weights.new_full((len(ids), 1), self.shared_weight)), dim=-1)
        ids = torch.cat((ids, ids.new_full((len(ids), 1), len(self.gate.expert_bias))), dim=-1)
        return chosen._replace(topk_weights=weights, topk_ids=ids)


def joins_shared_expert(c: Llada2Config, quant_config: Any) -> bool:
    """Whether the shared expert can stand with the routed ones: they are alike, and one kernel of this GPU runs all."""
    return (
        has_kernels()
        and quant_config is None
        and c.num_shared_experts == 1
        and c.shared_intermediate_size == c.moe_intermediate_size
        and get_parallel().moe_ep_size == 1
        and get_exec().moe.ep_num_redundant_experts == 0
        and not get_lora().enable_lora  # adapters have names for either
        # Who counts or returns the experts that tokens visit means routed ones.
        and get_exec().moe.expert_distribution_recorder_mode is None
        and not get_exec().features.enable_return_routed_experts
        and get_moe_a2a_backend().is_none()
        and (get_moe_runner_backend().is_auto() or get_moe_runner_backend().is_triton())
        and torch.cuda.get_device_capability()[0] < 10  # newer devices have expert kernels of their own
    )


def routes_in_one(c: Llada2Config) -> bool:
    """Whether routing is one kernel of ours."""
    sizes = (c.num_experts, c.n_group)
    return has_kernels() and c.expert_capacity is None and all(size & (size - 1) == 0 for size in sizes)


def has_kernels() -> bool:
    """Whether the model runs on a GPU that Triton compiles for."""
    return current_platform.is_cuda()


class Layer(nn.Module):
    """Attention and feed-forward between the host's boundaries, which hold norms, residuals and collectives."""

    def __init__(self, c: Llada2Config, layer_id: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.attention = Attention(c, layer_id, quant_config, add_prefix("attention", prefix))
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp: nn.Module
        if c.is_dense(layer_id):
            group = "replicated" if is_dense_ffn_fully_dp() else "tp"
            self.mlp = MLP(c.hidden_size, c.intermediate_size, quant_config, add_prefix("mlp", prefix), group)
        else:
            self.mlp = MoE(c, layer_id, quant_config, add_prefix("mlp", prefix))
        attn, ffn = self.stage_facts(c, layer_id)
        self.attn_boundary, self.ffn_boundary = append_stages(
            (attn, self.input_layernorm), (ffn, self.post_attention_layernorm)
        )

    @staticmethod
    def stage_facts(c: Llada2Config, layer_id: int) -> tuple[Any, Any]:
        """What the host's boundaries must know of a layer."""
        return (
            declare_attn(),
            declare_ffn(sparse=not c.is_dense(layer_id), next_layer_sparse=not c.is_dense(layer_id + 1)),
        )

    def forward(self, positions: Tensor, x: Tensor, forward_batch: Any) -> Tensor:
        x = self.attn_boundary.prepare(hidden_states=x, forward_batch=forward_batch)
        x = self.attention(positions, x, forward_batch)
        x = self.attn_boundary.finish(x, forward_batch)
        x = self.ffn_boundary.prepare(hidden_states=x, forward_batch=forward_batch)
        return self.ffn_boundary.finish(self.mlp(x), forward_batch)


class Trunk(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, c: Llada2Config, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            c.vocab_size,
            c.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("word_embeddings", prefix),
            use_attn_tp_group=is_dp_attention_enabled(),
        )
        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            c.num_hidden_layers,
            lambda idx, prefix: Layer(c, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
            stage_facts=partial(Layer.stage_facts, c),
        )
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> Tensor:
        x = self.word_embeddings(input_ids)
        residual_batch.start(forward_batch)
        counts = get_global_expert_distribution_recorder()
        for i, layer in enumerate(self.layers):
            with counts.with_current_layer(i):
                x = layer(positions, x, forward_batch)
        x = residual_batch.complete_output(x, forward_batch)
        if not forward_batch.forward_mode.is_idle():
            x = residual_batch.final_norm(x, forward_batch, self.norm)
        return x


class LLaDA2MoeModelLM(nn.Module):
    """The model class that the host finds for `architectures: [LLaDA2MoeModelLM]`."""

    # By these the host finds the layers that a quantised checkpoint names: to leave alone, or to treat in some way.
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_sglang_mapper = WeightsMapper(orig_to_new_prefix=PREFIXES)

    def __init__(self, config: Llada2Config, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config  # read by the host's loaders
        self.model = Trunk(config, quant_config, add_prefix("model", prefix))
        if config.tie_word_embeddings:
            self.lm_head = self.model.word_embeddings
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
                use_attn_tp_group=get_parallel().enable_dp_lm_head,
            )
        check_head(self.lm_head)
        self.wanted: set[str] | None = None  # names of the tensors that it was loaded from; written by load_tensors()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> LogitsProcessorOutput:
        """Hidden states after the last norm of all tokens, [N, H], in the host's output record."""
        hidden = self.model(input_ids, positions, forward_batch)
        # The host cuts padded rows off both; logits of no width, because those that matter are selected from later.
        return LogitsProcessorOutput(next_token_logits=hidden[:, :0], hidden_states=hidden)

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[Tensor]]:
        """The matrices of each layer's experts, as whoever moves experts between ranks wants them."""
        moes = {i: layer.mlp for i, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoE)}
        return {i: [matrix.data for matrix in moe.experts.parameters()] for i, moe in moes.items()}

    @property
    def head(self) -> Head:
        """This rank's rows of the output embedding, without the host's padding."""
        shard = self.lm_head.shard_indices
        return Head(
            self.lm_head.weight[: shard.num_org_elements],
            shard.org_vocab_start_index,
            slots=self.lm_head.num_embeddings_per_partition,
            vocabulary=self.config.vocab_size,
            invariant=get_exec().deterministic.enable_deterministic_inference,
        )

    @property
    def exchange(self) -> Exchange | None:
        """Gathers a tensor of every rank that holds a part of the head; None if this one holds all of it."""
        return None if self.lm_head.tp_size == 1 else self._gather

    def _gather(self, mine: Tensor) -> Sequence[Tensor]:
        group = get_attn_tp_group() if self.lm_head.use_attn_tp_group else get_tp_group()
        return group.all_gather(mine, dim=0).chunk(self.lm_head.tp_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint, or later part of one (weight updates).

        Raises:
            ConfigError: tensors are unknown, misshapen, doubled or, the first time, missing.
        """
        load_tensors(self, weights)
        self.post_load_weights()

    def post_load_weights(self) -> None:
        """Derive what is made of weights; also called by the host where weights come by another way."""
        for module in self.modules():
            if isinstance(module, Router):
                module.derive()

    @property
    def start_layer(self) -> int:
        """First layer of this rank; the host sizes the KV pool by it."""
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        """One past the last layer of this rank."""
        return self.model.end_layer

    def get_input_embeddings(self) -> nn.Module:
        """Asked for by the host."""
        return self.model.word_embeddings

    @classmethod
    def get_model_config_for_expert_location(cls, config: Llada2Config) -> ModelConfigForExpertLocation:
        """What expert load balancing must know."""
        return ModelConfigForExpertLocation(
            num_layers=config.num_hidden_layers, num_logical_experts=config.num_experts, num_groups=config.n_group
        )


def check_head(head: nn.Module) -> None:
    """Raise ConfigError if the output embedding is quantised: selection multiplies by it as it is."""
    if [name for name, param in head.named_parameters() if not as_it_is(param)] or not hasattr(head, "weight"):
        raise ConfigError(
            f"lm_head is quantised ({type(head.quant_method).__name__}); allowed: a checkpoint that leaves it as it is"
        )


EntryClass = LLaDA2MoeModelLM
