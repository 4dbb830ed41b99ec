"""What answers at one setting come to, which settings nothing beats, and the table of them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import median

from sglang_llada.tune.drive import Reply, Setting
from sglang_llada.tune.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all prompts at one setting, so many at once.

    Attributes:
        right: share of answers that are the file's, but for white space at their ends; None if it has none.
        same: share of answers that are the most careful setting's, token for token.
        same_tokens: share of tokens that stand in both answers in the same order.
        tokens_per_forward: tokens of answers by forwards that requests took part in.
        first, first_late: seconds to the first token, median and 99th percentile.
        latency, latency_late: seconds of a whole answer, the same.
        tokens, answers: a second, of all requests together.
    """

    setting: Setting
    at_once: int
    right: float | None
    same: float
    same_tokens: float
    tokens_per_forward: float
    first: float
    first_late: float
    latency: float
    latency_late: float
    tokens: float
    answers: float

    @property
    def quality(self) -> float:
        """What stands for accuracy: right answers where somebody knows them, else the careful setting's tokens."""
        return self.same_tokens if self.right is None else self.right

    @property
    def name(self) -> str:
        """The setting, for people."""
        return name_of(self.setting)

    def beats(self, other: Figures) -> bool:
        """Whether, at as many at once, no figure that counts is worse and one is better."""
        mine, its = (self.quality, self.answers), (other.quality, other.answers)
        return self.at_once == other.at_once and mine != its and all(a >= b for a, b in zip(mine, its, strict=True))


def name_of(setting: Setting) -> str:
    """A setting, for people; none is whatever the server does by itself."""
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "the server's own"


def figures(
    setting: Setting,
    at_once: int,
    prompts: Sequence[Prompt],
    replies: Sequence[Reply],
    careful: Sequence[Reply],
    seconds: float,
) -> Figures:
    """The figures of replies that took so many seconds together, held against those of the most careful setting."""
    tokens, pairs = sum(len(reply.ids) for reply in replies), list(zip(replies, careful, strict=True))
    known = [
        reply.text.strip() == prompt.answer.strip()
        for prompt, reply in zip(prompts, replies, strict=True)
        if prompt.answer is not None
    ]
    return Figures(
        setting=setting,
        at_once=at_once,
        right=sum(known) / len(known) if known else None,
        same=sum(mine.ids == its.ids for mine, its in pairs) / len(pairs),
        same_tokens=in_common(pairs),
        tokens_per_forward=tokens / max(1, sum(reply.forwards for reply in replies)),
        first=median(reply.first for reply in replies),
        first_late=late(reply.first for reply in replies),
        latency=median(reply.seconds for reply in replies),
        latency_late=late(reply.seconds for reply in replies),
        tokens=tokens / seconds,
        answers=len(replies) / seconds,
    )


def in_common(pairs: Iterable[tuple[Reply, Reply]]) -> float:
    """The share of the tokens of both that stand in both, in the same order: twice those by the sum of lengths."""
    common = total = 0
    for mine, its in pairs:
        blocks = SequenceMatcher(None, mine.ids, its.ids, autojunk=False).get_matching_blocks()
        common += 2 * sum(block.size for block in blocks)
        total += len(mine.ids) + len(its.ids)
    return common / total if total else 1.0


def late(values: Iterable[float]) -> float:
    """The 99th percentile: the least value that no more than one in a hundred exceeds."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


def unbeaten(rows: Sequence[Figures]) -> list[Figures]:
    """Those that no other beats."""
    return [row for row in rows if not any(other.beats(row) for other in rows)]


def table(rows: Sequence[Figures]) -> str:
    """All figures, in columns that line up; `*` marks what nothing beats."""
    best = unbeaten(rows)
    head = ["", "setting", "at once", "right", "same", "same tokens", "tokens/forward", "first token s", "p99"]
    head += ["answer s", "p99", "tokens/s", "answers/s"]
    lines = [head, *([("*" if row in best else ""), *cells(row)] for row in rows)]
    if all(row.right is None for row in rows):
        lines = [line[:3] + line[4:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(padded, line, widths, range(len(line))))} |" for line in lines)


def padded(cell: str, width: int, column: int) -> str:
    """A cell as wide as its column: marks and settings begin on the left, figures end on the right."""
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def cells(row: Figures) -> list[str]:
    """A row's cells behind its mark."""
    seconds = [f"{value:.3f}" for value in (row.first, row.first_late, row.latency, row.latency_late)]
    shares = ["" if share is None else f"{share:.1%}" for share in (row.right, row.same, row.same_tokens)]
    return [
        row.name,
        str(row.at_once),
        *shares,
        f"{row.tokens_per_forward:.2f}",
        *seconds,
        f"{row.tokens:,.0f}",
        f"{row.answers:,.1f}",
    ]
