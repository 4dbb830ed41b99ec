"""The host's server with a grammar backend that fails for whoever asks it to: `python -m bench.faulty_server FLAGS`.

A regex that holds `planted-WHERE-COUNT` makes WHERE (compile, fill or accept) raise once COUNT tokens are accepted.
The processes that the server spawns import this module too, which is how the faults get into the scheduler's.
"""

from __future__ import annotations

import functools
import re
import runpy
from collections.abc import Callable
from typing import Any

from bench.faults import plant

MODULE = "sglang.srt.constrained.xgrammar_backend"
PLACES = {
    "fill": f"{MODULE}.XGrammarGrammar.fill_vocab_mask",
    "accept": f"{MODULE}.XGrammarGrammar.accept_token",
}
COMPILE = f"{MODULE}.XGrammarGrammarBackend.dispatch_regex"
PLANTED = re.compile(r"planted-(\w+)-(\d+)")


class PlantedError(Exception):
    """What a grammar's code may raise: none of the kinds that the host expects."""


def planted(where: str, count: int) -> str:
    """A regex that every answer is longer than COUNT tokens for, so that its grammar fails for certain."""
    return f"planted-{where}-{count} [a-z]{{60}}"


def failing(where: str, call: Callable[..., Any], grammar: Any, *args: Any) -> Any:
    """Around a method of a grammar."""
    found = PLANTED.search(grammar.key_string or "")
    if found and found[1] == where and len(grammar.accepted_tokens) >= int(found[2]):
        raise PlantedError(found[0])
    return call(grammar, *args)


def failing_compile(call: Callable[..., Any], backend: Any, pattern: str) -> Any:
    """Around the compilation of a regex."""
    if "planted-compile" in pattern:
        raise PlantedError(pattern)
    return call(backend, pattern)


for place, target in PLACES.items():
    plant(target, functools.partial(failing, place))
plant(COMPILE, failing_compile)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
