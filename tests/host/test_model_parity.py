"""The model class in the host's layers gives the reference's logits, on one rank and split over two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.reference import Llada2ForDiffusion
from tests.host.ranks import run_ranks
from tests.toy import MASK, VOCAB, make_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("few_threads")]

T = 32
CLOSE = 1e-4
WIDTHS = {"intermediate_size": 128, "moe_intermediate_size": 64}  # multiples of 32 on each rank, as the host wants


def sequences() -> list[list[int]]:
    """Random tokens of 4 and 3 blocks, and those of 4 with one token of the third block changed; masks among all."""
    random = torch.Generator().manual_seed(1)
    long, short = (torch.randint(VOCAB, (blocks * T,), generator=random) for blocks in (4, 3))
    long[-20:], short[::7] = MASK, MASK
    changed = long.clone()
    changed[2 * T + 5] = (changed[2 * T + 5] + 1) % 256
    return [long.tolist(), short.tolist(), changed.tolist()]


# --- in the ranks' processes ----------------------------------------------------------------------------------------


def logits_of(runner: Any) -> dict[str, Any]:
    """What the model says of the sequences."""
    results = {"together": together(runner), "one block after the other": one_after_the_other(runner)}
    return results | after_an_update(runner)


def together(runner: Any) -> list[Tensor]:
    """Logits [L, V] of the sequences, all their blocks in one forward and in no order."""
    texts = sequences()
    rows = [(slot, block) for slot, text in enumerate(texts) for block in range(len(text) // T)]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()]
    logits = dict(zip(rows, forward(runner, texts, rows), strict=True))
    return [torch.cat([logits[slot, block] for block in range(len(text) // T)]) for slot, text in enumerate(texts)]


def one_after_the_other(runner: Any) -> list[Tensor]:
    """Logits [L, V] of the sequences, a forward per block."""
    texts = sequences()
    return [
        torch.cat([forward(runner, texts, [(slot, block)])[0] for block in range(len(text) // T)])
        for slot, text in enumerate(texts)
    ]


def after_an_update(runner: Any) -> dict[str, Any]:
    """Logits with the last norm doubled by an update of that tensor alone, and what faulty updates are told."""
    model = runner.model
    norm = torch.full((model.config.hidden_size,), 2.0)
    model.load_weights([("model.norm.weight", norm)])
    return {
        "norm doubled": together(runner),
        "unknown": told(lambda: model.load_weights([("model.extra.weight", norm)])),
        "misshapen": told(lambda: model.load_weights([("model.norm.weight", norm[:3])])),
    }


def short_logits(runner: Any) -> dict[str, Any]:
    """Logits [L, V] of the shortest sequence, and which kernels of ours ran."""
    text = sequences()[1]
    with Seen() as seen:
        parts = forward(runner, [text], [(0, block) for block in range(len(text) // T)])
    return {"together": [torch.cat(parts)], "kernels": seen.names}


class Seen(TorchDispatchMode):
    """Names of the operators of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("sglang_llada::"):
            self.names.append(func.name().removeprefix("sglang_llada::"))
        return func(*args, **(kwargs or {}))


def as_on_a_gpu() -> None:
    """Run the model as on a GPU, with our kernels in Triton's interpreter, and the router's parts in fp32."""
    from sglang_llada.host.models import llada2

    llada2.has_kernels = lambda: True
    llada2.joins_shared_expert = lambda c, quant_config: True
    llada2.precomputed_topk_postprocess_is_noop = lambda *inputs: True  # but for being on a GPU
    llada2.Router.by_part = lambda self, x: llada2.products(x, self.parts)


def told(call: Callable[[], None]) -> str:
    """The message of the ConfigError that a call raises; empty if it raises none."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


def forward(runner: Any, texts: list[list[int]], rows: list[tuple[int, int]]) -> list[Tensor]:
    """Logits [T, V] of rows (sequence, block), whose KV lies in pages of their own."""
    from sglang_llada.host.engine.executor import Decider, Executor
    from tests.rows import idle_rows  # which imports the host

    executor = Executor(runner, Decider(runner))
    for slot in range(len(texts)):  # page 0 is the host's, for padding
        begin = (1 + 8 * slot) * T
        runner.req_to_token_pool.req_to_token[slot, : 8 * T] = torch.arange(begin, begin + 8 * T)
    tokens = np.array([texts[slot][block * T : (block + 1) * T] for slot, block in rows])
    starts, slots = [block * T for _, block in rows], [slot for slot, _ in rows]
    with torch.inference_mode():
        batch = executor._batch(idle_rows(executor.layout, tokens, slots, starts), None)
        executor._unfold(batch)
        hidden = runner.forward(batch).logits_output.hidden_states
        return list(logits(runner.model, hidden).split(T))


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Over the whole vocabulary: every rank's part of the head, with the host's padding cut off."""
    local = hidden.float() @ model.lm_head.weight.float().T
    return torch.cat(list(model.exchange(local) if model.exchange else [local]), dim=-1)[:, : model.config.vocab_size]


# --- in the test's process ------------------------------------------------------------------------------------------


def assert_close(got: list[Tensor], want: list[Tensor], how: str) -> None:
    """Logits over the whole vocabulary, without the host's padding."""
    assert [logits.shape for logits in got] == [logits.shape for logits in want]
    off = max((g - w).abs().max().item() for g, w in zip(got, want, strict=True))
    print(f"{how}: largest difference {off:.1e}")
    assert off < CLOSE


def rewrite(folder: Path, model: Llada2ForDiffusion) -> None:
    """Store the network in the other spelling: prefixed names, fused experts, and no head if it is the embedding."""
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        before, _, after = name.partition(".mlp.experts.")
        if after:
            matrix = after.split(".")[1]
            stacks.setdefault(f"{before}.mlp.experts.{matrix}", []).append(tensor)
        elif not (model.config.tie_word_embeddings and name == "lm_head.weight"):
            tensors[name] = tensor
    tensors |= {name: torch.stack(parts) for name, parts in stacks.items()}
    spelt = {
        f"model.{name}" if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in spelt.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ()),
        (2, ()),
        (2, ("--ep-size", "2")),
        (1, ("--attention-backend", "torch_native")),
        (1, ("--attention-backend", "triton", "--max-running-requests", "4")),  # fewer than rows
    ],
    ids=["one rank", "two ranks", "experts on two ranks", "attention torch_native", "attention triton, interpreted"],
)
def test_logits_are_the_references(
    tmp_path: Path, ranks: int, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a sequence in one forward, in no order: whatever the backend, KV is written before it is read."""
    if "triton" in flags:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_checkpoint(tmp_path, **WIDTHS)
    want = [model.block_causal(text) for text in sequences()]
    for rank, got in enumerate(run_ranks(logits_of, tmp_path, ranks, *flags)):
        assert_close(got["together"], want, f"rank {rank}, together")
        assert_close(got["one block after the other"], want, f"rank {rank}, one block after the other")
        assert_close(got["norm doubled"], [2 * logits for logits in want], f"rank {rank}, norm doubled")
        assert "unknown tensor model.extra.weight" in got["unknown"]
        assert "model.norm.weight has shape [3], expected [64]" in got["misshapen"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_the_references_on_a_gpus_way(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared expert among the routed ones, routing and what is done to heads by kernels of ours."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_checkpoint(tmp_path, **WIDTHS)
    want = [model.block_causal(sequences()[1])]
    layers, dense = model.config.num_hidden_layers, model.config.first_k_dense_replace
    for rank, got in enumerate(run_ranks(short_logits, tmp_path, ranks, prepare=as_on_a_gpu)):
        assert_close(got["together"], want, f"rank {rank}")
        assert got["kernels"].count("rotate_and_store") == layers
        assert got["kernels"].count("route") == layers - dense


def test_tied_embeddings_and_the_other_spelling(tmp_path: Path) -> None:
    options = {"num_shared_experts": 2, "moe_router_enable_expert_bias": False, "norm_topk_prob": False}
    model = make_checkpoint(tmp_path, tie_word_embeddings=True, **WIDTHS, **options)
    rewrite(tmp_path, model)
    want = [model.block_causal(text) for text in sequences()]
    for rank, got in enumerate(run_ranks(logits_of, tmp_path, 2)):
        assert_close(got["together"], want, f"rank {rank}")
