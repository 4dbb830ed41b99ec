"""How far long work is: one line on a terminal, with the rate and what remains, and nothing where there is none.

Not tqdm, which whoever only speaks to a server need not have.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
SECONDS = 0.1  # between two looks of the line at least
CLEAR = "\r\x1b[K"


def counter(what: str, of: int) -> Callable[[int], None]:
    """What tells standard error how many there are of so many, if it is a terminal; the line goes with the last one."""
    if not sys.stderr.isatty():
        return lambda count: None
    begin = told = time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        now = time.monotonic()
        if count < of and (now - told >= SECONDS or not count):
            told = now
            show(f"{what}: {count} of {of}{pace(count, of, now - begin)}")
        elif count >= of:
            show("")

    tell(0)
    return tell


def watched(items: Iterable[T], what: str, of: int) -> Iterator[T]:
    """The same items, one by one; each counts once the next one is asked for."""
    tell = counter(what, of)
    try:
        for count, item in enumerate(items, 1):
            yield item
            tell(count)
    finally:
        tell(of)


def say(line: str) -> None:
    """Print a line of results in the place of the one that says how far work is, which comes again below it."""
    if sys.stderr.isatty():
        show("")
    print(line, flush=True)


def pace(count: int, of: int, seconds: float) -> str:
    """How fast they came, and what the others take at that."""
    if not count:
        return ""
    left = timedelta(seconds=round(seconds * (of - count) / count))
    return f", {count / seconds:.3g} a second, {left} left"


def show(text: str) -> None:
    print(CLEAR + text, end="", file=sys.stderr, flush=True)
