"""Rows of a forward that decide nothing, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_llada.decode.layout import RowLayout
from sglang_llada.host.engine.rows import WRITTEN, Numbers


def idle_rows(layout: RowLayout, tokens: Numbers, slots: Sequence[int], starts: Sequence[int]) -> Numbers:
    """Rows with these tokens [R, T], slots and first positions, int64 [R, width]."""
    rows = np.zeros((len(tokens), layout.width), np.int64)
    rows[:, layout.tokens], rows[:, layout.start] = tokens, starts
    rows[:, layout.place] = np.column_stack((starts, slots, [WRITTEN] * len(tokens)))
    return rows
