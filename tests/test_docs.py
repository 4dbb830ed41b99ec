"""The pages say what there is: links, commands, flags, names, metrics and messages are held against the sources.

Each check is a function from a page's text to complaints, so that one text with a planted fault can show that it is
found. Sources are read and never imported: nothing here needs torch or a server, and what is asked of the host is
looked up in its installed files.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sglang_llada"
README = ROOT / "README.md"
MOST_BYTES = 10_000  # of README: more is a page
MOST_COLUMNS = 120
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BOARD = ROOT / "docs" / "grafana.json"

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
VARIABLE = re.compile(r"\bSGLANG_[A-Z_]*[A-Z]\b")
METRIC = re.compile(r"\bsglang:[a-z0-9_]+")
PARTS = re.compile(r"_(bucket|sum|count)$")  # of a histogram, under names of their own
NAMED = re.compile(r"\]\(([^)\s]+\.py)\): ((?:`\w+`(?:, (?:and )?| and )?)+)")
PATH = re.compile(r"(?:\.ci|bench|docs|examples|patches|sglang_llada|tests|blocks|decode|host|llada2)/[\w./-]*\w")
# Modules of the host, whose flags are looked up as flags, and of its router, which is not installed here.
OTHERS = {"sglang.launch_server", "sglang.bench_serving", "sglang.test.run_eval", "sglang.test.few_shot_gsm8k"}
OTHERS |= {"sglang_router.launch_router"}
TOOLS = {"--strict", "--check"}  # flags of mypy and ruff
TOOLS |= set("--tasks --apply_chat_template --gen_kwargs --model_args --include_path --model".split())  # of lm-eval
TOOLS |= {"--worker-urls", "--policy", "--balance-abs-threshold"}  # of the router, and so are the next two
TOOLS |= {"--health-check-interval-secs", "--health-failure-threshold"}

Check = Callable[[str], list[str]]


# --- what a page holds ------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    """A page's text without fenced and indented code, in one line per paragraph."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", prose, flags=re.M)


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, those that a backslash continues put together, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    indented = re.findall(r"^ {4}(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    for line in "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines():
        yield re.sub(r"(^|\s)#.*$", "", line).strip()


def code(text: str) -> list[str]:
    """Everything in a page that is code: what stands between backquotes, wherever lines break, and lines of code."""
    return [" ".join(span.split()) for span in CODE.findall(without_code(text))] + list(code_lines(text))


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
        slug = name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        again = 0
        while name in found:
            again += 1
            name = f"{slug}-{again}"
        found.add(name)
    return found


# --- what there is ----------------------------------------------------------------------------------------------------


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def named_tests(file: Path) -> frozenset[str]:
    """Names of a file's tests."""
    functions = (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


@cache
def defined(file: Path) -> frozenset[str]:
    """Names that a file defines: functions, classes and what it assigns to."""
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


@cache
def texts(*folders: str) -> str:
    """All Python sources below some folders of the repository."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if file != Path(__file__)]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@cache
def host() -> Path | None:
    """The folder of the installed host, which is not imported."""
    spec = importlib.util.find_spec("sglang")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@cache
def host_texts(*patterns: str) -> str:
    """Sources of the host below its `srt` folder, or beside it."""
    assert (root := host()) is not None
    files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


needs_host = pytest.mark.skipif(host() is None, reason="SGLang is not installed; run `make venv`")


@cache
def messages() -> tuple[str, ...]:
    """Every text in the package's sources, with a line break for what is filled in."""
    found: list[str] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\n" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdr]", "\n", node.value))
    return tuple(found)


# --- the checks -------------------------------------------------------------------------------------------------------


def broken_links(text: str, page: Path = README) -> list[str]:
    """Links to files and anchors that there are not."""
    wrong = []
    for target in LINK.findall(without_code(text)):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if "://" in target:
            continue
        if not file.exists():
            wrong.append(f"there is no {target}")
        elif anchor and file.suffix == ".md" and anchor not in anchors(text if file == page else file.read_text()):
            wrong.append(f"{name or page.name} has no heading #{anchor}")
    return wrong


def wrong_commands(text: str) -> list[str]:
    """What is wrong with commands: tests, modules, their flags and make's targets that there are not."""
    wrong: list[str] = []
    for line in code(text):
        kinds: dict[str, Check] = {"pytest ": wrong_pytest, "python -m ": wrong_module, "make ": wrong_make}
        for begin, check in kinds.items():
            if line.startswith(begin):
                wrong += [f"{line}: {what}" for what in check(line.removeprefix(begin))]
    return wrong


def wrong_pytest(line: str) -> list[str]:
    """Files, tests and markers that there are not, and words of -k that are in no test's name."""
    paths, words, wrong = [], [], []
    arguments = iter(shlex.split(line))
    for argument in arguments:
        if argument == "-k":
            words = [word for word in re.findall(r"\w+", next(arguments)) if word not in ("and", "or", "not")]
        elif argument == "-m":
            markers = set(re.findall(r"\w+", next(arguments))) - {"and", "or", "not"}
            wrong += [f"no marker {marker}" for marker in markers if f'"{marker}: ' not in pyproject()]
        elif not argument.startswith("-"):
            paths.append(argument)
    names: set[str] = set()
    for path in paths or ["tests"]:
        name, _, test = path.partition("::")
        files = [ROOT / name] if (ROOT / name).is_file() else list((ROOT / name).rglob("test_*.py"))
        if not files:
            wrong.append(f"no tests in {name}")
        found = {each for file in files for each in named_tests(file)}
        if test and test.partition("[")[0] not in found:
            wrong.append(f"{name} has no {test}")
        names |= found
    return wrong + [f"no test's name has {word}" for word in words if not any(word in name for name in names)]


@cache
def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def wrong_module(line: str) -> list[str]:
    """A module that there is not, or that does not take a flag or command."""
    module, *arguments = re.sub(r"[|\[\]]", " ", line).split()
    if module in OTHERS or module.split(".")[-1].isupper():  # bench.NAME
        return []
    base = ROOT.joinpath(*module.split("."))
    file = next((each for each in (base.with_suffix(".py"), base / "__main__.py") if each.is_file()), None)
    if file is None or not module.startswith(("bench.", "examples.", "tests.", "sglang_llada")):
        return [f"no module {module}"]
    source = file.read_text(encoding="utf-8")
    wrong = [f"{module} has no {flag}" for flag in arguments if FLAG.fullmatch(flag) and f'"{flag}"' not in source]
    if module == "sglang_llada" and (command := next(iter(arguments), "")) not in commands_of(source):
        wrong.append(f"{module} has no command {command!r}")
    return wrong


def commands_of(source: str) -> set[str]:
    """The commands of the package's own command line: the keys of the mapping that it calls so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "commands":
            return set(re.findall(r"'(\w+)':", ast.unparse(node.value)))
    return set()


def wrong_make(line: str) -> list[str]:
    """Targets and variables that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wrong = []
    for word in shlex.split(line):
        name, assigned, _ = word.partition("=")
        if not re.search(rf"^{re.escape(name)} ?\?=" if assigned else rf"^{re.escape(name)}:", makefile, flags=re.M):
            wrong.append(f"the Makefile has no {name}")
    return wrong


def unknown_flags(text: str) -> list[str]:
    """Flags that neither a source here nor the host knows."""
    ours = texts("sglang_llada", "bench", "examples", "tests")
    theirs = host_texts(
        "srt/arg_groups/**/*.py", "srt/server_args.py", "bench_serving.py", "benchmark/**/*.py", "test/*.py"
    )
    flags = {flag for line in code(text) for flag in FLAG.findall(line)} - TOOLS
    return [
        f"nothing takes {flag}"
        for flag in sorted(flags)
        if f'"{flag}"' not in ours + theirs
        and not re.search(rf"^ +{flag.removeprefix('--').replace('-', '_')}: ", theirs, flags=re.M)
    ]


def unknown_variables(text: str) -> list[str]:
    """Environment variables that neither the package nor the host reads."""
    sources = texts("sglang_llada") + host_texts(
        "srt/environ.py", "srt/layers/sampler.py", "srt/observability/*.py", "srt/platforms/*.py"
    )
    return [f"nothing reads {name}" for name in sorted(set(VARIABLE.findall(text))) if name not in sources]


def unknown_metrics(text: str) -> list[str]:
    """Metrics that neither the package nor the host exports."""
    sources = texts("sglang_llada/host/engine") + host_texts("srt/observability/*.py")
    known = set(re.findall(r'"(sglang:\w+)"', sources))
    named = set(METRIC.findall(text))
    return [f"there is no {name}" for name in sorted(named) if not {name, PARTS.sub("", name)} & known]


def unknown_messages(text: str) -> list[str]:
    """Messages of the tables under "Troubleshooting" that are in no source, dots standing for what is filled in."""
    tables = text.partition("## Troubleshooting")[2].partition("\n## ")[0]
    wrong = []
    for row in re.findall(r"^\| (`.+?) \|", tables, flags=re.M):
        for message in CODE.findall(row):
            parts = [part.strip() for part in message.split("...") if len(part.strip()) > 3]
            if not any(all(part in each for part in parts) for each in messages()):
                wrong.append(f"nothing says {message}")
    return wrong


def unknown_names(text: str, page: Path = README) -> list[str]:
    """Functions, classes and tables, named behind the link to a file, that the file does not define."""
    wrong = []
    for target, names in NAMED.findall(" ".join(without_code(text).split())):
        file = (page.parent / target).resolve()
        if file.is_file():  # else broken_links says so
            wrong += [f"{target} has no {name}" for name in CODE.findall(names) if name not in defined(file)]
    return wrong


def unknown_paths(text: str) -> list[str]:
    """Files and folders of the repository, named as code, that there are not."""
    places = (ROOT, PACKAGE, PACKAGE / "host")
    named = {span for span in code(text) if PATH.fullmatch(span)}
    return [f"there is no {name}" for name in sorted(named) if not any((place / name).exists() for place in places)]


def metrics_without_row(text: str) -> list[str]:
    """Metrics that the package exports, of which no table of a page has a row."""
    exported = set(re.findall(r'\(\s*"(sglang:\w+)"', texts("sglang_llada/host/engine")))
    return [f"{name} has no row" for name in sorted(exported) if f"| `{name}` |" not in text]


def faults_of_readme(text: str) -> list[str]:
    """README is short, says what runs where before how to begin, and names every page."""
    wrong = [f"it does not name {page.name}" for page in PAGES if page != README and page.name not in text]
    if (size := len(text.encode())) >= MOST_BYTES:
        wrong.append(f"it has {size} bytes; allowed: less than {MOST_BYTES}")
    places = [text.find(begin) for begin in ("## Status", "make serve", "make test")]
    if places != sorted(places) or places[0] < 0:
        wrong.append("it says how to begin before it says what runs where, or not at all")
    return wrong


def long_lines(text: str) -> list[str]:
    """Lines with too many columns, but for rows of tables, which cannot be broken."""
    numbered = enumerate(text.splitlines(), 1)
    return [f"line {i} has {len(line)}" for i, line in numbered if len(line) > MOST_COLUMNS and line[0] != "|"]


# --- the tests --------------------------------------------------------------------------------------------------------

OF_PAGES = (broken_links, unknown_names)  # which have to know where a page is
OF_TEXT = (wrong_commands, unknown_paths, long_lines)
OF_HOST = (unknown_flags, unknown_variables, unknown_metrics)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_what_there_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = [what for check in OF_TEXT for what in check(text)]
    assert wrong + [what for of_page in OF_PAGES for what in of_page(text, page)] == []


@needs_host
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_variables_and_metrics_of_a_page_are_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [what for check in OF_HOST for what in check(text)] == []


@needs_host
def test_the_board_draws_metrics_that_are_exported() -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    drawn = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert drawn and all(METRIC.search(each) for each in drawn)
    assert unknown_metrics("\n".join(drawn)) == []


def test_messages_are_those_of_the_sources() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert "### The start ends" in text.partition("## Troubleshooting")[2]
    assert unknown_messages(text) == []


def test_every_metric_of_ours_has_a_row() -> None:
    assert metrics_without_row((ROOT / "docs" / "operations.md").read_text(encoding="utf-8")) == []


def test_the_readme_is_a_map() -> None:
    assert faults_of_readme(README.read_text(encoding="utf-8")) == []


FAULTS: list[tuple[Callable[[str], list[str]], str, str]] = [
    (broken_links, "see [it](docs/nowhere.md)", "see [it](docs/robustness.md)"),
    (broken_links, "see [it](docs/robustness.md#what-nobody-said)", "see [it](docs/robustness.md#what-is-promised)"),
    (broken_links, "# A b\n\n[there](#c)", "# A `b`: c?\n\n[there](#a-b-c)"),
    (broken_links, "# A\n\n# A\n\n[there](#a-2)", "# A\n\n# A\n\n[there](#a-1)"),
    (wrong_commands, "`pytest tests/test_nothing.py`", "`pytest -s tests/test_docs.py`"),
    (
        wrong_commands,
        "`pytest tests/test_docs.py::test_x`",
        "`pytest tests/test_docs.py::test_planted_faults_are_found`",
    ),
    (wrong_commands, "`pytest\ntests/test_docs.py -k nonsuch`", "`pytest\ntests/test_docs.py -k 'board or messages'`"),
    (wrong_commands, "`pytest -m nonsuch`", "`pytest -m 'long or not gpu'`"),
    (wrong_commands, "    python -m bench.nothing  # x", "    python -m bench.serve  # x"),
    (
        wrong_commands,
        "    python -m bench.serve \\\n      --nothing 3",
        "    python -m bench.serve \\\n      --repeats 3",
    ),
    (wrong_commands, "`python -m sglang_llada go`", "`python -m sglang_llada check --model PATH`"),
    (wrong_commands, "`python -m examples.nothing`", "`python -m tests.published.serve --each 5`"),
    (wrong_commands, "`make coffee`", "`make serve MODEL=x`"),
    (wrong_commands, "```sh\nmake serve COFFEE=1\n```", "```sh\nmake test\n```"),
    (unknown_names, "[a](sglang_llada/config.py): `nothing`", "[a](sglang_llada/config.py): `FLAGS`, `read_mode`"),
    (unknown_names, "[a](sglang_llada/config.py):\n`FLAGS`, `nothing`", "[a](sglang_llada/config.py):\n`replaced`"),
    (unknown_paths, "`host/nothing.py`", "`host/engine/rows.py` and `bench/results`"),
    (long_lines, "a " * 61, "|" + "a " * 61),
    (unknown_messages, "## Troubleshooting\n| `no such ... thing` |", "## Troubleshooting\n| `KV pool is full: ...` |"),
]
FAULTS_OF_HOST: list[tuple[Callable[[str], list[str]], str, str]] = [
    (unknown_flags, "`--no-such-flag 3`", "`--tp-size 4 --random-range-ratio 1` and --this is prose"),
    (unknown_variables, "`SGLANG_NOTHING=1`", "`SGLANG_LLADA=off`"),
    (unknown_metrics, "sglang:llada_nothing", "sum(rate(sglang:llada_steps_total[5m]))"),
    (unknown_metrics, "sglang:token_usage_total", "sglang:queue_time_seconds_bucket"),
]


def test_planted_faults_of_whole_pages_are_found() -> None:
    readme, table = README.read_text(encoding="utf-8"), (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert len(faults_of_readme(readme + "a" * MOST_BYTES)) == 1
    assert len(faults_of_readme(readme.replace("robustness.md", "x"))) == 1
    assert len(faults_of_readme(readme.replace("## Status", ""))) == 1
    assert len(faults_of_readme("make serve\n" + readme)) == 1
    assert len(metrics_without_row(table.replace("| `sglang:llada_rows_total` |", "| rows |"))) == 1


@pytest.mark.parametrize(("check", "wrong", "right"), FAULTS)
def test_planted_faults_are_found(check: Callable[[str], list[str]], wrong: str, right: str) -> None:
    assert len(check(wrong)) == 1
    assert check(right) == []


@needs_host
@pytest.mark.parametrize(("check", "wrong", "right"), FAULTS_OF_HOST)
def test_planted_faults_beside_the_host_are_found(check: Callable[[str], list[str]], wrong: str, right: str) -> None:
    assert len(check(wrong)) == 1
    assert check(right) == []
