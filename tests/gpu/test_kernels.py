"""Our kernels on the device against torch on the CPU. Not run yet: only the interpreter and the compiler saw them."""

from __future__ import annotations

import pytest
import torch

from sglang_llada.config import Report, Sampling
from sglang_llada.decode.sampling import Draws, draw, draw_sorted, uniform
from sglang_llada.decode.select import Head, select
from sglang_llada.decode.whole import Group, choose, report, whole_logits
from sglang_llada.llada2.router import route_blocks
from tests.decode import distribution

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
    hidden, head = torch.randn(300, 256, device="cuda"), Head(torch.randn(5000, 256, device="cuda"))
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


def of_one_kind(noise: torch.Tensor, **values: float) -> Draws:
    """The same draw for each noise, by the way of those that are cut; on the device."""
    how = distribution.sampling(**{"top_k": 1 << 30, **values})
    like = torch.ones(len(noise), device="cuda")
    return Draws(like * how.temperature, like.long() * how.top_k, like * how.top_p, like * how.min_p, noise.cuda(), 0)


@pytest.mark.parametrize("name", distribution.WAYS)
def test_twenty_thousand_draws_follow_the_distribution(name: str) -> None:
    torch.manual_seed(1)
    logits, way = torch.randn(distribution.V) * 2, distribution.WAYS[name]
    seeds = torch.arange(distribution.SAMPLES)
    draws = of_one_kind(uniform(seeds, seeds * 0 + 3, seeds * 0), **way)
    token, prob = draw(logits.repeat(len(seeds), 1).cuda(), distribution.MASK, draws)
    want = distribution.share(logits, distribution.sampling(**way))
    torch.testing.assert_close(prob.cpu(), want[token.cpu()], rtol=1e-4, atol=0)
    assert distribution.fit(token.cpu(), want) > 0.001


@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1000, "top_p": 0.9}])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_draws_from_a_real_vocabulary(cut: dict[str, float], scale: float) -> None:
    """Against the definition in fp64: noise falls too near to a token's edge to tell now and then."""
    torch.manual_seed(0)
    logits = torch.randn(64, 157_184, device="cuda") * scale
    logits[:4] = logits[:4].round()  # ties at every boundary
    draws = of_one_kind(torch.rand(64, dtype=torch.float64), **cut)
    token, prob = draw(logits.clone(), MASK, draws)
    want = draw_sorted(logits.double(), MASK, draws)
    same = token == want[0]
    assert same.sum() >= 62
    torch.testing.assert_close(prob[same], want[1][same], rtol=1e-4, atol=0)
    for i in (0, 7, 63):
        one = of_one_kind(draws.noise[i : i + 1], **cut)
        alone = draw(logits[i : i + 1].clone(), MASK, one)
        assert (alone[0][0], alone[1][0]) == (token[i], prob[i])


def test_positions_that_are_not_finite_have_no_draw() -> None:
    logits = torch.randn(5, 157_184, device="cuda")
    logits[0, 5], logits[1, -1], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 9:] = float("-inf")
    token, prob = draw(logits, MASK, of_one_kind(torch.rand(5, dtype=torch.float64), top_p=0.9))
    assert token[:3].tolist() == [-1] * 3 and prob[:3].tolist() == [0.0] * 3
    assert 0 <= token[3] < 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [1, 37, 256])
def test_whole_logits_are_never_rounded_to_the_weights_type(positions: int, dtype: torch.dtype) -> None:
    """Sums of sixteenths that need 15 bits."""
    hidden = (torch.randint(-4, 5, (positions, 2048), device="cuda") / 4).to(dtype)
    weight = (torch.randint(-4, 5, (5000, 2048), device="cuda") / 4).to(dtype)
    logits = whole_logits(hidden, Head(weight), None)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (hidden.double() @ weight.double().T).float())


def test_choosing_and_reporting_do_not_wait_for_the_device() -> None:
    hidden = torch.randn(64, 256, dtype=torch.bfloat16, device="cuda")
    head = Head(torch.randn(5000, 256, dtype=torch.bfloat16, device="cuda"))
    noise = torch.rand(32, dtype=torch.float64)
    group = Group(list(range(32)), 5000, Sampling(1.0, 50, 0.9, 0.0, 7), noise, report=Report(top=3, ids=(4, 5)))
    ids = torch.zeros(2, 32, dtype=torch.int64, device="cuda")
    origin = torch.arange(32, device="cuda").repeat(2, 1)

    def step() -> torch.Tensor:
        choose(hidden, [group], head, 3, 3, 1, None)
        return report(hidden, [group], ids, origin, head, 3, None)

    step()  # kernels load
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
