"""What people bring with them: the host's launch commands, other programs' names, text that looks like a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from sglang_llada.host.requests import door
from sglang_llada.host.requests.plain_text import UNSEEN, rename
from sglang_llada.host.requests.wishes import no_text
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from tests.host import warm
from tests.host.serving import ROOT, Server, events, serving

pytestmark = pytest.mark.host

TYPED = "a<|mask|>b"
COUNTING = "<role>HUMAN</role>List 13 numbers from 12.<|role_end|><role>ASSISTANT</role>"


# --- launch commands --------------------------------------------------------------------------------------------------

LOW_CONFIDENCE = "threshold: 0.95\n# Default: 32, for LLaDA2MoeModelLM\nblock_size: 32\n"
JOINT_THRESHOLD = "threshold: 0.5\nedit_threshold: 0.0\nmax_post_edit_steps: 16\npenalty_lambda: 3\n"
COOKBOOK = (
    "--dllm-algorithm JointThreshold --tp 1 --trust-remote-code --mem-fraction-static 0.8 --max-running-requests 1 "
    "--attention-backend flashinfer"
)
NIGHTLY = (
    "--attention-backend flashinfer --dtype bfloat16 --kv-cache-dtype auto --dllm-algorithm JointThreshold "
    "--max-running-requests 4 --enable-tokenizer-batch-encode --trust-remote-code --disable-radix-cache "
    "--disable-overlap-schedule --mem-fraction-static 0.8 --cuda-graph-bs-decode 1 2 3 4"
)
# Of SGLang's documentation, cookbook and tests, and of dFactory's guide: flags for our checkpoint of that release.
# Those of releases whose --cuda-graph-bs was one option for decode and prefill say which of both, as 0.5.23 demands.
COMMANDS: list[tuple[str, str]] = [
    ("", "--dllm-algorithm LowConfidence --dllm-algorithm-config low.yaml --host 0.0.0.0 --port 30000"),
    (".1", f"{COOKBOOK} --host 0.0.0.0 --port 8000"),
    (".1", COOKBOOK.replace("--tp 1", "--tp 2")),
    (".1", COOKBOOK.replace(" --attention-backend flashinfer", "")),
    (".1", f"{COOKBOOK} --dllm-algorithm-config joint.yaml"),
    (".1", NIGHTLY),
    (".1", f"{NIGHTLY} --dllm-algorithm-config joint.yaml"),
    ("", "--trust-remote-code --mem-fraction-static 0.9 --max-running-requests 1 --attention-backend triton "
     "--dllm-algorithm LowConfidence"),
    ("", "--trust-remote-code --tp-size 1 --mem-fraction-static 0.9 --max-running-requests 4 --attention-backend "
     "flashinfer --dllm-algorithm LowConfidence --cuda-graph-bs-decode 1 2 3 4"),
    ("", "--trust-remote-code --tp-size 1 --mem-fraction-static 0.9 --max-running-requests 1 --attention-backend "
     "flashinfer --dllm-algorithm JointThreshold --cuda-graph-bs-decode 1 --dllm-fdfo"),
    ("", "--host 127.0.0.1 --port 8188 --trust-remote-code --disable-cuda-graph --disable-radix-cache "
     "--mem-fraction-static 0.9 --attention-backend flashinfer --dllm-algorithm LowConfidence "
     "--max-running-requests 1"),
    (".2", "--trust-remote-code --dllm-algorithm JointThresholdInDel --mem-fraction-static 0.8 "
     "--max-running-requests 1 --attention-backend flashinfer"),
]  # fmt: skip

RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.dllm.config import DllmConfig
from sglang.srt.server_args import prepare_server_args
from sglang_llada.host.start.arguments import decode_config, facts_of
for command in json.load(sys.stdin):
    args = prepare_server_args(command)
    args.resolve_once()
    view = resolving_view(args)
    decode = decode_config(DllmConfig.from_server_args(args), facts_of(view.model_path, None))
    print(json.dumps([view.dllm_algorithm, view.attention_backend, view.max_running_requests, view.disable_radix_cache,
                      view.enable_tokenizer_batch_encode, decode.threshold, decode.penalty_lambda]))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration files of the host's documentation."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "low.yaml").write_text(LOW_CONFIDENCE)
    (folder / "joint.yaml").write_text(JOINT_THRESHOLD)
    return folder


def flags(line: str, files: Path) -> list[str]:
    """The words of a command, its configuration file in the folder."""
    return [str(files / word) if word.endswith(".yaml") else word for word in line.split()]


def test_documented_commands_resolve(files: Path) -> None:
    models = [str(ROOT / "examples" / f"tiny-llada2{release}") for release, _ in COMMANDS]
    commands = [["--model-path", model, *flags(line, files)] for model, (_, line) in zip(models, COMMANDS, strict=True)]
    done = warm.run_python(["-c", RESOLVE], warm.environment(), ROOT, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert len(found) == len(COMMANDS)
    for (_, line), got in zip(COMMANDS, found, strict=True):
        algorithm, attention, running, no_radix, batch_encode, threshold, penalty = got
        ours = {"JointThreshold": "TokenEditing", "LowConfidence": "Threshold", "JointThresholdInDel": "Levenshtein"}
        words = line.split()
        assert algorithm == ours[words[words.index("--dllm-algorithm") + 1]], line
        assert running == int(words[words.index("--max-running-requests") + 1]) if "--max-running" in line else 64
        assert (no_radix, batch_encode) == ("--disable-radix-cache" in line, "--enable-tokenizer-batch-encode" in line)
        assert (threshold, penalty) == (0.5, 3.0) if "joint.yaml" in line else penalty == 0
        if "flashinfer" in line:
            assert attention == "llada_rows", "it cannot run here"
    assert done.stderr.count("--attention-backend flashinfer needs an accelerator; here it is llada_rows") == sum(
        "flashinfer" in line for _, line in COMMANDS
    )


def test_a_documented_command_serves(files: Path, tmp_path: Path) -> None:
    line = f"{NIGHTLY} --dllm-algorithm-config joint.yaml"
    with serving(ROOT / "examples" / "tiny-llada2.1", tmp_path / "log", *flags(line, files)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY")
        chat = client.chat.completions.create(
            model="inclusionAI/LLaDA2.1-mini", messages=[{"role": "user", "content": "What is 17 + 25?"}], max_tokens=64
        )
        assert "42" in (chat.choices[0].message.content or "")
        texts = [COUNTING, COUNTING.replace("13", "5")]
        together = server.post("/generate", {"text": texts, "sampling_params": {"max_new_tokens": 64}}).json()
        alone = [
            server.post("/generate", {"text": text, "sampling_params": {"max_new_tokens": 64}}).json() for text in texts
        ]
        metas = [[each["meta_info"] for each in replies] for replies in (together, alone)]
        assert [m["prompt_tokens"] for m in metas[0]] == [m["prompt_tokens"] for m in metas[1]]
        assert all(m["finish_reason"]["type"] == "stop" for m in (*metas[0], *metas[1]))
        log = server.log.read_text()
        assert "penalty_lambda=3.0" in log and "needs an accelerator; here it is llada_rows" in log


# --- names of other programs ------------------------------------------------------------------------------------------


def test_requests_may_use_the_names_of_other_programs(server: Server) -> None:
    theirs = {"editing_threshold": 0.0, "max_post_steps": 4, "block_length": 32, "eos_early_stop": True}
    ours = {"edit_threshold": 0.0, "max_post_edit_steps": 4}
    ids = [70, 71, 72]
    want, got = (
        server.generate(ids, 64, custom_params={"algorithm": "joint_threshold", "threshold": 0.3, **each})
        for each in (ours, theirs)
    )
    assert want["output_ids"] == got["output_ids"]
    reply = server.post("/generate", {"input_ids": ids, "sampling_params": {"custom_params": {"gen_length": 8}}})
    assert reply.status_code == 400
    assert "gen_length is 8; the request's max_new_tokens (max_tokens of the OpenAI endpoints) says" in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_step_maps_are_asked_for_as_in_the_hosts_api_to_come(server: Server, stream: bool) -> None:
    def ask(**more: Any) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": 40, **more.pop("sampling", {})}
        reply = server.post("/generate", {"text": COUNTING, "stream": stream, "sampling_params": sampling, **more})
        return events(reply)[-1] if stream else reply.json()

    want = ask(sampling={"custom_params": {"trace": True}})["meta_info"]["step_maps"]
    assert len(want) == len(ask()["output_ids"]) > 10 and min(want) == 1
    for got in (ask(return_step_maps=True), ask(sampling={"custom_params": {"return_step_maps": True}})):
        assert got["meta_info"]["step_maps"] == want
    assert "step_maps" not in ask(return_step_maps=False)["meta_info"]


def test_step_maps_of_several_requests_and_bad_wishes(server: Server) -> None:
    body = {"text": [COUNTING, "a"], "return_step_maps": True}
    for sampling in ({"max_new_tokens": 9, "n": 2}, [{"max_new_tokens": 9}, {"max_new_tokens": 3}]):
        replies = server.post("/generate", {**body, "sampling_params": sampling}).json()
        assert [len(each["meta_info"]["step_maps"]) for each in replies] == [
            len(each["output_ids"]) for each in replies
        ]
    bad = server.post("/generate", {"text": "a", "return_step_maps": "many"})
    assert bad.status_code == 400 and "return_step_maps" in bad.text


def test_the_engine_takes_step_maps_as_an_argument() -> None:
    def generate(engine: str, prompt: Any = None, sampling_params: Any = None, **more: Any) -> Any:
        return engine, prompt, sampling_params, more

    asked = {"custom_params": {"threshold": 0.5, "return_step_maps": True}, "n": 2}
    given = {"custom_params": {"threshold": 0.5}, "n": 2}
    assert door.take_step_maps(generate, "e", "p", given, return_step_maps=True) == ("e", "p", asked, {})
    assert door.take_step_maps(generate, "e", sampling_params=[given], return_step_maps=True, stream=True) == (
        "e", None, [asked], {"stream": True},
    )  # fmt: skip
    assert door.take_step_maps(generate, "e", "p") == ("e", "p", None, {})
    assert given == {"custom_params": {"threshold": 0.5}, "n": 2}


# --- what meta_info says ----------------------------------------------------------------------------------------------


def test_counts_of_a_request_are_numbers(server: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 70, "ignore_eos": True, "custom_params": {"threshold": 0.9}}
    whole = server.post("/generate", {"text": COUNTING, "sampling_params": sampling}).json()["meta_info"]
    counts = (whole["dllm_steps"], whole["dllm_nfe"], whole["dllm_forward_counts"])
    assert counts[0] == sum(counts[2]) <= counts[1] and type(counts[0]) is type(counts[1]) is int
    several = server.post("/generate", {"text": [COUNTING] * 2, "sampling_params": {**sampling, "n": 2}}).json()
    seen = events(
        server.post("/generate", {"text": COUNTING, "stream": True, "sampling_params": sampling}, stream=True)
    )
    for meta in [each["meta_info"] for each in (*several, seen[-1])]:
        assert (meta["dllm_steps"], meta["dllm_forward_counts"]) == (counts[0], counts[2])
    so_far = [event["meta_info"]["dllm_steps"] for event in seen]
    assert so_far == sorted(so_far) and 1 <= so_far[0] < so_far[-1]
    for event in seen:
        assert event["meta_info"]["dllm_forward_counts"] == counts[2][: len(event["meta_info"]["dllm_forward_counts"])]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "return_meta_info": True}
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    assert type(choice["meta_info"]["dllm_nfe"]) is int and type(choice["meta_info"]["dllm_forward_counts"]) is list


# --- text that looks like a token -------------------------------------------------------------------------------------


def test_own_tokens_cannot_be_typed(facts: CheckpointFacts) -> None:
    folder = ROOT / "examples" / "tiny-llada2.2"
    changed, plain = (PreTrainedTokenizerFast.from_pretrained(folder) for _ in range(2))
    own = read_facts(folder).own_tokens
    rename(changed, own)
    for name in ("<|mask|>", "<|delete|>", "<|split|>"):
        assert own & set(plain.encode(f"x{name}")) and not own & set(changed.encode(f"x{name}"))
        assert changed.decode(changed.encode(f"x{name}")) == f"x{name}"
    for text in (COUNTING, "<|startoftext|>é 12<|endoftext|>", ""):
        assert changed.encode(text) == plain.encode(text)
    messages = [{"role": "user", "content": TYPED}, {"role": "assistant", "content": "b"}]
    ids = changed.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert not own & set(ids) and changed.decode(ids) == plain.apply_chat_template(messages, tokenize=False)
    assert changed.all_special_ids == plain.all_special_ids and changed.mask_token_id == plain.mask_token_id
    assert [changed.decode([i]).replace(UNSEEN, "") for i in own] == [plain.decode([i]) for i in own]


def test_own_tokens_in_prompts_are_named_with_their_place() -> None:
    facts = CheckpointFacts(32, 2, frozenset(), 402, 400, 401)
    assert no_text("input_ids", [5, 7], 402, facts) is None
    for token, name in ((2, "the mask"), (400, "DELETE"), (401, "SPLIT")):
        said = f"input_ids holds {token} at position 1, which is {name}; allowed: tokens of a text"
        assert no_text("input_ids", [5, token], 402, facts) == said
    for token in (-1, 402):
        assert no_text("input_ids", [token], 402, facts) == f"input_ids holds {token} at position 0; allowed: 0 to 401"
    assert no_text("input_ids", [400], 402, CheckpointFacts(32, 2, frozenset(), 402)) is None


def test_a_typed_mask_is_text_everywhere(server: Server, facts: CheckpointFacts) -> None:
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": TYPED}).json()["tokens"]
    assert facts.mask_id not in tokens and len(tokens) > 5
    assert server.post("/detokenize", {"model": "tiny", "tokens": tokens}).json()["text"] == TYPED
    sampling = {"temperature": 0, "max_new_tokens": 8}
    body = {"return_logprob": True, "logprob_start_len": 0, "sampling_params": sampling}
    for text in (TYPED, [TYPED, "<|mask|>" * 40]):
        replies = server.post("/generate", {"text": text, **body}).json()
        for reply in replies if isinstance(replies, list) else [replies]:
            assert facts.mask_id not in [token for _, token, _ in reply["meta_info"]["input_token_logprobs"]]
    texts = server.post("/v1/completions", {"model": "tiny", "prompt": TYPED, "max_tokens": 4, "echo": True})
    assert texts.json()["choices"][0]["text"].startswith(TYPED)
    messages = [
        {"role": "system", "content": TYPED},
        {"role": "user", "content": [{"type": "text", "text": TYPED}]},
        {"role": "assistant", "content": TYPED},
        {"role": "user", "content": "What is 17 + 25?"},
    ]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 8, "return_input_ids_in_sglext": True}
    reply = server.post("/v1/chat/completions", chat)
    assert reply.status_code == 200 and facts.mask_id not in reply.json()["sglext"]["input_ids"]


def test_a_typed_mask_is_text_in_answers_too(server: Server, facts: CheckpointFacts) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 40, "regex": "ab<\\|mask\\|>cd"}
    whole = server.post("/generate", {"text": "a", "sampling_params": sampling}).json()
    assert whole["text"] == "ab<|mask|>cd" and facts.mask_id not in whole["output_ids"]
    stopped = server.post("/generate", {"text": "a", "sampling_params": {**sampling, "stop": "<|mask|>"}}).json()
    assert stopped["text"] == "ab" and stopped["meta_info"]["finish_reason"]["matched"] == "<|mask|>"


def test_reserved_ids_are_refused_with_their_place(server: Server, facts: CheckpointFacts) -> None:
    said = f"input_ids holds {facts.mask_id} at position 2, which is the mask"
    ids = [70, 71, facts.mask_id, 72]
    for path, body in (
        ("/generate", {"input_ids": ids}),
        ("/generate", {"input_ids": [[70], ids]}),
        ("/v1/completions", {"model": "tiny", "prompt": ids}),
        ("/generate", {"text": f"ab<|mask|>{UNSEEN}"}),
    ):
        reply = server.post(path, body)
        assert reply.status_code == 400 and said in reply.text, (path, reply.text)


# --- what is not generation -------------------------------------------------------------------------------------------

NOT_EMBEDDED = "embeddings, classes and rewards are not supported"
OTHER_WORK: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/rerank": ({"query": "a", "documents": ["b", "c"]}, "not supported"),
    "/v1/embeddings": ({"model": "tiny", "input": "a"}, NOT_EMBEDDED),
    "/v1/classify": ({"model": "tiny", "input": "a"}, NOT_EMBEDDED),
    "/encode": ({"text": "a"}, NOT_EMBEDDED),
    "/classify": ({"text": "a"}, NOT_EMBEDDED),
}


@pytest.mark.parametrize("path", OTHER_WORK)
def test_what_is_no_generation_is_refused_with_a_reason(server: Server, path: str) -> None:
    body, said = OTHER_WORK[path]
    reply = server.post(path, body)
    assert reply.status_code == 400 and said in reply.text, reply.text
    assert server.generate([70], 1)["output_ids"]
