"""What users of the host expect of a server, and what they get from block rows on top."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.reference import Llada2ForDiffusion, generate
from tests.host.conftest import held_out_prompts, held_out_questions
from tests.host.serving import Server, events

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none")


@pytest.fixture(scope="module")
def long_prompt(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return next(held_out_prompts(tokenizer, [2016]))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_completion_is_right_and_stops_at_the_end_of_the_turn(client: openai.OpenAI) -> None:
    questions = held_out_questions(45)
    right = 0
    for messages, answer in questions:
        choice = client.chat.completions.create(model="tiny", messages=messages, max_tokens=128).choices[0]
        right += choice.message.content == answer
        assert choice.finish_reason == "stop"
    print(f"{right} of {len(questions)} chat answers right")
    assert right >= 0.95 * len(questions)


def test_a_stream_brings_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    """At one token per step, so that there is something to stream."""
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "List 13 numbers from 12."}],
        "max_tokens": 128,
        "extra_body": {"custom_params": {"threshold": 1.0}},
    }
    whole = client.chat.completions.create(**ask).choices[0].message.content
    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    pieces, usage = [], None
    for event in stream:
        usage = event.usage or usage
        pieces += [choice.delta.content for choice in event.choices if choice.delta.content]
    assert "".join(pieces) == whole
    assert len(pieces) > 2, "tokens are sent as soon as everything before them is decided"
    assert usage.completion_tokens > 40


def test_tokens_are_streamed_before_their_block_is_decided(server: Server) -> None:
    body = {
        "text": "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>",
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 64, "custom_params": {"threshold": 1.0}},
    }
    counts = [e["meta_info"]["completion_tokens"] for e in events(server.post("/generate", body, stream=True))]
    assert counts == sorted(counts)
    assert len(set(counts)) > 4, counts


def test_a_snapshot_before_any_token_costs_no_log_probability(server: Server) -> None:
    shown = {"threshold": 1.0, "stream_mode": "denoise"}
    sampling = {"temperature": 0, "max_new_tokens": 40, "custom_params": shown}
    body = {"text": "Reverse KBD.", "stream": True, "return_logprob": True, "sampling_params": sampling}
    first, *_, last = events(server.post("/generate", body, stream=True))
    assert not first["output_ids"] and last["output_ids"]
    assert [token for _, token, _ in last["meta_info"]["output_token_logprobs"]] == last["output_ids"]


def test_usage_counts_prompt_and_completion(server: Server, long_prompt: list[int]) -> None:
    meta = server.generate(long_prompt[-50:], 5, ignore_eos=True)["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (50, 5)
    assert meta["finish_reason"] == {"type": "length", "length": 5}


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("new_tokens", [0, 1, 33])
def test_lengths_around_a_block_border(server: Server, long_prompt: list[int], length: int, new_tokens: int) -> None:
    out = server.generate(long_prompt[-length:], new_tokens, ignore_eos=True)
    assert len(out["output_ids"]) == new_tokens == out["meta_info"]["completion_tokens"]


def test_n_samples_of_a_greedy_request_are_equal(server: Server) -> None:
    body = {"text": "Reverse KBD.", "sampling_params": {"temperature": 0, "max_new_tokens": 8, "n": 3}}
    outs = server.post("/generate", body).json()
    assert len(outs) == 3 and len({tuple(out["output_ids"]) for out in outs}) == 1


def test_stop_token_ids_and_stop_strings_end_inside_a_block(server: Server) -> None:
    text = "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>"
    ask = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 64}}
    whole = server.post("/generate", ask).json()
    at = whole["output_ids"][4]
    first = whole["output_ids"].index(at)
    stopped = server.post("/generate", ask | {"sampling_params": ask["sampling_params"] | {"stop_token_ids": [at]}})
    assert stopped.json()["output_ids"] == whole["output_ids"][: first + 1]
    assert stopped.json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": at}
    by_string = server.post("/generate", ask | {"sampling_params": ask["sampling_params"] | {"stop": "14"}}).json()
    assert by_string["text"] == whole["text"].split("14")[0]
    assert by_string["meta_info"]["finish_reason"] == {"type": "stop", "matched": "14"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.7}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"min_new_tokens": 5}, "min_new_tokens"),
        ({"regex": "a(b"}, "regex"),
        ({"logit_bias": {"500": 1.0}}, "logit_bias"),
        ({"beam_width": 2}, "Beam search"),
        ({"custom_params": {"treshold": 0.5}}, "treshold"),
        ({"custom_params": {"threshold": 1.5}}, "1.5"),
        ({"custom_params": {"steps": 33}}, "33"),
    ],
)
def test_what_is_not_honoured_is_refused_with_a_sentence(server: Server, options: dict[str, Any], said: str) -> None:
    body = {"text": "What is 1 + 1?", "sampling_params": {"temperature": 0, "max_new_tokens": 4} | options}
    reply = server.post("/generate", body)
    assert reply.status_code == 400, reply.text
    assert said in reply.text
    assert server.post("/generate", body | {"sampling_params": {"temperature": 0, "max_new_tokens": 4}}).ok


def test_threshold_and_steps_of_a_request_are_its_own(
    server: Server, facts: CheckpointFacts, reference: Llada2ForDiffusion, long_prompt: list[int]
) -> None:
    prompt = long_prompt[-70:]
    for options in ({"threshold": 0.3}, {"steps": 5}, {"threshold": 1.0, "steps": 32}):
        want = generate(reference, prompt, 32, mask_id=facts.mask_id, stop_ids=facts.stop_ids, **options)
        got = server.generate(prompt, 32, custom_params=options)
        assert got["output_ids"] == want.token_ids, options
        assert sum(got["meta_info"]["dllm_forward_counts"]) == want.forwards


# --- forwards ---------------------------------------------------------------------------------------------------------


def test_a_long_prompt_takes_one_forward_up_to_its_first_decode_step(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    meta = server.generate(long_prompt, 1, custom_params={"threshold": 0.0})["meta_info"]
    assert meta["cached_tokens"] == 0
    assert meta["dllm_nfe"] == 1


def test_prompts_that_arrive_delay_no_running_request_by_a_step(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    rng = random.Random(0)
    running = [rng.sample(long_prompt, 20) for _ in range(8)]
    arriving = [rng.sample(long_prompt, 512) for _ in range(8)]
    options = {"ignore_eos": True, "custom_params": {"threshold": 1.0}}
    with ThreadPoolExecutor(16) as pool:
        decoding = [pool.submit(server.generate, ids, 128, **options) for ids in running]
        time.sleep(0.3)
        filling = [pool.submit(server.generate, ids, 4, **options) for ids in arriving]
        metas = [each.result()["meta_info"] for each in decoding]
        assert all(each.result()["meta_info"]["completion_tokens"] == 4 for each in filling)
    for meta in metas:
        assert meta["dllm_nfe"] == meta["dllm_steps"] == sum(meta["dllm_forward_counts"]), "every forward decided"


# --- the prefix cache -------------------------------------------------------------------------------------------------


def test_a_repeated_prompt_is_cached_but_for_its_last_block(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    prompt = long_prompt[:1000]
    assert server.generate(prompt, 4)["meta_info"]["cached_tokens"] == 0
    assert server.generate(prompt, 4)["meta_info"]["cached_tokens"] == 992


def test_a_prompt_of_whole_blocks_is_cached_whole(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    for cached in (0, 512):
        assert server.generate(long_prompt[:512], 4)["meta_info"]["cached_tokens"] == cached


def test_a_second_turn_reuses_the_sealed_blocks_of_the_first_answer(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    first = server.generate(long_prompt[:40], 100, ignore_eos=True)["output_ids"]
    second = server.generate(long_prompt[:40] + first + long_prompt[40:60], 4)["meta_info"]
    assert second["cached_tokens"] == 128, "40 + 100 tokens make four whole blocks"


def test_requests_that_run_at_the_same_time_share_a_prompt(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    options = {"ignore_eos": True, "custom_params": {"threshold": 1.0}}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.generate, long_prompt[:960], 256, **options)
        time.sleep(1.0)
        second = server.generate([*long_prompt[:960], 70], 2, **options)
        assert not first.done(), "the first request must still run for this to show anything"
    assert second["meta_info"]["cached_tokens"] == 960


def test_requests_that_arrive_together_fill_a_shared_prompt_once(server: Server, long_prompt: list[int]) -> None:
    server.flush()
    before = server.metric("sglang:llada_rows_total", kind="fill")
    answers = server.generate_all([[*long_prompt[:960], 70 + i] for i in range(8)], 2, at_once=8)
    assert sorted(answer["meta_info"]["cached_tokens"] for answer in answers) == [0] + [960] * 7
    assert server.metric("sglang:llada_rows_total", kind="fill") - before == 30


# --- ends from outside ------------------------------------------------------------------------------------------------


def test_five_hundred_requests_with_disconnects_leave_nothing_behind(server: Server, long_prompt: list[int]) -> None:
    rng = random.Random(1)
    server.flush()
    before = server.load()

    def request(number: int) -> bool:
        length, gone = rng.choice([5, 40, 100, 300]), number % 5 == 0
        body = {
            "input_ids": long_prompt[number : number + length],
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": 200 if gone else 8, "ignore_eos": gone},
        }
        with server.post("/generate", body, stream=True) as reply:
            if gone:
                next(reply.iter_lines())  # the client goes away after the first event
                return False
            return events(reply)[-1]["meta_info"]["finish_reason"] is not None

    with ThreadPoolExecutor(24) as pool:
        finished = sum(pool.map(request, range(500)))
    assert finished == 400
    server.flush()
    after = server.load()
    for field in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens"):
        assert after[field] == before[field] == 0, field


def test_a_pause_holds_everything_and_continue_goes_on(server: Server, long_prompt: list[int]) -> None:
    want = server.generate(long_prompt[:50], 96, ignore_eos=True)["output_ids"]
    for mode in ("in_place", "retract"):
        got: list[list[int]] = []
        ask = threading.Thread(
            target=lambda: got.append(server.generate(long_prompt[:50], 96, ignore_eos=True)["output_ids"])  # noqa: B023
        )
        ask.start()
        time.sleep(0.05)
        assert server.post("/pause_generation", {"mode": mode}).ok
        time.sleep(0.5)
        assert server.post("/continue_generation").ok
        ask.join(60)
        assert got == [want], mode


def test_aborting_everything_ends_what_runs_and_what_waits(server: Server, long_prompt: list[int]) -> None:
    options = {"ignore_eos": True, "custom_params": {"threshold": 1.0}}
    with ThreadPoolExecutor(100) as pool:
        asked = [pool.submit(server.generate, long_prompt[i : i + 30], 1000, **options) for i in range(100)]
        time.sleep(1.0)
        assert server.post("/abort_request", {"abort_all": True}).ok
        reasons = [each.result()["meta_info"]["finish_reason"]["type"] for each in asked]
    assert reasons.count("abort") >= 90
    server.flush()
