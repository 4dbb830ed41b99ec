"""Figures along a size: the exponents with which they grow, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path

Curve = Mapping[int, float]  # a figure by its size


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves by their names, and what their axes say."""

    curves: Mapping[str, Curve]
    size: str
    figure: str


def exponents(curve: Curve) -> dict[str, float]:
    """The power of the size with which a figure grows: from each size to the next, and from the first to the last.

    0 is not at all, 1 in proportion. A figure that is not positive has none.
    """
    sizes = sorted(size for size, figure in curve.items() if figure > 0)
    ends = [(sizes[0], sizes[-1])] if len(sizes) > 2 else []
    return {
        f"{small} to {large}": log(curve[large] / curve[small]) / log(large / small)
        for small, large in [*pairwise(sizes), *ends]
    }


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, all axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), constrained_layout=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, curve in panel.curves.items():
            axis.plot(list(curve), list(curve.values()), "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel=panel.size, ylabel=panel.figure)
        sizes = sorted({size for curve in panel.curves.values() for size in curve})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.set_yticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path)
