"""Profiles are recorded, or it is said why not, and the server goes on."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.host.serving import Server

pytestmark = pytest.mark.host

ASK: dict[str, Any] = {"text": "What is 17 + 25?", "sampling_params": {"temperature": 0, "max_new_tokens": 64}}


def start(server: Server, folder: Path, **options: Any) -> None:
    reply = server.post("/start_profile", {"output_dir": str(folder), "with_stack": False, **options})
    assert reply.status_code == 200, reply.text


def traced(folder: Path, seconds: float = 60) -> list[Path]:
    """Files of traces, which must be whole, once there are any."""
    deadline = time.monotonic() + seconds
    while not (found := list(folder.glob("*.trace.json.gz"))):
        assert time.monotonic() < deadline, "no trace was written"
        time.sleep(0.2)
    for file in found:
        while True:
            try:
                assert json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
                break
            except (EOFError, ValueError):  # it is being written
                assert time.monotonic() < deadline
                time.sleep(0.2)
    return found


@pytest.mark.slow
def test_profiles_are_written(server: Server, tmp_path: Path) -> None:
    want = server.post("/generate", ASK).json()["output_ids"]
    for round_ in range(2):
        start(server, tmp_path / f"by hand {round_}")
        assert server.post("/generate", ASK).json()["output_ids"] == want
        reply = server.post("/start_profile", {"output_dir": str(tmp_path)})
        assert reply.status_code == 400 and "a profile is being recorded" in reply.text
        assert server.post("/stop_profile").status_code == 200
        assert len(traced(tmp_path / f"by hand {round_}")) == 1
        reply = server.post("/stop_profile")
        assert reply.status_code == 400 and "not in progress" in reply.text
    for name, options in {
        "steps": {"num_steps": 2},
        "stage": {"num_steps": 2, "profile_by_stage": True},
        "later": {"num_steps": 1, "start_step": 1, "activities": ["CPU"], "profile_prefix": "p"},
    }.items():
        start(server, tmp_path / name, **options)
        for _ in range(3):
            assert server.post("/generate", ASK).json()["output_ids"] == want
        assert len(traced(tmp_path / name)) == 1


def test_what_cannot_be_recorded_is_said_and_the_server_goes_on(server: Server, tmp_path: Path) -> None:
    want = server.post("/generate", ASK).json()["output_ids"]
    for activity in ("MEM", "RPD", "nonsense", "CUDA_PROFILER", "x" * 10_000):
        reply = server.post("/start_profile", {"activities": ["CPU", activity]})
        assert reply.status_code == 400 and "allowed: CPU, GPU" in reply.text and len(reply.text) < 1000, reply.text
    reply = server.post("/start_profile", {"profile_by_stage": True})
    assert reply.status_code == 400 and "num_steps" in reply.text, reply.text
    for path, more in (("/proc/nowhere", {}), ("/dev/null/x", {"num_steps": 1}), ("/proc/x", {"num_steps": -5})):
        server.post("/start_profile", {"output_dir": path, "with_stack": False, **more})
        assert server.post("/generate", ASK).json()["output_ids"] == want
        if not more:
            reply = server.post("/stop_profile")
            assert reply.status_code == 400 and "given up" in reply.text, reply.text
    for wrong in ({"num_steps": 2**70}, {"num_steps": "many"}, {"activities": "CPU"}, {"start_step": -(2**70)}):
        assert server.post("/start_profile", wrong).status_code in (400, 500)
    server.post("/stop_profile")
    assert server.post("/generate", ASK).json()["output_ids"] == want
    start(server, tmp_path, num_steps=1)
    assert server.post("/generate", ASK).json()["output_ids"] == want
    assert traced(tmp_path)
