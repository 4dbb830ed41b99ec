"""The viewer before a real server: what it shows of an answer is that answer, and a chat can be typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_llada.errors import ConfigError
from sglang_llada.service import Service
from sglang_llada.view.ask import Question, collected, put
from sglang_llada.view.serve import Viewer
from tests.browser import CHROMIUM, chromium
from tests.host.serving import Server
from tests.told import running

pytestmark = [pytest.mark.host, pytest.mark.slow]
QUESTION = [{"role": "user", "content": "List 12 numbers from 26."}]


def test_a_trace_is_the_answer_of_the_chat(server: Server) -> None:
    want = server.post("/v1/chat/completions", {"model": "a", "messages": QUESTION, "temperature": 0}).json()
    trace = collected(put(Service(server.url), Question(QUESTION, {"threshold": 0.999, "live_blocks": 2})))
    assert trace["answer"] == want["choices"][0]["message"]["content"]
    assert trace["algorithm"] == "threshold" and trace["finish"] == "stop"
    cells = {}
    for frame in trace["frames"]:
        cells |= dict(enumerate(frame["cells"], frame["first"]))
    shown = "".join(trace["texts"][str(cells[i]["token"])] for i in range(trace["tokens"] - 1))
    assert shown == trace["answer"]
    assert "".join(trace["texts"][str(token)] for token in trace["given"]).endswith("ASSISTANT</role>")


def test_the_server_refuses_in_its_own_words(server: Server) -> None:
    for params, said in (({"threshold": 3}, "threshold is 3; allowed"), ({"algorithm": "levenshtein"}, "levenshtein")):
        with pytest.raises(ConfigError, match=said):
            list(put(Service(server.url), Question(QUESTION, params)))
    with pytest.raises(ConfigError, match="the server at .* says: "):
        list(put(Service(server.url), Question([{"role": "nobody", "content": ""}], {})))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; `apt-get install chromium` brings it")
def test_a_chat_is_typed_and_watched(server: Server, tmp_path: Path) -> None:
    viewer = Viewer("127.0.0.1", 0, Service(server.url), [])
    with running(viewer), chromium(tmp_path) as tab:
        tab.open(f"http://127.0.0.1:{viewer.server_port}/")
        tab.run("settings.children[0].elements.threshold.value = 1")
        tab.type(QUESTION[0]["content"])
        tab.press("Enter", "\r")
        tab.wait("runs.length && runs[0].ended")
        tab.run("stepTo(Infinity)")
        answer, steps = tab.run("[runs[0].trace.answer, runs[0].trace.steps]")
        assert tab.run("document.querySelector('.text').textContent").startswith(answer)
        assert tab.run("document.querySelector('[data-count=step]').textContent") == f"{steps} of {steps}"
        assert steps == tab.run("runs[0].frames.length") - 1 and steps > 30, "with threshold 1, one token a step"
        assert tab.errors == []
