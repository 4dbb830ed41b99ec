"""The kernels of draws: in Triton's interpreter against torch, and compiled for the devices that they are meant for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_llada.config import Sampling
from sglang_llada.decode import sampling as definition
from sglang_llada.decode.contract import BOUNDS
from sglang_llada.decode.head import Best, Head, Lowered
from sglang_llada.decode.sampling import draw, draw_whole
from tests.decode.distribution import MASK, WAYS, draws, keys, sampling
from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted

MANY, WIDTH, RANKS = 300, 8, 3  # ids: no multiple of a tile, nor of the ranks
UNCUT = [way for name, way in WAYS.items() if name in ("as it is", "cold", "hot")]
CUT = [way for way in WAYS.values() if way not in UNCUT]

if INTERPRETED:
    from sglang_llada.decode import sampling_triton, select_triton
    from sglang_llada.decode.select_triton import Form

    @pytest.fixture(autouse=True)
    def small(monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes at which the interpreter is quick and there are several blocks, tiles and rounds."""
        form = Form(8, 64, 16, warps=4, stages=2, programs=2)
        monkeypatch.setattr(sampling_triton, "form_of", lambda source, weight: form)
        for room in (definition, sampling_triton):  # more passes of fewer bounds
            monkeypatch.setattr(room, "BOUNDS", 16)
            monkeypatch.setattr(room, "PASSES", 6)
        monkeypatch.setattr(select_triton, "INVARIANT_SLICES", 3)
        monkeypatch.setattr(sampling_triton, "FOLD_RECORDS", 4)
        monkeypatch.setattr(sampling_triton, "COUNT_RECORDS", 4)

    def ways(count: int, *kinds: dict[str, Any]) -> list[Sampling]:
        return [sampling(**{"top_k": 1 << 30, **kinds[i % len(kinds)]}) for i in range(count)]

    def inputs(count: int, scale: float = 1.0) -> tuple[Tensor, Head, Lowered]:
        torch.manual_seed(count)
        hidden, weight = torch.randn(count, WIDTH) * scale, torch.randn(MANY, WIDTH)
        return hidden, Head(weight), Lowered(torch.arange(count), torch.arange(count) % 3 * 1.5)

    def test_positions_of_all_kinds_in_one_batch() -> None:
        """Some that draw nothing, from all tokens, from some."""
        hidden, head, lowered = inputs(26)
        how = draws([None, None, *ways(9, *UNCUT), *ways(13, *CUT), None, None], keys(26))
        spans = torch.tensor([2, 11, 24], dtype=torch.int32)
        got = sampling_triton.draw(hidden, head, MASK, how, None, spans, lowered)
        want, mine = draw(hidden, head, MASK, how, lowered=lowered), slice(2, 24)
        assert got.token[mine].tolist() == want.token[mine].tolist()
        torch.testing.assert_close(got.prob[mine], want.prob[mine], rtol=1e-5, atol=0)
        assert len(set(got.token[mine].flatten().tolist())) > 10

    def test_an_invariant_head_draws_the_same_alone_to_the_last_bit() -> None:
        hidden, head, lowered = inputs(18)
        head, how = replace(head, invariant=True), draws([*ways(9, *UNCUT), *ways(9, *CUT)], keys(18))
        together = sampling_triton.draw(hidden, head, MASK, how, None, torch.tensor([0, 9, 18]).int(), lowered)
        for i in (3, 16):
            at, one = torch.tensor([i]), torch.tensor([0, int(i < 9), 1]).int()
            alone = sampling_triton.draw(hidden[at], head, MASK, how.at(at), None, one, lowered.at(at))
            assert (alone.token, alone.prob) == (together.token[i], together.prob[i])

    def test_logits_that_are_there_already() -> None:
        torch.manual_seed(1)
        logits, how = torch.randn(10, MANY) * 3, draws([None, *ways(9, *CUT, *UNCUT)], keys(10))
        got, want = sampling_triton.draw(logits, None, MASK, how, None, None, None), draw_whole(logits, MASK, how)
        assert got.token[1:].tolist() == want.token[1:].tolist()
        torch.testing.assert_close(got.prob[1:], want.prob[1:], rtol=1e-5, atol=0)

    def test_shards_of_ranks_are_put_together() -> None:
        """Of three ranks, of which one works at a time."""
        hidden, head, lowered = inputs(12)
        how, spans = draws([None, *ways(5, *UNCUT), *ways(6, *CUT)], keys(12)), torch.tensor([1, 6, 12]).int()
        size, works, together = MANY // RANKS, threading.Lock(), threading.Barrier(RANKS)
        sent: dict[int, Tensor] = {}

        def run(rank: int) -> Best:
            def exchange(mine: Tensor) -> list[Tensor]:
                sent[rank] = mine
                works.release()
                together.wait()
                everyones = [sent[each] for each in range(RANKS)]
                together.wait()
                works.acquire()
                return everyones

            shard = Head(head.weight[rank * size : (rank + 1) * size], rank * size, size, MANY)
            with works:
                return sampling_triton.draw(hidden, shard, MASK, how, exchange, spans, lowered)

        want = draw(hidden, head, MASK, how, lowered=lowered)
        with ThreadPoolExecutor(RANKS) as pool:
            for got in pool.map(run, range(RANKS)):
                assert got.token[1:].tolist() == want.token[1:].tolist()
                torch.testing.assert_close(got.prob[1:], want.prob[1:], rtol=1e-5, atol=0)

    def test_equals_at_a_cut_and_one_token_with_all_the_mass() -> None:
        logits = torch.full((6, MANY), float("-inf"))
        logits[:4, [MASK, 20, 64, 100, 127, 128, 200, 299]] = 0.0
        logits[:4, 150] = torch.tensor(4.0).log()
        logits[4:] = torch.randn(2, MANY)
        logits[4:, 131] = 1e4
        how = draws(ways(6, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.41}, {"top_p": 0.5}, {}), keys(6))
        got, want = sampling_triton.draw(logits, None, MASK, how, None, None, None), draw_whole(logits, MASK, how)
        assert torch.equal(got.token, want.token) and got.token[[0, 2, 4, 5], 0].tolist() == [150, 150, 131, 131]
        torch.testing.assert_close(got.prob, want.prob, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("kind", [{}, {"top_k": 20, "top_p": 0.9}])
    def test_what_is_not_finite_spoils_its_position_only(kind: dict[str, float]) -> None:
        torch.manual_seed(3)
        logits = torch.randn(6, MANY)
        logits[0, 150] = logits[1, MASK] = float("nan")
        logits[2, 299] = float("inf")
        logits[3] = float("-inf")
        logits[4, :200] = float("-inf")
        found = sampling_triton.draw(logits, None, MASK, draws(ways(6, kind), keys(6)), None, None, None)
        assert [int(each) < 0 for each in found.token] == [True] * 4 + [False] * 2
        assert found.prob[:4].tolist() == [[0.0]] * 4

    def test_no_positions() -> None:
        hidden, head, _ = inputs(0)
        found = sampling_triton.draw(hidden, head, MASK, draws([None], keys(1)).at(torch.arange(0)), None, None, None)
        assert found.token.shape == found.prob.shape == (0, 1)
        hidden, head, _ = inputs(3)
        nobody = torch.tensor([3, 3, 3], dtype=torch.int32)
        sampling_triton.draw(hidden, head, MASK, draws([None] * 3, keys(3)), None, nobody, None)

else:

    def test_the_kernels_agree_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    POINTERS = {"records": "fp32", "spans": "i32", "how": "fp32", "state": "fp32"}
    OF_A_PASS = {**POINTERS, "less": "i64", "by": "fp32", "key": "i64"}
    OF_A_FOLD = ["part_stride", "position_stride", "parts", "positions", "block"]

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("kind", ["all", "cut", "counts", "stored", "stored counts", "fp32 counts"])
    def test_passes_compile(kind: str, arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Descriptors and tensor cores, as a checkpoint in bf16 has them; of logits that are there, neither."""
        from sglang_llada.decode import sampling_triton as kernels

        stored, by_tile, cut = kind.startswith("stored"), kind in ("all", "cut", "counts"), kind != "all"
        form = kernels.STORED if stored else kernels.HALF if by_tile else kernels.SINGLE
        sides = {"source": form.positions, "weight": form.ids}
        kinds = {name: f"tensordesc<bf16[{n}, {form.width}]>" if by_tile else "fp32" for name, n in sides.items()}
        used = compiled(
            kernels.slice_kernel,
            OF_A_PASS | kinds,
            ["positions", "vocabulary", "first", "mask_id"],
            kernels.constants(form, 157_184 if stored else 2048, counts="counts" in kind)
            | {"CUT": cut, "STORED": stored, "SPANNED": not stored, "LOWERED": not stored}
            | {"BY_TILE": by_tile, "UPCAST": False},
            arch,
            tmp_path,
            multiples=list(OF_A_PASS),
            num_warps=form.warps,
            num_stages=form.stages,
        )
        with capsys.disabled():
            print(f"\npass over {kind} sm_{arch}: {used}")
        assert used["STACK"] <= (0 if by_tile else 64), "registers are spilled"
        assert used["shared"] <= (164 if arch == 80 else 227) * 1024

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("final", [False, True])
    def test_folds_compile(final: bool, arch: int, tmp_path: Path) -> None:
        from sglang_llada.decode import sampling_triton as kernels

        common = {"SPANNED": True, "FINAL": final, "FROM": 1, "BOUNDS": BOUNDS}
        draws = {"POSITIONS": kernels.FOLD_POSITIONS, "RECORDS": kernels.FOLD_RECORDS, "RANGE": 32.0}
        tokens = {"token": "i64" if final else "fp32", "prob": "fp32"}
        for kernel, pointers, constants in (
            (kernels.draws_kernel, POINTERS | tokens, common | draws),
            (kernels.bounds_kernel, POINTERS | {"packed": "fp32"}, common | {"RECORDS": kernels.COUNT_RECORDS}),
        ):
            used = compiled(kernel, pointers, OF_A_FOLD, constants, arch, tmp_path, num_warps=4)
            assert used["STACK"] == 0, "registers are spilled"
