"""What users send and the host would drop, or stumble over, is taken or refused with a sentence; the server goes on.

Hooks of the host's functions around its HTTP side, Engine and weight updates. Whatever a generate request asks for
beyond that is decided in wishes.py. Requests and weights of other models pass here too: what is refused of theirs would
have failed anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sglang_llada.errors import ConfigError
from sglang_llada.host.facts import is_ours
from sglang_llada.host.requests import bounds, canvas, scoring

NO_EMBEDDINGS = "embeddings, classes and rewards are not supported: LLaDA2 generates text; see /generate and /v1"


@dataclass
class OpenGenerateReqInput(GenerateReqInput):
    """The host's request, which may ask for a trace as in the host's API to come."""

    return_step_maps: bool = field(default=False, kw_only=True)


def refuse_dropped(why: str | None, serving: Any, request: Any) -> str | None:
    """The sentence that refuses a request to the host's OpenAI completions endpoint, `why` if the host has one."""
    if why is not None or not is_ours(serving.tokenizer_manager.server_args):
        return why
    if request.suffix:
        return f"suffix is {request.suffix!r}; allowed: none, since a LLaDA2 answer follows its prompt"
    if request.best_of not in (None, request.n):
        return f"best_of is {request.best_of}; allowed: {request.n}, which is n, or none"
    return None


def admit(manager: Any, obj: Any, request: Any = None) -> None:
    """Before the host looks at a request at all: what it cannot mean, or should not carry, is refused.

    Raises:
        ValueError: see bounds.check() and canvas.with_ids(); or it is for embeddings, of which the host would say to
            start it with --is-embedding.
    """
    if not is_ours(manager.server_args):
        return
    if isinstance(obj, EmbeddingReqInput):
        raise ValueError(NO_EMBEDDINGS)
    sequences = math.inf if request is None else bounds.MOST_SEQUENCES
    bounds.check(obj, bounds.Limits(manager.model_config.vocab_size, manager.context_len, sequences))
    if scoring.scoring.get():
        scoring.as_reads(obj)
    for name in bounds.REFUSED:  # a no of whatever form becomes the host's
        setattr(obj, name, getattr(type(obj), name))
    if manager.enable_metrics:
        check_labels(obj.custom_labels or {}, manager.server_args.tokenizer_metrics_allowed_custom_labels or [])
    obj.sampling_params = canvas.with_ids(obj.sampling_params, manager.tokenizer)
    if obj.return_step_maps:
        obj.sampling_params = with_step_maps(obj.sampling_params, obj.return_step_maps)


def check_prompt(manager: Any, obj: Any, input_ids: Any) -> None:
    """Before the host looks at one tokenized request; ValueError if it wants too much of its prompt."""
    if is_ours(manager.server_args):
        bounds.check_reported(obj, len(input_ids or ()))


def check_labels(labels: dict[str, str], allowed: list[str]) -> None:
    """Refuse labels that the server's metrics do not have: the host would end when it counts the answer.

    Raises:
        ValueError: names one.
    """
    for name in labels:
        if name not in allowed:
            known = ", ".join(allowed) or "none; --tokenizer-metrics-allowed-custom-labels names them"
            raise ValueError(f"custom_labels has {bounds.shown(name)}; allowed: {known}")


def with_step_maps(sampling_params: Any, wanted: Any) -> Any:
    """Sampling parameters of one or of several requests that ask for step maps, too."""
    if isinstance(sampling_params, list):
        return [with_step_maps(each, wanted) for each in sampling_params]
    given = sampling_params or {}
    return {**given, "custom_params": {**(given.get("custom_params") or {}), "return_step_maps": wanted}}


def take_step_maps(
    generate: Callable[..., Any],
    engine: Any,
    prompt: Any = None,
    sampling_params: Any = None,
    *args: Any,
    return_step_maps: bool = False,
    **kwargs: Any,
) -> Any:
    """Around the host's Engine.generate, which does not know return_step_maps yet."""
    if return_step_maps:
        sampling_params = with_step_maps(sampling_params, return_step_maps)
    return generate(engine, prompt, sampling_params, *args, **kwargs)


def refuse_tensors(
    update: Callable[..., tuple[bool, str]], updater: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """Around the host's update of weights from tensors: those that do not fit are named, where it would end.

    What the model derives of its weights follows those too that the host writes by itself (load_format "direct").
    """
    try:
        done = update(updater, *args, **kwargs)
    except ConfigError as error:
        return False, str(error)
    from sglang_llada.host.models.llada2 import LLaDA2MoeModelLM  # only processes that hold a model get here

    if isinstance(model := updater.get_model(), LLaDA2MoeModelLM):
        model.post_load_weights()
    return done


def keep_weights(
    update: Callable[..., tuple[bool, str]], updater: Any, model_path: str, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """Around the host's update of weights from disk: if they do not fit, the weights before are loaded again.

    The host means to do so, but looks for them where it found those that do not fit.
    """
    before = updater.model_config.model_path
    try:
        success, message = update(updater, model_path, *args, **kwargs)
    except Exception as error:  # of whatever reads the files, or of what the request says of them
        updater.model_config.model_path = before
        update(updater, before, "auto")
        return False, f"{error}; the weights of {before} were loaded again"
    if not success:
        updater.model_config.model_path = before
    return success, message
