"""Which requests are let in: everything a request may ask for is honoured or refused here with one sentence.

The host answers a refusal with HTTP 400 and goes on. Refusals are a table, so that honouring an option means deleting
its row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sglang_llada.config import DecodeConfig, Sampling
from sglang_llada.errors import ConfigError

TOP_K_GREEDY = 1  # how the host writes temperature 0 once it has normalised the parameters


@dataclass(frozen=True, slots=True)
class Refusal:
    """`asks` tells whether a request wants what we do not do; `sentence` gets request `r` and parameters `p`."""

    asks: Callable[[Any, Any], Any]
    sentence: str


REFUSALS = (
    Refusal(
        lambda r, p: p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1.0,
        "penalties are not supported: got frequency_penalty {p.frequency_penalty}, presence_penalty "
        "{p.presence_penalty}, repetition_penalty {p.repetition_penalty}; send 0, 0 and 1",
    ),
    Refusal(lambda r, p: p.min_new_tokens > 0, "min_new_tokens {p.min_new_tokens} is not supported; send 0"),
    Refusal(lambda r, p: p.logit_bias, "logit_bias is not supported"),
    Refusal(lambda r, p: r.custom_logit_processor, "custom_logit_processor is not supported"),
    Refusal(
        lambda r, p: p.json_schema or p.regex or p.ebnf or p.structural_tag,
        "structured output (json_schema, regex, ebnf, structural_tag, response_format, required tools) "
        "is not supported",
    ),
    Refusal(
        lambda r, p: r.return_logprob, "log-probabilities are not supported; send return_logprob or logprobs false"
    ),
    Refusal(lambda r, p: r.return_hidden_states, "return_hidden_states is not supported"),
    Refusal(lambda r, p: r.return_routed_experts or r.return_indexer_topk, "expert and index traces are not supported"),
    Refusal(lambda r, p: r.return_sampling_mask, "return_sampling_mask is not supported"),
    Refusal(lambda r, p: (p.beam_width or 1) > 1, "beam search (beam_width {p.beam_width}) is not supported"),
    Refusal(lambda r, p: p.watermark, "watermarks are not supported"),
    Refusal(lambda r, p: r.lora_id, "LoRA adapters are not supported"),
    Refusal(
        lambda r, p: r.input_embeds is not None or r.positional_embed_overrides is not None,
        "input embeddings are not supported: blocks are made of tokens",
    ),
    Refusal(
        lambda r, p: r.session is not None and r.session.streaming,
        "streaming sessions are not supported; the prefix cache reuses earlier turns without them",
    ),
)


def why_refused(req: Any, defaults: DecodeConfig) -> str | None:
    """The sentence that refuses a host request, or None if it is welcome."""
    params = req.sampling_params
    for refusal in REFUSALS:
        if refusal.asks(req, params):
            return refusal.sentence.format(r=req, p=params)
    try:
        decode_params(req, defaults)
    except ConfigError as error:
        return str(error)
    return None


def decode_params(req: Any, defaults: DecodeConfig) -> DecodeConfig:
    """The server's decode parameters with what the request's custom_params say instead, and how it samples.

    ConfigError if custom_params are bad; the host checks its own parameters.
    """
    params = req.sampling_params
    decode = defaults.replaced(params.custom_params or {})
    if params.top_k == TOP_K_GREEDY:
        return decode
    seed = seed_of(req.rid) if params.sampling_seed is None else params.sampling_seed
    sampling = Sampling(params.temperature, params.top_k, params.top_p, params.min_p, signed(seed))
    return replace(decode, sampling=sampling)


def seed_of(rid: str) -> int:
    """A seed for a request that names none: its id is another one for every request, and the same on every rank."""
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest(), "little")


def signed(number: int) -> int:
    """The low 64 bits, as an int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def stop_ids(req: Any) -> frozenset[int]:
    """Token ids that end a request, as the host's own finish check sees them."""
    params = req.sampling_params
    if params.ignore_eos:
        return frozenset()
    found = set(params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if req.tokenizer is not None:
        found.add(req.tokenizer.eos_token_id)
        found |= set(req.tokenizer.additional_stop_token_ids or ())
    return frozenset(token for token in found if token is not None)
