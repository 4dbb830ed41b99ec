"""What a request may ask for beside an algorithm: processors, log-probabilities of its prompt, stops, snapshots."""

from __future__ import annotations

import random
import re
from typing import Any

import openai
import pytest
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor, DisallowedTokensLogitsProcessor
from transformers import PreTrainedTokenizerFast

from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.reference import Llada2ForDiffusion
from tests.host.conftest import held_out_prompts
from tests.host.serving import Server, events

pytestmark = pytest.mark.host

COUNTING = "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>"


class Raises(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        raise ZeroDivisionError("of the user")


class Shrinks(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        return logits[:, :5]


def count(server: Server, new_tokens: int = 64, **options: Any) -> dict[str, Any]:
    """The checkpoint's answer to a question with a long one."""
    top = {key: options.pop(key) for key in list(options) if key in ("custom_logit_processor", "return_logprob")}
    body = {"text": COUNTING, "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, **options}, **top}
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


# --- custom logit processors ------------------------------------------------------------------------------------------


def test_a_custom_logit_processor_is_called_with_the_requests_parameters(server: Server) -> None:
    before = count(server)["output_ids"]
    banned = before[:3]
    processor = DisallowedTokensLogitsProcessor().to_str()
    options = {"custom_logit_processor": processor, "custom_params": {"token_ids": banned, "threshold": 0.9}}
    after = count(server, **options)["output_ids"]
    assert after and not set(banned) & set(after)
    assert count(server)["output_ids"] == before


@pytest.mark.parametrize(("processor", "said"), [(Raises, "of the user"), (Shrinks, "shape")])
def test_a_processor_that_fails_ends_its_request_alone(
    server: Server, processor: type[CustomLogitProcessor], said: str
) -> None:
    before = count(server)["output_ids"]
    body = {"text": COUNTING, "custom_logit_processor": processor.to_str(), "sampling_params": {"temperature": 0}}
    reply = server.post("/generate", body)
    assert reply.status_code == 400 and said in reply.text
    reply = server.post("/generate", body | {"custom_logit_processor": '{"callable": "80049500"}'})
    assert reply.status_code == 400 and "cannot be loaded" in reply.text
    assert count(server)["output_ids"] == before


# --- log-probabilities ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_log_probabilities_of_a_prompt_are_the_networks(
    server: Server, tokenizer: PreTrainedTokenizerFast, reference: Llada2ForDiffusion, facts: CheckpointFacts
) -> None:
    """Of each token at its own place: whole blocks as they are, the rest of the prompt before a block's open end."""
    torch.set_num_threads(1)
    rng, worst = random.Random(0), 0.0
    for prompt in held_out_prompts(tokenizer, [1, 20, 31, 32, 33, 64, 70, 100, 150, 200]):
        padded = prompt + [facts.mask_id] * (-len(prompt) % facts.block_size)
        want = reference.block_causal(padded).log_softmax(-1)
        for start in (0, rng.randrange(len(prompt))):
            body = {
                "input_ids": prompt,
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": 2,
                "token_ids_logprob": [7],
                "sampling_params": {"temperature": 0, "max_new_tokens": rng.choice([0, 5])},
            }
            meta = server.post("/generate", body).json()["meta_info"]
            rows = meta["input_token_logprobs"]
            if not body["sampling_params"]["max_new_tokens"] and len(prompt) % facts.block_size == 0:
                assert len(rows) == len(prompt) - start
            assert [token for _, token, _ in rows] == prompt[start:]
            for at, (value, token, _), top, named in zip(
                range(start, len(prompt)),
                rows,
                meta["input_top_logprobs"],
                meta["input_token_ids_logprobs"],
                strict=True,
            ):
                worst = max(worst, abs(value - want[at, token].item()), abs(named[0][0] - want[at, 7].item()))
                allowed = want[at].index_fill(0, torch.tensor(facts.mask_id), float("-inf"))
                assert [v for v, *_ in top] == pytest.approx(allowed.topk(2).values.tolist(), abs=1e-4)
    print(f"at most {worst:.1e} from the reference")
    assert worst < 1e-4


def test_log_probabilities_through_the_openai_endpoints(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0}
    chat = client.chat.completions.create(
        **ask, messages=[{"role": "user", "content": "Reverse KBD."}], logprobs=True, top_logprobs=3
    ).choices[0]
    assert chat.logprobs and chat.logprobs.content
    said = "".join(each.token for each in chat.logprobs.content)
    assert said.startswith(chat.message.content or "?")
    for each in chat.logprobs.content:
        assert len(each.top_logprobs) == 3 and each.logprob <= each.top_logprobs[0].logprob + 1e-6 <= 1e-6
    text = client.completions.create(**ask, prompt=COUNTING, logprobs=2, echo=True).choices[0]
    assert text.logprobs and text.logprobs.token_logprobs and text.text.startswith(COUNTING[:5])
    assert len(text.logprobs.token_logprobs) == len(text.logprobs.tokens or []) > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [({"top_logprobs_num": 400}, "top_logprobs_num is 400; allowed: 0 to 128"), ({"token_ids_logprob": [-1]}, "-1")],
)
def test_log_probabilities_that_do_not_exist_are_refused(server: Server, options: dict[str, Any], said: str) -> None:
    body = {"text": "a", "return_logprob": True, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    reply = server.post("/generate", body | options)
    assert reply.status_code == 400 and said in reply.text


# --- stops ------------------------------------------------------------------------------------------------------------


def test_stops_act_at_any_place_and_nothing_after_them_is_returned_or_counted(
    server: Server, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every place of an answer over three blocks, by string, regex and token."""
    whole = count(server, custom_params={"threshold": 0.5}, ignore_eos=True)
    text, ids = whole["text"], whole["output_ids"]
    assert len(ids) == 64
    for at in range(0, len(text) - 4, 3):
        stop = text[at : at + 4]
        first = text.index(stop)
        for options in ({"stop": stop}, {"stop_regex": re.escape(stop)}):
            got = count(server, **options, ignore_eos=True, custom_params={"threshold": 0.5})
            if "stop" in options:  # the host leaves what a regex matched
                assert got["text"] == text[:first]
            assert got["text"].startswith(text[:first]) and stop not in got["text"][: first + 3]
            assert got["meta_info"]["completion_tokens"] == len(got["output_ids"]) <= len(ids)
            assert got["output_ids"] == ids[: len(got["output_ids"])]
            # The stop is in the last token or two, and nothing follows it.
            assert stop not in tokenizer.decode(got["output_ids"][:-1])
        kept = count(server, stop=stop, no_stop_trim=True, ignore_eos=True, custom_params={"threshold": 0.5})
        assert kept["text"].startswith(text[: first + 4])
    for token in sorted(set(ids)):
        got = count(server, stop_token_ids=[token], custom_params={"threshold": 0.5})
        if token in got["output_ids"]:
            assert got["output_ids"].index(token) == len(got["output_ids"]) - 1
            assert got["output_ids"] == ids[: len(got["output_ids"])]


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_snapshots_show_each_step_and_leave_the_text_alone(server: Server, facts: CheckpointFacts) -> None:
    plain = count(server, custom_params={"threshold": 1.0})
    body = {
        "text": COUNTING,
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": 64,
            "custom_params": {"threshold": 1.0, "stream_mode": "denoise", "trace": True},
        },
    }
    seen = events(server.post("/generate", body, stream=True))
    assert seen[-1]["text"] == plain["text"] and seen[-1]["output_ids"] == plain["output_ids"]
    snapshots = seen[-1]["meta_info"]["dllm_snapshots"]
    assert [each["step"] for each in snapshots] == list(range(1, len(snapshots) + 1))
    assert len(snapshots) == seen[-1]["meta_info"]["dllm_steps"]
    assert len(seen) > len(snapshots) / 2, "they come while the block is decided"
    for each in snapshots[:-1]:
        standing = each["token_ids"]
        assert standing[0] is None, "what has nothing open before it is committed"
        assert facts.mask_id not in standing
        for i, token in enumerate(standing):
            known = plain["output_ids"][each["committed"] :]
            assert token is None or i >= len(known) or token == known[i]
        at = range(each["committed"], len(plain["output_ids"]))
        for said, in_the_end in (("steps", "step_maps"), ("confidences", "dllm_confidences")):
            final = [
                None if token is None else seen[-1]["meta_info"][in_the_end][i]
                for i, token in zip(at, standing, strict=False)
            ]
            assert each[said][: len(final)] == final and len(each[said]) == len(standing)
    assert "dllm_snapshots" not in plain["meta_info"]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_count_steps_rows_and_what_is_returned(server: Server) -> None:
    def counted() -> dict[str, float]:
        names = ["steps_total", "tokens_per_forward_count", "tokens_per_forward_sum"]
        names += ["forwards_per_block_count", "forwards_per_block_sum"]
        found = {name: server.metric(f"sglang:llada_{name}") for name in names}
        found |= {kind: server.metric("sglang:llada_rows_total", kind=kind) for kind in ("fill", "denoise", "seal")}
        return found | {"tokens": server.metric("sglang:generation_tokens_total")}

    server.flush()
    before = counted()
    got = count(server, ignore_eos=True, stop="19", custom_params={"threshold": 0.5})["meta_info"]
    after = counted()
    forwards, blocks = got["dllm_nfe"], got["dllm_forward_counts"]
    assert {name: pytest.approx(after[name] - before[name]) for name in after} == {
        "steps_total": forwards,
        "tokens_per_forward_count": 1,
        "tokens_per_forward_sum": got["completion_tokens"] / forwards,
        "forwards_per_block_count": len(blocks),
        "forwards_per_block_sum": sum(blocks),
        "fill": 0,
        "denoise": got["dllm_steps"],
        "seal": len(blocks) - 1,
        "tokens": got["completion_tokens"],
    }
