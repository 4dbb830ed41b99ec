"""Sets of positions as the package keeps them: numbers, with bit i for position i."""

from __future__ import annotations

from collections.abc import Iterable


def set_of(flags: Iterable[object]) -> int:
    """The positions whose flag is true."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)
