"""What the board and the alerts ask for is what a running server says."""

from __future__ import annotations

import re
import time

import pytest
import requests

from tests.host.serving import Server
from tests.test_board import alerts, queries

pytestmark = pytest.mark.host

NEVER_HERE = {"sglang:num_retracted_requests_total"}  # where KV has room for all


def test_every_metric_that_is_asked_for_is_there(server: Server) -> None:
    everything = [*queries(), *(alert["expr"] for alert in alerts())]
    asked = {name for query in everything for name in re.findall(r"sglang:\w+", query)}
    for _ in range(2):  # the second finds the first one's blocks
        server.generate([5] * 70, 8)
    leaving = {"input_ids": [5], "stream": True, "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    with server.post("/generate", leaving, stream=True) as reply:
        next(reply.iter_lines())
    deadline = time.monotonic() + 30
    while missing := asked - NEVER_HERE - names(server):
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)


def names(server: Server) -> set[str]:
    """Those of all metrics that a server has a value of."""
    return set(re.findall(r"^(sglang:\w+)[{ ]", requests.get(server.url + "/metrics", timeout=20).text, flags=re.M))
