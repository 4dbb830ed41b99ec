"""Fixtures of tests that need a running server with the trained checkpoint, and the answers it must give."""

from __future__ import annotations

import fcntl
import functools
import itertools
import multiprocessing
import os
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import examples
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts
from sglang_llada.llada2.reference import Generation, Llada2ForDiffusion, generate
from sglang_llada.llada2.weights import load_reference
from tests.host import warm
from tests.host.serving import ROOT, Server, serving, tail
from tests.sizes import size

TINY = Path(__file__).parents[2] / "examples" / "tiny-llada2"
PROMPTS, NEW_TOKENS = size(60, 200), 40
REQUESTS = "requests"  # where the server writes what each request took, beside its log
PATIENCE = 540  # with an example, in seconds
CLOSE = 1e-4  # a decision this near to another one may go either way in floating point


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and the reference's answer to it."""

    prompt: list[int]
    want: Generation

    @property
    def close_call(self) -> bool:
        """Whether some decision was too near to call."""
        return min(self.want.margins) < CLOSE


def compare(cases: list[Case], answers: list[dict[str, Any]], how: str, most_close: float = 0.1) -> None:
    """Every answer is the reference's; close calls are counted and set apart."""
    wrong, close = [], 0
    for case, answer in zip(cases, answers, strict=True):
        if case.close_call:
            close += 1
            continue
        meta = answer["meta_info"]
        same = (
            answer["output_ids"] == case.want.token_ids
            and meta["finish_reason"]["type"] == case.want.finish
            and meta["completion_tokens"] == len(case.want.token_ids)
            and (meta["num_retractions"] > 0 or meta["dllm_steps"] == case.want.forwards)
        )
        if not same:
            wrong.append((len(case.prompt), answer["output_ids"], case.want.token_ids))
    print(f"{how}: {len(cases) - close - len(wrong)} exact, {close} close calls set apart, {len(wrong)} wrong")
    assert not wrong, wrong[:3]
    assert close < len(cases) * most_close


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The trained checkpoint's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(TINY)


@pytest.fixture(scope="session")
def facts() -> CheckpointFacts:
    """What the trained checkpoint says of itself."""
    return read_facts(TINY)


@pytest.fixture(scope="session")
def reference() -> Llada2ForDiffusion:
    """The trained checkpoint in the reference network, fp32."""
    return load_reference(TINY)


@pytest.fixture(scope="session")
def cases(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Held-out prompts of 1 to 1,500 tokens, decoded by the reference once for all tests and the processes they run in.

    The process that comes second waits for the first one's answers.
    """
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 1500]
    rng = random.Random(0)
    while len(lengths) < PROMPTS:
        lengths.append(int(1500 ** rng.random()))
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / "cases").open("a+b") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        if not kept.seek(0, os.SEEK_END):
            pickle.dump(decoded(list(held_out_prompts(tokenizer, lengths))), kept)
            kept.flush()
        kept.seek(0)
        return pickle.load(kept)


def decoded(
    prompts: list[list[int]], new_tokens: int = NEW_TOKENS, folder: Path = TINY, *, ignore_eos: bool = False
) -> list[Case]:
    """Prompts with the answers of the reference to a checkpoint's weights, worked out on two cores."""
    work = functools.partial(decode_one, folder, new_tokens, ignore_eos)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, prompts))


def decode_one(folder: Path, new_tokens: int, ignore_eos: bool, prompt: list[int]) -> Case:
    """A prompt with the reference's answer."""
    torch.set_num_threads(1)
    model, facts = loaded(folder)
    stop_ids = frozenset() if ignore_eos else facts.stop_ids
    return Case(prompt, generate(model, prompt, new_tokens, mask_id=facts.mask_id, stop_ids=stop_ids))


@functools.lru_cache
def loaded(folder: Path) -> tuple[Llada2ForDiffusion, CheckpointFacts]:
    """A checkpoint in the reference network, and what it says of itself."""
    return load_reference(folder), read_facts(folder)


def held_out_prompts(tokenizer: PreTrainedTokenizerFast, lengths: list[int]) -> Iterator[list[int]]:
    """For each length the end of a chat that asks a held-out question after as many others as it takes."""
    source = examples(1, held_out=True)
    for length in lengths:
        ids: list[int] = []
        earlier: list[dict[str, str]] = []
        while len(ids) < length:
            example = next(source)
            ids = tokenizer.apply_chat_template(
                [*earlier, *example.messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            earlier += [*example.messages, {"role": "assistant", "content": example.answer}]
        yield ids[-length:]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The plain host command on the trained checkpoint."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--enable-cache-report", "--enable-custom-logit-processor", "--enable-metrics"]
    flags.append("--constrained-json-disable-any-whitespace")  # with which so small a model likes to fill answers
    flags += ["--export-metrics-to-file", "--export-metrics-to-file-dir", str(log.parent / REQUESTS)]
    with serving(TINY, log, *flags) as running:
        yield running


def held_out_questions(count: int, seed: int = 2) -> list[tuple[list[dict[str, str]], str]]:
    """Messages and answers of held-out questions, the tasks in turn."""
    found = itertools.islice(examples(seed, held_out=True), count)
    return [(example.messages, example.answer) for example in found]


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread per rank on any core, where the host would give each rank a NUMA node; nothing is compiled."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores}|{cores}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the host compiles its router, which takes longer than the test


@pytest.fixture
def run_example(tmp_path: Path) -> Callable[..., list[str]]:
    """An example with its arguments, to the lines that it prints."""

    def printed(module: str, *args: str) -> list[str]:
        out, errors = tmp_path / "out", tmp_path / "errors"
        process = warm.WarmServer(module, list(args), out, warm.environment(), ROOT, errors)
        assert process.wait(PATIENCE) == 0, tail(errors)
        return out.read_text().splitlines()

    return printed
