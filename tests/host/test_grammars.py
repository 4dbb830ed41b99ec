"""Structured output always conforms, whatever the temperature and whatever runs beside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.host.conftest import held_out_questions
from tests.host.grammars import GRAMMARS, Grammar
from tests.host.serving import Server
from tests.sizes import size

pytestmark = pytest.mark.host

EACH = size(10, 34)  # requests of each grammar: more than 1,000 where many are sent
NEW_TOKENS = 200


def ask(server: Server, grammar: Grammar, number: int) -> dict[str, Any]:
    """One of a grammar's requests: half of them greedy, with other questions each."""
    [(messages, _)] = held_out_questions(1, seed=number)
    text = f"<role>HUMAN</role>{messages[-1]['content']}<|role_end|><role>ASSISTANT</role>"
    options = {"temperature": number % 2, "sampling_seed": number, "max_new_tokens": NEW_TOKENS, **grammar.options}
    reply = server.post("/generate", {"text": text, "sampling_params": options})
    assert reply.status_code == 200, (grammar.name, reply.text)
    answer: dict[str, Any] = reply.json()
    return answer


def test_answers_conform_to_their_grammars(server: Server) -> None:
    """Beside greedy requests without one, which answer as ever."""
    plain = [70, 71, 72, 73]
    want = server.generate(plain, 40, ignore_eos=True)["output_ids"]
    asked = [(grammar, number) for number in range(EACH) for grammar in GRAMMARS]
    with ThreadPoolExecutor(16) as pool:
        beside = [pool.submit(server.generate, plain, 40, ignore_eos=True) for _ in range(10)]
        answers = list(pool.map(lambda one: ask(server, *one), asked))
        assert all(each.result()["output_ids"] == want for each in beside)
    tokens, steps, ends = defaultdict(int), defaultdict(int), Counter()
    for (grammar, number), answer in zip(asked, answers, strict=True):
        meta = answer["meta_info"]
        ends[meta["finish_reason"]["type"]] += 1
        assert meta["finish_reason"]["type"] == "stop", (grammar.name, number, answer["text"])
        assert grammar.conforms(answer["text"]), (grammar.name, number, answer["text"])
        tokens[grammar.name] += meta["completion_tokens"]
        steps[grammar.name] += meta["dllm_steps"]
    print(f"{len(asked)} requests over {len(GRAMMARS)} grammars: all conform, ends {dict(ends)}")
    print("tokens per forward: " + ", ".join(f"{name} {tokens[name] / steps[name]:.1f}" for name in tokens))
    assert sum(tokens.values()) > sum(steps.values()), "nothing was decided in parallel"
