"""The attention kernel: in Triton's interpreter against torch, and compiled for the devices that it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted
from tests.paged import Paged

TILE = {"queries": 128, "keys": 64, "warps": 8, "stages": 3}

if INTERPRETED:
    from dataclasses import replace

    from torch import Tensor

    from sglang_llada.errors import IntegrityError
    from sglang_llada.llada2 import attention_triton
    from sglang_llada.llada2.attention_triton import Device, Settings

    def attend(paged: Paged, splits: int | None = 1, programs: int = 512, part: int = 64, **tile: int) -> Tensor:
        """The kernel's answer."""
        device = Device.make(Settings(**(TILE | {"part": part} | tile)), programs, paged.q.shape[-1], "cpu")
        # What splits do not write must not be read.
        device.means.fill_(float("nan"))
        device.log_sums.fill_(float("nan"))
        return attention_triton.attend(
            paged.q,
            paged.keys,
            paged.values,
            paged.table,
            paged.requests,
            paged.ends,
            on=device,
            block=paged.block,
            scale=paged.scale,
            splits=splits,
        )

    def agree(paged: Paged, off: float = 2e-6, **options: int | None) -> None:
        torch.testing.assert_close(attend(paged, **options).double(), paged.attended(), rtol=0, atol=off)

    ROWS = [(1, 32), (0, 64), (1, 320), (0, 352), (0, 96)]  # rows of one request in one forward, in no order

    @pytest.mark.parametrize(("group", "splits"), [(1, 1), (3, 2), (4, 5), (8, 2)])
    def test_groups_of_heads_and_splits(group: int, splits: int) -> None:
        agree(Paged.make(ROWS, length=352, group=group, kv_heads=2), splits=splits)

    @pytest.mark.parametrize(("block", "head_size"), [(8, 16), (12, 128), (64, 64)])
    def test_blocks_and_heads(block: int, head_size: int) -> None:
        rows = [(0, block), (0, 5 * block), (1, 4 * block)]
        agree(Paged.make(rows, length=5 * block, block=block, head_size=head_size), splits=3)

    @pytest.mark.parametrize("tile", [{"keys": 32}, {"keys": 128, "part": 128}, {"queries": 64}])
    def test_tiles(tile: dict[str, int]) -> None:
        agree(Paged.make(ROWS, length=352), splits=2, **tile)

    def test_thousands_of_keys_in_many_splits() -> None:
        agree(Paged.make([(0, 4096), (0, 32), (0, 2080)], length=4096), splits=20)

    @pytest.mark.parametrize(("dtype", "off"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
    def test_half_precision(dtype: torch.dtype, off: float) -> None:
        agree(Paged.make(ROWS, length=352, dtype=dtype), off, splits=2)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_eight_bits_with_scales(dtype: torch.dtype) -> None:
        """Keys and values are stored divided by their scales."""
        paged = Paged.make(ROWS, length=352)
        small = replace(paged, keys=(paged.keys / 0.5).to(dtype), values=(paged.values / 0.25).to(dtype))
        device = Device.make(Settings(**TILE), 512, paged.q.shape[-1], "cpu")
        pool = (small.keys, small.values, small.table, small.requests, small.ends)
        got = attention_triton.attend(
            small.q, *pool, on=device, block=32, scale=small.scale * 0.5, value_scale=0.25, splits=2
        )
        want = replace(small, keys=small.keys.float() * 0.5, values=small.values.float() * 0.25).attended()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)

    def test_lengths_and_requests_of_32_bits_are_the_same() -> None:
        paged = Paged.make(ROWS, length=352)
        narrow = replace(paged, requests=paged.requests.int(), ends=paged.ends.int())
        assert torch.equal(attend(narrow, splits=2), attend(paged, splits=2))

    @pytest.mark.parametrize("splits", [1, 4])
    def test_a_row_does_not_depend_on_the_others(splits: int) -> None:
        """To the last bit, for a fixed number of splits."""
        paged = Paged.make(ROWS, length=352)
        together = attend(paged, splits=splits).split(32)
        for r, (request, end) in enumerate(ROWS):
            alone = replace(paged, q=paged.q[r * 32 :][:32], requests=torch.tensor([request]), ends=torch.tensor([end]))
            assert torch.equal(attend(alone, splits=splits), together[r])

    def test_tokens_that_pad_a_batch_and_rows_of_no_length_give_zeros() -> None:
        paged = Paged.make(ROWS, length=352)
        padded = replace(paged, q=torch.cat([paged.q, paged.q[:40]]), ends=torch.tensor([32, 0, 320, 352, 96]))
        out = attend(padded, splits=2)
        assert not out[160:].any()
        assert not out[32:64].any()
        assert torch.equal(out[64:160], attend(paged, splits=2)[64:])

    def test_what_lies_beyond_a_row_is_not_read() -> None:
        """Neither KV that nobody wrote nor pages of a former request."""
        paged = Paged.make([(0, 96)], length=352)
        want = attend(paged)
        beyond = paged.table[0, 96:].long()
        paged.keys[beyond] = paged.values[beyond] = float("nan")
        paged.table[0, 96:] = 2**31 - 32
        assert torch.equal(attend(paged), want)

    def test_few_rows_are_split_and_many_are_not() -> None:
        device = Device.make(Settings(**TILE), 132, 128, "cpu")
        assert [device.splits(rows * 4, 32_768) for rows in (1, 2, 8, 16, 32, 64, 1024)] == [33, 16, 4, 2, 1, 1, 1]
        assert device.splits(4, 512) == 2  # of which no part would be too short

    def test_memory_for_splits_is_not_exceeded() -> None:
        with pytest.raises(IntegrityError, match="memory for 8 programs"):
            attend(Paged.make(ROWS, length=352), splits=2, programs=8)

else:
    from triton import next_power_of_2

    from sglang_llada.llada2 import attention_triton
    from sglang_llada.llada2.attention_triton import LARGE, MERGED, OTHERS, Settings

    def resources(arch: int, settings: Settings, folder: Path, group: int = 4, kv: str = "bf16") -> dict[str, int]:
        """Of the kernel at the published shape: blocks of 32, heads of 128."""
        tile = min(next_power_of_2(32 * group), settings.queries)
        strides = ["q_stride", "q_head_stride", "key_stride", "key_head_stride", "value_stride", "value_head_stride"]
        pointers = {"q": "bf16", "keys": kv, "values": kv, "out": "bf16", "means": "fp32", "log_sums": "fp32"}
        return compiled(
            attention_triton.attend_kernel,
            pointers | {"table": "i32", "requests": "i64", "ends": "i64"},
            ["splits", *strides, "table_stride"],
            {
                "BLOCK": 32,
                "GROUP": group,
                "TILES": 32 * group // tile,
                "TILE": tile,
                "D": 128,
                "KEYS": settings.keys,
                "LEAST_PART": settings.part,
                "SPLIT": True,
                "UPCAST": False,
            },
            arch,
            folder,
            floats=["scale", "value_scale"],
            multiples=[*pointers, "table", "requests", "ends", *strides, "table_stride"],
            num_warps=settings.warps,
            num_stages=settings.stages,
        )

    def test_the_kernel_agrees_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize(
        ("arch", "settings", "memory", "kv"),
        [
            (80, OTHERS[2], 99 << 10, "bf16"),  # the least that cards of this kind have
            (90, LARGE[2], 227 << 10, "bf16"),
            (90, LARGE[2], 227 << 10, "fp8e4nv"),
            (100, LARGE[2], 227 << 10, "bf16"),
        ],
    )
    def test_it_compiles(
        arch: int, settings: Settings, memory: int, kv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """At the published shape: blocks of 32, four heads of 128 on a KV head."""
        used = resources(arch, settings, tmp_path, kv=kv)
        with capsys.disabled():
            print(f"\nattention over {kv}, sm_{arch}: {used}, {settings}")
        assert used["STACK"] == 0, "registers are spilled"
        assert used["shared"] <= memory

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_the_merge_compiles(arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pointers = {"out": "bf16", "means": "fp32", "log_sums": "fp32", "ends": "i64"}
        shape = {"BLOCK": 32, "GROUP": 4, "TILES": 1, "TILE": 128, "D": 128, "KEYS": 64, "LEAST_PART": 256}
        merged = {name: number for name, number in MERGED.items() if name.isupper()}
        used = compiled(
            attention_triton.merge_kernel,
            pointers,
            ["splits"],
            shape | merged,
            arch,
            tmp_path,
            multiples=list(pointers),
            num_warps=MERGED["num_warps"],
        )
        with capsys.disabled():
            print(f"\nmerge of splits sm_{arch}: {used}")
        assert used["STACK"] == 0, "registers are spilled"
