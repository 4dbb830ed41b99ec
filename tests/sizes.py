"""How many requests a test sends: a few of each kind by default, and many where tests that take minutes run too."""

from __future__ import annotations

long = False  # set by conftest before test modules are imported


def size(usual: int, many: int) -> int:
    """`usual`, or `many` where `-m long` is among what runs."""
    return many if long else usual
