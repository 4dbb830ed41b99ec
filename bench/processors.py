"""Custom logit processors that do what none may: the server imports them from here, since they are pickled by name."""

from __future__ import annotations

import time
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

Params = list[dict[str, Any]] | None


class Raises(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: Params = None) -> torch.Tensor:
        raise ZeroDivisionError("of the user")


class Shrinks(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: Params = None) -> torch.Tensor:
        return logits[:, :5]


class Nothing(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: Params = None) -> Any:
        return None


class Nan(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: Params = None) -> torch.Tensor:
        return logits * float("nan")


class Forbids(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: Params = None) -> torch.Tensor:
        return torch.full_like(logits, float("-inf"))


class Sleeps(CustomLogitProcessor):
    def __call__(self, logits: torch.Tensor, custom_param_list: Params = None) -> torch.Tensor:
        time.sleep(0.05)
        return logits


PROCESSORS = (Raises, Shrinks, Nothing, Nan, Forbids, Sleeps)
