"""Tool calls and thinking in streams whose pieces hold many tokens.

The host's detectors read a stream one token at a time. A block-diffusion model decides many at once, and a piece that
holds the end of a sentence and a whole call loses the sentence, the arguments or the call, differently for each format.
So they are fed what tokens might have been: a tag is one piece wherever the stream was cut, so are words. What a
detector has sent is then compared with what it makes of the whole answer, and what is missing follows at the end.

Invariants: a stream gives the calls and the text that the whole answer gives, wherever it was cut, save white space
before the first word. Arguments that grow come in pieces that grow, so that reading them again and again costs no more
than in proportion to their length. What a detector has sent cannot be taken back: where it sends what the whole answer
has not, or the answer ends inside a call, that stays.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ToolChoice
from sglang.srt.function_call.core_types import ToolCallItem
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from sglang_llada.host import earlier

TAG = r"<[^<>\s]{1,64}>"
TOKEN = re.compile(rf"{TAG}|\w+|\s+|.", re.DOTALL)
CUT_TAG = re.compile(r"<[^<>\s]{0,64}\Z")
SHARE = 8  # a detector gets at least this part of what it holds back: it will go over all of that again
READINGS = 64  # how often a detector may go over an answer before it has to wait for the end


class Pieces:
    """A stream, cut into pieces that a detector takes for tokens."""

    def __init__(self) -> None:
        self._rest = ""

    def take(self, text: str, held: Callable[[], int], *, last: bool = False) -> Iterator[str]:
        """The pieces that are whole now, and with `last` all that is left.

        Args:
            text: what the stream brings.
            held: how many characters the detector holds back, asked before each piece.
        """
        self._rest += text
        while piece := self._next(held() // SHARE, last):
            self._rest = self._rest[len(piece) :]
            yield piece

    def _next(self, least: int, last: bool) -> str:
        """A tag, or `least` characters and what is left of a word; empty if there is more to wait for."""
        end = 0
        while end < len(self._rest) and (end == 0 or end < least):
            if not last and CUT_TAG.match(self._rest, end):
                return ""
            token = TOKEN.match(self._rest, end)
            assert token is not None
            if len(token[0]) > 1 and token[0].startswith("<"):
                return self._rest[:end] or token[0]
            end = token.end()
        return self._rest[:end] if last or end >= least else ""


class PiecewiseCalls(FunctionCallParser):
    """The host's parser of tool calls, for a stream that brings many tokens at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._anew = functools.partial(type(self), *args, **kwargs)
        self._pieces = Pieces()
        self._text = ""  # of the stream
        self._held = 0  # characters of a call, or of what may become one, that the detector goes over again each time
        self._read = 0  # characters that it went over
        self._said = ""  # normal text that was sent
        self._space = ""  # white space at its end, which is none if a call follows
        self._calls: list[ToolCallItem] = []  # that were sent, in order
        self._order: dict[int, int] = {}  # by the detector's index, which may be that of the tool

    def get_structure_constraint(self, tool_choice: Any, *args: Any, **kwargs: Any) -> Any:
        """The grammar of calls; one asked for by name allows that name alone, which many of the host's do not."""
        narrowed = copy.copy(self)
        if isinstance(tool_choice, ToolChoice):
            narrowed.tools = [tool for tool in self.tools if tool.function.name == tool_choice.function.name]
        return super(PiecewiseCalls, narrowed).get_structure_constraint(tool_choice, *args, **kwargs)

    def parse_stream_chunk(self, chunk_text: str) -> tuple[str, list[ToolCallItem]]:
        """What a piece of the stream adds: normal text up to the first call, and calls."""
        if not self.tools and not earlier.parses_without_tools(self.detector):
            return chunk_text, []
        self._text += chunk_text
        return self._sent(self._feed(chunk_text, last=False))

    def parse_stream_end(self) -> tuple[str, list[ToolCallItem]]:
        """What is held back, and what the whole answer has and the stream has not brought."""
        if not self.tools and not earlier.parses_without_tools(self.detector):
            return "", []
        text, calls = self._sent(self._feed("", last=True))
        said, found = self._whole()
        calls += self._missing_calls(found)
        more = self._missing_text(said)
        if len(self._calls) <= len(found) or more.isspace():  # else the answer ends inside a call, which was sent
            text += more
        self.detector.prev_tool_call_arr = []  # of which the host would add what is added here
        return text, merged(calls)

    def _whole(self) -> tuple[str, list[ToolCallItem]]:
        """Text and calls of the whole answer, as the host gives them to a request that is not streamed."""
        parser = self._anew()
        if not parser.has_tool_call(self._text):
            return self._text, []
        try:
            return parser.parse_non_stream(self._text)
        except (AttributeError, KeyError, TypeError, ValueError):  # of detectors that look for less than they find
            return self._text, []

    def _feed(self, text: str, *, last: bool) -> Iterator[tuple[str, list[ToolCallItem]]]:
        """What the detector makes of each piece, as long as it does not go over the answer too often."""
        read, end = super().parse_stream_chunk, super().parse_stream_end
        for piece in self._pieces.take(text, lambda: self._held, last=last):
            self._held += len(piece)
            self._read += self._held
            if self._read > READINGS * (len(self._text) + READINGS):
                self._read = sys.maxsize  # for good: the detector has a gap
                return
            more, calls = read(piece)
            if any(call.name for call in calls) or (more and not self._calls):
                self._held = 0
            yield more, calls
        if last:
            yield end()

    def _sent(self, results: Iterable[tuple[str, list[ToolCallItem]]]) -> tuple[str, list[ToolCallItem]]:
        """Results of the detector as they are sent: numbered in order, nothing but calls after the first one."""
        text, calls = "", []
        for normal_text, items in results:
            if normal_text and not self._calls:
                grown = self._space + normal_text
                body = grown.rstrip()
                self._space = grown[len(body) :]
                text += body
                self._said += body
            for item in items:
                calls += self._numbered(item)
        return text, merged(calls)

    def _numbered(self, item: ToolCallItem) -> list[ToolCallItem]:
        """An item under the number of its call in this answer; none if it belongs to no call."""
        if item.name:
            self._order[item.tool_index] = len(self._calls)
            self._calls.append(ToolCallItem(tool_index=len(self._calls), name=item.name, parameters=""))
        elif item.tool_index not in self._order:
            return []
        call = self._calls[self._order[item.tool_index]]
        call.parameters += item.parameters or ""
        return [ToolCallItem(tool_index=call.tool_index, name=item.name, parameters=item.parameters or "")]

    def _missing_calls(self, found: list[ToolCallItem]) -> list[ToolCallItem]:
        """What the calls of the whole answer have and those that were sent have not."""
        missing = []
        for index, call in enumerate(found):
            if index >= len(self._calls):
                missing.append(ToolCallItem(tool_index=index, name=call.name, parameters=call.parameters))
                continue
            sent = self._calls[index].parameters
            if call.parameters.startswith(sent) and not same_json(sent, call.parameters):
                missing.append(ToolCallItem(tool_index=index, parameters=call.parameters[len(sent) :]))
        return missing

    def _missing_text(self, whole: str) -> str:
        """What the normal text of the whole answer has behind that which was sent.

        The host takes white space from both ends of a text that has calls behind it; at the beginning it was sent.
        """
        for sent in (self._said, self._said.lstrip()):
            if whole.startswith(sent):
                return whole[len(sent) :]
        return ""


class PiecewiseThinking(ReasoningParser):
    """The host's parser of thinking, for a stream that brings many tokens at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pieces = Pieces()

    def parse_stream_chunk(self, chunk_text: str) -> tuple[str, str]:
        """What a piece of the stream adds: thinking, and normal text."""
        read = super().parse_stream_chunk
        return joined(read(piece) for piece in self._pieces.take(chunk_text, nothing_held))

    def parse_stream_end(self) -> tuple[str, str]:
        """What is held back."""
        read = super().parse_stream_chunk
        rest = [read(piece) for piece in self._pieces.take("", nothing_held, last=True)]
        return joined([*rest, super().parse_stream_end()])


def nothing_held() -> int:
    """Detectors of thinking do not go over anything again that costs."""
    return 0


def joined(results: Iterable[tuple[str | None, str | None]]) -> tuple[str, str]:
    """The texts of several pieces as those of one."""
    thinking, normal = "", ""
    for more_thinking, more_normal in results:
        thinking += more_thinking or ""
        normal += more_normal or ""
    return thinking, normal


def merged(items: list[ToolCallItem]) -> list[ToolCallItem]:
    """Items with neighbours of one call put together."""
    together: list[ToolCallItem] = []
    for item in items:
        if together and item.name is None and together[-1].tool_index == item.tool_index:
            together[-1].parameters += item.parameters
        else:
            together.append(item)
    return together


def same_json(one: str, other: str) -> bool:
    """Whether two texts are JSON for the same value."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False
