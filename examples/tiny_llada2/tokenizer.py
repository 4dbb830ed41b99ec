"""The tokenizer of the tiny checkpoint: byte-level, some hundred whole words, LLaDA2's special tokens and templates."""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import CITIES, NAMES, examples

VOCAB = 400
SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]
ROLES = ["SYSTEM", "HUMAN", "ASSISTANT", "detailed thinking off"]

TEMPLATES = {
    "2.0": (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8"),
    "2.1": (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8"),
    "2.2": (Path(__file__).parent / "chat_template_2.2.jinja").read_text(encoding="utf-8"),
}


def build() -> PreTrainedTokenizerFast:
    """Train on the words of the tasks; digits and upper-case letters stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(ROLES),
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(), trainer)
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = TEMPLATES["2.0"]
    return fast


def _words() -> list[str]:
    """Text of questions without the strings that are worked on, which must not be merged."""
    kept: list[str] = []
    for example in itertools.islice(examples(0, held_out=False), 4000):
        for message in example.messages:
            words = [
                w
                for w in message["content"].split(" ")
                if not any(len(p) > 1 and p.isupper() for p in [w.strip(".?:")])
            ]
            kept.append(" ".join(words))
    json_parts = [f'{{"name": "{n}", "age": 1, "city": "{c}"}}' for n in NAMES for c in CITIES]
    return kept + json_parts * 3


def save(path: Path) -> PreTrainedTokenizerFast:
    """Build and write the tokenizer's files."""
    tokenizer = build()
    tokenizer.save_pretrained(path)
    return tokenizer
