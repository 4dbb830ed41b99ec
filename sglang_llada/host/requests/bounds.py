"""Every number, text and list that a request may carry, with what is allowed of it: one table, checked at the door.

What passes fits the integers and tensors that it ends up in, and is no work that others would wait for. The check runs
before anything is built of a request. What a value means, and whether it fits the others, is for the host and
host/requests/wishes.py to say. Fields that are not here are listed with the reason in tests/host/test_bounds.py.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, get_type_hints

import msgspec
from sglang.srt.sampling.sampling_params import MAX_STOP_COUNT, MAX_STOP_REGEX_COUNT, MAX_STOP_REGEX_LEN, SamplingParams


class Edge(enum.Enum):
    """Bounds that a server knows: the last token id, the context length, and what texts of that length stay below."""

    VOCABULARY = "the last token id"
    CONTEXT = "the context length"
    TEXT = "8 times the context length"


@dataclass(frozen=True, slots=True)
class Bound:
    """What is allowed of one field.

    Attributes:
        where: "sampling_params", "custom_params", "session_params", or "request" for a field of the host's
            GenerateReqInput.
        kind: int, float, bool or str; a bool is no number, and an integer is a fine float.
        low: the least number, or the least length of a text.
        high: the largest.
        most: entries of a list or mapping of such values; None: it is none. A single text may stand for a list of it.
        also: further values that are allowed.
        keys: of a mapping, what is allowed of its keys.
        levels: of a text that is JSON, how deep its lists and mappings may stand in one another.
        texts: of a list of numbers, the most characters of the texts that may stand among them, all together.
    """

    name: str
    where: str
    kind: type[int] | type[float] | type[bool] | type[str]
    low: float | int = 0
    high: float | int | Edge = 1
    most: int | Edge | None = None
    also: tuple[Any, ...] = ()
    keys: Bound | None = None
    levels: int | None = None
    texts: Edge | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server's own bounds are.

    Attributes:
        sequences: prompts of one request, and answers to them, altogether.
    """

    vocabulary: int
    context: int
    sequences: float = math.inf

    def of(self, bound: Any) -> Any:
        """A bound as a number."""
        if not isinstance(bound, Edge):
            return bound
        return {Edge.VOCABULARY: self.vocabulary - 1, Edge.CONTEXT: self.context, Edge.TEXT: 8 * self.context}[bound]


INT32, INT64 = 2**31 - 1, 2**63 - 1
MOST_SEQUENCES = 2_048  # of a request over HTTP; who calls Engine keeps nobody else waiting
MOST_IDS = 4_096  # of a list that is looked at in every step
MOST_LOGPROBS = 128  # for each position, where OpenAI's API gives up to 20
MOST_REPORTED = 2**17  # log-probabilities of a prompt, of which the host makes objects, messages and JSON
NAME, SOURCE = 512, 2**18  # characters of an identifier, and of a grammar or of code
LEVELS = 100  # a grammar of three hundred takes ten seconds to compile
SMALL = 1e-5  # what fp32 divides by without running out of range

SAMPLING, CUSTOM, REQUEST, SESSION = "sampling_params", "custom_params", "request", "session_params"
BOUNDS: tuple[Bound, ...] = (
    Bound("max_new_tokens", SAMPLING, int, 0, INT64),
    Bound("min_new_tokens", SAMPLING, int, 0, INT64),
    Bound("n", SAMPLING, int, 1, 128),
    Bound("temperature", SAMPLING, float, 0, 1000),
    Bound("top_p", SAMPLING, float, SMALL, 1),
    Bound("top_k", SAMPLING, int, 1, INT32, also=(-1,)),
    Bound("min_p", SAMPLING, float, 0, 1),
    Bound("frequency_penalty", SAMPLING, float, -2, 2),
    Bound("presence_penalty", SAMPLING, float, -2, 2),
    Bound("repetition_penalty", SAMPLING, float, SMALL, 2),
    Bound("sampling_seed", SAMPLING, int, -INT64 - 1, INT64),
    Bound("stream_interval", SAMPLING, int, 1, INT32),
    Bound("beam_width", SAMPLING, int, 1, INT32),
    Bound("stop", SAMPLING, str, 0, 256, most=MAX_STOP_COUNT),
    Bound("stop_regex", SAMPLING, str, 0, MAX_STOP_REGEX_LEN, most=MAX_STOP_REGEX_COUNT),
    Bound("stop_token_ids", SAMPLING, int, 0, INT32, most=MOST_IDS),  # clients name those of other models too
    Bound(
        "logit_bias",
        SAMPLING,
        float,
        -10_000,  # half precision has room for a logit beside it
        10_000,
        most=MOST_IDS,
        keys=Bound("logit_bias", SAMPLING, int, 0, Edge.VOCABULARY),
    ),
    Bound("json_schema", SAMPLING, str, 0, SOURCE, levels=LEVELS),
    Bound("regex", SAMPLING, str, 0, SOURCE),
    Bound("ebnf", SAMPLING, str, 0, SOURCE),
    Bound("structural_tag", SAMPLING, str, 0, SOURCE, levels=LEVELS),
    Bound("ignore_eos", SAMPLING, bool),
    Bound("skip_special_tokens", SAMPLING, bool),
    Bound("spaces_between_special_tokens", SAMPLING, bool),
    Bound("no_stop_trim", SAMPLING, bool),
    Bound("ebnf_full_assistant", SAMPLING, bool),
    Bound("canvas", CUSTOM, int, 0, Edge.VOCABULARY, most=Edge.CONTEXT, also=(None,), texts=Edge.TEXT),
    Bound("choices", CUSTOM, int, 0, Edge.VOCABULARY, most=MOST_LOGPROBS, texts=Edge.TEXT),
    Bound("text", REQUEST, str, 0, Edge.TEXT),
    Bound("input_ids", REQUEST, int, 0, Edge.VOCABULARY, most=Edge.TEXT),
    Bound("rid", REQUEST, str, 1, NAME),
    Bound("top_logprobs_num", REQUEST, int, 0, MOST_LOGPROBS),
    Bound("token_ids_logprob", REQUEST, int, 0, Edge.VOCABULARY, most=MOST_LOGPROBS),
    Bound("logprob_start_len", REQUEST, int, -1, Edge.CONTEXT),
    Bound("routed_experts_start_len", REQUEST, int, 0, Edge.CONTEXT),
    Bound("priority", REQUEST, int, -INT64 - 1, INT64),
    Bound("max_thinking_tokens", REQUEST, int, 0, INT32),
    Bound("extra_key", REQUEST, str, 0, NAME),
    Bound("cache_salt", REQUEST, str, 0, NAME),
    Bound("session_id", REQUEST, str, 0, NAME),
    Bound("routing_key", REQUEST, str, 0, NAME),
    Bound("conversation_id", REQUEST, str, 0, NAME),
    Bound("lora_path", REQUEST, str, 0, NAME),
    Bound("custom_logit_processor", REQUEST, str, 0, SOURCE),
    Bound("custom_labels", REQUEST, str, 0, NAME, most=256, keys=Bound("custom_labels", REQUEST, str, 0, NAME)),
    Bound("routed_dp_rank", REQUEST, int, 0, INT32),
    Bound("data_parallel_rank", REQUEST, int, 0, INT32),
    Bound("disagg_prefill_dp_rank", REQUEST, int, 0, INT32),
    Bound("bootstrap_host", REQUEST, str, 0, NAME),
    Bound("bootstrap_pair_key", REQUEST, str, 0, NAME),
    Bound("bootstrap_port", REQUEST, int, 0, 65_535),
    Bound("bootstrap_room", REQUEST, int, 0, INT64),
    Bound("decode_tp_size", REQUEST, int, 0, INT32),
    Bound("received_time", REQUEST, float, 0, INT64),
    Bound("id", SESSION, str, 0, NAME),
    Bound("rid", SESSION, str, 0, NAME),
    Bound("offset", SESSION, int, -INT32, INT32),
    Bound("replace", SESSION, bool),
    Bound("drop_previous_output", SESSION, bool),
)
OF = {where: {b.name: b for b in BOUNDS if b.where == where} for where in (SAMPLING, CUSTOM, REQUEST, SESSION)}

# Fields of the host's GenerateReqInput of which no value is taken, and why. They are refused here since some of them
# would not survive the way to the scheduler.
EMBEDDINGS = "input embeddings are not supported: blocks are made of tokens"
SCORES = "scores are read at the position behind each prompt, and nowhere else"
TRACES = "expert and index traces are not supported"
REFUSED = {
    "input_embeds": EMBEDDINGS,
    "positional_embed_overrides": EMBEDDINGS,
    "multi_item_delimiter_indices": SCORES,
    "token_indices_to_pool": SCORES,
    "return_hidden_states": "return_hidden_states is not supported",
    "return_routed_experts": TRACES,
    "return_indexer_topk": TRACES,
    "return_sampling_mask": "return_sampling_mask is not supported",
    "lora_id": "adapters are named by lora_path, as they were loaded",
}

# Others of custom_params are a decode's or a processor's own: only their form and size are looked at here.
ALSO_SAMPLING = ("custom_params", "watermark")
CUSTOM_PARAMS = get_type_hints(SamplingParams)["custom_params"]  # scalars, and lists and mappings of them
CUSTOM_NUMBER = Bound("custom_params", SAMPLING, int, -INT64 - 1, INT64)
CUSTOM_TEXT = Bound("custom_params", SAMPLING, str, 0, SOURCE)
MOST_CUSTOM = 2**18  # entries, all lists and mappings together


def check(request: Any, limits: Limits) -> None:
    """Hold a host's GenerateReqInput, of one prompt or of several, against the table, as it came.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    for name, why in REFUSED.items():
        value = getattr(request, name)
        if is_wanted(value):
            raise ValueError(f"{name} is {shown(value)}: {why}")
    params = request.sampling_params
    batch = params if isinstance(params, list) else [params]
    prompts = prompts_of(request)
    for each in batch:
        check_mapping(each, SAMPLING, limits, ALSO_SAMPLING)
    answers = max([(prompts or 1) * ((each or {}).get("n") or 1) for each in batch], default=0)
    if answers > limits.sequences or (prompts or 0) > limits.sequences:
        raise ValueError(f"the request has {prompts or 1} prompts and {answers} answers; allowed: {limits.sequences}")
    if isinstance(params, list):
        check_count(SAMPLING, params, prompts)
    for name, bound in OF[REQUEST].items():
        value = getattr(request, name)
        if value is None:
            continue
        if is_batch(value, bound):
            check_count(name, value, prompts)
            for one in value:
                check_value(one, bound, limits)
        else:
            check_value(value, bound, limits)
    check_mapping(request.session_params, SESSION, limits)


def is_wanted(value: Any) -> bool:
    """Whether a field of REFUSED says more than no, for one prompt or for each of several."""
    if isinstance(value, list) and value:
        return any(map(is_wanted, value))
    return value is not None and value is not False


def check_reported(request: Any, prompt: int) -> None:
    """Bound the log-probabilities that one host's request wants of a prompt of so many tokens.

    Raises:
        ValueError: they are more than others can wait for.
    """
    top, ids, start = request.top_logprobs_num, request.token_ids_logprob or (), request.logprob_start_len
    if not request.return_logprob or start < 0:
        return
    wanted = max(prompt - start, 0) * (top + len(ids))
    if wanted > MOST_REPORTED:
        raise ValueError(
            f"top_logprobs_num is {top} and token_ids_logprob has {len(ids)} entries, for {prompt - start} tokens of "
            f"the prompt from logprob_start_len {start} on; allowed: {MOST_REPORTED} log-probabilities of these in all"
        )


def prompts_of(request: Any) -> int | None:
    """How many prompts a request for several has; None: it is for one."""
    for prompts in (request.text, request.input_ids, request.input_embeds):
        if prompts is not None:
            if isinstance(prompts, str) or not isinstance(prompts, list):
                return None
            if prompts is request.text:
                return len(prompts)
            first = prompts[0] if prompts else 0
            several = isinstance(first, list) and (prompts is request.input_ids or isinstance((first or [0])[0], list))
            return len(prompts) if several else None
    return None


def is_batch(value: Any, bound: Bound) -> bool:
    """Whether a value of a request is a list of such values, one for each prompt."""
    return isinstance(value, list) and (bound.most is None or any(isinstance(one, list) for one in value[:1]))


def check_count(name: str, values: list[Any], prompts: int | None) -> None:
    """One value for each prompt, or ValueError."""
    if prompts is None:
        raise ValueError(f"{name} is {shown(values)}; allowed: one, since there is one prompt")
    if len(values) != prompts:
        raise ValueError(f"{name} has {len(values)} entries; allowed: {prompts}, one for each prompt")


def check_mapping(given: Any, where: str, limits: Limits, also: tuple[str, ...] = ()) -> None:
    """Hold a mapping of fields against the table's rows for it; ValueError if it is none or has others."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {shown(given)}; allowed: a mapping of names to values")
    for name, value in given.items():
        bound = OF[where].get(name)
        if bound is not None:
            check_value(value, bound, limits)
        elif name not in also:
            raise ValueError(f"{where}: unknown key {shown(name)}; allowed: {', '.join((*OF[where], *also))}")
    if "custom_params" in also:
        check_custom(given.get("custom_params"), limits)


def check_value(value: Any, bound: Bound, limits: Limits) -> None:
    """Hold one value of a field, which is a list where the bound says so, against its bound; None is always allowed.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    if value is None:
        return
    alone = bound.most is None or (bound.kind is str and isinstance(value, str))
    if alone:
        if not allows(bound, value, limits):
            raise ValueError(f"{bound.name} is {shown(value)}; allowed: {allowed(bound, limits)}")
        if bound.levels is not None and is_deeper(value, bound.levels):
            raise ValueError(f"{bound.name} is {shown(value)}, which is too deep; allowed: {allowed(bound, limits)}")
        return
    form: Any = Mapping if bound.keys is not None else list | tuple | set | frozenset
    if not isinstance(value, form):
        raise ValueError(f"{bound.name} is {shown(value)}; allowed: {described(bound, limits)}")
    if len(value) > limits.of(bound.most):
        raise ValueError(f"{bound.name} has {len(value)} entries; allowed: at most {limits.of(bound.most)}")
    if bound.keys is not None:
        check_all(bound, value.values(), limits)
        check_all(bound.keys, [number_of(key, bound.keys) for key in value], limits)
    else:
        check_all(bound, value, limits)


def check_all(bound: Bound, values: Collection[Any], limits: Limits) -> None:
    """Hold the entries of a list against a bound, or ValueError."""
    plain = bound.kind is int and set(map(type, values)) == {int}  # a prompt's hundred thousand ids, without a loop
    if plain and bound.low <= min(values) and max(values) <= limits.of(bound.high):
        return
    if bound.texts is not None:
        texts = [one for one in values if isinstance(one, str)]
        if (length := sum(map(len, texts))) > limits.of(bound.texts):
            raise ValueError(f"{bound.name} has {length} characters; allowed: {described(bound, limits)}")
    for position, one in enumerate(values):
        if not allows(bound, one, limits):
            raise ValueError(
                f"{bound.name} holds {shown(one)} at position {position}; allowed: {allowed(bound, limits)}"
            )


def check_custom(given: Any, limits: Limits) -> None:
    """Hold custom_params against the form that the host takes, and against what it can send to its scheduler."""
    try:
        msgspec.convert(given, CUSTOM_PARAMS)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"custom_params is {shown(given)}: {error}") from None
    for name, bound in OF[CUSTOM].items():
        check_value((given or {}).get(name), bound, limits)
    leaves = list(leaves_of(given))
    if len(leaves) > MOST_CUSTOM:
        raise ValueError(f"custom_params has {len(leaves)} entries; allowed: at most {MOST_CUSTOM}")
    for leaf in leaves:
        if type(leaf) in (int, str):
            check_value(leaf, CUSTOM_NUMBER if type(leaf) is int else CUSTOM_TEXT, limits)


def leaves_of(value: Any) -> Iterator[Any]:
    """Keys and values of custom_params, lists and mappings opened."""
    if isinstance(value, Mapping):
        yield from value
        value = value.values()
    elif not isinstance(value, list):
        yield value
        return
    for each in value:
        yield from leaves_of(each)


def allows(bound: Bound, value: Any, limits: Limits) -> bool:
    """Whether a single value is allowed. NaN fails the comparison."""
    if bound.kind is bool:
        return isinstance(value, bool)
    if bound.kind is str:
        return isinstance(value, str) and bound.low <= len(value) <= limits.of(bound.high)
    if value is None:
        return None in bound.also
    if bound.texts is not None and isinstance(value, str):
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float) if bound.kind is float else int):
        return False
    return value in bound.also or bound.low <= value <= limits.of(bound.high)


def is_deeper(text: str, levels: int) -> bool:
    """Whether a JSON text has lists and mappings in one another beyond so many levels; False if it is no JSON."""
    try:
        level = [json.loads(text)]
    except RecursionError:
        return True
    except ValueError:
        return False
    for _ in range(levels):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for values in inside for each in values]
    return any(isinstance(each, dict | list) for each in level)


def number_of(key: Any, bound: Bound) -> Any:
    """A mapping's key, which JSON makes a text of, as the number that it stands for; as it is if it stands for none."""
    if bound.kind is int and isinstance(key, str) and key.isdecimal() and len(key) < 20:
        return int(key)
    return key


def allowed(bound: Bound, limits: Limits | None = None) -> str:
    """What is allowed of a single value, in words; of a server whose limits are not known, by their names."""
    if bound.kind is bool:
        return "true or false"
    high = bound.high if limits is None else limits.of(bound.high)
    high = high.value if isinstance(high, Edge) else number(high)
    words = f"{number(bound.low)} to {high}{' characters' if bound.kind is str else ''}"
    words += f" of JSON with at most {bound.levels} levels" if bound.levels is not None else ""
    also = ["null" if value is None else str(value) for value in bound.also]
    return " or ".join([*also, words, *(["a text"] if bound.texts is not None else [])])


def described(bound: Bound, limits: Limits | None = None) -> str:
    """What is allowed of a field, in words, as in allowed()."""
    if bound.most is None:
        return allowed(bound, limits)
    most = bound.most if limits is None else limits.of(bound.most)
    most = most.value if isinstance(most, Edge) else most
    if bound.keys is not None:
        return f"at most {most} pairs of {allowed(bound.keys, limits)} and {allowed(bound, limits)}"
    texts = bound.texts if limits is None or bound.texts is None else limits.of(bound.texts)
    texts = texts.value if isinstance(texts, Edge) else texts
    words = "" if texts is None else f" of at most {texts} characters in all"
    return f"at most {most} of {allowed(bound, limits)}{words}"


def number(value: float | int) -> str:
    """A bound as people write it."""
    powers = {INT32: "2^31 - 1", INT64: "2^63 - 1", -INT64 - 1: "-2^63", -INT32: "-(2^31 - 1)"}
    return powers.get(value, str(value)) if isinstance(value, int) else str(value)


def shown(value: Any) -> str:
    """A value for a sentence, which may be of any size and depth."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > SHORTENED.maxstring:
        return f"{SHORTENED.repr(value)} of {len(value)} characters"
    return SHORTENED.repr(value)


SHORTENED = Repr()
SHORTENED.maxstring = SHORTENED.maxother = 80
SHORTENED.maxlong = 80


def table() -> str:
    """The table as Markdown."""
    rows = [f"| `{b.name}` | {b.where} | {described(b)} |" for b in BOUNDS if b.kind is not bool]
    return "\n".join(["| field | of | allowed |", "|---|---|---|", *rows])


def edges(bound: Bound, limits: Limits) -> list[Any]:
    """Values at, just inside and just beyond each edge of a field, and values of a wrong kind."""
    low, high = bound.low, limits.of(bound.high)
    wrong: list[Any] = [True, [True], "1", {}, {"a": 1}, [None], [[]], 0.5, math.nan, math.inf, 10**30]
    if bound.kind is bool:
        return [True, False, 1, *wrong]
    if bound.kind is str:
        ones: list[Any] = ["a" * length for length in (int(low) - 1, int(low), int(low) + 1, high - 1, high, high + 1)]
    else:
        step = 1 if bound.kind is int else 1e-6
        ones = [low - step, low, low + step, high - step, high, high + step, -(2**63) - 1, 2**63, 2**64, *bound.also]
    if bound.most is None:
        return [*ones, *wrong]
    most = limits.of(bound.most)
    inside = ones[2]
    if bound.keys is None:
        return [*([one] for one in ones), [inside] * most, [inside] * (most + 1), *wrong, *ones]
    keys = [str(key) for key in edges(bound.keys, limits)[:6]]
    by_key = [{key: inside} for key in keys]
    return [*by_key, *({keys[1]: one} for one in ones), {str(i): inside for i in range(most + 1)}, *wrong]
