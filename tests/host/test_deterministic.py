"""--enable-deterministic-inference: tokens and log-probabilities do not depend, to the last bit, on the batch."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sglang_llada.host.cpu import invariant
from tests.host.conftest import TINY, held_out_prompts
from tests.host.serving import Server, serving

pytestmark = pytest.mark.host

WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "sampling_seed": 7},
    {"temperature": 0.8, "sampling_seed": 8, "top_p": 0.9, "top_k": 50, "frequency_penalty": 0.5},
    {"temperature": 0, "custom_params": {"algorithm": "mbe"}},
    {"temperature": 1.5, "sampling_seed": 9, "custom_params": {"threshold": 0.5}},
]


def bodies(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Requests in every way, on prompts of up to a dozen blocks, some with a common beginning."""
    lengths = [5, 31, 40, 64, 90, 150, 260, 390]
    prompts = list(held_out_prompts(tokenizer, lengths)) + [[7] * 64 + [9] * more for more in (1, 20)]
    return [
        {
            "input_ids": prompt,
            "return_logprob": True,
            "top_logprobs_num": 2,
            "sampling_params": {"max_new_tokens": 48, "ignore_eos": True, **WAYS[(i + j) % len(WAYS)]},
        }
        for i, prompt in enumerate(prompts)
        for j in range(2)
    ]


def answer(server: Server, body: dict[str, Any]) -> tuple[Any, ...]:
    """The tokens with all that is said of them, each number to the last bit."""
    reply = server.post("/generate", body)
    assert reply.ok, reply.text
    got = reply.json()
    meta = got["meta_info"]
    return got["output_ids"], meta["output_token_logprobs"], meta["output_top_logprobs"], meta["dllm_steps"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_do_not_depend_on_the_batch(dtype: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Alone without a cache, among others that come in any order, and again when the cache has the prompt."""
    asked = bodies(tokenizer)
    flags = ["--enable-deterministic-inference", "--dtype", dtype, "--max-running-requests", "16"]
    with serving(TINY, tmp_path / "log", *flags) as server:
        alone = []
        for body in asked:
            server.flush()
            alone.append(answer(server, body))
        for seed in (1, 2):
            order = random.Random(seed).sample(range(len(asked)), len(asked))
            with ThreadPoolExecutor(len(asked)) as pool:
                together = list(pool.map(lambda i: answer(server, asked[i]), order))
            assert [together[order.index(i)] for i in range(len(asked))] == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(192, 512), (128, 192), (192, 400), (20, 16)])
def test_rows_of_a_product_are_alone_what_they_are_together(dtype: torch.dtype, width: int, out: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(150, width).to(dtype), torch.randn(out, width).to(dtype)
    together = invariant.mm(x, weight.T)
    torch.testing.assert_close(together, x @ weight.T)
    for rows in some_rows(150):
        assert torch.equal(invariant.mm(x[rows], weight.T), together[rows])


def some_rows(count: int) -> list[Tensor]:
    """Rows to pick: one, few, many, in any order."""
    rng = random.Random(0)
    return [torch.tensor(rng.sample(range(count), size)) for size in (1, 2, 3, 31, 32, 33, 64, 100)]
