"""The CPU platform around its kernels: which models it takes over, what it refuses, and that stock logits are right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.platforms.device_mixin import PlatformEnum
from torch import Tensor, nn

from sglang_llada.accelerator import PLATFORM
from sglang_llada.errors import ConfigError
from sglang_llada.host.attention import backend as attention
from sglang_llada.host.attention import cpu as cpu_attention
from sglang_llada.host.backends import ATTENTION_BACKEND
from sglang_llada.host.cpu import experts as cpu_experts
from sglang_llada.host.cpu.platform import CpuPlatform
from sglang_llada.host.start import devices
from tests.host import warm

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]


def test_activation_names_the_platform_class() -> None:
    assert f"{CpuPlatform.__module__}.{CpuPlatform.__name__}" == PLATFORM


def test_platform_is_out_of_tree_and_on_the_cpu() -> None:
    platform = CpuPlatform()
    assert platform._enum is PlatformEnum.OOT
    assert platform.device_type == "cpu"
    assert platform.get_default_attention_backend() == ATTENTION_BACKEND
    assert platform.get_torch_distributed_backend_str() == "gloo"
    assert not platform.capabilities.graph_capture


# --- which expert layers run here -----------------------------------------------------------------------------------


class LLaDA2MoeModelLM(nn.Module):
    """By its name the model that is taken over."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class Glm4MoeForCausalLM(LLaDA2MoeModelLM):
    """A model that multiplies by the scaling factor itself where there is no CUDA."""


def expert_layer() -> FusedMoE:
    """A host layer with only what makes it one; constructing it takes a running host."""
    layer = FusedMoE.__new__(FusedMoE)
    nn.Module.__init__(layer)
    return layer


def host_loop(*args: Any) -> str:
    """Stands for the host's own function."""
    return "host"


@pytest.mark.parametrize(("model", "ours"), [(LLaDA2MoeModelLM, True), (Glm4MoeForCausalLM, False)])
def test_only_experts_of_llada2_are_taken_over(
    model: type[LLaDA2MoeModelLM], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would apply the scaling factor twice."""
    monkeypatch.setattr(cpu_experts, "experts_forward", lambda *args: "ours")
    loaded = model(expert_layer())
    CpuPlatform().post_load_model(loaded)
    assert cpu_experts.forward_adopted(host_loop, loaded.layer, None, None, None) == ("ours" if ours else "host")  # type: ignore[arg-type, comparison-overlap]


def test_a_freed_layer_is_not_kept_alive() -> None:
    before = len(cpu_experts.ADOPTED)
    cpu_experts.adopt(LLaDA2MoeModelLM(expert_layer()))
    import gc

    gc.collect()
    assert len(cpu_experts.ADOPTED) == before


# --- what it computes in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "native", "dtype"),
    [("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("float32", True, "float32")],
)
def test_bf16_is_kept_where_the_processor_multiplies_it(
    stored: str, native: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": stored}))
    monkeypatch.setattr(devices, "native_bf16", lambda: native)
    assert devices.cpu_dtype(str(tmp_path), None) == dtype


# --- what the attention backend refuses -----------------------------------------------------------------------------


def attention_layer(**fields: Any) -> LLaDA2MoeModelLM:
    """A model of one host attention layer."""
    return LLaDA2MoeModelLM(RadixAttention(2, 8, 1.0, num_kv_heads=1, layer_id=0, **fields))


def test_plain_attention_is_served() -> None:
    attention.refuse_unsupported(attention_layer(), causal=True)


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"sliding_window_size": 128}, "sliding windows"),
        ({"logit_cap": 30.0}, "capped logits"),
        ({"is_cross_attention": True}, "cross attention"),
    ],
)
def test_attention_beyond_plain_is_refused_by_name(fields: dict[str, Any], feature: str) -> None:
    with pytest.raises(ConfigError, match=f"does not support {feature}, and LLaDA2MoeModelLM needs it"):
        attention.refuse_unsupported(attention_layer(**fields), causal=True)


# --- what graph runners and padded batches ask of it ----------------------------------------------------------------


def backend(slots: int = 2, longest: int = 700) -> cpu_attention.RowAttention:
    """A backend without a pool."""
    table = torch.arange(slots * longest).view(slots, longest).int()
    pools = SimpleNamespace(req_to_token=table)
    return cpu_attention.RowAttention(
        SimpleNamespace(device="cpu", req_to_token_pool=pools, token_to_kv_pool=Pool(slots * longest))
    )


class Pool:
    """KV of one head of 8."""

    def __init__(self, size: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.keys, self.values = (torch.randn(size, 1, 8, generator=random) for _ in range(2))

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.values


def batch(rows: list[tuple[int, int, int]]) -> Any:
    """A forward of rows (request, queries, end)."""
    return SimpleNamespace(
        req_pool_indices=torch.tensor([row[0] for row in rows]),
        seq_lens=torch.tensor([row[2] for row in rows]),
        seq_lens_cpu=None,
        extend_seq_lens_cpu=[row[1] for row in rows],
        forward_mode=SimpleNamespace(is_decode_or_idle=lambda: False),
    )


def attend(on: cpu_attention.RowAttention, tokens: int, causal: bool) -> Tensor:
    """One layer of two heads over `tokens` tokens that have their KV."""
    layer = attention_layer().layer
    layer.attn_type = cpu_attention.AttentionType.DECODER if causal else cpu_attention.AttentionType.ENCODER_ONLY
    random = torch.Generator().manual_seed(1)
    q = torch.randn(tokens, 16, generator=random)
    return on.forward_extend(q, None, None, layer, None, save_kv_cache=False)  # type: ignore[arg-type]


def of_graph(rows: list[tuple[int, int, int]]) -> SimpleNamespace:
    """The same as a graph runner hands it over: without lengths of rows."""
    eager = batch(rows)
    keep = ("forward_mode", "req_pool_indices", "seq_lens", "seq_lens_cpu")
    tokens = sum(count for _, count, _ in rows)
    return SimpleNamespace(input_ids=torch.zeros(tokens), **{name: getattr(eager, name) for name in keep})


def test_a_replay_plans_as_an_eager_forward_does() -> None:
    """Graph runners call the out-of-graph half; a plan left over from the capture would be silently wrong."""
    eager, replayed = backend(), backend()
    eager.init_forward_metadata(batch([(1, 32, 64)]))
    replayed.init_forward_metadata_out_graph(of_graph([(0, 32, 32)]), in_capture=True)
    replayed.init_forward_metadata_out_graph(of_graph([(1, 32, 64)]))
    assert type(replayed).init_forward_metadata is AttentionBackend.init_forward_metadata
    torch.testing.assert_close(attend(replayed, 32, False), attend(eager, 32, False), rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_gives_numbers(causal: bool) -> None:
    """A padded row has more queries than KV; padded tokens belong to no row at all."""
    on = backend()
    on.init_forward_metadata(batch([(1, 32, 64), (0, 32, on.get_cuda_graph_seq_len_fill_value())]))
    out = attend(on, 70, causal)
    assert out.isfinite().all()
    assert not out[64:].any()
    alone = backend()
    alone.init_forward_metadata(batch([(1, 32, 64)]))
    torch.testing.assert_close(out[:32], attend(alone, 70, causal)[:32])


@pytest.mark.parametrize("prefix", [0, 100])
def test_chunks_of_a_causal_prompt_equal_one_attention(prefix: int) -> None:
    """A prompt longer than one chunk, and not a multiple of it."""
    count = 2 * cpu_attention.CAUSAL_CHUNK + 44
    on = backend()
    on.init_forward_metadata(batch([(1, count, prefix + count)]))
    got = attend(on, count, causal=True)
    q = torch.randn(count, 16, generator=torch.Generator().manual_seed(1)).view(count, 2, 8)
    seen = on.req_to_token[1, : prefix + count].long()
    scores = torch.einsum("qhd,kd->hqk", q, on.token_to_kv_pool.keys[seen, 0])
    hidden = torch.ones(count, prefix + count, dtype=torch.bool).triu(prefix + 1)
    want = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ on.token_to_kv_pool.values[seen, 0]  # [heads, Q, D]
    torch.testing.assert_close(got, want.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)


def test_rows_of_one_prompt_need_no_mask() -> None:
    on = backend()
    on.init_forward_metadata(batch([(1, 32, 32 * (i + 1)) for i in range(20)]))
    (group,) = on.groups
    assert [(piece.length, piece.mask) for piece in group.pieces(causal=False)] == [
        (32 * (i + 1), None) for i in range(20)
    ]


# --- the stock model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stock_model_gives_the_logits_of_the_reference(tmp_path: Path) -> None:
    """Five blocks of one request in one forward of the host's own class, and what it gives without our experts."""
    command = ["-m", "tests.host.stock_logits", str(tmp_path / "checkpoint")]
    done = warm.run_python(command, warm.environment() | {"SGLANG_LLADA": "off"}, ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    model, backend_name, difference, without = done.stdout.splitlines()[-1].split()
    assert (model, backend_name) == ("sglang.srt.models.llada2", "RowAttention")
    assert float(difference) < 1e-4
    assert float(without) > 1e-2  # the comparison can fail
