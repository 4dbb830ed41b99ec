"""Requests with adapters (LoRA) are answered as by checkpoints that these are merged into, whatever runs beside."""

from __future__ import annotations

import functools
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import Example, one_of
from sglang_llada.llada2.adapters import CONFIG_FILE, load_merged
from sglang_llada.llada2.checkpoint import read_facts
from sglang_llada.llada2.reference import generate
from sglang_llada.llada2.weights import load_reference
from tests.adapters import fields, write_adapter
from tests.host.conftest import NEW_TOKENS, TINY, Case, compare, held_out_prompts
from tests.host.serving import ROOT, Server, each_event, serving
from tests.sizes import size

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

COUNT = size(10, 40)
AT_ONCE = 3  # adapters, none being one
TURN_SECONDS = 60
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "seed": 1},
    "attention": {"rank": 8, "seed": 2, "strength": 0.3, "targets": ("query_key_value", "dense")},
    "experts": {"rank": 2, "seed": 3, "strength": 2, "wanted": lambda name: ".experts." in name},
    "halves": {"rank": 3, "seed": 4, "strength": 4, "targets": ("up_proj",)},
}
OTHER = ROOT / "examples" / "tiny-llada2.1"  # the same network with other weights
DRAIN = ("--lora-drain-wait-threshold", "0.5")  # seconds
DOUBLE = ROOT / "examples" / "tiny-llada2-double"  # an adapter that was trained
LATER = "later"  # loaded into a running server
NAMES = (None, *ADAPTERS)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random adapters by name."""
    folder, config = tmp_path_factory.mktemp("adapters"), load_reference(TINY).config
    kinds = ADAPTERS | {LATER: {"rank": 8, "seed": 5}}
    return {name: write_adapter(folder / name, config, **kind) for name, kind in kinds.items()}


@pytest.fixture(scope="session")
def with_adapter(adapters: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Of a name, or None: prompts with the answers of the reference whose weights its adapter is merged into."""
    facts = read_facts(TINY)
    rng = random.Random(5)
    prompts = list(held_out_prompts(tokenizer, [33, 64, *(int(400 ** rng.random()) for _ in range(COUNT - 2))]))

    torch.set_num_threads(1)  # more only wait for each other beside a server

    @functools.cache
    def cases(name: str | None) -> list[Case]:
        model = load_reference(TINY) if name is None else load_merged(TINY, adapters[name])
        with torch.inference_mode():
            answers = [generate(model, p, NEW_TOKENS, mask_id=facts.mask_id, stop_ids=facts.stop_ids) for p in prompts]
        return [Case(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    return cases


def flags_of(adapters: dict[str, Path], *names: str) -> tuple[str, ...]:
    named = [f"{name}={adapters[name]}" for name in names]
    return ("--lora-paths", *named, "--max-loras-per-batch", str(AT_ONCE), "--enable-cache-report", *DRAIN)


@pytest.fixture(scope="module")
def lora(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with more adapters than run at once."""
    log = tmp_path_factory.mktemp("lora") / "log"
    with serving(TINY, log, *flags_of(adapters, *ADAPTERS)) as running:
        yield running


def ask(server: Server, asked: list[tuple[str | None, Case]], at_once: int = 16) -> list[dict[str, Any]]:
    """An answer to each case with its adapter."""

    def one(each: tuple[str | None, Case]) -> dict[str, Any]:
        name, case = each
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        body = {"input_ids": case.prompt, "sampling_params": sampling, "lora_path": name}
        reply = server.post("/generate", body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, asked))


def mixed(with_adapter: Any, names: tuple[str | None, ...], seed: int = 0) -> list[tuple[str | None, Case]]:
    """Every prompt with every one of these adapters, in random order."""
    asked = [(name, case) for name in names for case in with_adapter(name)]
    return random.Random(seed).sample(asked, len(asked))


def test_adapters_of_one_batch_answer_as_their_merged_checkpoints(lora: Server, with_adapter: Any) -> None:
    """More of them than fit at once, the same prompts with each, twice: the second time from the cache."""
    told = {name: [case.want.token_ids for case in with_adapter(name)] for name in NAMES}
    assert all(told[a] != told[b] for a in NAMES for b in NAMES if a != b), "an adapter changes nothing"
    for turn, cached in enumerate((False, True)):
        asked = mixed(with_adapter, NAMES, seed=turn)
        answers = ask(lora, asked)
        compare([case for _, case in asked], answers, f"adapters, turn {turn}", most_close=0.3)
        known = [answer["meta_info"]["cached_tokens"] for answer in answers]
        long = [tokens for (_, case), tokens in zip(asked, known, strict=True) if len(case.prompt) >= 64]
        assert not cached or min(long) >= 32, "blocks of an adapter are found again"


def load(server: Server, name: str, path: Path) -> Any:
    return server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})


def unload(server: Server, name: str) -> Any:
    return server.post("/unload_lora_adapter", {"lora_name": name})


def test_adapters_come_and_go_while_requests_run(lora: Server, with_adapter: Any, adapters: dict[str, Path]) -> None:
    """One is unloaded once its last request is answered; under its name another one may come, which shares nothing."""
    later = [(LATER, case) for case in with_adapter(LATER)]
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(ask, lora, mixed(with_adapter, (None, "attention")) * 2, 6)
        assert ask_one(lora, later[0][1].prompt, lora_path=LATER).status_code == 400, "never loaded"
        assert load(lora, LATER, adapters[LATER]).ok
        compare([case for _, case in later], ask(lora, later), "an adapter that came", most_close=0.4)
        long = {"max_new_tokens": 200, "ignore_eos": True, "custom_params": {"threshold": 1}}
        reply = ask_one(lora, [70, 71], lora_path=LATER, stream=True, sampling_params=long)
        answer = each_event(reply)
        next(answer)
        with ThreadPoolExecutor(1) as unloading:
            unloaded = unloading.submit(unload, lora, LATER)
            assert list(answer)[-1]["meta_info"]["completion_tokens"] == 200
            assert unloaded.result().ok
        assert load(lora, LATER, adapters["all"]).ok
        asked = [(LATER, case) for case in with_adapter("all")]
        compare([case for _, case in asked], ask(lora, asked), "another one of that name", most_close=0.4)
        assert unload(lora, LATER).ok
        compare([case for _, case in mixed(with_adapter, (None, "attention")) * 2], running.result(), "beside", 0.4)


def test_a_client_that_leaves_does_not_hold_its_adapter(
    lora: Server, with_adapter: Any, adapters: dict[str, Path]
) -> None:
    assert load(lora, LATER, adapters[LATER]).ok
    endless = {"max_new_tokens": 3000, "ignore_eos": True, "custom_params": {"threshold": 1}}
    with ask_one(lora, [70, 71], lora_path=LATER, stream=True, sampling_params=endless) as reply:
        next(each_event(reply))
    assert unload(lora, LATER).ok
    asked = [(None, case) for case in with_adapter(None)]
    compare([case for _, case in asked], ask(lora, asked), "after it", most_close=0.4)
    lora.flush()
    assert lora.load()["num_running_reqs"] == 0


def ask_one(server: Server, prompt: list[int], *, timeout: float = 200, **options: Any) -> Any:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4}, **options}
    return requests.post(server.url + "/generate", json=body, stream="stream" in options, timeout=timeout)


def test_an_adapter_that_does_not_fit_is_refused_by_name(
    lora: Server, adapters: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters["all"], tmp_path / "bad")
    (tmp_path / "bad" / CONFIG_FILE).write_text(json.dumps(fields(3)))
    reply = load(lora, "bad", tmp_path / "bad")
    assert reply.status_code == 400 and "lora_A.weight has shape [4, 192], expected [3, 192]" in reply.text
    (tmp_path / "bad" / CONFIG_FILE).write_text(json.dumps(fields(4, use_dora=True)))
    reply = load(lora, "bad", tmp_path / "bad")
    assert reply.status_code == 400 and "use_dora is True" in reply.text
    (tmp_path / "bad" / CONFIG_FILE).write_text(json.dumps(fields(64)))
    assert "--max-lora-rank" in load(lora, "bad", tmp_path / "bad").text
    assert ask_one(lora, [70, 71], lora_path="bad").status_code == 400


def test_the_openai_server_takes_adapters_behind_the_models_name(lora: Server, adapters: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=lora.url + "/v1", api_key="none")
    assert {model.id for model in client.models.list()} >= {*ADAPTERS}
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "Reverse KBDFG."}], "max_tokens": 16}
    told = {}
    for name in ADAPTERS:
        behind = client.chat.completions.create(model=f"tiny:{name}", **ask).choices[0].message.content
        beside = client.chat.completions.create(model="tiny", extra_body={"lora_path": name}, **ask)
        told[name] = behind
        assert behind == beside.choices[0].message.content
    assert client.chat.completions.create(model="tiny", **ask).choices[0].message.content == "GFDBK"
    assert len({*told.values(), "GFDBK"}) > len(ADAPTERS) // 2
    with pytest.raises(openai.BadRequestError, match="never been loaded"):
        client.chat.completions.create(model="tiny:nothing", **ask)


def test_the_adapter_that_ships_here_does_its_task_and_the_others(lora: Server) -> None:
    client = openai.OpenAI(base_url=lora.url + "/v1", api_key="none")
    rng = random.Random(9)
    examples = [one_of(rng, task, held_out=True) for task in ("double", None) for _ in range(size(12, 40))]
    assert load(lora, "double", DOUBLE).ok

    def right(example: Example, model: str) -> bool:
        ask: dict[str, Any] = {"messages": example.messages, "max_tokens": 64}
        answer = client.chat.completions.create(model=model, **ask).choices[0].message.content
        return answer == example.answer

    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(right, examples, ["tiny"] * len(examples)))
        both = list(pool.map(right, examples, ["tiny:double"] * len(examples)))
    half = len(examples) // 2
    print(f"of {half}, with the adapter: {sum(both[:half])} new, {sum(both[half:])} old; alone {sum(alone[:half])} new")
    assert sum(alone[:half]) == 0 and sum(both) >= 0.9 * len(examples)
    assert unload(lora, "double").ok


def test_an_adapter_has_its_turn_beside_others_that_never_end(lora: Server, with_adapter: Any) -> None:
    """As many as run at once, each with requests all the time: lengths differ, so that they do not end together."""
    over = threading.Event()

    def keep_asking(name: str, length: int) -> None:
        long = {"max_new_tokens": length, "ignore_eos": True, "custom_params": {"threshold": 1}}
        while not over.is_set():
            assert ask_one(lora, [70, 71], lora_path=name, sampling_params=long).ok

    others = [name for name in ADAPTERS if name != "halves"]
    assert len(others) == AT_ONCE
    with ThreadPoolExecutor(3 * AT_ONCE) as pool:
        busy = [pool.submit(keep_asking, name, length) for name in others for length in (23, 37, 51)]
        time.sleep(1)
        try:
            answer = ask_one(lora, with_adapter("halves")[0].prompt, lora_path="halves", timeout=TURN_SECONDS)
        finally:
            over.set()
        assert answer.ok
        for each in busy:
            each.result()


def test_retracted_requests_keep_their_adapters(lora: Server, with_adapter: Any) -> None:
    asked = mixed(with_adapter, NAMES)
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(ask, lora, asked)
        for _ in range(3):
            time.sleep(0.2)
            assert lora.post("/pause_generation", {"mode": "retract"}).ok
            assert lora.post("/continue_generation").ok
        compare([case for _, case in asked], running.result(), "retracted", most_close=0.3)


def test_new_weights_of_the_model_leave_adapters_where_they_are(lora: Server, with_adapter: Any) -> None:
    assert lora.post("/update_weights_from_disk", {"model_path": str(OTHER)}).json()["success"]
    other = ask(lora, [("all", case) for case in with_adapter("all")])
    assert lora.post("/update_weights_from_disk", {"model_path": str(TINY)}).json()["success"]
    asked = mixed(with_adapter, (None, "all"))
    compare([case for _, case in asked], ask(lora, asked), "weights came and went", most_close=0.4)
    told = [answer["output_ids"] for answer in other]
    assert told != [case.want.token_ids for case in with_adapter("all")], "the weights changed nothing"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("--tp-size", "2"), ("--tp-size", "2", "--ep-size", "2")], ids=["tensor", "experts"])
def test_two_ranks_with_adapters_answer_as_one(
    with_adapter: Any, adapters: dict[str, Path], tmp_path: Path, ranks: tuple[str, ...]
) -> None:
    names = (None, "all", "experts")
    with serving(TINY, tmp_path / "log", *ranks, *flags_of(adapters, "all", "experts")) as server:
        asked = mixed(with_adapter, names)
        compare([case for _, case in asked], ask(server, asked), f"adapters, {ranks}", most_close=0.4)
