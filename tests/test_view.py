"""How an answer came: frames of what a server tells, traces in files, and the little server behind the page."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sglang_llada.__main__ import main
from sglang_llada.errors import ConfigError
from sglang_llada.service import Service
from sglang_llada.view import command
from sglang_llada.view.ask import Question, collected, load, put
from sglang_llada.view.draw import EDGE, HIGH, HOLD, PACE, picture, svg
from sglang_llada.view.gif import SCALE
from sglang_llada.view.serve import PLACE, Viewer, page
from sglang_llada.view.trajectory import CHANGED, COME, GONE, OPEN, WRITTEN, Cell, Deleted, Frame, Trajectory, aligned
from tests import told
from tests.told import BLOCK, SCRIPTS, running

Params = dict[str, Any]


def frames(script: str, outputs: slice = slice(None)) -> list[Frame]:
    """The frames of a script, from some of its outputs."""
    story = SCRIPTS[script]
    trajectory = Trajectory(BLOCK, len(story.prompt), moves=script == "levenshtein")
    return [trajectory.begin(), *(frame for output in story.outputs[outputs] for frame in trajectory.take(output))]


def text(frame: Frame) -> str:
    """A frame's cells, `_` where open."""
    return "".join("_" if cell.token is None else chr(cell.token) for cell in frame.cells)


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "rows"), [("levenshtein", told.MOVING), ("threshold", told.STAYING)])
def test_frames_show_what_stood_after_each_step(script: str, rows: list[told.Row]) -> None:
    begin, *after = frames(script)
    assert text(begin) == "_" * (BLOCK - len(SCRIPTS[script].prompt) % BLOCK)
    assert [text(frame) for frame in after] == [row.replace("|", "") for row, _ in rows]
    assert ["".join(str(cell.step or ".") for cell in frame.cells) for frame in after] == [steps for _, steps in rows]
    assert [frame.step for frame in after] == [frame.forwards - 1 for frame in after] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_frames_are_the_same_from_the_last_output_alone(script: str) -> None:
    assert frames(script) == frames(script, slice(-1, None))


def test_an_edit_an_insertion_and_a_deletion_are_told_apart() -> None:
    _, drafted, inserted, edited, deleted, ended = frames("levenshtein")
    assert [cell.inserted for cell in inserted.cells] == [False, False, True, False, False]
    assert [cell.was for cell in edited.cells] == [(), (), (), (), (ord("x"),)]
    assert edited.cells[2] == Cell(ord("q"), 3, told.sure("3"), inserted=True)
    assert deleted.deleted == (Deleted(2, ord("q")),)
    assert not any(frame.deleted for frame in (drafted, inserted, edited, ended))
    assert ended.cells[3] == Cell(ord("!"), 3, told.sure("3"), was=(ord("x"),))


def test_blocks_count_their_own_steps() -> None:
    assert [frame.steps for frame in frames("threshold")] == [
        (),
        ((0, 1),),
        ((0, 2), (1, 1)),
        ((0, 3), (1, 2)),
        ((1, 3),),
    ]


def test_positions_that_edits_open_again_keep_what_they_were() -> None:
    was = Cell(5, 1, 0.5)
    assert was.then(OPEN) == replace(OPEN, was=(5,))
    assert was.then(OPEN).then(Cell(6, 3, 0.75)) == Cell(6, 3, 0.75, was=(5,))
    assert was.then(was) == was


def test_a_snapshot_waits_for_its_tokens() -> None:
    trajectory = Trajectory(BLOCK, 8, moves=False)
    second = SCRIPTS["threshold"].outputs[1]
    late = {**second, "output_ids": second["output_ids"][:2]}
    assert [frame.step for frame in trajectory.take(late)] == [1]
    assert [frame.step for frame in trajectory.take(second)] == [2]


def test_tokens_behind_a_stop_string_are_not_shown() -> None:
    last = SCRIPTS["threshold"].outputs[-1]
    meta = last["meta_info"]
    cut = {name: meta[name][:9] for name in ("step_maps", "dllm_confidences")}
    trajectory = Trajectory(BLOCK, 8, moves=False)
    *_, end = trajectory.take({**last, "output_ids": last["output_ids"][:9], "meta_info": {**meta, **cut}})
    assert end.committed == len(trajectory.cells) == 9


def change(rng: random.Random, cells: list[Cell], step: int) -> tuple[list[Cell], int]:
    """What a random step makes of a block, and what it costs as an explanation."""
    now, cost = list[Cell](), 0
    for cell in cells:
        how = rng.random()
        new = Cell(rng.randrange(3), step, rng.random())
        if how < 0.1:
            cost += GONE
        elif how < 0.2:
            now += [OPEN, cell]
            cost += COME
        elif how < 0.3 and cell.token is not None:
            now.append(rng.choice([new, OPEN]))
            cost += CHANGED
        elif how < 0.6 and cell.token is None:
            now.append(new)
            cost += WRITTEN
        else:
            now.append(cell)
    return (now + [OPEN] * len(cells))[: len(cells)], cost


def test_no_more_happened_than_explains_a_block() -> None:
    """Random steps: what is found makes of the block before the one after, and costs no more than what was done."""
    rng = random.Random(0)
    for _ in range(200):
        block = [OPEN] * 12
        for step in range(1, 8):
            now, done = change(rng, block, step)
            came, gone = aligned(block, now, step)
            kept = [cell for cell in came if cell is not OPEN and not cell.inserted]
            fresh = sum(cell.inserted for cell in came)
            written = sum(cell.step == step and was.token is None for was, cell in zip(came, now, strict=True))
            changed = sum(was.token is not None and was != cell for was, cell in zip(came, now, strict=True))
            assert len(came) == len(now) and len(kept) + len(gone) <= len(block)
            moved = [cell for cell in now if cell.token is not None and cell.step != step]
            assert all(was == cell for was, cell in zip(came, now, strict=True) if cell in moved)
            assert GONE * len(gone) + COME * fresh + WRITTEN * written + CHANGED * changed <= done
            block = now


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[told.Server]:
    """A scripted server."""
    serves = told.Server()
    with running(serves):
        yield serves


def question(content: str = "Say something.", **params: Any) -> Question:
    """A chat of one question."""
    return Question([{"role": "user", "content": content}], params)


def test_a_question_becomes_a_trace(server: told.Server) -> None:
    asked = question(threshold=0.5)
    trace = collected(put(Service(server.url, "key"), asked))
    assert trace["answer"] == "Hello, world!" and trace["tokens"] == 13 and trace["finish"] == "stop"
    assert (trace["steps"], trace["forwards"]) == (4, 5)
    assert trace["model"] == "scripted" and trace["block_size"] == BLOCK and trace["algorithm"] == "threshold"
    assert trace["messages"] == asked.messages and trace["custom_params"] == {"threshold": 0.5}
    assert trace["frames"] == [frame.json() for frame in frames("threshold")]
    assert {chr(int(token)) for token in trace["texts"]} == set("Hello, world!")
    sent = next(body for path, body, _ in server.asked if path == "/generate")["sampling_params"]
    assert sent["custom_params"] == {"threshold": 0.5, "trace": True, "stream_mode": "denoise"}
    assert sent["max_new_tokens"] == 128 and sent["temperature"] == 0
    assert {key for _, _, key in server.asked} == {"Bearer key"}


def test_the_algorithm_that_is_asked_for_says_whether_tokens_move(server: told.Server) -> None:
    trace = collected(put(Service(server.url), question("move", algorithm="levenshtein")))
    assert trace["given"] == [ord(letter) for letter in "abc"] and trace["texts"][str(ord("a"))] == "a"
    assert [frame["deleted"] for frame in trace["frames"]][4] == ({"at": 2, "token": ord("q")},)


def test_a_refusal_is_told_in_the_servers_words(server: told.Server) -> None:
    with pytest.raises(ConfigError, match=r"^the server says: 4 are too many$"):
        list(put(Service(server.url), question(live_blocks=4)))


def test_an_answer_that_breaks_off_is_said_to(server: told.Server) -> None:
    server.tells = lambda outputs: outputs[:3]
    events = put(Service(server.url), question())
    assert sum(len(event["frames"]) for event in itertools.islice(events, 1, 5)) == 4
    with pytest.raises(ConfigError, match="broke off after 3 steps"):
        next(events)


def test_a_server_that_leaves_snapshots_out_is_named(server: told.Server) -> None:
    server.tells = lambda outputs: [outputs[0], only_new(outputs[-1])]
    with pytest.raises(ConfigError, match=r"told 1 of 4 steps; start it without --incremental-streaming-output"):
        list(put(Service(server.url), question()))


def only_new(output: dict[str, Any]) -> dict[str, Any]:
    """An output with the last of its snapshots alone."""
    meta = output["meta_info"]
    return {**output, "meta_info": {**meta, "dllm_snapshots": meta["dllm_snapshots"][-1:]}}


def test_a_server_of_another_kind_is_named(server: told.Server) -> None:
    server.flag = "Other"
    with pytest.raises(ConfigError, match="decodes no blocks: its dllm_algorithm is 'Other'"):
        list(put(Service(server.url), question()))


def test_no_server_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no server answers at http://127.0.0.1:9 .*`make serve` starts one"):
        list(put(Service("http://127.0.0.1:9"), question()))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_trace_is_opened_again(server: told.Server, tmp_path: Path) -> None:
    trace = collected(put(Service(server.url), question()))
    command.save([trace], tmp_path / "a.json")
    assert load(tmp_path / "a.json") == json.loads(json.dumps(trace))


def test_a_saved_page_holds_its_traces_and_no_text_ends_its_script(tmp_path: Path) -> None:
    trace = {"format": "x", "answer": "</script><b>&"}
    command.save([trace], tmp_path / "a.html")
    saved = (tmp_path / "a.html").read_text(encoding="utf-8")
    given = saved.split('id="given">')[1].split("</script>")[0]
    assert json.loads(given) == {"traces": [trace], "asks": False}
    assert page([], asks=True).replace('{"traces": [], "asks": true}', "null").count(PLACE) == 1


def test_what_cannot_be_saved_or_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"allowed: a name that ends in .json or .html or .svg or .gif"):
        command.save([{}], tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="nothing to write; give --ask or --trace"):
        command.save([], tmp_path / "a.json")
    with pytest.raises(ConfigError, match="holds one trace; got 2"):
        command.save([{}, {}], tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"b.json is no trace"):
        load(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load(tmp_path / "none.json")


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_question_is_asked_and_saved_from_the_command_line(server: told.Server, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    asked = ["--ask", "move", "--params", '{"algorithm": "levenshtein"}', "--max-tokens", "9", "--api-key", "key"]
    assert main(["view", "--url", server.url + "/", *asked, "--save", str(file)]) == 0
    assert load(file)["custom_params"] == {"algorithm": "levenshtein"} and load(file)["max_new_tokens"] == 9
    assert {key for _, _, key in server.asked} == {"Bearer key"}
    both = ["--trace", str(file), "--trace", str(file), "--save", str(tmp_path / "b.svg")]
    assert main(["view", *both]) == 0
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == svg([load(file)] * 2)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", "--url", "http://127.0.0.1:9", "--ask", "a", "--save", str(tmp_path / "a.json")]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert main(["view", "--trace", str(tmp_path / "none.json")]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["view", "--ask", "a", "--params", "{"])


def test_the_page_is_served_until_ctrl_c(server: told.Server) -> None:
    command_line = [sys.executable, "-m", "sglang_llada", "view", "--url", server.url, "--port", "0"]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    with urllib.request.urlopen(said.split()[0], timeout=20) as reply:
        assert reply.status == 200
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


# --- pictures ---------------------------------------------------------------------------------------------------------


def trace_of(script: str) -> dict[str, Any]:
    """A script as a trace."""
    shown = [frame.json() for frame in frames(script)]
    letters = {token for frame in frames(script) for token in frame.tokens()} | set(SCRIPTS[script].prompt)
    asked = {"messages": [{"role": "user", "content": "a < b?"}], "custom_params": {}, "algorithm": script}
    facts = {"block_size": BLOCK, "given": SCRIPTS[script].prompt[: len(SCRIPTS[script].prompt) % BLOCK]}
    trace = {**asked, **facts, "frames": shown, "texts": {str(each): chr(each) for each in letters}, "steps": 5}
    return json.loads(json.dumps(trace))


def letters_at(picture: str, seconds: float) -> str:
    """The texts of positions that an SVG shows at a time, in the order of their places."""
    root, found = ElementTree.fromstring(picture), []
    namespace = "{http://www.w3.org/2000/svg}"
    style = next(root.iter(f"{namespace}style")).text or ""
    hidden = set()
    for name, whole, steps in re.findall(r"animation:(\w+) ([\d.]+)s step-end infinite}@keyframes \w+{(.*?})}", style):
        changes = [(float(at), value) for at, value in re.findall(r"([\d.]+)%{opacity:(\d)}", steps)]
        now = [value for at, value in changes if at <= seconds / float(whole) * 100]
        hidden |= {name} if now[-1] == "0" else set()
    for group in [root, *root.findall(f"{namespace}g")]:
        if group.get("class") not in hidden:
            found += [each for each in group.findall(f"{namespace}text") if each.get("class") == "t"]
    return "".join(
        each.text or "" for each in sorted(found, key=lambda e: (float(e.get("y", 0)), float(e.get("x", 0))))
    )


@pytest.mark.parametrize(("script", "rows"), [("levenshtein", told.MOVING), ("threshold", told.STAYING)])
def test_a_picture_plays_every_step(script: str, rows: list[told.Row]) -> None:
    picture = svg([trace_of(script)])
    key = {"levenshtein": "12345", "threshold": "1234"}[script] + "editedinserted"
    seen = [letters_at(picture, (at + 0.5) * PACE) for at in range(len(rows) + 1)]
    given = "abc" if script == "levenshtein" else ""
    whole = ["".join(chr(cell.token) for cell in cells if cell.token) for cells in standing(frames(script))]
    assert seen == [given + text.replace(" ", "␣") + key for text in whole]
    assert letters_at(picture, len(rows) * PACE + HOLD - 0.1) == seen[-1], "the last frame stays"


def standing(shown: list[Frame]) -> Iterator[list[Cell]]:
    """All cells of each frame."""
    cells: list[Cell] = []
    for frame in shown:
        cells = [*cells[: frame.first], *frame.cells]
        yield cells


def test_a_picture_that_may_not_move_is_its_last_frame() -> None:
    picture = svg([trace_of("levenshtein")])
    assert "prefers-reduced-motion" in picture
    still = re.sub(r"animation:\w+ [\d.]+s", "animation:none 0s", picture)
    root = ElementTree.fromstring(still)
    shown = {name for name, opacity in re.findall(r"\.(f\d+){opacity:(\d)", still) if opacity == "1"}
    groups = [each for each in root if each.tag.endswith("}g") and each.get("class") in shown]
    assert {text.text for group in groups for text in group if text.get("class") == "t"} >= {"!"}
    assert "a &lt; b?" in picture


def test_two_traces_stand_side_by_side_in_a_picture() -> None:
    one, two = trace_of("levenshtein"), trace_of("threshold")
    both = picture([one, two])
    assert len(both.frames) == max(len(one["frames"]), len(two["frames"]))
    titles = [shape for shape in both.frames[-1] if shape.kind == "title"]
    assert [shape.x for shape in titles] == [EDGE, both.width / 2 + EDGE]
    assert all(shape.x + shape.width <= both.width for shape in both.frames[-1])


def test_a_gif_has_the_same_frames(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed; the host brings it")
    traces = [trace_of("levenshtein")]
    command.save(traces, tmp_path / "a.gif")
    drawn = picture(traces)
    with image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == len(drawn.frames) and gif.size == (drawn.width * SCALE, drawn.height * SCALE)
        for at, shapes in enumerate(drawn.frames):
            gif.seek(at)
            assert gif.info["duration"] == 1000 * (HOLD if at == gif.n_frames - 1 else PACE)
            pixels = gif.convert("RGB")
            for shape in shapes:
                if shape.kind == "decided":
                    left = pixels.getpixel(((shape.x + 2) * SCALE + 2, (shape.y + HIGH / 2) * SCALE))
                    assert all(abs(a - b) < 16 for a, b in zip(left, shape.colour or (), strict=True))


# --- the page's server ------------------------------------------------------------------------------------------------


@pytest.fixture
def viewer(server: told.Server) -> Iterator[str]:
    """The address of the page's server, before a scripted one."""
    serves = Viewer("127.0.0.1", 0, Service(server.url), [])
    with running(serves):
        yield f"http://127.0.0.1:{serves.server_port}"


def post(url: str, body: bytes, kind: str = "application/json") -> list[dict[str, Any]]:
    """The events that come back."""
    asked = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(asked, timeout=20) as reply:
        return [json.loads(line) for line in reply]


def test_the_page_and_nothing_else_is_served(viewer: str) -> None:
    with urllib.request.urlopen(viewer + "/", timeout=20) as reply:
        assert reply.read().decode() == page([], asks=True)
    for path in ("/server_info", "/page.html", "/../ask.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(viewer + path, timeout=20)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        post(viewer + "/generate", b"{}")


def test_a_question_is_answered_with_events(viewer: str, server: told.Server) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "custom_params": {}}).encode()
    assert collected(post(viewer + "/ask", body))["answer"] == "Hello, world!"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"messages": [], "custom_params": {}, "more": 1}', "a question has"),
        (b'{"messages": [], "custom_params": 3}', "custom_params is 3; allowed: an object"),
        (b'{"messages": [{"content": "a"}], "custom_params": {"live_blocks": 4}}', "4 are too many"),
        (b"{", "Expecting property name"),
    ],
)
def test_what_is_wrong_with_a_question_is_the_last_event(viewer: str, body: bytes, said: str) -> None:
    assert said in post(viewer + "/ask", body)[-1]["error"]


def test_pictures_are_drawn_and_what_cannot_be_is_said(viewer: str) -> None:
    trace = trace_of("threshold")
    drawn = urllib.request.Request(viewer + "/draw", json.dumps([trace]).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(drawn, timeout=20) as reply:
        assert reply.read().decode() == svg([trace]) and reply.headers.get_content_type() == "image/svg+xml"
    for body in (b"[]", b"[{}]", b"{", b"3", json.dumps([{**trace, "frames": [3]}]).encode()):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(viewer + "/draw", body)


def test_a_form_of_another_site_is_not_heard(viewer: str, server: told.Server) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "custom_params": {}}).encode()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(viewer + "/ask", body, kind="text/plain")
    assert server.asked == []
