"""Our CPU platform steps in only where nothing else was asked for or is there."""

from __future__ import annotations

import pytest

from sglang_llada import accelerator


@pytest.mark.parametrize(
    ("engine", "visible", "ours"),
    [(None, False, True), ("0", False, True), ("1", False, False), (None, True, False), ("1", True, False)],
)
def test_platform_is_ours_only_on_a_bare_cpu(
    monkeypatch: pytest.MonkeyPatch, engine: str | None, visible: bool, ours: bool
) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    if engine is not None:
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", engine)
    monkeypatch.setattr(accelerator, "accelerator_visible", lambda: visible)
    assert accelerator.activate_platform() == (accelerator.PLATFORM if ours else None)
