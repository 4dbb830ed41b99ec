"""Facts that come from the checkpoint and nowhere else: block size, mask id, stop ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.config import Llada2Config

MASK_TOKEN = "<|mask|>"
TURN_END = "<|role_end|>"
MOST_SAID = 240  # characters of an error of other people's code


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


@dataclass(frozen=True, slots=True)
class Stated:
    """A token id and the place that states it."""

    token: int
    where: str

    def __str__(self) -> str:
        return f"{self.token} ({self.where})"


@dataclass(frozen=True, slots=True)
class StatedIds:
    """Every place of a checkpoint that states an id, those that count most first."""

    mask: Sequence[Stated]
    stops: Sequence[Stated]
    bos: Sequence[Stated]
    pad: Sequence[Stated]


def read_facts(path: str | Path) -> CheckpointFacts:
    """The facts of a checkpoint folder.

    Raises:
        ConfigError: config.json is contradictory, or no mask token can be found.
    """
    folder = Path(path)
    config = read_config(folder)
    return gather(config, read_tokenizer(folder, config), read_generation(folder))


def read_fields(folder: Path) -> dict[str, Any]:
    """config.json of a folder as it stands there."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder}: there is no config.json")
    return read_json(file)


def read_config(folder: Path) -> Llada2Config:
    """config.json of a folder, checked."""
    return Llada2Config(**{key: value for key, value in read_fields(folder).items() if key != "model_type"})


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of a folder; empty if there is none, as in the published 2.0 and 2.1."""
    file = folder / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def read_tokenizer(folder: Path, config: Llada2Config) -> Any:
    """The tokenizer of a folder."""
    try:
        return AutoTokenizer.from_pretrained(folder, config=config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be read: {shortly(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {content!r}; needed is a JSON object")
    return content


def shortly(error: Exception) -> str:
    """What an error says, on one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_SAID else said[:MOST_SAID] + " ..."


def gather(config: Llada2Config, tokenizer: Any, generation: dict[str, Any]) -> CheckpointFacts:
    """The facts from the three places that may state them.

    The mask id is config.mask_token_id, or the tokenizer's mask token; the published configs leave it to the
    tokenizer, where it is an added token and no more. Stop ids are the union of what all three name, and the token that
    ends a turn.
    """
    stated = stated_ids(config, tokenizer, generation)
    if not stated.mask:
        raise ConfigError(
            f"the checkpoint has no mask token: config.json has no mask_token_id, the tokenizer no mask_token and no "
            f"{MASK_TOKEN!r}"
        )
    if len({each.token for each in stated.mask}) > 1:
        raise ConfigError(f"the mask token is {', but '.join(map(str, stated.mask))}")
    mask_id = stated.mask[0].token
    for each in (*stated.mask[:1], *stated.stops):
        if not 0 <= each.token < config.vocab_size:
            name = "mask" if each.token == mask_id else "stop"
            raise ConfigError(f"{name} token id {each} is outside the vocabulary of {config.vocab_size}")
    stop_ids = {each.token for each in stated.stops}
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


def stated_ids(config: Llada2Config, tokenizer: Any, generation: dict[str, Any]) -> StatedIds:
    """What config.json, the tokenizer and generation_config.json say of the tokens that are no text."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    has_mask = tokenizer.mask_token_id is not None

    def stated(*places: tuple[Any, str]) -> list[Stated]:
        return [
            Stated(token, where)
            for tokens, where in places
            for token in (tokens if isinstance(tokens, list) else [tokens])
            if token is not None
        ]

    return StatedIds(
        mask=stated(
            (config.mask_token_id, "mask_token_id of config.json"),
            (tokenizer.mask_token_id, "mask_token of the tokenizer"),
            (None if has_mask else vocabulary.get(MASK_TOKEN), f"token {MASK_TOKEN} of the tokenizer"),
        ),
        stops=stated(
            (config.eos_token_id, "eos_token_id of config.json"),
            (generation.get("eos_token_id"), "eos_token_id of generation_config.json"),
            (tokenizer.eos_token_id, "eos_token of the tokenizer"),
            (vocabulary.get(TURN_END), f"token {TURN_END} of the tokenizer"),
        ),
        bos=stated(
            (config.bos_token_id, "bos_token_id of config.json"),
            (tokenizer.bos_token_id, "bos_token of the tokenizer"),
        ),
        pad=stated(
            (config.pad_token_id, "pad_token_id of config.json"),
            (tokenizer.pad_token_id, "pad_token of the tokenizer"),
        ),
    )
