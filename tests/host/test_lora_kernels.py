"""What the host's backends of adapters on a GPU make of a batch of rows, in Triton's interpreter, beside ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import INTERPRETED, run_interpreted

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

T, H, RANK = 32, 64, 16
SLOTS = [1, 0, 2, 1, 0]  # of each row; slot 0 holds no adapter
RANKS, SCALINGS = [0, 4, 16], [0.0, 2.0, 0.5]
LAYERS = {"run_qkv_lora": (64, 32, 32), "run_gate_up_lora": (64, 64), "run_lora_b_sgemm": (64,)}


def batch_of_rows() -> Any:
    """As the executor makes one."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    rows = len(SLOTS)
    return SimpleNamespace(
        forward_mode=ForwardMode.DLLM_EXTEND,
        batch_size=rows,
        extend_num_tokens=rows * T,
        extend_seq_lens=torch.full((rows,), T, dtype=torch.int32),
        extend_seq_lens_cpu=[T] * rows,
        extend_logprob_start_lens_cpu=[T] * rows,
        return_logprob=False,
    )


def layer(widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A [slots, matrices x RANK, H] and B [slots, widths, RANK] of a fused layer, as the pool fills them."""
    a, b = torch.zeros(len(RANKS), len(widths) * RANK, H), torch.zeros(len(RANKS), sum(widths), RANK)
    for slot, rank in enumerate(RANKS):
        a[slot, : len(widths) * rank] = torch.randn(len(widths) * rank, H)
        b[slot, :, :rank] = torch.randn(sum(widths), rank)
    return a, b


def prepared(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend of the host's, told of the rows."""
    import sglang.kernels.ops.lora.dense.lora_tuning_config as tuning
    from sglang.srt.lora.backend import chunked_backend
    from sglang.srt.lora.backend.lora_registry import get_backend_from_name

    from sglang_llada.host.cpu.adapters import Unpinned

    monkeypatch.setattr(tuning, "get_device_name", lambda: "none")
    monkeypatch.setattr(chunked_backend, "get_lora", lambda: SimpleNamespace(max_lora_chunk_size=16))
    backend = get_backend_from_name(name)(len(RANKS), torch.device("cpu"), server_args=SimpleNamespace())
    backend.is_moe_lora = True
    with Unpinned():
        backend.prepare_lora_batch(batch_of_rows(), SLOTS, RANKS, SCALINGS, False)
    return backend


if INTERPRETED:

    @pytest.mark.parametrize("run", LAYERS)
    @pytest.mark.parametrize("name", ["csgmv", "triton"])
    def test_rows_get_what_the_cpu_gives_them(name: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang_llada.host.cpu.adapters import CpuAdapters

        torch.manual_seed(0)
        ours = CpuAdapters(len(RANKS), torch.device("cpu"))
        ours.prepare_lora_batch(batch_of_rows(), SLOTS, RANKS, SCALINGS)
        backend, widths = prepared(name, monkeypatch), LAYERS[run]
        (a, b), x, base = layer(widths), torch.randn(len(SLOTS) * T, H), torch.randn(len(SLOTS) * T, sum(widths))
        offsets = torch.tensor([0, *widths]).cumsum(0).int()
        want = ours.forward_with_base(None, x, base.clone, a, b, offsets, tuple(offsets.tolist()))
        assert (want - base).view(len(SLOTS), -1).any(-1).tolist() == [slot > 0 for slot in SLOTS]
        common = {"base_output": base.clone(), "output_offset": offsets, "output_offset_cpu": offsets}
        if run == "run_qkv_lora":
            got = backend.run_qkv_lora(x, a, b, max_qkv_out_dim=max(widths), **common)
        elif run == "run_gate_up_lora":
            got = backend.run_gate_up_lora(x, a, b, **common)
        else:
            got = backend.run_lora_b_sgemm(backend.run_lora_a_sgemm(x, a), b, **common)
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("name", ["csgmv", "triton"])
    def test_routed_experts_are_told_of_every_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        found = prepared(name, monkeypatch).batch_info.moe_lora_info
        assert found.token_lora_mapping.view(len(SLOTS), T).unique(dim=-1).flatten().tolist() == [1, -1, 2, 1, -1]
        assert found.adapter_enabled.tolist() == [0, 1, 1]

else:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)
