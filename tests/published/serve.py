"""A server on each published layout by the plain host command, and what it answers: `python -m tests.published.serve`.

Names of layouts may be given; --each asks so many questions of each task. One line per layout: right answers, tokens
returned per decode step, answers that ended at <|role_end|>; first the checkpoints as they were trained, in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_llada2.tasks import HARD_TASKS, TASKS, Example, examples
from tests.host.serving import Server, serving
from tests.published.layout import EXAMPLES, LAYOUTS, write

NEW_TOKENS = 128
TURN_END = 5  # <|role_end|> of the trained tokenizer


@dataclass(frozen=True, slots=True)
class Score:
    """What became of some questions: how many, right answers, those that ended their turn; tokens and decode steps."""

    asked: int
    right: int
    ended: int
    tokens: int
    steps: int

    def __str__(self) -> str:
        per_step = f"{self.tokens / self.steps:5.2f}" if self.steps else "    -"
        return f"{self.right:3} of {self.asked:3} right, {per_step} tokens a step, {self.ended:3} ended at <|role_end|>"


def questions(trained: str, each: int, seed: int = 3) -> list[Example]:
    """Held-out questions, `each` of every task that a trained checkpoint knows."""
    hard = trained != "tiny-llada2"
    found: dict[str, list[Example]] = {task: [] for task in (HARD_TASKS if hard else TASKS)}
    for example in examples(seed, held_out=True, hard=hard):
        if len(found[example.task]) < each:
            found[example.task].append(example)
        if all(len(some) == each for some in found.values()):
            break
    return list(itertools.chain.from_iterable(found.values()))


def ask(server: Server, asked: list[Example]) -> Score:
    """The chat endpoint's answers, greedily, as a client sees them."""
    right = ended = tokens = steps = 0
    for example in asked:
        body = {"model": "default", "messages": example.messages, "max_tokens": NEW_TOKENS, "return_meta_info": True}
        reply = server.post("/v1/chat/completions", body)
        assert reply.ok, reply.text
        choice = reply.json()["choices"][0]
        right += choice["message"]["content"] == example.answer
        ended += choice["matched_stop"] == TURN_END
        tokens += reply.json()["usage"]["completion_tokens"]
        steps += sum(choice["meta_info"].get("dllm_forward_counts", []))  # the host's own code counts none
    return Score(len(asked), right, ended, tokens, steps)


def folders(names: list[str], parent: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, folder and trained checkpoint of what is to be served, written when its turn comes."""
    for trained in dict.fromkeys(LAYOUTS[name].trained for name in names):
        yield f"{trained}, as trained", EXAMPLES / trained, trained
    for name in names:
        yield name, write(name, parent), LAYOUTS[name].trained


def main() -> None:
    """Serve and ask, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LAYOUTS)}; all unless given")
    parser.add_argument("--each", type=int, default=1, help="questions of each task")
    parser.add_argument("--flags", default="", help="further flags of the server, separated by spaces")
    args = parser.parse_args()
    unknown = set(args.names) - set(LAYOUTS)
    if unknown:
        parser.error(f"no layout is named {', '.join(sorted(unknown))}; allowed: {', '.join(LAYOUTS)}")
    with tempfile.TemporaryDirectory() as parent:
        for name, folder, trained in folders(args.names or list(LAYOUTS), Path(parent)):
            with serving(folder, Path(parent) / "log", *args.flags.split()) as server:
                print(f"{name:<36} {ask(server, questions(trained, args.each))}", flush=True)


if __name__ == "__main__":
    main()
