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
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},  # it works on single numbers
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def compiled(
    kernel: Any,
    pointers: dict[str, str],
    numbers: list[str],
    constants: dict[str, Any],
    arch: int,
    folder: Path,
    floats: Sequence[str] = (),
    multiples: Sequence[str] = (),
    **options: int,
) -> dict[str, int]:
    """Compile a kernel for sm_`arch`: its registers (REG), bytes of spilled registers (STACK) and of shared memory.

    Args:
        pointers: types of what the kernel's pointers point to, and its descriptors. numbers: its integer parameters.
        constants: the others. folder: where the binary may be written. options: num_warps, num_stages.
        floats: its fp32 parameters. multiples: parameters that are multiples of 16 (pointers: of 16 bytes), which
            Triton finds out when it launches a kernel, and loads wide then.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.knobs import nvidia

    signature = {name: kind if kind.startswith("tensordesc") else f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(numbers, "i32") | dict.fromkeys(floats, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    code = triton.compile(
        ASTSource(kernel, signature, constants, known), target=GPUTarget("cuda", arch, 32), options=options
    )
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
