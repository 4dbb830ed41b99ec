"""Tuning: prompts of a file, figures of answers, what nothing beats, the picture, and a scripted server driven."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sglang_llada.__main__ import main
from sglang_llada.config import ALGORITHMS, DecodeConfig
from sglang_llada.errors import ConfigError
from sglang_llada.service import Service
from sglang_llada.tune import prompts
from sglang_llada.tune.command import SETTINGS, settings_for
from sglang_llada.tune.drive import Ask, Driver, Reply
from sglang_llada.tune.figures import Figures, figures, late, table, unbeaten
from sglang_llada.tune.plot import svg, ticks
from sglang_llada.tune.prompts import Prompt
from tests import told

CHAT = [{"role": "user", "content": "a"}]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def server() -> Iterator[told.Server]:
    """A scripted server."""
    serves = told.Server()
    with told.running(serves):
        yield serves


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Prompts of the scripts that the server knows, one with its answer."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"messages": CHAT, "answer": "Hello, world!"}, {"messages": [{"role": "user", "content": "move"}]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def reply(ids: list[int], text: str = "", forwards: int = 1, first: float = 0.5, seconds: float = 1.0) -> Reply:
    return Reply(text, ids, forwards, first, seconds)


def row(quality: float, answers: float, at_once: int = 1, setting: float = 0.5) -> Figures:
    """Figures of which two count."""
    return Figures({"threshold": setting}, at_once, quality, 1, 1, 1, 1, 1, 1, 1, 1, answers)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_line_is_a_chat_a_text_or_one_of_openais_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines: list[dict[str, Any]] = [
        {"messages": CHAT, "answer": "b", "task": "any"},
        {"text": "c", "max_tokens": 7},
        {"prompt": "d"},
        {"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": CHAT, "max_tokens": 3}, "answer": "e"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert prompts.read(path) == [
        Prompt(CHAT, "b", None),
        Prompt("c", None, 7),
        Prompt("d", None, None),
        Prompt(CHAT, "e", 3),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; needed is a JSON object with messages or text on each line"),
        ("\n \n", "is empty"),
        ('{"text": "a"}\n{"text": ', "a.jsonl, line 2 is no JSON: "),
        ("[1]", "line 1 is [1]; needed is an object with messages, prompt or text"),
        ('{"body": "text"}', "needed is an object with messages, prompt or text"),
        ('{"text": "a", "prompt": "b"}', "one of them"),
        ('{"text": ""}', 'line 1: text is ""; needed is a text'),
        ('{"messages": "a"}', 'messages is "a"; needed is a list of messages'),
        ('{"text": "a", "answer": 3}', "answer is 3; needed is a text"),
        ('{"text": "a", "max_tokens": 0}', "max_tokens is 0; needed is an integer from 1"),
        ('{"text": "a", "max_tokens": true}', "max_tokens is true"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        prompts.read(path)
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"--prompts: .*nothing.jsonl cannot be read"):
        prompts.read(tmp_path / "nothing.jsonl")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_all_answers_together() -> None:
    asked = [Prompt("a", "x", None), Prompt("b", "y", None), Prompt("c", None, None), Prompt("d", None, None)]
    careful = [reply([1, 2, 3, 4]), reply([1, 2]), reply([5]), reply([])]
    replies = [
        reply([1, 2, 3, 4], " x\n", forwards=2, first=0.1, seconds=1),
        reply([2, 1], "z", forwards=1, first=0.2, seconds=2),
        reply([1, 5], "", forwards=3, first=0.3, seconds=3),
        reply([], "", forwards=1, first=0.4, seconds=4),
    ]
    found = figures({}, 2, asked, replies, careful, seconds=5)
    assert found.right == 1 / 2, "of those with an answer in the file"
    assert found.same == 2 / 4
    assert found.same_tokens == 2 * (4 + 1 + 1) / (8 + 7)
    assert found.tokens_per_forward == 8 / 7
    assert (found.first, found.first_late, found.latency, found.latency_late) == (0.25, 0.4, 2.5, 4)
    assert (found.tokens, found.answers) == (8 / 5, 4 / 5)
    unknown = figures({}, 2, asked[2:], replies[2:], careful[2:], seconds=5)
    assert unknown.right is None and unknown.quality == unknown.same_tokens


def test_one_in_a_hundred_is_later_than_late() -> None:
    assert late(range(100)) == 98
    assert late(range(10)) == 9
    assert late([3]) == 3


def test_what_nothing_beats_is_better_or_faster_than_any_other_at_as_many_at_once() -> None:
    slow, equal, fast, beaten = row(1, 1), row(1, 2), row(0.5, 3), row(0.5, 2)
    elsewhere = row(0.1, 0.1, at_once=2)
    assert unbeaten([slow, equal, fast, beaten, elsewhere]) == [equal, fast, elsewhere]
    assert unbeaten([row(1, 1, setting=0.1), row(1, 1, setting=0.2)]) != [], "a draw beats nobody"


def test_a_table_has_a_column_for_right_answers_where_some_are_known() -> None:
    head, rule, first, second = table([row(1, 4, setting=0.9), row(0.5, 2)]).splitlines()
    assert len({len(line) for line in (head, rule, first, second)}) == 1, "columns line up"
    assert head.count("|") == rule.count("|") and " right " in head
    assert first.startswith("| * | threshold 0.9 |") and second.startswith("|   | threshold 0.5 |")
    unknown = figures({}, 1, [Prompt("a", None, None)], [reply([1])], [reply([1])], 1)
    assert " right " not in table([unknown]) and "| the server's own |" in table([unknown])


def test_every_algorithm_has_settings_that_it_takes_the_most_careful_first() -> None:
    assert SETTINGS.keys() == ALGORITHMS.keys()
    for algorithm, settings in SETTINGS.items():
        defaults = DecodeConfig.defaults(32, algorithm, indel=True)
        taken = [defaults.replaced(setting) for setting in settings]
        assert taken[0].threshold == 1 == max(each.threshold for each in taken)
        assert {} in settings and len({json.dumps(each) for each in settings}) == len(settings)
    assert settings_for("mbe") == SETTINGS["joint_threshold"]


# --- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[100.0, 100.0], [0.0], [17.3, 18.9, 2.2], [99.9, 100.0], [1e-3, 5e-3]])
def test_ticks_are_round_and_around_all_values(values: list[float]) -> None:
    marks = ticks(values)
    assert marks[0] <= min(values) and marks[-1] >= max(values) - 1e-9
    assert 2 <= len(marks) <= 8
    steps = {round(b - a, 9) for a, b in itertools.pairwise(marks)}
    assert len(steps) == 1 and f"{steps.pop():e}"[0] in "125"


def test_a_picture_has_each_point_where_its_figures_are() -> None:
    rows = [
        row(1, 10, setting=1),
        row(0.9, 20, setting=0.5),
        row(0.8, 15, setting=0.2),
        row(1, 40, at_once=8, setting=1),
    ]
    root = ElementTree.fromstring(svg(rows, "a < b"))
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{SVG}circle")]
    points, key = circles[:4], circles[4:]
    assert len(key) == 3, "one line of the key for each setting"
    assert points[0][0] < points[2][0] < points[1][0], "more answers a second are further right"
    assert points[0][1] < points[1][1] < points[2][1], "and better ones higher"
    lines = [line.get("points", "").split() for line in root.iter(f"{SVG}polyline")]
    assert lines == [[f"{x:g},{y:g}" for x, y in points[:2]], [f"{x:g},{y:g}" for x, y in points[3:]]]
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert all(0 < x < width and 0 < y < height for x, y in circles)
    said = [each.text for each in root.iter(f"{SVG}text")]
    assert {"a < b", "1 at once", "8 at once", "threshold 1", "right answers, %"} <= set(said)


# --- a server driven --------------------------------------------------------------------------------------------------


def test_an_answer_is_the_last_output_and_the_same_of_one_told_in_pieces(server: told.Server) -> None:
    ask = Driver(Service(server.url), pieces=False).ask_of(Prompt(CHAT, None, None), 5)
    assert ask == Ask({"input_ids": told.SCRIPTS["threshold"].prompt}, 5)
    whole = Driver(Service(server.url), pieces=False).answer(ask, {"threshold": 0.9})
    assert (whole.text, whole.ids) == ("Hello, world!", [ord(letter) for letter in "Hello, world!"])
    assert whole.forwards == len(told.STAYING) + 1 and 0 < whole.first <= whole.seconds
    sent = server.asked[-1][1]["sampling_params"]
    assert sent == {"temperature": 0, "max_new_tokens": 5, "custom_params": {"threshold": 0.9}}
    server.tells = in_pieces
    parts = Driver(Service(server.url), pieces=True).answer(ask, {})
    assert (parts.text, parts.ids, parts.forwards) == (whole.text, whole.ids, whole.forwards)


def in_pieces(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As with --incremental-streaming-output: what is new of each."""
    starts = [0, *(len(each["text"]) for each in outputs)]
    return [
        {**each, "text": each["text"][start:], "output_ids": each["output_ids"][start:]}
        for start, each in zip(starts, outputs, strict=False)
    ]


def test_as_many_are_under_way_as_asked_for(server: told.Server) -> None:
    under_way, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)

    def tells(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(20)
        with lock:
            under_way -= 1
        return outputs

    server.tells = tells
    driver = Driver(Service(server.url), pieces=False)
    heard: list[int] = []
    replies = driver.answers([driver.ask_of(Prompt(CHAT, None, None), 5)] * 9, {}, 3, heard.append)
    assert most == 3 and heard == list(range(1, 10)) and {each.text for each in replies} == {"Hello, world!"}


def run(server: told.Server, file: Path, *args: str) -> int:
    return main(["tune", "--url", server.url + "/", "--prompts", str(file), *args])


def test_every_prompt_is_answered_at_every_setting(
    server: told.Server, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.svg"
    assert run(server, file, "--at-once", "1", "2", "--save", str(picture)) == 0
    settings = len(SETTINGS["threshold"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * settings and all("100.0% | 100.0%" in line for line in lines[2:])
    asked = [body["sampling_params"] for path, body, _ in server.asked if path == "/generate"]
    assert len([each for each in asked if each["max_new_tokens"] == 1]) == settings + 2, "tried, and prompts read"
    assert len([each for each in asked if each["max_new_tokens"] == 128]) == 2 * 2 * settings
    assert ElementTree.fromstring(picture.read_text()).tag == f"{SVG}svg"


def test_all_figures_as_json(server: told.Server, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--setting", '{"threshold": 0.9}', "--setting", "{}", "--first", "1", "--at-once", "4")
    assert run(server, file, "--json", *chosen, "--max-tokens", "9") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["model"], record["algorithm"], record["prompts"]) == ("scripted", "threshold", 1)
    assert [each["setting"] for each in record["rows"]] == [{"threshold": 0.9}, {}]
    assert all(each["right"] == each["same"] == 1 and each["answers"] > 0 for each in record["rows"])
    assert any(each["unbeaten"] for each in record["rows"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--save", "a.png"], "--save is 'a.png'; allowed: a name that ends in .svg"),
        (["--setting", '{"live_blocks": 4}'], "the server says: 4 are too many"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    server: told.Server, file: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    assert run(server, file, *args) == 1
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--first", "0"], "'0'; allowed: an integer from 1"),
        (["--setting", "3"], "'3'; allowed: a JSON object"),
        (["--setting", "{"], "'{' is no JSON"),
    ],
)
def test_flags_say_what_they_allow(
    server: told.Server, file: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        run(server, file, *args)
    assert said in capsys.readouterr().err


def test_a_server_that_is_not_there_or_none_of_ours_is_named(
    server: told.Server, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--url", "http://127.0.0.1:9", "--prompts", str(file)]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    server.tells = lambda outputs: [
        {**each, "meta_info": {k: v for k, v in each["meta_info"].items() if k != "dllm_nfe"}} for each in outputs
    ]
    assert run(server, file) == 1
    assert "does sglang-llada serve the model?" in capsys.readouterr().err
    server.flag = "None"
    assert run(server, file) == 1
    assert "decodes no blocks" in capsys.readouterr().err


def test_a_server_that_breaks_off_leaves_what_there_is(
    server: told.Server, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told_so_far = itertools.count()
    before = 2 + 2 + 2  # settings tried, prompts read, the first setting's answers
    server.tells = lambda outputs: outputs if next(told_so_far) < before else outputs[:-1]
    assert run(server, file, "--setting", "{}", "--setting", '{"threshold": 0.5}') == 1
    out, err = capsys.readouterr()
    assert "broke off inside an answer" in err and len(out.splitlines()) == 3 and "the server's own" in out


def test_ctrl_c_leaves_what_there_is(server: told.Server, file: Path) -> None:
    reached, told_so_far, never = threading.Event(), itertools.count(), threading.Event()

    def tells(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if next(told_so_far) == 6:
            reached.set()
            never.wait(60)
        return outputs

    server.tells = tells
    args = ["tune", "--url", server.url, "--prompts", str(file), "--setting", "{}", "--setting", '{"threshold": 0.5}']
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_llada", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert reached.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        never.set()
        process.kill()
    assert process.returncode == 1 and err == "\nstopped after 1 of 4 runs\n"
    assert len(out.splitlines()) == 3 and "the server's own" in out
