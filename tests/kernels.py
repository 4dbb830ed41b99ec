"""What can be known of a Triton kernel without a device: its results in the interpreter, its code for a target."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)

# The interpreter is chosen when Triton is first imported, so its tests run in a process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """Run a test file once more, in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def compiled(
    kernel: Any,
    arrays: dict[str, str],
    numbers: list[str],
    constants: dict[str, Any],
    arch: int,
    folder: Path,
    scales: Sequence[str] = (),
    multiples: Sequence[str] = (),
    **options: int,
) -> dict[str, int]:
    """Compile a kernel for sm_`arch`: its registers (REG), bytes of spilled registers (STACK) and of shared memory.

    Args:
        arrays: types of the kernel's pointers and descriptors. numbers: its integer parameters. constants: the others.
        scales: its parameters in fp32. multiples: of its integers those that are multiples of 16, as Triton finds out
            when it launches a kernel. folder: where the binary may be written. options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.knobs import nvidia

    # Addresses of tensors are multiples of 16; without knowing that, a kernel would fetch number by number.
    names = [name for name, kind in arrays.items() if kind.startswith("*")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*names, *multiples)}
    signature = (
        arrays | dict.fromkeys(numbers, "i32") | dict.fromkeys(scales, "fp32") | dict.fromkeys(constants, "constexpr")
    )
    order = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, order, constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "cubin"
    cubin.write_bytes(code.asm["cubin"])
    out = subprocess.check_output([nvidia.cuobjdump.path, "--dump-resource-usage", cubin], text=True)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", out)}
    return used | {"shared": code.metadata.shared}


def occupancy(used: dict[str, int], warps: int) -> int:
    """How many programs of a kernel share a multiprocessor of an H100."""
    registers = rounded_up(used["REG"], 8) * 32 * warps
    return min(65536 // registers, 227 * 1024 // (used["shared"] + 1024), 64 // warps)


def rounded_up(number: int, unit: int) -> int:
    """The next multiple."""
    return -(-number // unit) * unit
