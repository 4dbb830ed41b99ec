"""What our attention on a GPU hands to its kernel: the batch's own tensors, so that a graph follows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import Tensor, nn

from sglang_llada.errors import ConfigError, IntegrityError
from sglang_llada.host.attention import backend as attention
from sglang_llada.host.attention.backend import KernelAttention

pytestmark = pytest.mark.host

T, HEADS, KV_HEADS, D = 8, 4, 2, 16
CARD = SimpleNamespace(major=9, minor=0, multi_processor_count=132)


class Pool:
    """KV of one layer, in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.zeros(64, KV_HEADS, D).to(dtype) for _ in range(2))

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.values


def backend(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16) -> KernelAttention:
    """One of a model in bf16, whose memory lies on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    return KernelAttention(
        SimpleNamespace(
            device="cpu",
            dtype=torch.bfloat16,
            page_size=T,
            server_args=SimpleNamespace(enable_deterministic_inference=False),
            model_config=SimpleNamespace(head_dim=D),
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(3, 64, dtype=torch.int32)),
            token_to_kv_pool=Pool(dtype),
        )
    )


def layer(**fields: Any) -> RadixAttention:
    """One of the model's."""
    options = {"attn_type": AttentionType.ENCODER_ONLY} | fields
    return RadixAttention(HEADS, D, 0.5, num_kv_heads=KV_HEADS, layer_id=0, **options)


def batch(rows: int) -> SimpleNamespace:
    """Rows of a forward."""
    return SimpleNamespace(req_pool_indices=torch.zeros(rows, dtype=torch.int64), seq_lens=torch.full((rows,), T))


@pytest.mark.parametrize(("stored", "scales"), [(torch.bfloat16, (0.5, 1.0)), (torch.float8_e4m3fn, (1.0, 4.0))])
def test_the_kernel_reads_the_batchs_own_tensors(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, scales: tuple[float, float]
) -> None:
    """And applies scales to KV that is stored with them only."""
    on = backend(monkeypatch, stored)
    called: list[Any] = []

    def attend(q: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
        called.append((q.shape, tensors, options))
        return torch.zeros_like(q)

    monkeypatch.setattr(attention.attention_triton, "attend", attend)
    asked = layer()
    asked.k_scale, asked.k_scale_float, asked.v_scale, asked.v_scale_float = (
        torch.tensor(2.0),
        2.0,
        torch.tensor(4.0),
        4.0,
    )
    rows = batch(3)
    q = torch.zeros(3 * T, HEADS * D, dtype=torch.bfloat16)
    assert on.forward_extend(q, q, q, asked, rows, save_kv_cache=False).shape == q.shape
    (shape, tensors, options) = called.pop()
    own = (on.token_to_kv_pool.keys, on.token_to_kv_pool.values, on.req_to_token, rows.req_pool_indices, rows.seq_lens)
    assert shape == (3 * T, HEADS, D)
    assert all(given is wanted for given, wanted in zip(tensors, own, strict=True))
    assert (options["scale"], options["value_scale"], options["block"]) == (*scales, T)


def test_nothing_is_planned() -> None:
    for name in ("init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"):
        assert getattr(KernelAttention, name) is getattr(AttentionBackend, name)
    assert not KernelAttention.needs_cpu_seq_lens


def test_a_model_that_leaves_writing_to_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(T, HEADS * D)
    with pytest.raises(IntegrityError, match="told to write KV"):
        backend(monkeypatch).forward_extend(q, q, q, layer(), batch(1))


def test_causal_layers_are_refused_where_the_kernel_runs() -> None:
    causal = nn.Sequential(layer(attn_type=AttentionType.DECODER))
    attention.refuse_unsupported(causal, causal=True)
    with pytest.raises(ConfigError, match="does not support causal attention"):
        attention.refuse_unsupported(causal, causal=False)
