"""`python -m sglang_llada env | check | algorithms | view | tune`: what is installed, whether it fits the host, what it
can decode, how answers came, and at which setting they come best.

`check --model PATH` says what is read of a checkpoint instead, and what a start with it would refuse. Imports nothing
of the host, so every answer comes at once, also where the host does not start.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sglang_llada
from sglang_llada import config, options, plugin
from sglang_llada.errors import ConfigError, HostMismatch
from sglang_llada.host.seam import check

ENTRY_POINT = "sglang_llada"
PLUGIN_GROUP = "sglang.srt.plugins"
PLATFORM_VARIABLE = "SGLANG_PLATFORM"
WHITELIST_VARIABLE = "SGLANG_PLUGINS"


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit status 0 if all is well, 1 if something differs, is excluded or set wrongly."""
    parser = argparse.ArgumentParser(prog="python -m sglang_llada", description=sglang_llada.__doc__)
    commands = {
        "env": show_env,
        "check": show_check,
        "algorithms": show_algorithms,
        "view": show_view,
        "tune": show_tuning,
    }
    sub = parser.add_subparsers(dest="command", required=True)
    parsers = {name: sub.add_parser(name, description=command.__doc__) for name, command in commands.items()}
    parsers["check"].add_argument("--model", help="a checkpoint, as --model-path of the server takes it")
    parsers["check"].add_argument("--revision", help="a branch, tag or commit of its repository")
    parsers["algorithms"].add_argument("--json", action="store_true", help="the JSON schema of custom_params")
    for name in ("view", "tune"):
        parsers[name].add_argument("--url", default="http://127.0.0.1:30000", help="the model's server, without a path")
        parsers[name].add_argument("--api-key", help="its key, if it was started with one")
    add_view_flags(parsers["view"])
    add_tune_flags(parsers["tune"])
    args = parser.parse_args(argv)
    try:
        return commands[args.command](args)
    except (ConfigError, HostMismatch) as error:
        print(error, file=sys.stderr)
        return 1


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """What is shown, and how."""
    parser.add_argument("--ask", help="a question to begin with")
    parser.add_argument("--params", type=json.loads, default={}, help="with --ask: custom_params, as JSON")
    parser.add_argument("--max-tokens", type=int, default=128, help="with --ask: tokens of the answer at most")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a saved trace to begin with; or two")
    parser.add_argument("--save", type=Path, help="no page is served, this file written: .json, .html, .svg or .gif")
    parser.add_argument("--host", default="127.0.0.1", help="the page's own address")
    parser.add_argument("--port", type=int, default=30080, help="and port")


def add_tune_flags(parser: argparse.ArgumentParser) -> None:
    """What is measured, and what is made of it."""
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with messages or text, and answer")
    parser.add_argument("--first", type=positive, help="only so many of them, from the beginning")
    parser.add_argument(
        "--setting",
        type=mapping,
        action="append",
        default=[],
        metavar="JSON",
        help="custom_params to try, again for each; the first is what others are held against",
    )
    parser.add_argument("--at-once", type=positive, nargs="+", default=[1, 8], help="requests under way at any time")
    parser.add_argument("--max-tokens", type=positive, default=128, help="tokens of an answer at most")
    parser.add_argument("--save", type=Path, help="an .svg to draw")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, not the table")


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer from 1")
    return int(text)


def mapping(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a JSON object")
    return value


def show_env(_: argparse.Namespace) -> int:
    """Versions, machine, mode, and whether the host will load us."""
    mode = config.read_mode(os.environ)
    print(f"sglang-llada  {sglang_llada.__version__}")
    for name in ("sglang", "torch", "transformers"):
        print(f"{name:13} {installed_version(name)}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    print(f"mode          {mode.value} ({config.MODE_VARIABLE})")
    print(f"plugin        {standing(os.environ)}")
    print(f"platform      {plugin.activate() or 'left to the host'}")
    return 0


def show_check(args: argparse.Namespace) -> int:
    """What differs from the table of each release, which of them is in use, and whether the host will load us."""
    if args.model is not None:
        return show_model(args.model, args.revision)
    host = check.installed_host()
    print(f"sglang {host.version} in {host.root}")
    compared = check.compare(host)
    fits = not compared[0].differences
    for comparison in compared:
        version, seams = comparison.release.version, comparison.release.seams
        print(f"table of {version}: {len(comparison.differences)} of {len(seams)} seams differ")
        for difference in comparison.differences:
            print(
                f"  {difference.seam.kind.value:8} {difference.sentence}\n{'':11}needed because: {difference.seam.why}"
            )
    if fits:
        print(f"in use: the table of {compared[0].release.version}")
    else:
        print("in use: none, so LLaDA2 models are refused and others are left to the host")
    print(f"plugin is {standing(os.environ)}")
    return 0 if fits and exclusion(os.environ) is None else 1


def show_model(model: str, revision: str | None) -> int:
    """What is read of a checkpoint, without its weights."""
    from sglang_llada.host.hub import folder_of
    from sglang_llada.llada2.report import report

    found = report(model, folder_of(model, revision))
    for line in found.lines():
        print(line)
    return 1 if found.refusals else 0


def show_algorithms(args: argparse.Namespace) -> int:
    """Decode algorithms with their parameters."""
    if args.json:
        print(json.dumps(options.schema(), indent=2))
        return 0
    for algorithm, parameters in config.ALGORITHMS.items():
        flags = ", ".join(flag for flag, meant in config.FLAGS.items() if meant == algorithm)
        print(f"{algorithm}  (--dllm-algorithm {flags})")
        for p in parameters:
            default = "block size" if p.default is None else p.default
            if isinstance(p.kind, tuple):
                kind, allowed = "name", " or ".join(p.kind)
            else:
                kind, allowed = p.kind.__name__, f"{p.low} to {'block size' if p.high is None else p.high}"
            print(f"  {p.name:19} {kind:6} default {default}, {allowed}: {p.help}")
    for name, (algorithm, changes) in config.VARIANTS.items():
        print(f"{name}  (--dllm-algorithm {config.flag_of(name)})  {algorithm} with {changes}")
    print("names of other programs")
    for key, foreign in config.FOREIGN.items():
        if foreign.ours not in (None, key):
            print(f"  {key:19} means {foreign.ours}")
    return 0


def show_view(args: argparse.Namespace) -> int:
    """How answers are decided, step by step: a page for questions to a running server, or for saved traces."""
    from sglang_llada.service import Service
    from sglang_llada.view import command

    service = Service(args.url.rstrip("/"), args.api_key)
    traces = [command.load(path) for path in args.trace]
    if args.ask is not None:
        asked = command.Question([{"role": "user", "content": args.ask}], args.params, args.max_tokens)
        traces.append(command.collected(command.put(service, asked)))
    if args.save is not None:
        command.save(traces, args.save)
    else:
        command.serve(args.host, args.port, service, traces)
    return 0


def show_tuning(args: argparse.Namespace) -> int:
    """Which setting suits whose prompts: a server's answers to them at several, their quality, forwards and times."""
    from sglang_llada.service import Service
    from sglang_llada.tune import command, prompts

    plan = command.Plan(prompts.read(args.prompts)[: args.first], args.setting, args.at_once, args.max_tokens)
    whole = command.tune(Service(args.url.rstrip("/"), args.api_key), plan, args.save, args.json)
    return 0 if whole else 1


def standing(environ: Mapping[str, str]) -> str:
    """Whether the host will load us, in words."""
    reason = exclusion(environ)
    return "active" if reason is None else f"excluded: {reason}"


def exclusion(environ: Mapping[str, str]) -> str | None:
    """Why the host will not load us, by the rules of its plugin loader; None if it will."""
    if not importlib.metadata.entry_points(group=PLUGIN_GROUP, name=ENTRY_POINT):
        return "the package is not installed, so the host finds no entry point; run `pip install -e .`"
    selected = environ.get(PLATFORM_VARIABLE)
    if selected and selected != ENTRY_POINT:
        return f"{PLATFORM_VARIABLE} is {selected!r}, which leaves out every package with another platform"
    listed = environ.get(WHITELIST_VARIABLE)
    if listed and ENTRY_POINT not in (name.strip() for name in listed.split(",")):
        return f"{WHITELIST_VARIABLE} is {listed!r}, which does not list {ENTRY_POINT!r}"
    return None


def installed_version(distribution: str) -> str:
    """The version of a distribution, or that there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
