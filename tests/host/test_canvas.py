"""Answers of which a part is given: served output equals the reference, and what cannot be meant is refused."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import examples
from sglang_llada.config import Sampling
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.llada2.editing import Wishes
from sglang_llada.llada2.reference import read
from tests.host.conftest import Case, compare, held_out_prompts, loaded
from tests.host.serving import Server, events, serving
from tests.host.ways import CHECKPOINT, RASH, WAYS, Question, answers, babble

pytestmark = pytest.mark.host

EACH = 3
PLAIN = {"algorithm": "threshold"}
SOME = [
    "threshold", "no early exit", "few steps", "live blocks", "quality", "rash", "rash mbe", "live blocks of mbe"
]  # fmt: skip


@pytest.fixture(scope="module")
def facts() -> CheckpointFacts:
    return read_facts(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its pool is too small for 16 long answers."""
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(CHECKPOINT, log, "--max-total-tokens", "1024", env=env) as running:
        yield running


def some_canvas(rng: random.Random, stop: int, mask: int) -> tuple[int | None, ...]:
    """Runs of given tokens, some of them longer than blocks and some with a stop token, and open positions between."""
    canvas: list[int | None] = []
    for _ in range(rng.randint(1, 3)):
        canvas += [rng.choice([*range(6, 300), stop]) for _ in range(rng.choice([0, 1, 3, 31, 70]))]
        canvas += [None] * rng.choice([1, 2, 5, 33])
    canvas += [rng.randrange(6, 300) for _ in range(rng.choice([0, 0, 2, 40]))]
    return tuple(token if token != mask else mask + 1 for token in canvas)


def send(ask: Callable[..., dict[str, Any]], question: Question) -> dict[str, Any]:
    """A question, to Server.generate or Server.stream."""
    sampling: dict[str, Any] = {"custom_params": {**question.custom_params, "canvas": list(question.canvas)}}
    if question.sampling is not None:
        sampling |= {"temperature": question.sampling.temperature, "sampling_seed": question.sampling.seed}
    if question.wishes is not None:
        sampling |= {"presence_penalty": question.wishes.presence, "min_new_tokens": question.wishes.min_new_tokens}
    return ask(question.prompt, 1, **sampling)


def test_answers_on_a_canvas_equal_their_references(server: Server, facts: CheckpointFacts) -> None:
    """In every way that keeps positions, drawn and with penalties; alone, then streamed and 16 at once, retracted."""
    rng = random.Random(0)
    stop, prompts = min(facts.stop_ids), babble(EACH * (len(SOME) + 2))
    canvases = [some_canvas(rng, stop, facts.mask_id) for _ in prompts]
    drawn = Sampling(5.0, 1 << 30, 1.0, 0.0, seed=3)
    wishes = Wishes(presence=2.0, min_new_tokens=1, ends=facts.stop_ids)
    hows: list[dict[str, Any]] = [{"custom_params": WAYS[way]} for way in SOME]
    edits = {**RASH, "max_post_edit_steps": 3}
    hows += [{"custom_params": PLAIN, "sampling": drawn}, {"custom_params": edits, "wishes": wishes}]
    questions = [
        Question(prompt, len(canvas), canvas=canvas, **hows[i % len(hows)])
        for i, (prompt, canvas) in enumerate(zip(prompts, canvases, strict=True))
    ]
    cases = answers(questions)
    for ask, at_once in ((server.generate, 2), (server.stream, 16)):
        server.flush()
        with ThreadPoolExecutor(at_once) as pool:
            got = list(pool.map(partial(send, ask), questions))
        compare(cases, got, f"canvases, {at_once} at once", most_close=0.5)
    for question, each in zip(questions, got, strict=True):
        answer = each["output_ids"]
        assert all(token in (None, here) for token, here in zip(question.canvas, answer, strict=False))
        whole = len(answer) > max((i for i, token in enumerate(question.canvas) if token is not None), default=0)
        assert whole or "max_nfe" in question.custom_params
    retracted = sum(each["meta_info"]["num_retractions"] > 0 for each in got)
    print(f"{retracted} of {len(got)} were retracted")
    assert retracted > 0, "the pool was never full, so nothing was shown"
    assert {each["meta_info"]["finish_reason"]["type"] for each in got} == {"stop", "length"}
    server.flush()


def test_texts_are_their_tokens_and_given_ones_are_streamed_before_any_step(
    server: Server, tokenizer: PreTrainedTokenizerFast
) -> None:
    canvas: list[Any] = ["A record: ", None, None, " ends here", *[None] * 3, "."]
    ids = [
        token
        for entry in canvas
        for token in (tokenizer.encode(entry, add_special_tokens=False) if isinstance(entry, str) else [entry])
    ]
    [case] = answers([Question([70, 71], len(ids), PLAIN, canvas=tuple(ids))])
    for given in (canvas, ids):
        got = server.generate([70, 71], 1, custom_params={**PLAIN, "canvas": given})
        compare([case], [got], "texts")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    asked: dict[str, Any] = {"model": "tiny", "prompt": [70, 71], "temperature": 0}
    said = client.completions.create(**asked, extra_body={"custom_params": {**PLAIN, "canvas": canvas}})
    assert said.choices[0].text == got["text"] and said.usage and said.usage.completion_tokens == len(ids)
    long = [*[72] * 70, None]
    sampling = {"temperature": 0, "custom_params": {**PLAIN, "canvas": long}}
    body = {"input_ids": [70] * 32, "stream": True, "sampling_params": sampling}
    first, *_, last = events(server.post("/generate", body, stream=True))
    assert first["output_ids"] == [72] * 64 and first["meta_info"]["dllm_steps"] == 0
    assert len(last["output_ids"]) == 71 and last["meta_info"]["dllm_steps"] > 0


def test_given_tokens_have_no_step_and_are_certain(server: Server) -> None:
    canvas = [None, 80, None, *[81] * 64, None]
    params = {**PLAIN, "canvas": canvas, "trace": True}
    body = {
        "input_ids": [70, 71], "return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [5],
        "sampling_params": {"temperature": 0, "ignore_eos": True, "custom_params": params},
    }  # fmt: skip
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    meta = reply.json()["meta_info"]
    for given, step, sure, (logprob, *_), top, named in zip(
        [token is not None for token in canvas],
        meta["step_maps"],
        meta["dllm_confidences"],
        meta["output_token_logprobs"],
        meta["output_top_logprobs"],
        meta["output_token_ids_logprobs"],
        strict=True,
    ):
        assert (step == 0) == given and (not given or (sure, logprob) == (1, 0))
        assert bool(top) == bool(named) == (not given)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"canvas": [5, None, 6], "algorithm": "levenshtein"}, "canvas: algorithm is 'levenshtein', which inserts"),
        ({"canvas": [5, 6]}, "canvas has no open position; needed is one at least, as null"),
        ({"canvas": []}, "canvas has no open position"),
        ({"canvas": [5, 10**6, None]}, "canvas holds 1000000 at position 1; allowed: null or 0 to"),
        ({"canvas": ["a", [5]]}, "custom_params"),
        ({"canvas": "a hole"}, "canvas is 'a hole'; allowed: at most"),
        ({"canvas": [None] * 1500}, "1500"),
    ],
)
def test_what_a_canvas_cannot_be_is_refused(server: Server, sampling: dict[str, Any], message: str) -> None:
    body = {"input_ids": [4, 5], "sampling_params": {"temperature": 0, "custom_params": {**PLAIN, **sampling}}}
    reply = server.post("/generate", body)
    assert reply.status_code == 400 and message in reply.text, reply.text


def test_own_tokens_stops_without_holes_and_grammars_are_refused(server: Server, facts: CheckpointFacts) -> None:
    stop = min(facts.stop_ids)
    for canvas, more, message in (
        ([facts.mask_id, None], {}, f"canvas holds {facts.mask_id} at position 0, which is the mask"),
        ([5, stop, None, None], {}, "canvas has no open position before its end, the stop token at position 1"),
        ([None], {"regex": "a+"}, "canvas: structured output"),
    ):
        sampling = {"temperature": 0, "custom_params": {**PLAIN, "canvas": canvas}, **more}
        reply = server.post("/generate", {"input_ids": [4, 5], "sampling_params": sampling})
        assert reply.status_code == 400 and message in reply.text, reply.text
    assert server.generate([4, 5], 1, ignore_eos=True, custom_params={**PLAIN, "canvas": [5, stop, None, None]})


def test_stops_count_behind_what_is_given(server: Server, facts: CheckpointFacts) -> None:
    """A stop token before the last given position is text; the given end of an answer is its end."""
    stop = min(facts.stop_ids)
    for canvas, finish, length in (
        ([stop, None, 80], "length", 3),
        ([None, 80, stop, *[None] * 40], "stop", 3),
    ):
        got = server.generate([70, 71], 1, custom_params={**PLAIN, "canvas": canvas}, no_stop_trim=True)
        assert got["meta_info"]["finish_reason"]["type"] == finish and len(got["output_ids"]) == length, got


def case_of(prompt: list[int], canvas: list[int | None]) -> Case:
    return answers([Question(prompt, len(canvas), PLAIN, canvas=tuple(canvas))])[0]


def test_kv_of_given_blocks_is_found_by_the_next_prompt(server: Server, tokenizer: PreTrainedTokenizerFast) -> None:
    [prompt] = held_out_prompts(tokenizer, [40])
    canvas: list[int | None] = [None, *[80 + i % 20 for i in range(150)], None]
    server.flush()
    first = server.generate(prompt, 1, custom_params={**PLAIN, "canvas": canvas})
    compare([case_of(prompt, canvas)], [first], "a long given run")
    turn = [*prompt, *first["output_ids"][:-1]]  # the last is of a block that is not kept
    again = server.generate(turn, 1, custom_params={**PLAIN, "canvas": [None] * 3})
    compare([case_of(turn, [None] * 3)], [again], "the next turn")
    assert again["meta_info"]["cached_tokens"] >= 160


# --- reads: the probabilities of choices, with nothing decided --------------------------------------------------------

CHOICES = [5, 70, 71, 300]


def test_reads_equal_the_reference_beside_everything_else(server: Server, facts: CheckpointFacts) -> None:
    """Alone, then 16 at once beside answers that fill the pool; from the cache and not."""
    rng, (model, _) = random.Random(1), loaded(CHECKPOINT)
    prompts = babble(12, seed=3)
    canvases = [some_canvas(rng, min(facts.stop_ids), facts.mask_id) for _ in prompts]
    want = [
        read(model, prompt, canvas, CHOICES, mask_id=facts.mask_id)
        for prompt, canvas in zip(prompts, canvases, strict=True)
    ]

    def ask(prompt: list[int], canvas: tuple[int | None, ...]) -> dict[str, Any]:
        return server.generate(prompt, 9, custom_params={"canvas": list(canvas), "choices": CHOICES})

    server.flush()
    alone = list(map(ask, prompts, canvases))
    with ThreadPoolExecutor(16) as pool:
        beside = [
            pool.submit(server.generate, ids, 120, ignore_eos=True, custom_params=PLAIN) for ids in babble(12, seed=4)
        ]
        together = list(pool.map(ask, prompts, canvases))
        assert all(len(each.result()["output_ids"]) == 120 for each in beside)
    for got in (alone, together):
        for each, right, prompt, canvas in zip(got, want, prompts, canvases, strict=True):
            meta = each["meta_info"]
            assert meta["dllm_choices"] == [pytest.approx(row, abs=1e-4) for row in right]
            assert each["output_ids"] == [] and meta["finish_reason"]["type"] == "length"
            assert meta["prompt_tokens"] == len(prompt) + len(canvas)
    assert "dllm_choices" not in beside[0].result()["meta_info"]
    server.flush()


def test_scores_are_reads_of_the_position_behind_each_prompt(
    server: Server, tokenizer: PreTrainedTokenizerFast, facts: CheckpointFacts
) -> None:
    model, _ = loaded(CHECKPOINT)
    items, labels = ["17 + 2", "4 + 4"], [70, 71, 22]
    body = {"model": "tiny", "query": "What is ", "items": items, "label_token_ids": labels}
    got = server.post("/v1/score", body)
    assert got.status_code == 200, got.text
    prompts = [tokenizer.encode(f"What is {item}") for item in items]
    want = [read(model, prompt, [None], labels, mask_id=facts.mask_id)[0] for prompt in prompts]
    assert got.json()["scores"] == [pytest.approx(row, abs=1e-4) for row in want]
    among = server.post("/v1/score", {**body, "apply_softmax": True}).json()["scores"]
    assert among == [pytest.approx([p / sum(row) for p in row], abs=1e-4) for row in want]


@pytest.mark.parametrize(
    ("custom", "more", "message"),
    [
        ({"choices": [5]}, {}, "choices are read at the open positions of a canvas"),
        ({"choices": [5], "canvas": [6]}, {}, "choices are read at the open positions of a canvas"),
        ({"choices": [], "canvas": [None]}, {}, "choices is empty"),
        ({"choices": ["two words of text"], "canvas": [None]}, {}, "tokens, ["),
        ({"choices": [None], "canvas": [None]}, {}, "choices holds None at position 0; allowed: 0 to"),
        ({"choices": [5] * 129, "canvas": [None]}, {}, "choices has 129 entries; allowed: at most 128"),
        ({"choices": [5], "canvas": [None]}, {"return_logprob": True}, "which return_logprob is about"),
    ],
)
def test_what_cannot_be_read_is_refused(
    server: Server, custom: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    body = {"input_ids": [4, 5], "sampling_params": {"temperature": 0, "custom_params": custom}, **more}
    reply = server.post("/generate", body)
    assert reply.status_code == 400 and message in reply.text, reply.text


def test_what_is_missing_is_found(server: Server, tokenizer: PreTrainedTokenizerFast) -> None:
    """Held-out records of which the end is given, and counted numbers of which every third is missing."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for example in islice((e for e in examples(5, held_out=True) if e.task in ("json", "enumerate")), 60):
        if len(example.messages) > 1:
            continue
        parts = re.findall(r"\d+|\D+", example.answer)
        numbers = [i for i, part in enumerate(parts) if part.isdigit()][:: 1 if example.task == "json" else 3]
        canvas: list[Any] = []
        for i, part in enumerate(parts):
            canvas += [None] * len(tokenizer.encode(part, add_special_tokens=False)) if i in numbers else [part]
        prompt = tokenizer.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        got = server.generate(prompt, 1, custom_params={**PLAIN, "canvas": canvas})
        asked[example.task] += 1
        right[example.task] += got["text"] == example.answer
    print(f"of {dict(asked)} what was missing was found in {dict(right)}")
    assert min(asked.values()) > 10 and all(right[task] > 0.8 * asked[task] for task in asked)
