"""Facts of a checkpoint: where the mask id and the stop ids may stand, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import gather, read_config, read_facts
from tests.toy import EOS, MASK, TURN_END, VOCAB, make_checkpoint, make_config


@dataclass
class FakeTokenizer:
    """What is asked of a tokenizer."""

    mask_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    vocabulary: dict[str, int] = field(default_factory=dict)

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


BARE = {"mask_token_id": None, "eos_token_id": None}


def test_facts_of_a_folder(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    facts = read_facts(tmp_path)
    assert (facts.mask_id, facts.block_size, facts.vocab_size) == (MASK, 32, VOCAB)
    assert facts.stop_ids == {EOS, TURN_END}


def test_mask_from_config() -> None:
    assert gather(make_config(mask_token_id=5), FakeTokenizer(), {}).mask_id == 5


@pytest.mark.parametrize(
    "tokenizer", [FakeTokenizer(mask_token_id=6), FakeTokenizer(vocabulary={"<|mask|>": 6})], ids=["named", "by text"]
)
def test_mask_from_tokenizer(tokenizer: FakeTokenizer) -> None:
    assert gather(make_config(**BARE), tokenizer, {}).mask_id == 6


def test_mask_id_zero_counts() -> None:
    assert gather(make_config(**BARE), FakeTokenizer(mask_token_id=0), {}).mask_id == 0
    assert gather(make_config(mask_token_id=0), FakeTokenizer(), {}).mask_id == 0


def test_two_masks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask token is 5 \(mask_token_id of .*\), but 6 \(mask_token of the"):
        gather(make_config(mask_token_id=5), FakeTokenizer(mask_token_id=6), {})


def test_no_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="no mask token"):
        gather(make_config(**BARE), FakeTokenizer(), {})


def test_a_mask_that_is_no_integer_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask_token_id is '5'"):
        gather(make_config(mask_token_id="5"), FakeTokenizer(), {})


@pytest.mark.parametrize("mask", [-1, VOCAB])
def test_a_mask_outside_the_vocabulary_is_refused(mask: int) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"mask token id {mask} .* is outside the vocabulary of {VOCAB}",
    ):
        gather(make_config(mask_token_id=mask), FakeTokenizer(), {})


def test_a_mask_that_stops_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 is also a stop token"):
        gather(make_config(mask_token_id=5), FakeTokenizer(), {"eos_token_id": [5, 7]})


def test_stop_ids_are_the_union_of_all_that_are_named() -> None:
    tokenizer = FakeTokenizer(eos_token_id=3, vocabulary={"<|role_end|>": 4})
    facts = gather(make_config(mask_token_id=9, eos_token_id=0), tokenizer, {"eos_token_id": [1, 2]})
    assert facts.stop_ids == {0, 1, 2, 3, 4}


def test_a_checkpoint_may_name_no_stop() -> None:
    assert gather(make_config(mask_token_id=9, eos_token_id=None), FakeTokenizer(), {}).stop_ids == frozenset()


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.json"):
        read_config(tmp_path)


def test_edit_tokens_of_a_checkpoint_that_inserts_and_deletes() -> None:
    facts = gather(make_config(delete_token_id=7, split_token_id=8), FakeTokenizer(), {})
    assert facts.indel and (facts.delete_id, facts.split_id) == (7, 8)
    assert not gather(make_config(), FakeTokenizer(), {}).indel


@pytest.mark.parametrize(("delete", "split"), [(7, None), (None, 7), (7, 7), (MASK, 7), (7, EOS), (VOCAB, 7), (-1, 7)])
def test_wrong_edit_tokens(delete: int | None, split: int | None) -> None:
    with pytest.raises(ConfigError, match=f"delete_token_id is {delete}, split_token_id is {split}; needed are both"):
        gather(make_config(delete_token_id=delete, split_token_id=split), FakeTokenizer(), {})
