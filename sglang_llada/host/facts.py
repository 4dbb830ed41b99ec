"""What every part asks of a server: whether it is ours, its checkpoint's facts and how it decodes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolving_view

from sglang_llada.config import FLAGS, DecodeConfig, algorithm_of_flag, flag_of
from sglang_llada.host.hub import folder_of
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_facts, read_json

DEFAULT_BUDGET = 8192  # tokens of a forward when --chunked-prefill-size is off


def is_ours(server_args: Any) -> bool:
    """Whether a resolved server decodes with an algorithm of ours; the host's own code serves every other model."""
    flag = resolving_view(server_args).dllm_algorithm
    return flag in FLAGS and own_flag(flag) == flag


def own_flag(flag: str) -> str:
    """The one value of --dllm-algorithm that stands for a flag and its aliases."""
    return flag_of(algorithm_of_flag(flag))


def decode_config(config: Any, facts: CheckpointFacts) -> DecodeConfig:
    """How the server decodes unless a request says otherwise, from the host's DllmConfig."""
    defaults = DecodeConfig.defaults(config.block_size, algorithm_of_flag(config.algorithm), indel=facts.indel)
    return defaults.replaced(config.algorithm_config, "--dllm-algorithm-config")


def row_budget(chunked_prefill_size: int | None, block_size: int) -> int:
    """Rows that a forward should have at most, from --chunked-prefill-size, which counts tokens (-1 is off)."""
    tokens = DEFAULT_BUDGET if chunked_prefill_size in (None, -1) else chunked_prefill_size
    return max(tokens // block_size, 1)


def attention_dp(args: Any) -> bool:
    """Whether ranks attend for requests of their own; the host turns the first flag into the second."""
    return bool(args.enable_dp_attention or args.attn_dp_size > 1)


def architectures(model_path: str, revision: str | None) -> tuple[str, ...]:
    """What config.json says the model is; empty if there is none to read, which the host will report in its own way."""
    return tuple(config_of(model_path, revision).get("architectures") or ())


@lru_cache(maxsize=8)
def config_of(model_path: str, revision: str | None) -> dict[str, Any]:
    """A model's config.json; empty if there is none to read."""
    folder = Path(model_path)
    if folder.is_dir():
        file = folder / "config.json"
        return read_json(file) if file.is_file() else {}
    if "://" in model_path or folder.is_file():  # object stores and GGUF files
        return {}
    return fetch_config(model_path, revision)


def fetch_config(repository: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model that is named by its repository."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(repository, revision=revision)
    except OSError:
        return {}
    return config


@lru_cache(maxsize=8)
def facts_of(model_path: str, revision: str | None) -> CheckpointFacts:
    """The facts of a checkpoint in a folder or, named by its repository, in the local cache."""
    return read_facts(folder_of(model_path, revision))
