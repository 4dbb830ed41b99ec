"""Prompts that are being filled, by what they begin with: who asks for the same may wait a step and share their KV.

A prompt's blocks are numbered once, each with all before it, so that to look for a common beginning costs as much as to
find a place in a sorted list, however long prompts are and however many requests wait.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import Any

from sglang_llada.blocks.request import Phase, Request


def prefixes(prompt: Sequence[int], block_size: int, key: Hashable) -> list[int]:
    """A number for each whole block of a prompt, of its tokens, all before them, and what keeps it apart from others.

    Equal numbers mean equal beginnings, but for one case in 2**64, in which somebody waits a step for nothing. They are
    made of bytes, whose hashes nobody outside the process can foresee.
    """
    tokens, T = array("q", prompt), block_size
    numbers, before = [], hash(key)
    for start in range(0, len(tokens) // T * T, T):
        before = hash((before, tokens[start : start + T].tobytes()))
        numbers.append(before)
    return numbers


class Filling:
    """The requests that are being filled, or are about to be."""

    def __init__(self) -> None:
        self._begun: dict[Request[Any], int] = {}  # up to where their KV was there when they were let in
        self._by_prefix: dict[int, list[Request[Any]]] = {}
        self._shared: dict[Request[Any], int] = {}  # blocks that those who asked have in common with them

    def add(self, request: Request[Any], filled: int) -> None:
        """Note a request that is let in; the KV of [0, filled) is there."""
        self._begun[request] = filled
        self._shared.clear()
        for number in request.prefixes:
            self._by_prefix.setdefault(number, []).append(request)

    def settle(self) -> None:
        """Forget those that are filled, or ended, or retracted."""
        for request in list(self._begun):
            if request.phase not in (Phase.LOADING, Phase.FILLING):
                del self._begun[request]
                self._shared.clear()
                for number in request.prefixes:
                    sharing = self._by_prefix[number]
                    sharing.remove(request)
                    if not sharing:
                        del self._by_prefix[number]

    def brings(self, request: Request[Any], least: int) -> bool:
        """Whether most of what a request has to fill, and at least so many positions, is about to be filled anyway."""
        known, numbers = self._by_prefix, request.prefixes
        shared = self._shared.get(request)
        if shared is None:
            shared = bisect_left(range(len(numbers)), True, key=lambda i: numbers[i] not in known)
            self._shared[request] = shared
        if not shared:
            return False
        for other in known[numbers[shared - 1]]:
            filled = max(self._begun[other], other.filled)
            coming = min(shared * request.block_size, request.live_from, other.live_from) - filled
            if coming >= least and 2 * coming >= request.live_from - filled:
                return True
        return False
