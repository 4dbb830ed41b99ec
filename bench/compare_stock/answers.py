"""Probes of what a request asks for and gets. Each takes a server of either side and says what it saw."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from bench.compare_stock.right import COUNTING, exact, ids_of, questions, reference, right, tokenizer
from bench.compare_stock.sides import NotAnswered, Seen, Target
from bench.serve import after
from examples.tiny_llada2.tasks import examples
from sglang_llada.llada2.reference import generate

BLOCK = 32
REVERSE = "<role>HUMAN</role>Reverse KBD.<|role_end|><role>ASSISTANT</role>"
WARM = 5.0  # a temperature at which even this model is of many minds
GRAMMAR_SECONDS = 10.0  # a free answer takes less than one
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
ADD = {"type": "object", "properties": {"a": {"enum": [17]}, "b": {"enum": [25]}}, "required": ["a", "b"]}
ADD["additionalProperties"] = False


# --- decoding ---------------------------------------------------------------------------------------------------------


def greedy(target: Target) -> Seen:
    return exact(target, questions())


def chat(target: Target) -> Seen:
    asked = list(islice(examples(4, held_out=True), 12))
    good = 0
    for example in asked:
        body = {"model": "tiny", "messages": example.messages, "temperature": 0, "max_tokens": 64}
        answer = target.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        good += answer.strip() == example.answer
    return Seen(f"{good} of {len(asked)} right", good >= len(asked) - 1)


def counted(target: Target, prompt: list[int] | str, new_tokens: int, **options: Any) -> tuple[Any, int]:
    """An answer, and the forwards that it took."""
    before = int(target.forwards[0])
    got = target.generate(prompt, new_tokens, **options)
    return got, int(target.forwards[0]) - before


def prompt_forwards(target: Target) -> Seen:
    prompt = after(tokenizer(), 2016, seed=1)
    target.flush()
    _, forwards = counted(target, prompt, 1)
    return Seen(f"{forwards} forwards", forwards < len(prompt) // 32)


def block_forwards(target: Target) -> Seen:
    prompt = after(tokenizer(), 32, seed=2)
    model, facts = reference()
    want = generate(model, prompt, 96, mask_id=facts.mask_id, threshold=1.0)
    target.flush()
    got, forwards = counted(target, prompt, 96, ignore_eos=True)
    same = "" if got["output_ids"] == want.token_ids else ", for other tokens"
    return Seen(
        f"{forwards} forwards for {want.forwards} steps of decoding{same}", forwards <= want.forwards and not same
    )


def threshold(target: Target) -> Seen:
    prompt = ids_of(COUNTING)
    said = []
    for value in (0.3, 1.0):
        want = right(prompt, 64, threshold=value)
        got, forwards = counted(target, prompt, 64, custom_params={"threshold": value})
        good = got["output_ids"] == want.token_ids and forwards in (want.forwards, want.forwards + 1)
        said.append((f"{forwards} forwards at {value}", good))
    return Seen(", ".join(text for text, _ in said), all(good for _, good in said))


def unknown_parameter(target: Target) -> Seen:
    return refused(target, custom_params={"treshold": 0.5})


def live_blocks(target: Target) -> Seen:
    prompt, params = ids_of(COUNTING), {"threshold": 1.0, "live_blocks": 3, "next_block_share": 0.9}
    want, one_by_one = right(prompt, 96, **params), right(prompt, 96, threshold=1.0)
    got, forwards = counted(target, prompt, 96, custom_params={"algorithm": "threshold", **params})
    good = got["output_ids"] == want.token_ids and forwards in (want.forwards, want.forwards + 1)
    return Seen(f"{forwards} forwards, where block after block takes {one_by_one.forwards}", good)


def canvas(target: Target) -> Seen:
    given = [*ids_of("A record: "), None, None, *ids_of(" ends here.")]
    got = target.generate([70, 71], len(given), custom_params={"algorithm": "threshold", "canvas": given})["output_ids"]
    kept = sum(here == token for here, token in zip(got, given, strict=False) if token is not None)
    most = sum(token is not None for token in given)
    return Seen(f"{kept} of {most} given tokens stand in the answer", kept == most)


def choices(target: Target) -> Seen:
    params = {"algorithm": "threshold", "canvas": [None], "choices": [22, 70]}
    found = target.generate(ids_of(COUNTING), 1, custom_params=params)["meta_info"].get("dllm_choices")
    return Seen("their probabilities" if found else "a free answer, no probabilities", bool(found))


def score(target: Target) -> Seen:
    body = {"model": "tiny", "query": "What is ", "items": ["17 + 2", "4 + 4"], "label_token_ids": [70, 71, 22]}
    scores = target.post("/v1/score", body).json()["scores"]
    return Seen(f"{len(scores)} rows of {len(scores[0])} probabilities", all(any(row) for row in scores))


# --- sampling ---------------------------------------------------------------------------------------------------------


def distinct(answers: list[Any]) -> int:
    return len({tuple(each["output_ids"]) for each in answers})


def temperature(target: Target) -> Seen:
    got = target.together([(REVERSE, 32, {"temperature": WARM})] * 6, 6)
    return Seen(f"{distinct(got)} different answers of 6", distinct(got) > 1)


def seeds(target: Target) -> Seen:
    asked = [(REVERSE, 32, {"temperature": WARM, "sampling_seed": seed}) for seed in (1, 1, 1, 2, 3)]
    got = target.together(asked, 5)
    alone = target.generate(*asked[0][:2], **asked[0][2])
    same, others = distinct([*got[:3], alone]), distinct(got[2:])
    return Seen(f"{same} answer of one seed, {others} of three", same == 1 and others == 3)


def truncation(target: Target) -> Seen:
    plain = target.generate(REVERSE, 32)["output_ids"]
    hot = {"temperature": WARM, "sampling_seed": 1}
    free = target.generate(REVERSE, 32, **hot)["output_ids"]
    cut = [target.generate(REVERSE, 32, **hot, **one)["output_ids"] == plain for one in ({"top_k": 1}, {"min_p": 1.0})]
    cut.append(target.generate(REVERSE, 32, **hot, top_p=1e-5)["output_ids"] == plain)
    if free == plain:
        return Seen("nothing is drawn that they could cut", False)
    return Seen(f"{sum(cut)} of 3 give the likeliest tokens", all(cut))


def copies(target: Target) -> Seen:
    got = target.generate(REVERSE, 32, temperature=WARM, n=4)
    return Seen(f"{distinct(got)} different answers of 4", distinct(got) > 1)


def penalty(target: Target) -> Seen:
    prompt = ids_of(COUNTING)
    want, plain = right(prompt, 40, wishes={"frequency": 2.0}), right(prompt, 40)
    got = target.generate(prompt, 40, frequency_penalty=2.0)["output_ids"]
    said = {True: "the reference's answer with it", False: "another answer"}[got == want.token_ids]
    return Seen("the answer without it" if got == plain.token_ids else said, got == want.token_ids)


def bias(target: Target) -> Seen:
    banned = sorted(set(target.generate(COUNTING, 32)["output_ids"]))[:3]
    got = target.generate(COUNTING, 32, logit_bias={str(token): -100 for token in banned})["output_ids"]
    there = sum(token in banned for token in got)
    return Seen(f"{there} tokens with a bias of -100 in the answer", there == 0)


def least_tokens(target: Target) -> Seen:
    got = target.generate(REVERSE, 64, min_new_tokens=40)["meta_info"]["completion_tokens"]
    return Seen(f"{got} tokens where 40 are the least", got >= 40)


def processor(target: Target) -> Seen:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    banned = sorted(set(target.generate(COUNTING, 32)["output_ids"]))[:3]
    top = {"custom_logit_processor": DisallowedTokensLogitsProcessor().to_str()}
    got = target.generate(COUNTING, 32, top=top, custom_params={"token_ids": banned})["output_ids"]
    there = sum(token in banned for token in got)
    return Seen(f"{there} tokens that it forbids in the answer", there == 0)


# --- what comes back --------------------------------------------------------------------------------------------------


def log_probabilities(target: Target) -> Seen:
    got = target.generate(COUNTING, 40, top={"return_logprob": True, "top_logprobs_num": 2})
    rows, tokens = got["meta_info"].get("output_token_logprobs") or [], got["output_ids"]
    good = [token for _, token, _ in rows] == tokens and all(value <= 0 for value, *_ in rows)
    return Seen(f"{len(rows)} of {len(tokens)} tokens", good)


def prompt_log_probabilities(target: Target) -> Seen:
    prompt = after(tokenizer(), 64, seed=6)
    got = target.generate(prompt, 1, top={"return_logprob": True, "logprob_start_len": 0})["meta_info"]
    rows = got.get("input_token_logprobs") or []
    with torch.inference_mode():
        want = reference()[0].block_causal(prompt).log_softmax(-1)
    worst = [abs(value - want[at, prompt[at]].item()) for at, (value, *_) in enumerate(rows) if value is not None]
    near = f", at most {max(worst):.0e} from the network's" if worst else ""
    return Seen(f"{len(rows)} of {len(prompt)} tokens{near}", len(worst) == len(prompt) and max(worst) < 1e-3)


def stop_text(target: Target) -> Seen:
    got, forwards = counted(target, COUNTING, 64, stop="14")
    return ended(forwards, got["text"] == target.generate(COUNTING, 64)["text"].split("14")[0])


def stop_token(target: Target) -> Seen:
    ids = target.generate(COUNTING, 64)["output_ids"]
    got, forwards = counted(target, COUNTING, 64, stop_token_ids=[ids[4]])
    return ended(forwards, got["output_ids"] == ids[: ids.index(ids[4]) + 1])


def ended(forwards: int, good: bool) -> Seen:
    """An answer in the block that COUNTING ends in."""
    positions = BLOCK - len(ids_of(COUNTING)) % BLOCK
    said = "the answer up to it" if good else "another answer"
    return Seen(
        f"{said} after {forwards} forwards, where its block has {positions} positions", good and forwards < positions
    )


def pieces(target: Target) -> Seen:
    counts = [each["meta_info"]["completion_tokens"] for each in target.stream(COUNTING, 96, ignore_eos=True)]
    counts = sorted({count for count in counts if count})
    return Seen(f"{len(counts)} pieces, the first of {counts[0]} tokens", counts[0] < 32 and len(counts) > 4)


def steps_of_tokens(target: Target) -> Seen:
    meta = target.generate(COUNTING, 40, custom_params={"trace": True})["meta_info"]
    found = [name for name in ("step_maps", "dllm_forward_counts") if meta.get(name)]
    return Seen(f"{' and '.join(found) or 'neither'} in meta_info", len(found) == 2)


def snapshots(target: Target) -> Seen:
    params = {"stream_mode": "denoise", "trace": True, "threshold": 1.0}
    *_, last = target.stream(COUNTING, 64, custom_params=params)
    found = last["meta_info"].get("dllm_snapshots") or []
    return Seen(f"{len(found)} snapshots of a block being decided", len(found) > 1)


# --- structured output ------------------------------------------------------------------------------------------------


def conforms(check: Callable[[str], bool], **options: Any) -> Callable[[Target], Seen]:
    """A probe of a grammar, which nothing else than an answer that conforms satisfies."""

    def probe(target: Target) -> Seen:
        text = target.post("/generate", target.body(COUNTING, 64, None, options), seconds=GRAMMAR_SECONDS).json()[
            "text"
        ]
        return Seen(f"conforms: {text[:30]}" if check(text) else f"does not conform: {text[:30]}", check(text))

    return probe


def is_record(text: str) -> bool:
    try:
        return json.loads(text) in ({"a": 1}, {"a": 2})
    except ValueError:
        return False


regex = conforms(lambda text: bool(re.fullmatch("(yes|no)[.!]", text)), regex="(yes|no)[.!]")
schema = conforms(is_record, json_schema=json.dumps(SCHEMA))
ebnf = conforms(lambda text: text in ("left", "right"), ebnf='root ::= "left" | "right"')


def tool_call(target: Target) -> Seen:
    tool = {"type": "function", "function": {"name": "add", "strict": True, "parameters": ADD}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "tools": [tool]}
    body |= {"tool_choice": "required", "temperature": 0, "max_tokens": 96}
    message = target.post("/v1/chat/completions", body, seconds=GRAMMAR_SECONDS).json()["choices"][0]["message"]
    made = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    good = [(name, json.loads(arguments)) for name, arguments in made] == [("add", {"a": 17, "b": 25})]
    return Seen("add(17, 25)" if good else f"calls {made}", good)


# --- what cannot be meant ---------------------------------------------------------------------------------------------


def refused(target: Target, prompt: list[int] | str = REVERSE, **options: Any) -> Seen:
    """Whether a request is refused with a sentence, and the server goes on."""
    try:
        target.generate(prompt, 8, **options)
    except NotAnswered as error:
        return Seen(str(error), str(error).startswith("HTTP 400") and target.answers())
    return Seen("an answer, as if nothing had been said", False)


def bad_id(target: Target) -> Seen:
    return refused(target, [70, -1, 71])


def mask_id(target: Target) -> Seen:
    return refused(target, [70, reference()[1].mask_id, 71])


def bad_regex(target: Target) -> Seen:
    return refused(target, stop_regex="((")


def typed_mask(target: Target) -> Seen:
    body = {"model": "tiny", "prompt": "a<|mask|>b", "temperature": 0, "max_tokens": 8}
    body |= {"return_token_ids": True, "return_prompt_token_ids": True}
    choice = target.post("/v1/completions", body).json()["choices"][0]
    ids = choice.get("prompt_token_ids")
    if ids is None:
        return Seen("prompt tokens are not returned", False)
    is_mask = reference()[1].mask_id in ids
    return Seen("is the mask" if is_mask else f"is text, of {len(ids) - 2} tokens", not is_mask)
