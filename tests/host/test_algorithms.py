"""Every way to decode, chosen per request: served output equals its reference decode, alone and in one mixed batch."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from sglang_llada.config import DecodeConfig
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.service import Service
from sglang_llada.view.ask import Question as Chat
from sglang_llada.view.ask import collected, put
from sglang_llada.view.draw import svg
from sglang_llada.view.trajectory import Trajectory
from tests.host.conftest import NEW_TOKENS, compare, held_out_prompts
from tests.host.serving import ROOT, Server, events, serving
from tests.host.ways import (
    CHECKPOINT,
    RASH,
    RESTLESS,
    SHAPED,
    WAYS,
    Asked,
    Question,
    answers,
    ask,
    ask_sampled,
    ask_shaped,
    babble,
)
from tests.sizes import size

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

PLAIN = ("threshold", "quality", "mbe", "levenshtein")  # get all prompts, the others every third
COUNT, LONG_TOKENS = size(16, 100), 100
SEEDS = size(21, 64)
ENDLESS = size(4, 16)  # requests of each way that do not end by themselves


@pytest.fixture(scope="module")
def facts() -> CheckpointFacts:
    return read_facts(CHECKPOINT)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    return list(held_out_prompts(tokenizer, [1, 2, 31, 32, 33, 63, 64, 65, *range(30, 22 + COUNT)]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The plain host command: the checkpoint says how it is decoded. Its pool is too small for 16 long answers."""
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(CHECKPOINT, log, "--max-total-tokens", "768", env=env) as running:
        yield running


def test_mixed_algorithms_in_one_batch_equal_their_references(server: Server, prompts: list[list[int]]) -> None:
    """Each way one request at a time, then streamed and 16 at once."""
    some = {way: prompts[:: 1 if way in PLAIN else 3] for way in WAYS}
    asked = [each for way in WAYS for each in ask(way, some[way])]
    random.Random(0).shuffle(asked)
    texts = []
    for at_once, send in ((1, server.generate), (16, server.stream)):
        server.flush()
        got = send_all(send, asked, at_once)
        for way in WAYS:
            mine = [i for i, each in enumerate(asked) if each.way == way]
            compare([asked[i].case for i in mine], [got[i] for i in mine], f"{way}, {at_once} at once, mixed")
        texts.append([a["text"] for a, each in zip(got, asked, strict=True) if not each.case.close_call])
    assert texts[0] == texts[1]
    for way in ("rash", "rash levenshtein"):
        hasty = {**RASH, "edit_threshold": 1.0}
        mine = [each.case for each in asked if each.way == way]
        unedited = answers([Question(case.prompt, NEW_TOKENS, hasty) for case in mine])
        changed = sum(a.want.token_ids != b.want.token_ids for a, b in zip(mine, unedited, strict=True))
        print(f"{way}: edits changed {changed} of {len(mine)} answers")
        assert changed > 0


def send_all(send: Any, asked: list[Asked], at_once: int) -> list[dict[str, Any]]:
    """Answers to all requests, in their order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda each: send(each.case.prompt, each.new_tokens, **each.options), asked))


def test_requests_that_go_round_in_circles_end_within_their_bound_and_disturb_nobody(
    server: Server, facts: CheckpointFacts
) -> None:
    """Random prompts, long answers without an end, all ways at once, in a pool that is too small for them."""
    by_way = [ask(way, babble(ENDLESS), LONG_TOKENS, ignore_eos=True) for way in WAYS]
    asked = [each for group in zip(*by_way, strict=True) for each in group]
    asked[::20] = ask_sampled(babble(len(asked[::20]), seed=2), RESTLESS)
    server.flush()
    replies = send_all(server.stream, asked, 16)
    compare([each.case for each in asked], replies, "without an end, 16 at once, mixed", most_close=0.4)
    repetitive = [each.case for each in asked if each.way == "repetitions"][:5]
    free = {**WAYS["repetitions"], "penalty_lambda": 0}
    others = answers([Question(case.prompt, LONG_TOKENS, free, ignore_eos=True) for case in repetitive])
    changed = sum(a.want.token_ids != b.want.token_ids for a, b in zip(repetitive, others, strict=True))
    print(f"the penalty for repetitions changed {changed} of {len(repetitive)} answers")
    assert changed > 0
    retracted = sum(reply["meta_info"]["num_retractions"] > 0 for reply in replies)
    longest = dict.fromkeys([*WAYS, *RESTLESS], 0)
    for each, got in zip(asked, replies, strict=True):
        longest[each.way] = max(longest[each.way], *got["meta_info"]["dllm_forward_counts"])
    print(f"{retracted} of {len(asked)} were retracted; most steps of a block: {longest}")
    assert retracted > 0, "the pool was never full, so nothing was shown"
    for way, (_, params) in RESTLESS.items():
        bound = DecodeConfig.defaults(facts.block_size, "levenshtein", indel=True).replaced(params).most_steps
        assert RASH["max_post_edit_steps"] < longest[way] <= bound, "nobody went round in circles"


def test_samples_are_those_of_their_seed_whatever_runs_beside_them(server: Server, prompts: list[list[int]]) -> None:
    """Alone, then in another order, 16 at once and beside greedy requests, some of them retracted."""
    asked = ask_sampled([p for pair in zip(babble(SEEDS), prompts, strict=False) for p in pair][:SEEDS])
    alone = send_all(server.generate, asked, 1)
    compare([each.case for each in asked], alone, "sampled, alone", most_close=0.6)
    random.Random(1).shuffle(asked)
    with ThreadPoolExecutor(8) as pool:
        beside = [
            pool.submit(server.generate, ids, LONG_TOKENS, ignore_eos=True, custom_params=WAYS["rash"])
            for ids in babble(32, seed=1)
        ]
        again = send_all(server.generate, asked, 16)
        assert all(len(each.result()["output_ids"]) == LONG_TOKENS for each in beside)
    compare([each.case for each in asked], again, "sampled, 16 at once beside greedy ones", most_close=0.6)
    assert sum(each["meta_info"]["num_retractions"] for each in again) > 0, "the pool was never full"
    assert len({tuple(each["output_ids"]) for each in alone}) > SEEDS / 2


def test_samples_without_a_seed_differ(server: Server) -> None:
    options = {"temperature": 9.0, "max_new_tokens": 32, "n": 4, "ignore_eos": True}
    body = {"input_ids": [70, 71, 72], "sampling_params": options}
    drawn = [tuple(out["output_ids"]) for _ in range(2) for out in server.post("/generate", body).json()]
    assert len(set(drawn)) == 8


def test_traces_are_the_references(server: Server, prompts: list[list[int]]) -> None:
    """Step and probability of each returned token, streamed or not."""
    for way, params in WAYS.items():
        for each in ask(way, [*prompts[9:12], *babble(3)]):
            want = each.case.want
            if each.case.close_call:
                continue
            traced = {**each.options, "custom_params": {**params, "trace": True}}
            for send in (server.generate, server.stream):
                meta = send(each.case.prompt, NEW_TOKENS, **traced)["meta_info"]
                assert meta["step_maps"] == want.step_map, way
                assert meta["dllm_confidences"] == pytest.approx([p for _, p in want.notes], abs=1e-4), way
    assert "step_maps" not in server.generate(prompts[0], 4)["meta_info"]


@pytest.mark.parametrize("way", WAYS)
def test_snapshots_explain_every_answer(server: Server, prompts: list[list[int]], way: str) -> None:
    """Step by step they lead to its tokens, each put there when and as surely as the trace says."""
    moves = WAYS[way].get("algorithm", "levenshtein") == "levenshtein"
    for prompt in [*prompts[9:12], *babble(3)]:
        got = server.generate(prompt, NEW_TOKENS, custom_params={**WAYS[way], "trace": True, "stream_mode": "denoise"})
        trajectory, meta = Trajectory(32, len(prompt), moves=moves), got["meta_info"]
        frames = list(trajectory.take(got))
        assert [cell.token for cell in trajectory.cells] == got["output_ids"]
        assert [cell.step for cell in trajectory.cells] == meta["step_maps"]
        assert [cell.confidence for cell in trajectory.cells] == meta["dllm_confidences"]
        assert (len(frames), frames[-1].forwards) == (meta["dllm_steps"], meta["dllm_nfe"])
        for frame in frames:
            of_step = dict(frame.steps)
            for position, cell in enumerate(frame.cells, frame.first):
                block = (position + len(prompt) % 32) // 32
                assert (cell.step or 0) <= of_step.get(block, 0), "no token is of a step to come"


def test_the_picture_of_the_readme_is_this_checkpoints(server: Server) -> None:
    """But for the bars of confidence, which may differ by a hair from machine to machine."""
    question = [{"role": "user", "content": "Put in order: 31, 15, 50, 33, 64, 21, 20, 25, 21."}]
    drawn = svg([collected(put(Service(server.url), Chat(question, {})))])
    kept = (ROOT / "docs" / "decode.svg").read_text(encoding="utf-8")
    bars = re.compile(r'<rect fill="#\w+" opacity=".6" [^>]*/>')
    assert bars.sub("", drawn) == bars.sub("", kept) and len(bars.findall(kept)) > 30


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


def test_penalties_bias_and_early_ends_are_the_references(
    server: Server, prompts: list[list[int]], facts: CheckpointFacts
) -> None:
    """In every kind of decode, 16 at once."""
    asked = [each for way in SHAPED for each in ask_shaped(way, [*prompts[10:14], *babble(2)], facts)]
    random.Random(0).shuffle(asked)
    server.flush()
    got = send_all(server.stream, asked, 16)
    for way in SHAPED:
        mine = [i for i, each in enumerate(asked) if each.way == way]
        compare([asked[i].case for i in mine], [got[i] for i in mine], way, most_close=0.7)
        plain = [Question(asked[i].case.prompt, NEW_TOKENS, asked[i].options["custom_params"]) for i in mine]
        changed = [got[i]["output_ids"] != case.want.token_ids for i, case in zip(mine, answers(plain), strict=True)]
        assert any(changed), f"{way} changed no answer, so nothing was shown"


def test_log_probabilities_are_the_references(server: Server, prompts: list[list[int]], facts: CheckpointFacts) -> None:
    """Of each token in the step that decided it; the largest ones and those of named ids come from the same step."""
    worst, count, exact = 0.0, 0, 0
    for way in (*PLAIN, "repetitions"):
        for each in ask(way, prompts[:10]):
            if each.case.close_call:
                continue
            want = each.case.want
            body = {
                "input_ids": each.case.prompt,
                "return_logprob": True,
                "top_logprobs_num": 3,
                "token_ids_logprob": [22, 23],
                "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, **each.options},
            }
            replies = [server.post("/generate", body).json()]
            replies.append(events(server.post("/generate", {**body, "stream": True}, stream=True))[-1])
            for got in replies:
                meta = got["meta_info"]
                assert [token for _, token, _ in meta["output_token_logprobs"]] == want.token_ids
                for (value, token, _), top, named, (_, prob) in zip(
                    meta["output_token_logprobs"],
                    meta["output_top_logprobs"],
                    meta["output_token_ids_logprobs"],
                    want.notes,
                    strict=True,
                ):
                    worst, count = max(worst, abs(value - math.log(prob))), count + 1
                    values = [v for v, *_ in top]
                    assert len(top) == 3 and values == sorted(values, reverse=True) and value <= values[0] + 1e-6
                    assert facts.mask_id not in [t for _, t, _ in top]
                    exact += top[0][1] == token
                    for v, t, _ in top:
                        assert t != token or v == pytest.approx(value, abs=1e-6)
                    assert [t for _, t, _ in named] == [22, 23]
                    assert all(v == value for v, t, _ in named if t == token)
    print(f"{count} log-probabilities, at most {worst:.1e} from the reference; {exact} of the most probable token")
    assert worst < 1e-4 and exact > 0.9 * count


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
