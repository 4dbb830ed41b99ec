"""What is put in place on a host that fits no table: LLaDA2 models are refused, and nothing else is changed.

A hook of the host might be one of the names that are gone, and a hook without a target is only logged: a LLaDA2 model
would then run on code that nobody has checked. So this asks transformers. Whatever of the host reads a checkpoint gets
the class of its configuration there by the model type of config.json, and a class that is registered comes before
code that a checkpoint brings. The other models' classes stay as they are.
"""

from __future__ import annotations

from typing import Any


def refuse_models() -> None:
    """End whatever reads the configuration of a LLaDA2 checkpoint from now on with a list of what differs."""
    from transformers import AutoConfig, PretrainedConfig

    from sglang_llada.host.seam import check
    from sglang_llada.llada2.config import MERGED_MODEL_TYPE, MODEL_TYPE

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise check.mismatch()

    for name in (MODEL_TYPE, MERGED_MODEL_TYPE):
        refused = type("RefusedConfig", (PretrainedConfig,), {"model_type": name, "__init__": refuse})
        AutoConfig.register(name, refused, exist_ok=True)
