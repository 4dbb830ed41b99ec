"""New weights in a running server, as RL trainers send them: between requests, while some wait, and under a pause."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.utils import MultiprocessingSerializer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.host.conftest import NEW_TOKENS, TINY, Case, compare, decoded, held_out_prompts
from tests.host.serving import ROOT, Server, each_event

pytestmark = pytest.mark.host

OTHER = ROOT / "examples" / "tiny-llada2.1"  # the same network and tokenizer, trained further
LONG = [70, 71, 72]


@pytest.fixture(scope="module")
def answers(tokenizer: PreTrainedTokenizerFast) -> dict[Path, list[Case]]:
    """Prompts with what the reference answers to them with the weights of either checkpoint."""
    prompts = list(held_out_prompts(tokenizer, [20, 33, 50, 64, 80, 100, 120, 150]))
    found = {folder: decoded(prompts, folder=folder) for folder in (TINY, OTHER)}
    assert [case.want.token_ids for case in found[TINY]] != [case.want.token_ids for case in found[OTHER]]
    return found


@pytest.fixture
def mutable(server: Server) -> Iterator[Server]:
    """The server of all tests, which has its own weights again afterwards."""
    try:
        yield server
    finally:
        server.post("/continue_generation")
        assert from_disk(server, TINY).ok
        server.flush()


def from_disk(server: Server, folder: Path, **options: Any) -> Any:
    return server.post("/update_weights_from_disk", {"model_path": str(folder), **options})


def from_tensors(server: Server, tensors: dict[str, Tensor]) -> Any:
    torch.multiprocessing.set_sharing_strategy("file_system")  # between processes that are not related
    packed = MultiprocessingSerializer.serialize(list(tensors.items()), output_str=True)
    return server.post("/update_weights_from_tensor", {"serialized_named_tensors": [packed]})


def answers_with(server: Server, cases: list[Case], what: str) -> None:
    got = server.generate_all([case.prompt for case in cases], NEW_TOKENS, 4)
    compare(cases, got, what, most_close=0.5)


def test_weights_from_disk(mutable: Server, answers: dict[Path, list[Case]]) -> None:
    for folder in (OTHER, TINY):
        assert from_disk(mutable, folder).json()["success"]
        answers_with(mutable, answers[folder], f"weights of {folder.name} from disk")


def test_weights_from_tensors_in_parts(mutable: Server, answers: dict[Path, list[Case]]) -> None:
    tensors = load_file(next(OTHER.glob("*.safetensors")))
    names = sorted(tensors)
    assert mutable.post("/begin_weight_update").ok
    for part in (names[::2], names[1::2]):
        reply = from_tensors(mutable, {name: tensors[name] for name in part})
        assert reply.json()["success"], reply.text
    assert mutable.post("/end_weight_update").ok
    answers_with(mutable, answers[OTHER], "weights from tensors")


def test_an_update_waits_for_what_runs(mutable: Server, answers: dict[Path, list[Case]]) -> None:
    slow = {"ignore_eos": True, "custom_params": {"threshold": 1.0}}  # a token a step
    before = mutable.generate(LONG, 120, **slow)["output_ids"]
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(mutable.generate, LONG, 120, **slow) for _ in range(4)]
        while mutable.load()["num_running_reqs"] < 4:
            assert not any(each.done() for each in running), "they did not run together"
        assert pool.submit(from_disk, mutable, OTHER).result().json()["success"]
        assert all(each.result()["output_ids"] == before for each in running)
    answers_with(mutable, answers[OTHER], "after an update that waited")


def test_an_update_under_a_pause_changes_what_is_still_to_come(
    mutable: Server, answers: dict[Path, list[Case]]
) -> None:
    restless = {"ignore_eos": True, "temperature": 3.0, "sampling_seed": 1, "max_new_tokens": 250}
    body = {"input_ids": LONG, "sampling_params": restless, "stream": True}  # other weights draw other tokens
    before = mutable.generate(LONG, **restless)["output_ids"]

    def streamed(begun: Event) -> list[int]:
        answer: list[int] = []
        for event in each_event(mutable.post("/generate", body, stream=True)):
            answer = event["output_ids"]
            if len(answer) >= 8:
                begun.set()
        return answer

    with ThreadPoolExecutor(4) as pool:
        begun = [Event() for _ in range(4)]
        running = [pool.submit(streamed, each) for each in begun]
        assert all(each.wait(100) for each in begun)
        assert mutable.post("/pause_generation", {"mode": "in_place"}).ok
        assert from_disk(mutable, OTHER, flush_cache=False).json()["success"]
        assert not any(each.done() for each in running)
        assert mutable.post("/continue_generation").ok
        after = [each.result() for each in running]
    assert all(len(each) == 250 and each != before and each[:8] == before[:8] for each in after)
    mutable.flush()
    answers_with(mutable, answers[OTHER], "after an update under a pause")


def test_a_bad_update_is_refused_and_the_server_goes_on(
    mutable: Server, answers: dict[Path, list[Case]], tmp_path: Path
) -> None:
    shutil.copytree(OTHER, tmp_path / "bad")
    [file] = (tmp_path / "bad").glob("*.safetensors")
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(3, 4)}, file, {"format": "pt"})
    for folder, said in ((tmp_path, str(tmp_path)), (tmp_path / "bad", "lm_head.weight has shape [3, 4]")):
        reply = from_disk(mutable, folder)
        assert reply.status_code == 400 and said in reply.json()["message"], reply.text
        answers_with(mutable, answers[TINY], "after weights that were refused")
    assert mutable.post("/begin_weight_update").ok
    for tensors, said in (
        ({"lm_head.weight": torch.zeros(3, 4)}, "lm_head.weight has shape [3, 4]"),
        ({"model.extra.weight": torch.zeros(3)}, "unknown tensor model.extra.weight"),
    ):
        reply = from_tensors(mutable, tensors)
        assert not reply.json()["success"] and said in reply.json()["message"], reply.text
    assert mutable.post("/end_weight_update").ok
    answers_with(mutable, answers[TINY], "after tensors that were refused")
