"""Attention of rows under one name in the host, `llada_rows`: on a GPU our kernel, on the CPU torch (cpu.py).

The one on a GPU plans nothing, copies nothing and reads nothing back: the kernel finds lengths and pages in the batch's
own tensors when it runs, which in a CUDA graph are the static ones. It is for models that write the KV of a forward
before they attend, and whose layers are not causal; others are refused when the model is loaded.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import Tensor

from sglang_llada.card import card_of
from sglang_llada.errors import ConfigError, IntegrityError
from sglang_llada.host.attention import cpu as cpu_attention
from sglang_llada.host.backends import ATTENTION_BACKEND
from sglang_llada.llada2 import attention_triton

logger = logging.getLogger(__name__)


def register() -> None:
    """Make `--attention-backend llada_rows` resolve."""
    register_attention_backend(ATTENTION_BACKEND)(create)


def create(model_runner: Any) -> AttentionBackend:
    """The backend of a loaded model.

    Raises:
        ConfigError: the model's attention has features that this backend would leave out silently.
    """
    on_cpu = torch.device(model_runner.device).type == "cpu"
    refuse_unsupported(model_runner.model, causal=on_cpu)
    return cpu_attention.RowAttention(model_runner) if on_cpu else KernelAttention(model_runner)


def refuse_unsupported(model: torch.nn.Module, causal: bool) -> None:
    """Raise ConfigError naming what the model's attention layers ask for beyond plain attention."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    asked = {
        "sliding windows": any(layer.sliding_window_size > -1 for layer in layers),
        "capped logits": any(layer.logit_cap > 0 for layer in layers),
        "cross attention": any(layer.is_cross_attention for layer in layers),
        "temperature by length": any(layer.xai_temperature_len > 0 for layer in layers),
        "causal attention": not causal and any(layer.attn_type != AttentionType.ENCODER_ONLY for layer in layers),
    }
    if any(asked.values()):
        features = ", ".join(feature for feature, wanted in asked.items() if wanted)
        raise ConfigError(
            f"--attention-backend is {ATTENTION_BACKEND}, which does not support {features}, and "
            f"{type(model).__name__} needs it; name another backend, for example torch_native"
        )


class KernelAttention(AttentionBackend):
    """The host's attention interface over our kernel; where the interface lets a backend plan, nothing is done."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.block_size: int = model_runner.page_size  # a page is a block
        # How keys are split follows from the number of rows, and so would the order of sums.
        self.splits = 1 if model_runner.server_args.enable_deterministic_inference else None
        card = card_of(torch.device(model_runner.device))
        settings = attention_triton.settings_for(model_runner.dtype.itemsize, card.capability)
        self.launcher = attention_triton.Device.make(
            settings, card.multiprocessors, model_runner.model_config.head_dim, model_runner.device
        )
        logger.info(
            "attention: %s, one kernel a layer and no plan; sm_%d%d, %d multiprocessors, %s",
            ATTENTION_BACKEND,
            *card.capability,
            card.multiprocessors,
            settings,
        )

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """Rows of one block; q [N, heads x D], result the same."""
        if save_kv_cache:
            raise IntegrityError(f"{ATTENTION_BACKEND} was told to write KV, which the model does before it attends")
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        # As the pool does: it divides by a scale what it stores in another dtype.
        scaled = keys.dtype != q.dtype
        out = attention_triton.attend(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            keys,
            values,
            self.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            on=self.launcher,
            block=self.block_size,
            scale=layer.scaling * (layer.k_scale_float if scaled and layer.k_scale is not None else 1.0),
            value_scale=layer.v_scale_float if scaled and layer.v_scale is not None else 1.0,
            splits=self.splits,
        )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    # --- what a graph runner asks -----------------------------------------------------------------------------------

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """KV length of a padded row."""
        return self.block_size

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to keep: a graph holds the kernel's launches, and they read the batch's own tensors."""
