"""The examples that need the host, against a real server or as an engine: they print what their page says."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from examples import canvas, offline_engine, openai_client, tool_loop
from tests.host.serving import ROOT, Server, free_port

pytestmark = [pytest.mark.host, pytest.mark.slow]


def on_page(lines: list[str]) -> bool:
    """Whether the page has these lines as code, one behind the other."""
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    return "\n".join(f"    {line}" if line else "" for line in lines).strip("\n") in page


def chat(server: Server, question: str) -> str:
    """What the server answers to a question that is neither streamed nor asked through the client."""
    body = {"model": "default", "messages": openai_client.user(question), "temperature": 0, "max_tokens": 128}
    reply: requests.Response = server.post("/v1/chat/completions", body)
    assert reply.ok, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_openai_client_prints_a_whole_and_a_streamed_answer(
    server: Server, run_example: Callable[..., list[str]]
) -> None:
    lines = run_example("examples.openai_client", "--url", server.url)
    whole, streamed = openai_client.QUESTIONS
    assert lines[:3] == [f"question: {whole}", f"answer:   {chat(server, whole)}", f"question: {streamed}"]
    assert lines[3].removeprefix("pieces:   ").replace("|", "") == chat(server, streamed)
    assert lines[3].count("|") >= 1
    assert on_page(lines[:3])


def test_offline_engine_answers_every_question(run_example: Callable[..., list[str]]) -> None:
    lines = run_example("examples.offline_engine", "--new-tokens", "64")
    asked = [line.removeprefix("question: ") for line in lines if line.startswith("question: ")]
    answers = [line for line in lines if line.startswith("answer:   ")]
    forwards = [int(line.split()[1]) for line in lines if line.startswith("forwards: ")]
    assert asked == offline_engine.QUESTIONS
    assert len(answers) == len(forwards) == len(asked)
    assert all(count >= 1 for count in forwards)
    assert on_page(lines)


def test_a_tool_loop_calls_a_function_and_answers(server: Server, run_example: Callable[..., list[str]]) -> None:
    question, call, answer = run_example("examples.tool_loop", "--url", server.url)
    assert question == f"question: {tool_loop.QUESTION}"
    matched = re.fullmatch(r"call:     add\((.*)\) = (\d+)", call)
    assert matched is not None and sum(json.loads(matched[1]).values()) == int(matched[2])
    assert answer.startswith("answer:   ")
    assert on_page([question, call, answer])


def test_a_canvas_is_filled_and_choices_are_read(run_example: Callable[..., list[str]]) -> None:
    """The page has what the example prints."""
    lines = run_example("examples.canvas")
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    assert [line for line in lines if line and f"    {line}" not in page.splitlines()] == []
    assert sum(line.startswith(("answer: ", "choices: ")) for line in lines) == len(canvas.INFILLS) + len(canvas.READS)


def test_a_chat_shows_each_step_and_remembers(server: Server) -> None:
    command = [sys.executable, "-m", "examples.chat", "--url", server.url, "--threshold", "1"]
    typed = "Spell KLMN.\nSpell KLM.\n"
    done = subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=100, check=True)
    first, *lines = done.stdout.splitlines()
    second = next(i for i, line in enumerate(lines) if line.startswith("> "))
    *steps, answer = lines[:second]
    assert first == "> Spell KLMN." and answer == chat(server, "Spell KLMN.") and on_page([first])
    assert [int(step.split()[0]) for step in steps] == list(range(1, len(steps) + 1)) and len(steps) > 8
    still_open = [step.count("·") for step in steps]
    assert sorted(still_open, reverse=True) == still_open and still_open[0] > 8 and still_open[-1] == 0
    assert on_page([steps[-1], answer]) or steps[-1].split()[1] == f"{answer}▪"
    turns = [
        *openai_client.user("Spell KLMN."),
        {"role": "assistant", "content": answer},
        *openai_client.user("Spell KLM."),
    ]
    body = {"model": "default", "messages": turns, "temperature": 0, "custom_params": {"threshold": 1}}
    assert lines[-2] == server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_facts_are_extracted_by_a_schema(server: Server, run_example: Callable[..., list[str]]) -> None:
    assert on_page(run_example("examples.extract", "--url", server.url))


def test_a_file_of_questions_becomes_one_of_answers(
    server: Server, run_example: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    assert on_page(run_example("examples.batch", "examples/questions.jsonl", str(out), "--url", server.url))
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["sum", "sort", "fast", "wrong"]
    assert [answer["error"] and answer["error"]["code"] for answer in answers] == [None, None, None, 400]
    assert answers[0]["response"]["body"]["choices"][0]["message"]["content"] == "42"


@pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="`pip install sglang-router` brings it")
def test_a_router_answers_for_its_servers(server: Server, run_example: Callable[..., list[str]]) -> None:
    assert on_page(run_example("examples.router", server.url, "--port", str(free_port())))
