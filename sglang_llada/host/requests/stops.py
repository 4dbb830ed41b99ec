"""Stop expressions are read and searched for with a bound: the host does so on the thread that everybody waits for.

The host searches the end of an answer for each stop_regex after every step, once more for each token of it. An
expression such as (a+)+$ takes longer than anybody waits on forty letters. Here a request has SECONDS for that in a
step, and ends alone if they do not do, by the host's own way of ending a request for its stop_regex.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from http import HTTPStatus
from re import _parser as parser  # type: ignore[attr-defined]  # the host reads expressions with it, too
from time import thread_time
from typing import Any

import regex
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.sampling.sampling_params import MAX_LEN

from sglang_llada.host.requests.bounds import shown

SECONDS = 0.05  # of the scheduler's thread, for a request in a step
MOST_TAIL = 512  # tokens at the end of an answer that a stop_regex without a longest match is looked for in
MOST_PARTS = 10_000  # of an expression, which takes some milliseconds to compile; nested repeats would take the memory
# A brace that repeats nothing is a character for `re`; for `regex` it may allow errors in what stands before it.
PLAIN_BRACE = re.compile(r"(?<!\\)((?:\\\\)*)\{(?!\d*,?\d*\})")


class Search:
    """What stands for the module `re` where the host searches: `regex` finds the same, and can be stopped.

    Attributes:
        left: seconds that the request whose answer is searched has left in this step. Only searches count, in time of
            this thread: nobody's request ends because the machine is busy.
    """

    error = re.error

    def __init__(self) -> None:
        self.left = 0.0

    def search(self, pattern: str, text: str) -> Any:
        """As re.search.

        Raises:
            TimeoutError: there is no time left.
        """
        if self.left <= 0:
            raise TimeoutError
        expression, begin = compiled(pattern), thread_time()
        found = expression.search(text, timeout=self.left)
        self.left -= thread_time() - begin
        return found


SEARCH = Search()


def within_time(check: Callable[..., bool], req: Any, *args: Any) -> bool:
    """Around the host's look for stop strings and expressions in an answer; whether the request ends."""
    SEARCH.left = SECONDS
    try:
        return check(req, *args)
    except TimeoutError:
        patterns = ", ".join(shown(pattern) for pattern in req.sampling_params.stop_regex_strs)
        why = f"stop_regex is {patterns}; allowed: what takes less than {SECONDS} s to look for in {MOST_TAIL} tokens"
        req.finished_reason = FINISH_ABORT(why, HTTPStatus.BAD_REQUEST, "BadRequestError")
        return True


def read(measure: Callable[[str], int], pattern: str) -> int:
    """Around the host's look at how long a match of a stop_regex may be; its parser fails in ways of its own.

    Raises:
        ValueError: it is no regular expression, or one that is too large or too deep.
    """
    try:
        re.compile(pattern)
        if (parts := parts_of(parser.parse(pattern))) > MOST_PARTS:
            raise ValueError(f"with its repeats it has {parts} parts; allowed: {MOST_PARTS}")
        compiled(pattern)
        return min(measure(pattern), MAX_LEN)  # of nested repeats it may be more than can be sent
    except (ValueError, re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex is {shown(pattern)}, which cannot be read: {error}") from None


def parts_of(tree: Any) -> int:
    """How many parts an expression has once its repeats are written out as often as they must be, as `regex` does."""
    return sum(1 + max(least(operator, value), 1) * sum(map(parts_of, inside(value))) for operator, value in tree)


def least(operator: Any, value: Any) -> int:
    """How often what an operator repeats must stand there."""
    repeats = operator in (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)
    return int(value[0]) if repeats else 1


def inside(value: Any) -> Iterator[Any]:
    """The expressions that an operator's value holds, wherever it does."""
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from inside(each)


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> Any:
    """An expression of `re` as one of `regex` that means the same."""
    return regex.compile(PLAIN_BRACE.sub(r"\1\\{", pattern))
