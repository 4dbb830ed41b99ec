"""docs/Dockerfile: every instruction is one that there is, and what it copies and runs exists. No image is built."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docs" / "Dockerfile"
LISTS = {"ENTRYPOINT", "CMD"}  # as JSON: a shell between would keep signals from the server
INSTRUCTIONS = LISTS | {"ARG", "FROM", "COPY", "RUN", "EXPOSE", "ENV", "WORKDIR", "LABEL", "USER", "HEALTHCHECK"}


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Name and arguments of each instruction, without comments, lines put together where a backslash continues them."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", kept).splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            yield name, " ".join(arguments.split())


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    found = list(instructions(text))
    names = [name for name, _ in found]
    wrong = [f"{name} is no instruction" for name in names if name not in INSTRUCTIONS]
    wrong += [f"{name} has no arguments" for name, arguments in found if not arguments]
    before = names[: names.index("FROM")] if "FROM" in names else names
    if "FROM" not in names or set(before) - {"ARG"}:
        wrong.append("FROM does not come first")
    wrong += [f"{name} occurs more than once" for name in LISTS if names.count(name) > 1]
    for name, arguments in found:
        try:
            if name in LISTS and not all(isinstance(each, str) for each in json.loads(arguments)):
                wrong.append(f"{name} is no list of strings")
            elif name == "RUN":
                shlex.split(arguments)
        except ValueError as error:
            wrong.append(f"{name} cannot be read: {error}")
        if name == "COPY":
            wrong += [f"{source} is not there" for source in arguments.split()[:-1] if not (ROOT / source).exists()]
    given = {arguments.partition("=")[0] for name, arguments in found if name in ("ARG", "ENV")}
    wrong += [f"{used} is not given" for used in re.findall(r"\$\{(\w+)\}", text) if used not in given]
    return wrong


def test_the_dockerfile_can_be_read() -> None:
    assert complaints(DOCKERFILE.read_text(encoding="utf-8")) == []


def test_the_image_keeps_its_host_and_starts_the_server() -> None:
    found = dict(instructions(DOCKERFILE.read_text(encoding="utf-8")))
    assert found["FROM"] == "${BASE}"
    assert "pip install --no-cache-dir --no-deps" in found["RUN"]
    assert json.loads(found["ENTRYPOINT"])[:3] == ["python3", "-m", "sglang.launch_server"]
    assert "--model-path" in json.loads(found["CMD"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("EXPOSE", "EXPOSES"),
        ("EXPOSE 30000", "EXPOSE"),
        ("FROM ${BASE}", ""),
        ("ARG BASE", "ARG BAS"),
        ('"30000"]', '"30000"'),
        ("LICENSE /src", "LICENCE /src"),
        ("--no-deps /src \\", "--no-deps /src"),
        ("/src \\\n    && rm", "'/src \\\n    && rm"),
        ("EXPOSE 30000", 'CMD ["x"]'),
    ],
)
def test_planted_faults_are_found(old: str, new: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert old in text
    assert complaints(text.replace(old, new))
