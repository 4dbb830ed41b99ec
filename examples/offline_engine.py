"""Answers without a server: `python -m examples.offline_engine ["a question" ...]`.

Prints each question, its answer and the forwards that each block of the answer took.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sglang  # noqa: TID251 - outside the package, as a user would
from transformers import PreTrainedTokenizerFast

CHECKPOINT = Path(__file__).parent / "tiny-llada2"
QUESTIONS = [
    "What is 17 + 25?",
    "Sort 42, 17, 58.",
    "Spell KLMN.",
    "List 12 numbers from 26.",
    "Make JSON: Mia is 31 and lives in Oslo.",
]


def ask(engine: sglang.Engine, tokenizer: PreTrainedTokenizerFast, questions: list[str], new_tokens: int) -> None:
    """Put all questions at once, each through the chat template, and print what comes back."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    outputs = engine.generate(prompts, {"temperature": 0, "max_new_tokens": new_tokens})
    for question, output in zip(questions, outputs, strict=True):
        counts = output["meta_info"]["dllm_forward_counts"]
        print(f"question: {question}\nanswer:   {output['text']}\nforwards: {sum(counts)} {counts}\n")


def main() -> None:
    """Start an engine, ask, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.checkpoint)
    with sglang.Engine(model_path=str(args.checkpoint), log_level="warning") as engine:
        ask(engine, tokenizer, args.questions, args.new_tokens)


if __name__ == "__main__":  # needed: the engine's processes are spawned
    main()
