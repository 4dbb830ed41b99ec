"""Our kernels on the device against torch on the CPU."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from sglang_llada.config import RUN, DecodeConfig, Report, Sampling
from sglang_llada.decode.contract import Draws, Tokens
from sglang_llada.decode.decide import decide, in_torch
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import numbers, pack, record
from sglang_llada.decode.logprobs import report
from sglang_llada.decode.sampling import draw, draw_whole, from_chunks, warm_up
from sglang_llada.decode.select import select
from sglang_llada.decode.whole import Group, choose, whole_logits
from sglang_llada.llada2 import attention_triton
from sglang_llada.llada2.router import products, route, route_blocks, split, summed
from tests.decode import distribution
from tests.paged import Paged

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


@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention(dtype: torch.dtype, splits: int | None) -> None:
    """Mini's shape: blocks of 32, 16 heads of 128 on 4 KV heads; rows of one request in one forward."""
    rows = [(0, 8192), (1, 32), (1, 64), (2, 4128), (0, 8160)]
    paged = Paged.make(rows, length=8192, kv_heads=4, head_size=128, dtype=dtype, device="cuda")
    got = attended(paged, splits)
    torch.testing.assert_close(got.double(), paged.attended(), rtol=0, atol={4: 1e-5, 2: 1e-2}[dtype.itemsize])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_over_kv_of_8_bits(dtype: torch.dtype) -> None:
    if dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 takes a card of compute capability 8.9")
    rows = [(0, 1024), (1, 32)]
    paged = Paged.make(rows, length=1024, kv_heads=4, head_size=128, dtype=torch.bfloat16, device="cuda")
    small = replace(paged, keys=paged.keys.to(dtype), values=paged.values.to(dtype))
    want = replace(small, keys=small.keys.float(), values=small.values.float()).attended()
    torch.testing.assert_close(attended(small, None).double(), want, rtol=0, atol=1e-2)


def test_attention_in_a_graph_follows_the_lengths() -> None:
    """Captured for short rows, replayed for long ones of other requests."""
    rows = [(0, 2048), (1, 4096), (2, 32), (0, 64)]
    paged = Paged.make(rows, length=4096, kv_heads=4, head_size=128, dtype=torch.bfloat16, device="cuda")
    static = replace(paged, requests=torch.zeros_like(paged.requests), ends=torch.full_like(paged.ends, 32))
    launcher = launcher_for(static)
    attended(static, None, launcher)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attended(static, None, launcher)
    static.requests.copy_(paged.requests)
    static.ends.copy_(paged.ends)
    graph.replay()
    assert torch.equal(out, attended(paged, None))


def launcher_for(paged: Paged) -> attention_triton.Device:
    """As the host's backend makes it, with memory for the splits that tests ask for."""
    settings = attention_triton.settings_for(paged.q.element_size(), torch.cuda.get_device_capability())
    processors = torch.cuda.get_device_properties().multi_processor_count
    return attention_triton.Device.make(settings, max(processors, 256), paged.q.shape[-1], "cuda")


def attended(paged: Paged, splits: int | None, launcher: attention_triton.Device | None = None) -> torch.Tensor:
    """The kernel's answer."""
    pool = (paged.keys, paged.values, paged.table, paged.requests, paged.ends)
    on = launcher or launcher_for(paged)
    return attention_triton.attend(paged.q, *pool, on=on, block=paged.block, scale=paged.scale, splits=splits)


@pytest.mark.parametrize("rows", [1, 7, 128, 300])
def test_decisions(rows: int) -> None:
    """All algorithms and any sets, with many equal probabilities, in a graph too."""
    T, random = 32, torch.Generator().manual_seed(rows)
    hidden = (torch.randint(-4, 5, (rows * T, 64), generator=random) / 4).bfloat16()
    head = (torch.randint(-4, 5, (1000, 64), generator=random) / 4).bfloat16()
    sets = torch.randint(0, 1 << T, (2, rows), generator=random).tolist()
    names, table = ("threshold", "joint_threshold", RUN), []
    for r, (is_open, editable) in enumerate(zip(*sets, strict=True)):
        name = names[r % 3]
        params = DecodeConfig.defaults(T).from_left_to_right if name == RUN else DecodeConfig.defaults(T, name)
        table.append(record(is_open, editable * params.edits, numbers(params), [r % T, r % 5]))
    ids = torch.randint(0, 1000, (rows * T,), generator=random)
    arguments = hidden, ids, torch.tensor(table), rows * T
    want = pack(in_torch(*arguments, Head(head), T, Tokens(MASK)), trace=True)[:, : -2 * T]
    on_device = [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments]

    def decided() -> torch.Tensor:
        return pack(decide(*on_device, head=Head(head.cuda()), block_size=T, tokens=Tokens(MASK)), trace=True)

    assert torch.equal(decided()[:, : -2 * T].cpu(), want)
    weight = Head(head.cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pack(decide(*on_device, head=weight, block_size=T, tokens=Tokens(MASK)), trace=True)
    graph.replay()
    assert torch.equal(out[:, : -2 * T].cpu(), want)
    on_device[2].copy_(on_device[2].roll(1, 0))  # other rows are open: the same graph finds them
    graph.replay()
    assert torch.equal(out.cpu()[:, : -2 * T], decided().cpu()[:, : -2 * T])


@pytest.mark.parametrize("tokens", [1, 33, 1024])
def test_routing_by_parts(tokens: int) -> None:
    from sglang_llada.llada2.router_triton import route as in_one_kernel

    random = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 2048, generator=random).bfloat16(), torch.randn(256, 2048, generator=random) / 11
    bias = torch.randn(256, generator=random) * 0.1
    by_part = products(x.cuda(), split(weight.cuda()))
    torch.testing.assert_close(summed(by_part).cpu(), x.float() @ weight.T, rtol=1e-5, atol=1e-4)
    want = route(summed(by_part).cpu(), bias, num_groups=8, top_groups=4, top_k=8, normalise=True)
    weights, ids = in_one_kernel(by_part, bias.cuda(), 8, 4, 8, True, 1.0, 0.4)
    same = (ids[:, :8].cpu().long() == want.ids).all(-1)
    assert same.float().mean() > 0.99  # where two scores are equal but for the last bit of exp()
    torch.testing.assert_close(weights[:, :8].cpu()[same], want.weights[same], rtol=1e-5, atol=0)
    assert (ids[:, 8] == 256).all()


def test_heads_are_normed_turned_and_written() -> None:
    from sglang_llada.llada2.rotary_triton import rotate_and_store

    random = torch.Generator().manual_seed(0)
    heads, kv_heads, width, turned, tokens = 16, 4, 128, 64, 70
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=random).bfloat16()
    norms = torch.rand(2, width, generator=random).bfloat16()
    angles = torch.rand(100, turned // 2, generator=random)
    cos_sin, positions = torch.cat((angles.cos(), angles.sin()), -1), torch.randint(0, 100, (tokens,), generator=random)
    places = torch.randperm(200, generator=random)[:tokens]
    pools = torch.zeros(2, 200, kv_heads, width, dtype=torch.bfloat16, device="cuda")
    q, k = rotate_and_store(
        *(each.cuda() for each in (qkv, positions, norms[0], norms[1], cos_sin)), 1e-6, *pools, places.cuda()
    )
    parts = qkv.float().view(tokens, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    for got, x, norm in ((q, parts[0], norms[0]), (k, parts[1], norms[1])):
        y = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.float()).bfloat16().float()
        a, b, rest = y.split([turned // 2, turned // 2, width - turned], dim=-1)
        cos, sin = angles[positions].cos()[:, None], angles[positions].sin()[:, None]
        want = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
        torch.testing.assert_close(got.cpu().view_as(want).float(), want, rtol=1e-2, atol=1e-2)
    assert torch.equal(pools[0, places.cuda()].flatten(1), k)
    assert torch.equal(pools[1, places.cuda()].cpu(), qkv.view(tokens, -1, width)[:, heads + kv_heads :])


def of_one_kind(count: int, **values: float) -> Draws:
    """The same way to draw for each of so many seeds; on the device."""
    way = distribution.sampling(**{"top_k": 1 << 30, **values})
    return Draws(*(each.cuda() for each in distribution.draws([way] * count, distribution.keys(count))))


@pytest.mark.parametrize("name", distribution.WAYS)
def test_twenty_thousand_draws_follow_the_distribution(name: str) -> None:
    torch.manual_seed(1)
    logits, way = torch.randn(distribution.V) * 2, distribution.WAYS[name]
    draws = of_one_kind(distribution.SAMPLES, **way)
    found = draw_whole(logits.repeat(distribution.SAMPLES, 1).cuda(), distribution.MASK, draws)
    token, want = found.token[:, 0].cpu(), distribution.share(logits, distribution.sampling(**way))
    torch.testing.assert_close(found.prob[:, 0].cpu(), want[token], rtol=1e-4, atol=0)
    assert distribution.fit(token, want) > 0.001


def test_a_request_that_samples_finds_its_kernels_compiled() -> None:
    """The first draw after a warm-up takes milliseconds, where compiling takes seconds."""
    warm_up(157_184, MASK, "cuda")
    logits, how = torch.randn(7, 157_184, device="cuda"), of_one_kind(7, top_p=0.9)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    draw_whole(logits, MASK, how)
    torch.cuda.synchronize()
    assert time.perf_counter() - begin < 0.5


@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1000, "top_p": 0.9}])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_draws_from_a_real_vocabulary(cut: dict[str, float], scale: float) -> None:
    """Of a head and of whole logits, against the definition: rounding decides now and then."""
    torch.manual_seed(0)
    hidden, head = (
        torch.randn(64, 512, device="cuda") * scale,
        Head(torch.randn(157_184, 512, device="cuda") / 512**0.5),
    )
    draws, spans = of_one_kind(64, **cut), torch.tensor([0, 0 if cut else 64, 64], dtype=torch.int32, device="cuda")
    hidden, head = hidden.bfloat16(), replace(head, weight=head.weight.bfloat16())
    found, logits = draw(hidden, head, MASK, draws, spans=spans), whole_logits(hidden, head, None)
    cpu = Draws(*(each.cpu() for each in draws))
    want = from_chunks(lambda: [(0, logits.cpu())], MASK, cpu)
    for got in (found, draw_whole(logits, MASK, draws)):
        same = got.token.cpu() == want.token
        assert same.sum() >= 62
        torch.testing.assert_close(got.prob.cpu()[same], want.prob[same], rtol=1e-3, atol=0)
    for i in (0, 7, 63):
        at = torch.tensor([i], device="cuda")
        alone = draw_whole(logits[at], MASK, draws.at(at))
        assert alone.token[0] == draw_whole(logits, MASK, draws).token[i]


def test_positions_that_are_not_finite_have_no_draw() -> None:
    logits = torch.randn(5, 157_184, device="cuda")
    logits[0, 5], logits[1, -1], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 9:] = float("-inf")
    found = draw_whole(logits, MASK, of_one_kind(5, top_p=0.9))
    assert found.token[:3].tolist() == [[-1]] * 3 and found.prob[:3].tolist() == [[0.0]] * 3
    assert 0 <= found.token[3] < 9


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
    wanted = Report(top=3, ids=(4, 5))
    group, draws = Group(list(range(32)), Sampling(1.0, 50, 0.9, 0.0, 7), lambda x: x + 1.0, wanted), of_one_kind(64)
    ids = torch.zeros(2, 32, dtype=torch.int64, device="cuda")
    origin = torch.arange(32, device="cuda").repeat(2, 1)

    def step() -> torch.Tensor:
        choose(hidden, [group], head, 3, 3, 1, None, draws)
        return report(hidden, [group], ids, origin, head, 3, None)

    step()  # kernels load
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
