"""What can run here: without SGLang tests/host is left out, without an accelerator tests marked gpu are skipped."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tests import sizes

HOST_INSTALLED = importlib.util.find_spec("sglang") is not None

# Their modules import the host, so they cannot even be collected without it.
collect_ignore_glob = [] if HOST_INSTALLED else ["host/*"]


def pytest_configure(config: pytest.Config) -> None:
    """Where long tests run, the others send many requests too. Processes that run side by side share the cores."""
    sizes.long = "long" in config.option.markexpr
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        import torch

        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // int(workers), 1))


def pytest_report_header() -> list[str]:
    """Say what is left out and what would run it."""
    return [] if HOST_INSTALLED else ["tests/host is left out: SGLang is not installed; run `make venv`"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no accelerator, and those marked long where they are not asked for.

    Servers come first: of files that run side by side, what is left for the end is short.
    """
    items.sort(key=lambda item: "host" not in item.path.parts)
    if not sizes.long:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="runs with `-m long` only"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator that torch.cuda sees"))
