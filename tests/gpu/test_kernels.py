"""Our kernels on the device against torch on the CPU. Not run yet: only the interpreter and the compiler saw them."""

from __future__ import annotations

import pytest
import torch

from sglang_llada.decode.select import Head, select
from sglang_llada.llada2.router import route_blocks

pytestmark = pytest.mark.gpu

MASK = 156_895
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}  # sums in another order


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("positions", "vocabulary", "width"), [(1, 157_184, 2048), (37, 157_184, 2048), (1024, 157_184, 2048), (5, 130, 40)]
)
def test_selection(positions: int, vocabulary: int, width: int, dtype: torch.dtype, count: int) -> None:
    """Quarters, whose products add up without rounding: tokens are equal, ties included."""
    random = torch.Generator().manual_seed(positions)
    hidden = (torch.randint(-4, 5, (positions, width), generator=random) / 4).to(dtype)
    weight = (torch.randint(-4, 5, (vocabulary, width), generator=random) / 4).to(dtype)
    want = select(hidden, Head(weight), MASK, count)
    got = select(hidden.cuda(), Head(weight.cuda()), MASK, count)
    assert torch.equal(got.token.cpu(), want.token)
    torch.testing.assert_close(got.prob.cpu(), want.prob, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("wanted", [0, 1, 64, 65, 300])
def test_positions_that_nobody_wants_are_left_alone(wanted: int) -> None:
    hidden, head = torch.randn(300, 256).bfloat16().cuda(), Head(torch.randn(5000, 256).bfloat16().cuda())
    whole = select(hidden, head, MASK)
    some = select(hidden, head, MASK, wanted=torch.tensor(wanted, device="cuda"))
    assert torch.equal(some.token[:wanted], whole.token[:wanted])


def test_block_routing() -> None:
    random = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(96, 256, generator=random), torch.randn(256, generator=random) * 0.1
    options = {"block_size": 32, "capacity": 48, "top_k": 8, "normalise": True}
    want = route_blocks(logits, bias, **options)
    got = route_blocks(logits.cuda(), bias.cuda(), **options)
    assert torch.equal(got.ids.cpu(), want.ids)
    torch.testing.assert_close(got.weights.cpu(), want.weights, rtol=1e-5, atol=0)
