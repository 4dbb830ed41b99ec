"""Faults that are planted in a server: a function of the host or of ours with another one around it."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins import load_plugins


def plant(target: str, around: Callable[..., Any]) -> None:
    """Have `around(function, *args, **kwargs)` called for a dotted name's function, as the plugins left it."""
    load_plugins()
    owner, _, name = target.rpartition(".")
    holder = pkgutil.resolve_name(owner)
    function = getattr(holder, name)

    @functools.wraps(function)
    def planted(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    fixed = isinstance(inspect.getattr_static(holder, name), staticmethod)
    setattr(holder, name, staticmethod(planted) if fixed else planted)
