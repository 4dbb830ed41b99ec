"""The examples that need the host: the client against a real server, the engine in a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from examples import canvas, offline_engine, openai_client, tool_loop
from tests.host import warm
from tests.host.serving import ROOT, Server, tail

pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """An example with its arguments, to the lines that it prints."""

    def printed(module: str, *args: str) -> list[str]:
        out, errors = tmp_path / "out", tmp_path / "errors"
        process = warm.WarmServer(module, list(args), out, warm.environment(), ROOT, errors)
        assert process.wait(280) == 0, tail(errors)
        return out.read_text().splitlines()

    return printed


def chat(server: Server, question: str) -> str:
    """What the server answers to a question that is neither streamed nor asked through the client."""
    body = {"model": "default", "messages": openai_client.user(question), "temperature": 0, "max_tokens": 128}
    reply: requests.Response = server.post("/v1/chat/completions", body)
    assert reply.ok, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_openai_client_prints_a_whole_and_a_streamed_answer(server: Server, run: Callable[..., list[str]]) -> None:
    lines = run("examples.openai_client", "--url", server.url)
    whole, streamed = openai_client.QUESTIONS
    assert lines[:3] == [f"question: {whole}", f"answer:   {chat(server, whole)}", f"question: {streamed}"]
    assert lines[3].removeprefix("pieces:   ").replace("|", "") == chat(server, streamed)
    assert lines[3].count("|") >= 1


def test_offline_engine_answers_every_question(run: Callable[..., list[str]]) -> None:
    lines = run("examples.offline_engine", "--new-tokens", "64")
    asked = [line.removeprefix("question: ") for line in lines if line.startswith("question: ")]
    answers = [line for line in lines if line.startswith("answer:   ")]
    forwards = [int(line.split()[1]) for line in lines if line.startswith("forwards: ")]
    assert asked == offline_engine.QUESTIONS
    assert len(answers) == len(forwards) == len(asked)
    assert all(count >= 1 for count in forwards)


def test_a_tool_loop_calls_a_function_and_answers(server: Server, run: Callable[..., list[str]]) -> None:
    question, call, answer = run("examples.tool_loop", "--url", server.url)
    assert question == f"question: {tool_loop.QUESTION}"
    matched = re.fullmatch(r"call:     add\((.*)\) = (\d+)", call)
    assert matched is not None and sum(json.loads(matched[1]).values()) == int(matched[2])
    assert answer.startswith("answer:   ")


def test_a_canvas_is_filled_and_choices_are_read(run: Callable[..., list[str]]) -> None:
    """The page has what the example prints."""
    lines = run("examples.canvas")
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    assert [line for line in lines if line and f"    {line}" not in page.splitlines()] == []
    assert sum(line.startswith(("answer: ", "choices: ")) for line in lines) == len(canvas.INFILLS) + len(canvas.READS)
