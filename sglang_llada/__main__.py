"""`python -m sglang_llada env | check | algorithms`: what is installed, whether it fits the host, what it can decode.

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
    commands = {"env": show_env, "check": show_check, "algorithms": show_algorithms}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--model", help="with check: a checkpoint, as --model-path of the server takes it")
    parser.add_argument("--revision", help="with check --model: a branch, tag or commit of its repository")
    parser.add_argument("--json", action="store_true", help="with algorithms: the JSON schema of custom_params")
    args = parser.parse_args(argv)
    if args.model is not None and args.command != "check":
        parser.error(f"--model goes with check, not with {args.command}")
    if args.json:
        if args.command != "algorithms":
            parser.error(f"--json goes with algorithms, not with {args.command}")
        print(json.dumps(options.schema(), indent=2))
        return 0
    try:
        return commands[args.command]() if args.model is None else show_model(args.model, args.revision)
    except (ConfigError, HostMismatch) as error:
        print(error, file=sys.stderr)
        return 1


def show_env() -> int:
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


def show_check() -> int:
    """What differs from the table of each release, which of them is in use, and whether the host will load us."""
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


def show_algorithms() -> int:
    """Decode algorithms with their parameters."""
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
