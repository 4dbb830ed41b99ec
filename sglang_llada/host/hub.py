"""Where the files of a checkpoint are that is named as the host takes it: by its folder or by its repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import shortly

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def folder_of(model: str, revision: str | None = None, patterns: Sequence[str] = SMALL_FILES) -> Path:
    """Where the small files of a checkpoint are, or others; of a repository in the local cache, fetched if need be."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError:
        raise ConfigError(f"{model!r} is neither a folder nor the name of a repository") from None
    except OSError as error:  # nothing cached, no network, no such repository, no right to it
        raise ConfigError(
            f"{model!r} is no folder, and as a repository it is neither in the local Hugging Face cache nor to be had "
            f"from the hub: {shortly(error)}"
        ) from None
