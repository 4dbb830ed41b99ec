"""The page in a browser: questions typed, steps counted, read by keyboard and by screen readers, wide and narrow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_llada.service import Service
from sglang_llada.view import command
from sglang_llada.view.ask import Question, Trace, collected, put
from sglang_llada.view.draw import svg
from sglang_llada.view.serve import Viewer
from tests import told
from tests.browser import CHROMIUM, Tab, chromium
from tests.told import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; `apt-get install chromium` brings it"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    """A wide window; no script of the page may fail in it."""
    browser.errors.clear()
    browser.look(1280)
    yield browser
    assert browser.errors == []


@pytest.fixture(scope="module")
def server() -> Iterator[told.Server]:
    serves = told.Server()
    with running(serves):
        yield serves


@pytest.fixture(scope="module")
def viewer(server: told.Server) -> Iterator[str]:
    serves = Viewer("127.0.0.1", 0, Service(server.url), [])
    with running(serves):
        yield f"http://127.0.0.1:{serves.server_port}/"


def trace(server: told.Server, content: str, **params: Any) -> Trace:
    """An answer of the scripted server."""
    return collected(put(Service(server.url), Question([{"role": "user", "content": content}], params)))


def saved(server: told.Server, folder: Path, *contents: str) -> str:
    """The address of a saved page with answers; what moves is asked for by that word."""
    algorithms = ["levenshtein" if "move" in content else "threshold" for content in contents]
    traces = [trace(server, each, algorithm=algorithm) for each, algorithm in zip(contents, algorithms, strict=True)]
    command.save(traces, folder / "page.html")
    return (folder / "page.html").as_uri()


def texts(tab: Tab, selector: str) -> list[str]:
    """The texts of the elements that are to be seen."""
    each = f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility())"
    return tab.run(f"{each}.map(e => e.textContent)")


def counts(tab: Tab) -> dict[str, str]:
    """The counters of the first panel."""
    of = "document.querySelector('.panel').querySelectorAll('[data-count]')"
    return dict(tab.run(f"[...{of}].map(e => [e.dataset.count, e.textContent])"))


def ask(tab: Tab, content: str) -> None:
    """Type a question and wait for the end of its answers, which are shown as they come."""
    tab.run("document.getElementById('speed').value = '0'; document.getElementById('question').focus()")
    tab.type(content)
    tab.press("Enter", "\r")
    tab.wait("runs.length && runs.every(run => run.ended) && timer === null")


def test_a_typed_chat_is_watched_and_its_steps_are_counted(tab: Tab, viewer: str, server: told.Server) -> None:
    tab.open(viewer)
    ask(tab, "Say something.")
    assert counts(tab) == {"step": "4 of 4", "forwards": "5", "tokens": "13", "rate": "2.6"}
    assert texts(tab, "#at") == ["4 of 4"]
    assert texts(tab, ".text") == ["Hello, world!"]
    assert texts(tab, "#turns li") == ["Say something.", "Hello, world!"]
    ask(tab, "And then?")
    chat = next(body["messages"] for path, body, _ in reversed(server.asked) if path == "/tokenize")
    assert [turn["content"] for turn in chat] == ["Say something.", "Hello, world!", "And then?"]


def test_keys_go_from_step_to_step_of_a_saved_page(tab: Tab, server: told.Server, tmp_path: Path) -> None:
    tab.open(saved(server, tmp_path, "move"))
    tab.wait("at === 5 && timer === null")
    assert texts(tab, "form") == []
    seen = []
    tab.press("Home")
    for _ in told.MOVING:
        tab.press("ArrowRight")
        seen.append(texts(tab, ".text")[0])
    assert seen == [row.replace("_", "·").replace("|", "") for row, _ in told.MOVING]
    tab.press("ArrowLeft")
    assert texts(tab, "#at") == ["4 of 5"] and texts(tab, ".gone") == ["deleted: q "]
    tab.press("ArrowLeft")
    assert texts(tab, ".cells .inserted") == ["q"] and texts(tab, ".cells .edited") == ["!"]
    assert texts(tab, ".cells .given") == ["a", "b", "c"] and texts(tab, ".cells .fresh") == ["q", "!"]
    tab.press("Home")
    tab.press(" ", " ")
    tab.wait("timer !== null")
    tab.press(" ", " ")
    assert tab.run("timer") is None and tab.run("at") < 5


def test_a_position_says_how_it_was_decided(tab: Tab, server: told.Server, tmp_path: Path) -> None:
    tab.open(saved(server, tmp_path, "move"))
    tab.wait("at === 5 && timer === null")
    tab.run("document.querySelector(\".cells [tabindex='0']\").focus()")
    for _ in range(6):
        tab.press("ArrowRight")
    said = "Position 4: “!”, decided in step 3 of its block with confidence 0.700; before that “x”."
    assert texts(tab, ".detail") == [said]
    assert tab.run("document.activeElement.getAttribute('aria-label')") == said
    assert texts(tab, "#at") == ["5 of 5"], "arrows in a block do not go from step to step"
    tab.run("stepTo(1)")
    assert texts(tab, ".detail") == ["Position 4: “x”, decided in step 1 of its block with confidence 0.900."]


def test_live_blocks_stand_side_by_side(tab: Tab, server: told.Server, tmp_path: Path) -> None:
    tab.open(saved(server, tmp_path, "stay"))
    tab.run("stepTo(2)")
    assert texts(tab, ".block.live .state") == ["step 2, 2 open", "step 1, 6 open"]
    left, right = tab.run("[...document.querySelectorAll('.block')].map(e => e.getBoundingClientRect().top)")
    assert left == right


def test_two_settings_are_compared_with_one_player(tab: Tab, viewer: str) -> None:
    tab.open(viewer)
    tab.run("document.getElementById('compare').click(); settings.children[1].elements.live_blocks.value = 4")
    ask(tab, "Say something.")
    assert texts(tab, "h2") == ["A: threshold", "B: threshold, live_blocks 4"]
    assert texts(tab, ".panel .error") == ["the server says: 4 are too many"]
    tab.run("settings.children[1].elements.live_blocks.value = 2; settings.children[1].elements.threshold.value = 0.5")
    ask(tab, "Say something.")
    assert texts(tab, "h2") == ["A: threshold", "B: threshold, threshold 0.5, live_blocks 2"]
    tab.run("document.activeElement.blur()")
    tab.press("ArrowLeft")
    assert texts(tab, "[data-count=step]") == ["3 of 4", "3 of 4"]


def test_traces_are_saved_and_opened(tab: Tab, viewer: str, server: told.Server, tmp_path: Path) -> None:
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.open(viewer)
    ask(tab, "Say something.")
    tab.run("document.getElementById('save').click()")
    file = tmp_path / "trace.json"
    wait_for(tab, file)
    kept = command.load(file)
    assert kept == json.loads(json.dumps(trace(server, "Say something.")))
    tab.run("document.getElementById('draw').click()")
    wait_for(tab, tmp_path / "answer.svg")
    assert (tmp_path / "answer.svg").read_text(encoding="utf-8") == svg([kept])
    tab.open(viewer)
    choose(tab, file)
    tab.wait("runs.length === 1 && timer === null && at === 4")
    assert texts(tab, ".text") == ["Hello, world!"]
    (tmp_path / "other.json").write_text("[]")
    choose(tab, tmp_path / "other.json")
    tab.wait("!document.getElementById('trouble').hidden")
    assert "That is no trace" in texts(tab, "#trouble")[0]


def wait_for(tab: Tab, file: Path) -> None:
    """Until a file is whole."""
    for _ in range(200):
        if file.exists() and file.stat().st_size:
            return
        tab.run("new Promise(done => setTimeout(done, 50))")
    raise AssertionError(f"there is no {file}")


def choose(tab: Tab, file: Path) -> None:
    """Choose a file to be opened."""
    node = tab.call("Runtime.evaluate", expression="document.getElementById('open')")["result"]["objectId"]
    tab.call("DOM.setFileInputFiles", files=[str(file)], objectId=node)


def test_what_a_screen_reader_needs_is_there(tab: Tab, viewer: str) -> None:
    tab.open(viewer)
    ask(tab, "Say something.")
    nodes = [node for node in tab.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    acting = {"button", "textbox", "combobox", "slider", "spinbutton", "image"}
    assert [role for role, name in roles if role in acting and not name] == []
    assert ("image", "Position 13: “!”, decided in step 1 of its block with confidence 0.900.") in roles
    assert texts(tab, "#said") == ["step 4, 13 tokens: Hello, world!"]


# Of the elements that hold text: its colour on what is behind it, and whether it is cut off.
READABLE = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    return colour[3] === 0 && e.parentElement ? behind(e.parentElement) : colour;
  };
  const wrong = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!own || box.width <= 1 || !e.checkVisibility({ checkVisibilityCSS: true })) continue;
    if (e.matches("option, :disabled")) continue;
    const [a, b] = [light(rgb(style.color)), light(behind(e))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05), what = `${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`;
    if (contrast < 4.5) wrong.push(`${what}: contrast ${contrast.toFixed(2)}`);
    if (parseFloat(style.fontSize) < 10) wrong.push(`${what}: ${style.fontSize}`);
    if (!e.matches(".cell, span") && e.scrollWidth > e.clientWidth + 1) wrong.push(`${what}: is cut off`);
    if (box.left < 0 || box.right > innerWidth) wrong.push(`${what}: is outside`);
  }
  return wrong;
})()"""
# Pairs of neighbours that cover one another.
OVERLAPS = """(() => {
  const wrong = [];
  for (const parent of document.querySelectorAll("body, body *")) {
    const flows = ({ position, display }) => !["absolute", "sticky"].includes(position) && display !== "inline";
    const boxes = [...parent.children].filter((e) => e.checkVisibility() && flows(getComputedStyle(e)))
      .map((e) => [e, e.getBoundingClientRect()]).filter(([, box]) => box.width && box.height);
    for (const [i, [one, a]] of boxes.entries()) for (const [two, b] of boxes.slice(i + 1)) {
      if (a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 0.5 && b.top < a.bottom - 0.5)
        wrong.push(`${one.tagName}.${one.className} and ${two.tagName}.${two.className}`);
    }
  }
  return wrong;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overlaps_and_all_can_be_read(tab: Tab, viewer: str, width: int, dark: bool, tmp_path: Path) -> None:
    tab.look(width, dark=dark)
    tab.open(viewer)
    tab.run("document.getElementById('compare').click()")
    for content in ("Say something.", "move"):
        ask(tab, content)
        tab.run("step(-2)")
        assert tab.run(OVERLAPS) == [] and tab.run(READABLE) == []
        assert tab.run("document.documentElement.scrollWidth") == width
    tab.shoot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[16:20] == width.to_bytes(4)


def test_what_overlaps_or_cannot_be_read_is_found(tab: Tab, viewer: str) -> None:
    tab.open(viewer)
    assert tab.run(OVERLAPS) == [] and tab.run(READABLE) == []
    tab.run("document.querySelector('h1').style.marginBottom = '-40px'; form.style.marginTop = '-30px'")
    assert tab.run(OVERLAPS) != []
    tab.run("document.querySelector('h1').style.color = '#999'")
    assert any("contrast" in each for each in tab.run(READABLE))
