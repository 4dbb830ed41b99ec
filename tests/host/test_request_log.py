"""What the host writes of each request (`--export-metrics-to-file`) says what it took here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.host.conftest import REQUESTS
from tests.host.serving import ROOT, Server, events

pytestmark = pytest.mark.host

COUNTING = "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>" * 2  # more than a block


def lines_of(server: Server, rid: str) -> list[str]:
    """The lines of a request; they may come a little after its answer."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = "".join(file.read_text() for file in sorted((server.log.parent / REQUESTS).iterdir()))
        whole = text.splitlines()[: text.count("\n")]  # one may be on its way
        if found := [line for line in whole if json.loads(line)["id"] == rid]:
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing is written of {rid}")


def ask(server: Server, rid: str, **more: Any) -> dict[str, Any]:
    """What `meta_info` of an answer of some blocks says, decided slowly."""
    sampling = {"temperature": 0, "max_new_tokens": 128, "ignore_eos": True, "custom_params": {"threshold": 1}}
    reply = server.post("/generate", {"rid": rid, "text": COUNTING, "sampling_params": sampling, **more})
    assert reply.status_code == 200, reply.text
    answer = events(reply)[-1] if more.get("stream") else reply.json()
    meta: dict[str, Any] = answer["meta_info"]
    return meta


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_what_a_request_took(server: Server, stream: bool) -> None:
    server.flush()
    for rid, cached in ((f"cold{stream}", False), (f"warm{stream}", True)):
        meta = ask(server, rid, stream=stream)
        (line,) = lines_of(server, rid)
        said = json.loads(line)
        counts = ("dllm_nfe", "dllm_steps", "completion_tokens", "prompt_tokens", "cached_tokens", "num_retractions")
        assert {name: said[name] for name in counts} == {name: meta[name] for name in counts}
        assert said["dllm_forward_counts"] == meta["dllm_forward_counts"] and len(said["dllm_forward_counts"]) > 3
        assert said["completion_tokens"] == 128 <= said["dllm_nfe"]
        assert said["cached_tokens"] == (said["prompt_tokens"] // 32 * 32 if cached else 0)
        assert json.loads(said["request_parameters"])["text"] == COUNTING, "the page warns of it"
        computed = said["request_finished_ts"] - said["forward_entry_time"]
        assert said["queue_time"] >= 0 and computed > 0 and said["queue_time"] + computed < said["e2e_latency"] + 0.01


def test_a_first_token_comes_before_the_last_one_of_an_answer_that_is_not_streamed(server: Server) -> None:
    ask(server, "first")
    said = json.loads(lines_of(server, "first")[0])
    assert 0 < said["first_token_latency"] < said["e2e_latency"] / 2, "of 128 steps the first decides it"


def test_a_refused_request_has_a_line_with_the_sentence(server: Server) -> None:
    body = {"rid": "refused", "text": "a", "sampling_params": {"custom_params": {"threshold": 7}}}
    assert server.post("/generate", body).status_code == 400
    (line,) = lines_of(server, "refused")
    assert "threshold is 7" in json.loads(line)["finish_reason"]["message"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq; `apt-get install jq` brings it")
def test_the_command_of_the_page_reads_it(server: Server, tmp_path: Path) -> None:
    meta = ask(server, "read")
    file = tmp_path / "lines"
    file.write_text(lines_of(server, "read")[0] + "\n")
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"jq -c '(.+?)' ", page, flags=re.S)
    out = subprocess.run(["jq", "-c", program, str(file)], capture_output=True, text=True, check=True).stdout
    said = json.loads(out)
    told = (said["id"], said["forwards"], said["tokens"], said["blocks"])
    assert told == ("read", meta["dllm_nfe"], 128, len(meta["dllm_forward_counts"]))
    assert said["tokens_per_forward"] == round(128 / meta["dllm_nfe"], 2)
    assert said["queue_ms"] + said["compute_ms"] <= said["total_ms"] + 2 and said["first_ms"] < said["total_ms"]
