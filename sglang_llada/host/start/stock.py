"""What the host's own LLaDA2 class needs to run a checkpoint, for comparison in mode off."""

from __future__ import annotations

from typing import Any

from sglang_llada.llada2.config import MERGED_MODEL_TYPE, Llada2Config


class StockConfig(Llada2Config):
    """The configuration with fields that the host's class reads of every checkpoint, stated or not."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"embedding_dropout": 0.0, **fields})
        if self.moe_shared_expert_intermediate_size is None:
            self.moe_shared_expert_intermediate_size = self.moe_intermediate_size


class StockMergedConfig(StockConfig):
    """The same of the other model type."""

    model_type = MERGED_MODEL_TYPE
    __init__ = StockConfig.__init__  # transformers would make one of its own for a class without
