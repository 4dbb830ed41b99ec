"""Every algorithm, chosen per request: served output equals its reference decode, alone and in one mixed batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sglang_llada.config import DecodeConfig, Sampling
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.llada2.editing import generate_as
from sglang_llada.llada2.reference import Llada2ForDiffusion
from sglang_llada.llada2.weights import load_reference
from tests.host.conftest import NEW_TOKENS, Case, compare, held_out_prompts
from tests.host.serving import Server, serving

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-llada2.2"  # which knows them all
# Decides rashly, so that there is something to edit.
RASH = {"algorithm": "joint_threshold", "threshold": 0.0, "edit_threshold": 0.0, "max_post_edit_steps": 40}
WAYS: dict[str, dict[str, Any]] = {
    "threshold": {"algorithm": "threshold"},
    "no early exit": {"algorithm": "threshold", "early_exit": False},
    "few steps": {"algorithm": "threshold", "max_nfe": 2},
    "live blocks": {"algorithm": "threshold", "live_blocks": 3, "next_block_share": 0.9},
    "quality": {"algorithm": "joint_threshold"},
    "rash": RASH,
    "few steps of editing": {"algorithm": "joint_threshold", "threshold": 0.9, "max_nfe": 3},
    "mbe": {"algorithm": "mbe", "mode": "speed"},
    "rash mbe": {**RASH, "algorithm": "mbe", "window": 3},
    "live blocks of mbe": {"algorithm": "mbe", "threshold": 0.9, "live_blocks": 2, "next_block_share": 1.0},
    "levenshtein": {},
    "rash levenshtein": {"threshold": 0.0, "max_post_edit_steps": 40, "cumulative_budget": True},
    "live blocks of levenshtein": {"live_blocks": 2, "next_block_share": 1.0},
}
PLAIN = ("threshold", "quality", "mbe", "levenshtein")  # get all prompts, the others every third
WARM = {"temperature": 5.0}  # where even this model is of many minds
SAMPLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sampling parameters, custom_params
    "temperature": (WARM, {"algorithm": "threshold"}),
    "at once": (WARM, {"algorithm": "threshold", "threshold": 0.0}),
    "cut": ({"temperature": 5.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"algorithm": "threshold", "steps": 4}),
    "edits": (WARM, {**RASH, "max_post_edit_steps": 3}),
    "levenshtein": (WARM, {"threshold": 0.0, "max_post_edit_steps": 3}),
    "live blocks": (WARM, {**WAYS["rash mbe"], "live_blocks": 2, "max_post_edit_steps": 3}),
}
COUNT, BABBLE, LONG_TOKENS = 100, 16, 100


@pytest.fixture(scope="module")
def facts() -> CheckpointFacts:
    return read_facts(CHECKPOINT)


@pytest.fixture(scope="module")
def reference() -> Llada2ForDiffusion:
    return load_reference(CHECKPOINT)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    return list(held_out_prompts(tokenizer, [1, 2, 31, 32, 33, 63, 64, 65, *range(30, 30 + COUNT - 8)]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The plain host command: the checkpoint says how it is decoded. Its pool is too small for 16 long answers."""
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(CHECKPOINT, log, "--max-total-tokens", "1024", env=env) as running:
        yield running


def decoded(
    model: Llada2ForDiffusion,
    facts: CheckpointFacts,
    prompts: list[list[int]],
    custom_params: dict[str, Any],
    new_tokens: int = NEW_TOKENS,
    sampling: Sampling | None = None,
) -> list[Case]:
    torch.set_num_threads(1)
    params = DecodeConfig.defaults(facts.block_size, "levenshtein", indel=True).replaced(custom_params)
    params = replace(params, sampling=sampling)
    return [Case(prompt, generate_as(params, model, prompt, new_tokens, facts)) for prompt in prompts]


def test_mixed_algorithms_in_one_batch_equal_their_references(
    server: Server, prompts: list[list[int]], reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    """Each way one request at a time, then streamed and 16 at once: 706 streams."""
    some = {way: prompts[:: 1 if way in PLAIN else 3] for way in WAYS}
    wanted = {way: decoded(reference, facts, some[way], params) for way, params in WAYS.items()}
    asked = [(way, case) for way in WAYS for case in wanted[way]]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    texts = []
    for at_once, send in ((1, server.generate), (16, server.stream)):
        server.flush()
        with ThreadPoolExecutor(at_once) as pool:
            given = pool.map(lambda i: send(asked[i][1].prompt, NEW_TOKENS, custom_params=WAYS[asked[i][0]]), order)  # noqa: B023
            answers = dict(zip(order, given, strict=True))
        for kind in WAYS:
            mine = [i for i, (way, _) in enumerate(asked) if way == kind]
            compare([asked[i][1] for i in mine], [answers[i] for i in mine], f"{kind}, {at_once} at once, mixed")
        texts.append([answers[i]["text"] for i, (_, case) in enumerate(asked) if not case.close_call])
    assert texts[0] == texts[1]
    hasty = decoded(reference, facts, some["rash"], {**RASH, "edit_threshold": 1.0})
    for way in ("rash", "rash levenshtein"):
        changed = sum(a.want.token_ids != b.want.token_ids for a, b in zip(wanted[way], hasty, strict=True))
        print(f"{way}: edits changed {changed} of {len(hasty)} answers")
        assert changed > 0


def test_requests_that_go_round_in_circles_end_within_their_bound_and_disturb_nobody(
    server: Server, reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    """Random prompts, long answers without an end, all ways at once, in a pool that is too small for them."""
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(rng.choice([1, 5, 20, 33, 60]))] for _ in range(BABBLE)]
    endless = replace(facts, stop_ids=frozenset())
    wanted = {way: decoded(reference, endless, prompts, params, LONG_TOKENS) for way, params in WAYS.items()}
    asked = [(way, case) for i in range(BABBLE) for way in WAYS for case in [wanted[way][i]]]

    def ask(way: str, case: Case) -> dict[str, Any]:
        return server.stream(case.prompt, LONG_TOKENS, ignore_eos=True, custom_params=WAYS[way])

    server.flush()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: ask(*each), asked))
    compare([case for _, case in asked], answers, "without an end, 16 at once, mixed", most_close=0.3)
    retracted = sum(answer["meta_info"]["num_retractions"] > 0 for answer in answers)
    longest = {
        way: max(
            max(a["meta_info"]["dllm_forward_counts"]) for (w, _), a in zip(asked, answers, strict=True) if w == way
        )
        for way in WAYS
    }
    print(f"{retracted} of {len(asked)} were retracted; most steps of a block: {longest}")
    assert retracted > 0, "the pool was never full, so nothing was shown"
    for way in ("rash", "rash levenshtein"):
        bound = DecodeConfig.defaults(facts.block_size, "levenshtein", indel=True).replaced(WAYS[way]).most_steps
        assert RASH["max_post_edit_steps"] < longest[way] <= bound, "nobody went round in circles"


def test_samples_are_those_of_their_seed_whatever_runs_beside_them(
    server: Server, prompts: list[list[int]], reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    """Random prompts and questions, alone and 16 at once in another order, beside greedy requests, some retracted."""
    rng = random.Random(2)
    asked: list[tuple[dict[str, Any], dict[str, Any], Case]] = []
    endless = replace(facts, stop_ids=frozenset())
    for seed in range(64):
        options, custom_params = list(SAMPLED.values())[seed % len(SAMPLED)]
        prompt = [rng.randrange(300) for _ in range(rng.choice([1, 5, 20, 33, 60]))] if seed % 2 else prompts[seed]
        how = Sampling(**{"top_k": 1 << 30, "top_p": 1.0, "min_p": 0.0, "seed": seed, **options})
        (case,) = decoded(reference, endless, [prompt], custom_params, NEW_TOKENS, how)
        options = {**options, "sampling_seed": seed, "custom_params": custom_params, "ignore_eos": True}
        asked.append((options, custom_params, case))

    def ask(i: int) -> dict[str, Any]:
        return server.generate(asked[i][2].prompt, NEW_TOKENS, **asked[i][0])

    def beside(i: int) -> dict[str, Any]:
        return server.generate(asked[i][2].prompt, LONG_TOKENS, ignore_eos=True, custom_params=asked[i][1])

    order = list(range(64))
    alone = [ask(i) for i in order]
    compare([case for *_, case in asked], alone, "sampled, alone", most_close=0.6)
    rng.shuffle(order)
    with ThreadPoolExecutor(8) as others, ThreadPoolExecutor(16) as pool:
        running = [others.submit(beside, i) for i in range(0, 64, 2)]
        again = dict(zip(order, pool.map(ask, order), strict=True))
        assert all(len(each.result()["output_ids"]) == LONG_TOKENS for each in running)
    cases = [asked[i][2] for i in order]
    compare(cases, [again[i] for i in order], "sampled, 16 at once beside greedy ones", most_close=0.6)
    assert sum(again[i]["meta_info"]["num_retractions"] for i in order) > 0, "the pool was never full"
    assert len({tuple(answer["output_ids"]) for answer in alone}) > 32


def test_samples_without_a_seed_differ(server: Server) -> None:
    options = {"temperature": 9.0, "max_new_tokens": 32, "n": 4, "ignore_eos": True}
    body = {"input_ids": [70, 71, 72], "sampling_params": options}
    answers = [out["output_ids"] for _ in range(2) for out in server.post("/generate", body).json()]
    assert len({tuple(answer) for answer in answers}) == 8


def test_a_stream_of_the_openai_server_brings_the_same_text_in_pieces(server: Server, prompts: list[list[int]]) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    for way, params in WAYS.items():
        for prompt in prompts[10:15]:
            ask: dict[str, Any] = {
                "model": "tiny", "prompt": prompt, "max_tokens": 64, "extra_body": {"custom_params": params}
            }  # fmt: skip
            whole = client.completions.create(**ask, temperature=0).choices[0].text
            pieces = [event.choices[0].text for event in client.completions.create(**ask, temperature=0, stream=True)]
            assert "".join(pieces) == whole, way


@pytest.mark.parametrize(
    ("custom_params", "message"),
    [
        ({"algorithm": "threshold", "edit_threshold": 0.5}, "unknown key 'edit_threshold'"),
        ({"algorithm": "joint_threshold", "mode": "best"}, "mode is 'best'; allowed: quality, speed"),
        ({"cumulative_budget": 1}, "cumulative_budget is 1; allowed: true or false"),
        ({"window": 2}, "unknown key 'window'"),
        ({"algorithm": "mbe", "window": 5}, "window is 5; allowed: an integer from 1 to 4"),
    ],
)
def test_what_an_algorithm_does_not_take_is_refused(
    server: Server, custom_params: dict[str, Any], message: str
) -> None:
    body = {"input_ids": [4, 5], "sampling_params": {"temperature": 0, "custom_params": custom_params}}
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert message in reply.text
