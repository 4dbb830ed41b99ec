"""The sampling kernel: in Triton's interpreter against torch, and compiled for the devices that it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_llada.decode.contract import Draws
from sglang_llada.decode.sampling import draw_sorted
from tests.decode.distribution import MASK, WAYS, V, sampling, share
from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted

MANY = 300  # ids; no multiple of a tile
SAMPLES = 20
LOW, HIGH = 0.0, 1 - 2.0**-53  # the least noise and the most


def draws(
    noise: Tensor,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 1 << 30,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
) -> Draws:
    """The same for all positions, or for each its own; all take the way of those that are cut."""
    like = torch.zeros(len(noise))
    return Draws(
        temperature=like + torch.tensor(temperature),
        top_k=like.long() + torch.tensor(top_k),
        top_p=like + torch.tensor(top_p),
        min_p=like + torch.tensor(min_p),
        noise=noise,
        whole=0,
    )


if INTERPRETED:
    from sglang_llada.decode import sampling_triton

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampling_triton, "LANES", 256)
        monkeypatch.setattr(sampling_triton, "TILE", 128)

    def agree(logits: Tensor, how: Draws) -> list[int]:
        """The kernel's tokens, once they are known to be torch's."""
        token, prob = sampling_triton.draw(logits.clone(), MASK, how)
        want = draw_sorted(logits.clone(), MASK, how)
        assert token.tolist() == want[0].tolist()
        torch.testing.assert_close(prob, want[1], rtol=1e-5, atol=0, equal_nan=True)
        return token.tolist()

    def spread(rows: int) -> Tensor:
        """Noise over all of [0, 1), its ends included."""
        return torch.linspace(LOW, HIGH, rows, dtype=torch.float64)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_rows_of_all_ways_in_one_batch(seed: int) -> None:
        torch.manual_seed(seed)
        ways = [sampling(**{"top_k": MANY, **way}) for way in WAYS.values()]
        columns = ([getattr(way, name) for way in ways] for name in ("temperature", "top_k", "top_p", "min_p"))
        noise = torch.rand(len(ways), dtype=torch.float64)
        agree(torch.randn(len(ways), MANY) * (1 + 3 * seed), draws(noise, *columns))

    def test_of_equals_at_the_boundary_the_lowest_ids_stay() -> None:
        """Two of weight 4 and, among weights of 1, the four that top-k and top-p have room for, over all tiles."""
        logits = torch.full((8, MANY), float("-inf"))
        logits[:, [MASK, 20, 64, 100, 127, 128, 200, 299]] = 0.0
        logits[:, [150, 151]] = torch.tensor(4.0).log()
        kept = {20, 64, 100, 127, 150, 151}
        assert set(agree(logits, draws(spread(8), top_k=6))) <= kept
        some = draws(spread(8), top_p=11.5 / 15)
        assert {20, 150, 151, 127} <= set(agree(logits, some)) <= kept
        assert set(agree(logits[:3], draws(spread(3), top_k=5, top_p=0.8))) <= kept - {127}

    def test_all_are_equal() -> None:
        for how in (draws(spread(3)), draws(spread(3), top_k=9), draws(spread(3), top_p=0.03, min_p=1.0)):
            agree(torch.zeros(3, MANY), how)

    @pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1, "min_p": 1.0}])
    def test_the_hardest_cuts_leave_the_best(cut: dict[str, float]) -> None:
        torch.manual_seed(0)
        logits = torch.randn(3, MANY)
        logits[:, MASK] = 50.0
        best = logits.index_fill(-1, torch.tensor(MASK), float("-inf")).argmax(-1)
        assert agree(logits, draws(spread(3), **cut)) == best.tolist()

    @pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.1}])
    def test_one_token_has_all_the_mass(cut: dict[str, float]) -> None:
        logits = torch.randn(3, MANY)
        logits[:, 131] = 1e4
        assert agree(logits, draws(spread(3), **cut)) == [131] * 3

    @pytest.mark.parametrize("temperature", [1e-6, 0.01, 100.0, 1e3])
    def test_temperatures(temperature: float) -> None:
        torch.manual_seed(1)
        agree(torch.randn(6, MANY), draws(spread(6), temperature, top_p=[1.0, 0.5, 0.9, 1.0, 0.3, 0.7]))

    def test_tokens_that_a_grammar_forbids_are_never_drawn() -> None:
        torch.manual_seed(2)
        logits = torch.full((6, MANY), float("-inf"))
        allowed = [0, 5, 65, 129, 130, 298]
        logits[:, allowed] = torch.randn(6, 6)
        for cut in ({}, {"top_k": 200}, {"top_p": 0.99}):
            assert set(agree(logits, draws(spread(6), **cut))) <= set(allowed)

    def test_what_is_not_finite_spoils_its_position_only() -> None:
        torch.manual_seed(3)
        logits = torch.randn(6, MANY)
        logits[0, 150] = logits[1, MASK] = float("nan")
        logits[2, 299] = float("inf")
        logits[3] = float("-inf")
        logits[4, :] = float("-inf")
        logits[4, MASK] = 1.0  # sound, though nothing can be drawn
        token = agree(logits, draws(spread(6), top_k=20, top_p=0.9))
        assert [each < 0 for each in token] == [True] * 4 + [False] * 2

    def test_rows_may_be_part_of_wider_ones() -> None:
        torch.manual_seed(4)
        wide, noise = torch.randn(3, MANY + 21), spread(3)
        token, prob = sampling_triton.draw(wide.clone()[:, :MANY], MASK, draws(noise, top_k=50))
        want = draw_sorted(wide.clone()[:, :MANY], MASK, draws(noise, top_k=50))
        assert torch.equal(token, want[0])
        torch.testing.assert_close(prob, want[1])

    def test_a_draw_is_the_same_alone() -> None:
        torch.manual_seed(5)
        logits, noise = torch.randn(4, MANY), spread(4)
        together = sampling_triton.draw(logits.clone(), MASK, draws(noise, top_p=0.8))
        for i in (1, 3):
            alone = sampling_triton.draw(logits[i : i + 1].clone(), MASK, draws(noise[i : i + 1], top_p=0.8))
            assert [each[0] for each in alone] == [each[i] for each in together]

    def test_no_positions() -> None:
        token, prob = sampling_triton.draw(torch.zeros(0, MANY), MASK, draws(spread(0)))
        assert token.shape == prob.shape == (0,)

    def test_draws_follow_the_distribution() -> None:
        """Of noise that is spread evenly each token gets its share"""
        torch.manual_seed(1)
        logits, way = torch.randn(V) * 2, sampling(**WAYS["all"])
        how = draws(spread(SAMPLES), way.temperature, way.top_k, way.top_p, way.min_p)
        token, prob = sampling_triton.draw(logits.repeat(SAMPLES, 1), MASK, how)
        want = share(logits, way)
        torch.testing.assert_close(prob, want[token], rtol=1e-5, atol=0)
        assert ((token.bincount(minlength=V) - want * SAMPLES).abs() <= 1).all()

else:

    def test_the_kernel_agrees_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_it_compiles(arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from sglang_llada.decode import sampling_triton as kernels

        vocabulary = 157_184
        used = compiled(
            kernels.kernel,
            {"logits": "fp32", "temperature": "fp32", "top_k": "i64", "top_p": "fp32", "min_p": "fp32"}
            | {"noise": "fp64", "token": "i64", "prob": "fp32"},
            ["vocabulary", "stride", "mask_id"],
            {
                "LANES": kernels.LANES,
                "TILE": kernels.TILE,
                "TILES": kernels.tiles(vocabulary),
                "UNROLL": kernels.UNROLL,
            },
            arch,
            tmp_path,
            num_warps=kernels.WARPS,
        )
        with capsys.disabled():
            print(f"\nsampling sm_{arch}: {used}")
        assert used["STACK"] <= 16, "registers are spilled"
        assert used["shared"] <= 48 * 1024
