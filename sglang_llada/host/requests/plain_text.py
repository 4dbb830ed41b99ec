"""Text never means one of the model's own tokens: "<|mask|>" in a prompt is eight characters, not the mask.

The tokenizer that encodes what users write gets other names for the mask, DELETE and SPLIT, in place, so that every way
of encoding is meant: prompts alone, in batches and in parallel, chats, stop strings, /tokenize. Names differ by a
character that is not seen, so ids are still shown as what they are. Ids in `input_ids` are refused in wishes.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer

from sglang_llada.host.facts import facts_of, is_ours

UNSEEN = "\u2060"  # a word joiner


def read_as_text(result: None, manager: Any) -> None:
    """After the host's TokenizerManager has its tokenizer, if it is ours and can be changed."""
    args, tokenizer = manager.server_args, manager.tokenizer
    if is_ours(args) and tokenizer is not None and tokenizer.is_fast:
        rename(tokenizer, facts_of(args.model_path, args.revision).own_tokens)


def rename(tokenizer: Any, ids: Collection[int]) -> None:
    """Give the added tokens with these ids names that nobody writes."""
    names = {token.content: token.content + UNSEEN for i, token in tokenizer.added_tokens_decoder.items() if i in ids}
    if not names:
        return
    tokenizer._tokenizer = renamed(tokenizer._tokenizer, names)
    tokenizer.mask_token = names.get(tokenizer.mask_token, tokenizer.mask_token)
    tokenizer.extra_special_tokens = [names.get(str(token), token) for token in tokenizer.extra_special_tokens]


def renamed(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A tokenizer with other names for some of its added tokens, also where its vocabulary lists them."""
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        description["model"]["vocab"] = {names.get(word, word): i for word, i in vocabulary.items()}
    return Tokenizer.from_str(json.dumps(description))
