"""Facts that come from the checkpoint and nowhere else: block size, mask id, stop ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.config import Llada2Config

MASK_TOKEN = "<|mask|>"
TURN_END = "<|role_end|>"


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What decoding must know of a checkpoint.

    stop_ids end an answer: end of text, end of a turn. delete_id and split_id (LLaDA2.2) are both there or both None.
    """

    block_size: int
    mask_id: int
    stop_ids: frozenset[int]
    vocab_size: int
    delete_id: int | None = None
    split_id: int | None = None

    @property
    def indel(self) -> bool:
        """Whether the checkpoint inserts and deletes."""
        return self.delete_id is not None

    @property
    def own_tokens(self) -> frozenset[int]:
        """Tokens that are no text: the mask, DELETE and SPLIT."""
        return frozenset(token for token in (self.mask_id, self.delete_id, self.split_id) if token is not None)


def read_facts(path: str | Path) -> CheckpointFacts:
    """The facts of a checkpoint folder.

    Raises:
        ConfigError: config.json is contradictory, or no mask token can be found.
    """
    folder = Path(path)
    config = read_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return gather(config, tokenizer, generation)


def read_config(folder: Path) -> Llada2Config:
    """config.json of a folder, checked."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder}: there is no config.json")
    fields = json.loads(file.read_text(encoding="utf-8"))
    return Llada2Config(**{key: value for key, value in fields.items() if key != "model_type"})


def gather(config: Llada2Config, tokenizer: Any, generation: dict[str, Any]) -> CheckpointFacts:
    """The facts from the three places that may state them.

    The mask id is config.mask_token_id, or the tokenizer's mask token; the published 2.0 configs leave it to the
    tokenizer. Stop ids are the union of what all three name, and the token that ends a turn.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    named = config.mask_token_id
    own = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else vocabulary.get(MASK_TOKEN)
    if named is not None and own is not None and named != own:
        raise ConfigError(f"mask_token_id is {named} in config.json, but the tokenizer's mask token is {own}")
    mask_id = named if named is not None else own
    if mask_id is None:
        raise ConfigError(
            f"the checkpoint has no mask token: config.json has no mask_token_id, the tokenizer no mask_token and no "
            f"{MASK_TOKEN!r}"
        )
    stop_ids = {
        token
        for source in (
            config.eos_token_id,
            generation.get("eos_token_id"),
            tokenizer.eos_token_id,
            vocabulary.get(TURN_END),
        )
        for token in (source if isinstance(source, list) else [source])
        if token is not None
    }
    if not 0 <= mask_id < config.vocab_size:
        raise ConfigError(f"mask token id {mask_id} is outside the vocabulary of {config.vocab_size}")
    if mask_id in stop_ids:
        raise ConfigError(f"mask token id {mask_id} is also a stop token")
    edit_ids = (config.delete_token_id, config.split_token_id)
    if edit_ids != (None, None) and (
        None in edit_ids
        or len({mask_id, *edit_ids}) != 3
        or not all(0 <= token < config.vocab_size and token not in stop_ids for token in edit_ids if token is not None)
    ):
        raise ConfigError(
            f"config.json: delete_token_id is {edit_ids[0]!r}, split_token_id is {edit_ids[1]!r}; needed are both or "
            f"neither: two ids below {config.vocab_size} that are not the mask token {mask_id} and no stop token"
        )
    return CheckpointFacts(config.block_size, mask_id, frozenset(stop_ids), config.vocab_size, *edit_ids)
