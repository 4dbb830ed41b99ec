"""Functions that count as one operation where a run is written down (replay/recording.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])

ACTIVE: list[Any] = []  # the recording that runs, if any


def kernel(function: F) -> F:
    """Mark a function as one operation of a graph."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not ACTIVE:
            return function(*args, **kwargs)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        ACTIVE[-1].add(function.__qualname__, (args, kwargs), result)
        return result

    return run  # type: ignore[return-value]
