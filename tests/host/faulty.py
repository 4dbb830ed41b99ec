"""The host's server with a fault in every function that handles one request: `python -m tests.host.faulty FLAGS`.

A request whose id begins with "fault in NAME" makes the function of that name raise. The processes that the server
spawns import this module too, which is how the faults get into the scheduler's.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from typing import Any

from bench.faults import plant

VARIABLE = "FAULTS"
PREFIX = "fault in "
ENGINE = "sglang_llada.host.engine"
EXECUTOR, ADMISSION = f"{ENGINE}.executor.Executor", f"{ENGINE}.admission.Admission"
REQUEST, HOST_REQUEST = "sglang_llada.blocks.request.Request", "sglang.srt.managers.schedule_batch.Req"
GRAMMAR = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar"

# In the order of a request's life.
STAGES = {
    "handle": "sglang.srt.managers.scheduler.Scheduler._handle_generate_request",
    "wishes": f"{ENGINE}.admission.wishes_of",
    "new": f"{ADMISSION}._new_request",
    "being filled": f"{ADMISSION}._is_being_filled",
    "fits": f"{ADMISSION}._fits",
    "place": f"{ENGINE}.pages.Pages.place",
    "take part": f"{REQUEST}.take_part",
    "insert": f"{ENGINE}.pages.Pages.insert",
    "prompt group": f"{EXECUTOR}._prompt_group",
    "group": f"{EXECUTOR}._group",
    "shaping": "sglang_llada.host.requests.shaping.Shaping._counts",
    "noted": f"{ENGINE}.step.StepResult.noted",
    "decide": f"{REQUEST}.decide",
    "snapshot": f"{ENGINE}.pipeline.snapshot_of",
    "logprobs": f"{ENGINE}.booking.book_logprobs",
    "prompt logprobs": f"{ENGINE}.booking.book_prompt_logprobs",
    "update": f"{ENGINE}.booking.Booking._update_finish",
    "update of the host": f"{HOST_REQUEST}.update_finish_state",
    "text": f"{HOST_REQUEST}._check_str_based_finish",
    "stream": f"{ENGINE}.streaming.traced",
    "stream of the host": f"{HOST_REQUEST}.init_incremental_detokenize",
    "metrics": f"{ENGINE}.metrics.Metrics.ended",
}
# Of a grammar, which does not know its request: named in its pattern.
GRAMMAR_STAGES = {"accept": f"{GRAMMAR}.accept_token", "fill": f"{GRAMMAR}.fill_vocab_mask"}
ALONE = "second rank"  # which fails while the first one does not
LEFT = "left without blocks"  # a request that contradicts itself from then on


class Fault(Exception):
    """What was planted."""


def rid_of(values: list[Any]) -> str:
    """The id of the request that a function handles."""
    for value in values:
        for each in (value, getattr(value, "request", None)):
            if isinstance(rid := getattr(each, "rid", None), str):
                return rid
    return ""


def planted(name: str) -> Callable[..., Any]:
    def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if rid_of([*args, *kwargs.values()]).startswith(PREFIX + name + ":"):
            raise Fault(f"planted in {name}")
        return function(*args, **kwargs)

    return around


def planted_in_grammar(name: str) -> Callable[..., Any]:
    def around(function: Callable[..., Any], grammar: Any, *args: Any, **kwargs: Any) -> Any:
        if name in grammar.key_string:
            raise Fault(f"planted in {name}")
        return function(grammar, *args, **kwargs)

    return around


def planted_on_second_rank(function: Callable[..., Any], *args: Any) -> Any:
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_rank == 1 and rid_of([*args]).startswith(PREFIX + ALONE + ":"):
        raise Fault(f"planted in {ALONE}")
    return function(*args)


def leaving_without_blocks(function: Callable[..., Any], request: Any, *args: Any) -> Any:
    result = function(request, *args)
    if request.rid.startswith(PREFIX + LEFT + ":"):
        request.blocks.clear()
    return result


if VARIABLE in os.environ:
    for stage, target in STAGES.items():
        plant(target, planted(stage))
    for stage, target in GRAMMAR_STAGES.items():
        plant(target, planted_in_grammar(stage))
    plant(f"{ENGINE}.pipeline.Pipeline._conforming", planted_on_second_rank)
    plant(f"{REQUEST}.take_part", leaving_without_blocks)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
