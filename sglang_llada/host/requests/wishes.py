"""Which requests are let in: everything a request may ask for is honoured or refused here with one sentence.

The host answers a refusal with HTTP 400 and goes on. Refusals are a table, so that honouring an option means deleting
its row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB as ORIGINAL_LOGPROBS
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sglang_llada.config import CANVAS, CHOICES, KEYS, DecodeConfig, Report, Sampling
from sglang_llada.errors import ConfigError
from sglang_llada.host import earlier
from sglang_llada.host.requests.canvas import Canvas, check, check_read, report_of_read
from sglang_llada.llada2.checkpoint import CheckpointFacts

# Keys of custom_params that the host writes and reads itself.
HOST_PARAMS = {*earlier.private_params(), "thinking_budget"}
NO_PARAMETERS = {*HOST_PARAMS, CANVAS, CHOICES}  # of a decode
TOP_K_GREEDY = 1  # how the host writes temperature 0 once it has normalised the parameters


@dataclass(frozen=True, slots=True)
class Refusal:
    """`asks` tells whether a request wants what we do not do; `sentence` gets request `r` and parameters `p`."""

    asks: Callable[[Any, Any], Any]
    sentence: str


REFUSALS = (
    Refusal(lambda r, p: p.watermark, "watermarks are not supported"),
    Refusal(
        lambda r, p: r.session is not None and r.session.streaming,
        "streaming sessions are not supported; the prefix cache reuses earlier turns without them",
    ),
)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request wants, read once when the host validates it.

    Attributes:
        params: how its blocks are decoded; without `report`, for which the host has to settle where in the prompt
            log-probabilities begin.
        ends: token ids that end a turn, as the host's own finish check sees them.
        stop_ids: those that end this request, which may ignore them.
        processor: its custom logit processor, or None.
        canvas: its answer as far as it is given; empty if it says nothing of it.
        choices: tokens whose probabilities are read at its open positions, where otherwise those are decided.
    """

    params: DecodeConfig
    ends: frozenset[int]
    stop_ids: frozenset[int]
    processor: Any
    canvas: Canvas
    choices: tuple[int, ...]


def wishes_of(req: Any, defaults: DecodeConfig, vocabulary: int, facts: CheckpointFacts) -> Wishes:
    """What a host request wants, whose numbers were held against host/requests/bounds.py.

    Raises:
        ConfigError: it asks for what is not done here, its prompt or its canvas is no text, or custom_params or the
            custom logit processor are bad.
    """
    for refusal in REFUSALS:
        if refusal.asks(req, req.sampling_params):
            raise ConfigError(refusal.sentence.format(r=req, p=req.sampling_params))
    custom = req.sampling_params.custom_params or {}
    given = custom.get(CANVAS)
    canvas: Canvas = tuple(given or ())
    choices: tuple[int, ...] = tuple(custom.get(CHOICES) or ())
    for name, ids in (("input_ids", req.origin_input_ids), (CANVAS, canvas), (CHOICES, choices)):
        if (reason := no_text(name, ids, vocabulary, facts)) is not None:
            raise ConfigError(reason)
    processor, ends = processor_of(req), ends_of(req, vocabulary)
    params = decode_params(req, defaults, lenient=processor is not None)
    stop_ids = frozenset() if req.sampling_params.ignore_eos else ends
    structured = is_structured(req.sampling_params)
    if custom.get(CHOICES) is not None:
        check_read(req, canvas, choices, structured=structured)
    elif given is not None:
        check(canvas, params, stop_ids, structured=structured)
    return Wishes(params, ends, stop_ids, processor, canvas, choices)


def no_text(name: str, ids: Sequence[int | None], vocabulary: int, facts: CheckpointFacts) -> str | None:
    """The sentence about the first id of a prompt or canvas that is no token of a text; None if all are.

    A tokenizer may have tokens that the model has no embedding for.
    """
    own = {facts.mask_id: "the mask", facts.delete_id: "DELETE", facts.split_id: "SPLIT"}
    for position, token in enumerate(ids):
        if token is None:
            continue
        if not 0 <= token < vocabulary:
            return f"{name} holds {token} at position {position}; allowed: 0 to {vocabulary - 1}"
        if token in own:
            return f"{name} holds {token} at position {position}, which is {own[token]}; allowed: tokens of a text"
    return None


def decode_params(req: Any, defaults: DecodeConfig, *, lenient: bool) -> DecodeConfig:
    """The server's decode parameters with what the request's custom_params say instead, and what else it wants.

    ConfigError if custom_params are bad.

    Args:
        lenient: whether keys that are not a decode's are a custom logit processor's.
    """
    params = req.sampling_params
    custom = {key: value for key, value in (params.custom_params or {}).items() if key not in NO_PARAMETERS}
    if lenient:
        custom = {key: value for key, value in custom.items() if key in KEYS}
    decode = defaults.replaced(custom)
    if is_structured(params):
        decode = decode.from_left_to_right
    if params.top_k == TOP_K_GREEDY:
        return decode
    seed = seed_of(req.rid) if params.sampling_seed is None else params.sampling_seed
    sampling = Sampling(params.temperature, params.top_k, params.top_p, params.min_p, signed(seed))
    return replace(decode, sampling=sampling)


def is_structured(params: Any) -> bool:
    """Whether sampling parameters ask for structured output."""
    return any((params.json_schema, params.regex, params.ebnf, params.structural_tag))


def processor_of(req: Any) -> Any:
    """A request's custom logit processor, or None; ConfigError if its text makes none."""
    if not req.custom_logit_processor:
        return None
    try:
        return CustomLogitProcessor.from_str(req.custom_logit_processor)
    except Exception as error:  # whatever a user's pickle raises
        raise ConfigError(f"custom_logit_processor cannot be loaded: {error!r}") from None


def report_of(req: Any) -> Report | None:
    """The log-probabilities that a request wants, once the host has said from where on in its prompt; None: none."""
    if req.wishes.choices:
        return report_of_read(req.wishes.canvas, req.wishes.choices, len(req.origin_input_ids))
    if not req.return_logprob:
        return None
    top, ids, start = req.logprob.top_logprobs_num, req.logprob.token_ids_logprob or (), req.logprob_start_len
    return Report(top, tuple(ids), ORIGINAL_LOGPROBS, start if 0 <= start < len(req.origin_input_ids) else None)


def seed_of(rid: str) -> int:
    """A seed for a request that names none: its id is another one for every request, and the same on every rank."""
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest(), "little")


def signed(number: int) -> int:
    """The low 64 bits, as an int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def ends_of(req: Any, vocabulary: int) -> frozenset[int]:
    """Token ids that end a request which does not ignore them, as the host's own finish check sees them.

    A checkpoint may name some that it has no logits for.
    """
    found = {*(req.sampling_params.stop_token_ids or ()), *(req.eos_token_ids or ())}
    return frozenset(token for token in ends_of_tokenizer(req.tokenizer) | found if 0 <= token < vocabulary)


@lru_cache(maxsize=4)
def ends_of_tokenizer(tokenizer: Any) -> frozenset[int]:
    """Token ids that end a turn, if there is a tokenizer; it looks them up anew each time it is asked."""
    if tokenizer is None:
        return frozenset()
    found = {tokenizer.eos_token_id, *(tokenizer.additional_stop_token_ids or ())}
    return frozenset(token for token in found if token is not None)
