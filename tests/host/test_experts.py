"""A shared expert among the routed ones is run with the settings that the host has for these."""

from __future__ import annotations

import pytest
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as host

from sglang_llada.host.models.parts import experts

pytestmark = pytest.mark.host


def test_settings_of_the_routed_experts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(host, "get_config_file_name", host.get_config_file_name)  # put back afterwards
    before = [host.get_config_file_name(E, 512, None) for E in (256, 257, 258)]
    experts.install.cache_clear()
    monkeypatch.setattr(experts, "JOINED", set())
    experts.joined(256)
    assert before[0].startswith("E=256,N=512,device_name=NVIDIA_H200")
    assert [host.get_config_file_name(E, 512, None) for E in (256, 257, 258)] == [before[0], before[0], before[2]]
    assert host.get_config_file_name(257, 512, None, down_moe=True).startswith("E=256,N=512,")
