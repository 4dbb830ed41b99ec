"""Answers of which a part is given, and reads of choices: `python -m examples.canvas`.

Prints each canvas with `_` for an open position, what the model makes of it, and the probabilities of choices.
"""

from __future__ import annotations

from pathlib import Path

import sglang  # noqa: TID251 - outside the package, as a user would
from transformers import PreTrainedTokenizerFast

from sglang_llada.options import Decode, Threshold

CHECKPOINT = Path(__file__).parent / "tiny-llada2"
Canvas = list[int | str | None]
INFILLS: list[tuple[str, Canvas]] = [
    ("Make JSON: Mia is 31 and lives in Oslo.", ['{"name": "Mia", "age": ', None, None, ', "city": "Oslo"}']),
    ("List 10 numbers from 46.", ["46, ", None, None, ", 48, 49, ", None, None, ", 51, 52, 53, 54, 55"]),
    ("Spell KLMN.", ["K-", None, "-", None, "-N"]),
]
READS: list[tuple[str, Canvas, list[str]]] = [
    ("How many X are in XYXZ?", [None], ["1", "2", "3"]),
    ("Sort 42, 17.", [None, "7, 42"], ["1", "4"]),
]


def shown(canvas: Canvas) -> str:
    """A canvas as text."""
    return "".join("_" if entry is None else str(entry) for entry in canvas)


def main() -> None:
    """Start an engine, fill, read, stop it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)

    def ask(question: str, options: Threshold) -> dict[str, object]:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        answer: dict[str, object] = engine.generate(prompt, {"temperature": 0, "custom_params": options.custom_params})
        return answer

    with sglang.Engine(model_path=str(CHECKPOINT), log_level="warning") as engine:
        for question, canvas in INFILLS:
            answer = ask(question, Threshold(canvas=canvas))
            print(f"question: {question}\ncanvas:   {shown(canvas)}\nanswer:   {answer['text']}\n")
        for question, canvas, choices in READS:
            answer = ask(question, Threshold(canvas=canvas, choices=choices))
            [chances] = Decode.of(answer["meta_info"]).chances
            said = ", ".join(f"{choice}: {p:.3f}" for choice, p in zip(choices, chances, strict=True))
            print(f"question: {question}\ncanvas:   {shown(canvas)}\nchoices:  {said}\n")


if __name__ == "__main__":  # needed: the engine's processes are spawned
    main()
