"""What people measure a model with, asked of a server: every answer, and so every score, is the reference decode's."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import examples
from sglang_llada.config import DecodeConfig
from sglang_llada.llada2.editing import generate_as
from tests.host.conftest import CLOSE, TINY, loaded
from tests.host.serving import ROOT, Server, serving
from tests.sizes import size

pytestmark = pytest.mark.host

OTHER = ROOT / "examples" / "tiny-llada2.1"
NEW_TOKENS = 64
STOPS = ("Question", "Assistant:", "<|separator|>")  # of the host's evaluators, in text that is not a chat
Lines = list[dict[str, Any]]


class Reference:
    """The reference decode of a checkpoint as it decodes by default, from text to text."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model, self.facts = loaded(folder)
        self.params = DecodeConfig.defaults(self.facts.block_size, indel=self.facts.indel)

    def filled(self, question: str) -> str:
        """The chat template with a question in it."""
        messages = [{"role": "user", "content": question}]
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def answer(self, text: str, stops: tuple[str, ...] = ()) -> str | None:
        """What it says to a text, up to a stop; None if some decision was too near to call."""
        torch.set_num_threads(1)
        said = generate_as(self.params, self.model, self.tokenizer.encode(text), NEW_TOKENS, self.facts)
        if min(said.margins) < CLOSE:
            return None
        decoded = self.tokenizer.decode(said.token_ids, skip_special_tokens=True)
        return min((decoded.split(stop)[0] for stop in stops), key=len, default=decoded)


reference_of = functools.cache(Reference)


@functools.cache
def answer_of(folder: Path, text: str, stops: tuple[str, ...] = ()) -> str | None:
    return reference_of(folder).answer(text, stops)


def write(file: Path, lines: Lines) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def judged(want: list[str | None], got: list[str]) -> None:
    """Every answer is the reference's, but for close calls, which are few."""
    near = want.count(None)
    wrong = [(mine, text) for mine, text in zip(want, got, strict=True) if mine not in (None, text)]
    print(f"{len(want) - near - len(wrong)} exact, {near} close calls set apart, {len(wrong)} wrong")
    assert not wrong and near < 0.3 * len(want), wrong[:3]


# --- the host's own ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lines]:
    """A file like GSM8K's, where the last number counts, of lists that are begun: text that these models carry on."""
    reference, lines = reference_of(TINY), []
    for first in range(11, 11 + 3 * size(5, 16), 3):
        begun = reference.filled(f"List {10 + first % 5} numbers from {first}.") + f"{first}, {first + 1},"
        lines.append({"question": begun, "answer": str(first + 9 + first % 5)})
    return write(tmp_path_factory.mktemp("gsm8k") / "test.jsonl", lines), lines


@pytest.mark.parametrize(
    ("name", "api"),
    [("gsm8k", "chat"), ("gsm8k", "completion"), ("gsm8k", "generate"), ("mixed_prefix_gsm8k", "generate")],
)
def test_run_eval(
    server: Server, lists: tuple[Path, Lines], name: str, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one example before each question; the mixed ones have none to three, some of which were asked before."""
    from sglang.test.run_eval import run_eval_once
    from sglang.test.simple_eval_mixed_prefix_gsm8k import GSM8KEval, MixedPrefixGSM8KEval, get_answer_value

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    file, lines = lists
    if name == "gsm8k":
        evaluation = GSM8KEval(num_threads=4, num_shots=1, data_path=str(file))
    else:
        evaluation = MixedPrefixGSM8KEval(None, 4, num_shots=1, secondary_pool_size=2, data_path=str(file), seed=0)
    result, *_ = run_eval_once(Namespace(api=api, max_tokens=NEW_TOKENS), server.url + "/v1", evaluation)
    prompts, got = ([conversation[at]["content"] for conversation in result.convos] for at in (0, -1))
    filled, stops = (reference_of(TINY).filled, ()) if api == "chat" else (str, STOPS)
    judged([answer_of(TINY, filled(prompt), stops) for prompt in prompts], got)
    right = [get_answer_value(text) == int(line["answer"]) for text, line in zip(got, lines[-len(got) :], strict=True)]
    print(f"{name}, {api}: {sum(right)} of {len(right)}")
    assert result.score == sum(right) / len(right)


def test_few_shot_gsm8k(
    server: Server, lists: tuple[Path, Lines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through the host's language of prompts (`sgl.gen`), which stops at strings."""
    from sglang.test import few_shot_gsm8k
    from sglang.test.few_shot_gsm8k import get_few_shot_examples, get_one_example

    monkeypatch.chdir(tmp_path)  # where it leaves what it was told
    file, lines = lists
    host, _, port = server.url.removeprefix("http://").partition(":")
    numbers = {"num_shots": 1, "num_questions": 100, "max_new_tokens": NEW_TOKENS, "parallel": 4}
    seen = few_shot_gsm8k.run_eval(Namespace(data_path=str(file), host=host, port=int(port), **numbers))
    prompts = [get_few_shot_examples(lines, 1) + get_one_example(lines, n, False) for n in range(len(lines))]
    want = [answer_of(TINY, prompt, STOPS) for prompt in prompts]
    right = [
        few_shot_gsm8k.get_answer_value(text or "") == int(line["answer"])
        for text, line in zip(want, lines, strict=True)
    ]
    got = round(seen["accuracy"] * len(lines))
    print(f"{got} of {len(lines)}; the reference has {sum(right)}, {want.count(None)} not judged")
    assert got > 0 and sum(right) <= got <= sum(right) + want.count(None)


# --- those that have to be installed ----------------------------------------------------------------------------------

INSTALLED = ("lm_eval[api]==0.4.13", "sgl-eval==0.1.3")
TASK = """
task: {api}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
PLAIN = """
user: "{problem}"
evaluator_config: {extract_from_boxed: false, extract_regex: "(.+)"}
"""  # a prompt of sgl-eval


@pytest.fixture(scope="session")
def evaluators(request: pytest.FixtureRequest) -> Path:
    """The programs of an environment that has them, made once."""
    folder = request.config.cache.mkdir("evaluators")  # type: ignore[union-attr]  # pytest may run without
    if not (folder / "made").exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "-q", "install", *INSTALLED], check=True, timeout=900)
        except subprocess.SubprocessError as error:
            pytest.skip(f"{' and '.join(INSTALLED)} cannot be installed: {error}")
        (folder / "made").touch()
    return folder / "bin"


@pytest.fixture(scope="module", params=[TINY, OTHER], ids=lambda folder: folder.name)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server, its checkpoint, and questions of which every fourth has another answer than the right one."""
    found = (each for each in examples(7, held_out=True, hard=request.param == OTHER) if len(each.messages) == 1)
    lines = [
        {"question": each.messages[0]["content"], "answer": "none" if n % 4 == 3 else each.answer}
        for n, each in enumerate(islice(found, 40))
    ]
    with serving(request.param, tmp_path_factory.mktemp("asked") / "log", "--served-model-name", "tiny") as server:
        yield server, request.param, lines


def command(tmp_path: Path, *args: Any) -> None:
    """Run a program, which may keep what it likes below a folder."""
    done = subprocess.run(
        [*map(str, args)], cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("api", ["local-chat-completions", "local-completions"])
def test_lm_eval(evaluators: Path, asked: tuple[Server, Path, Lines], api: str, tmp_path: Path) -> None:
    server, folder, lines = asked
    chat = api == "local-chat-completions"
    filled = [reference_of(folder).filled(line["question"]) for line in lines]
    texts = [line["question"] for line in lines] if chat else filled
    file = write(tmp_path / "questions.jsonl", [{**line, "question": t} for line, t in zip(lines, texts, strict=True)])
    (tmp_path / "task.yaml").write_text(TASK.format(api=api, file=file, tokens=NEW_TOKENS))
    model = f"model=tiny,base_url={server.url}/v1/{api.removeprefix('local-').replace('-', '/')},num_concurrent=8"
    more = ["--apply_chat_template"] if chat else []
    model += "" if chat else ",tokenizer_backend=None,tokenized_requests=False"
    out = ["--output_path", tmp_path / "out", "--log_samples", "--include_path", tmp_path]
    command(tmp_path, evaluators / "lm_eval", "run", "--model", api, "--tasks", api, "--model_args", model, *more, *out)
    [samples], [results] = ([*tmp_path.glob(f"out/*/{name}")] for name in ("samples*.jsonl", "results*.json"))
    said = {each["doc_id"]: each["resps"][0][0] for each in map(json.loads, samples.read_text().splitlines())}
    got = [said[n] for n in range(len(lines))]
    judged([answer_of(folder, text) for text in filled], got)
    right = sum(text == line["answer"] for text, line in zip(got, lines, strict=True))
    score = json.loads(results.read_text())["results"][api]["exact_match,none"]
    print(f"{folder.name}, {api}: {score}, {right} of {len(lines)}")
    assert score == right / len(lines) > 0.7


@pytest.mark.long
def test_sgl_eval(evaluators: Path, asked: tuple[Server, Path, Lines], tmp_path: Path) -> None:
    server, folder, lines = asked
    told = [(line["question"], line["answer"]) for line in lines if line["answer"].isdigit()]
    data = [
        {"id": str(n), "problem": question, "expected_answer": "99999" if n % 4 == 3 else answer}
        for n, (question, answer) in enumerate(told)
    ]
    file, prompt = write(tmp_path / "questions.jsonl", data), tmp_path / "plain.yaml"
    prompt.write_text(PLAIN)
    args = ["--base-url", server.url + "/v1", "--from-dataset", file, "--prompt", prompt, "--out-dir", tmp_path / "out"]
    command(tmp_path, evaluators / "sgl-eval", "run", "gsm8k", *args, "--num-threads", "8")
    [samples] = tmp_path.glob("out/*/output*.jsonl")
    said = {each["id"]: each["generation"] for each in map(json.loads, samples.read_text().splitlines())}
    reference = reference_of(folder)
    judged([answer_of(folder, reference.filled(each["problem"])) for each in data], [said[each["id"]] for each in data])
    right = sum(said[each["id"]] == each["expected_answer"] for each in data)
    [metrics] = tmp_path.glob("out/*/metrics.json")
    score = json.loads(metrics.read_text())["aggregate"]["score"]
    print(f"{folder.name}: {score}, {right} of {len(data)}")
    assert score == right / len(data) > 0.6
