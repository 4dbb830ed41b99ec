"""The references of LLaDA2's decodes with anything but one live block that is never edited: all of 2.1's and 2.2's.

Everything is recomputed each step, and positions are walked over in Python. What a step does with one block is a class
for each algorithm; generate_blocks() moves the live blocks along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from sglang_llada.config import ALGORITHMS, SHOWN, DecodeConfig, Sampling
from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.reference import GIVEN, Generation, Llada2ForDiffusion, generate, last_given, quota

TINY = 1e-30
CANDIDATES, TRIED, SEEN = 5, 4, 64  # what is looked at and remembered; see LevenshteinBlock

Candidates = list[list[tuple[int, float]]]  # of each position the best tokens and their probabilities, best first


class LiveBlock(Protocol):
    """A block while it is worked on: its tokens, which are open, of each its step (from 1) and its probability then."""

    ids: list[int]
    fixed: list[bool]  # which are given
    notes: list[tuple[int, float]]
    edited: bool  # whether decided positions may change too
    step_index: int  # steps made so far
    gaps: list[float]  # of the last step: how far decisions were from going the other way

    @property
    def open(self) -> list[bool]:
        """Which positions are open."""

    def step(self, candidates: Candidates) -> bool:
        """One step; returns whether it was the block's last."""

    def edit(self, candidates: Candidates) -> None:
        """One step after the last."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request does to the logits of its positions: penalties, ids that are banned early on, and bias."""

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    min_new_tokens: int = 0
    ends: frozenset[int] = frozenset()
    bias: dict[int, float] = field(default_factory=dict)

    def changed(self, logits: list[float], index: int, others: list[int]) -> list[float]:
        """Logits of the answer's position `index`, when `others` are all other tokens that are decided."""
        out = []
        for token, logit in enumerate(logits):
            if times := others.count(token):
                logit -= self.frequency * times + self.presence
                logit = logit / self.repetition if logit > 0 else logit * self.repetition
            if index < self.min_new_tokens and token in self.ends:
                logit = -math.inf
            out.append(logit + self.bias.get(token, 0.0))
        return out


def generate_as(
    params: DecodeConfig,
    model: Llada2ForDiffusion,
    prompt_ids: list[int],
    max_new_tokens: int,
    facts: CheckpointFacts,
    wishes: Wishes | None = None,
    canvas: Sequence[int | None] = (),
) -> Generation:
    """The reference of whatever the parameters ask for; a canvas (see generate) not of what inserts and deletes."""
    values = {p.name: getattr(params, p.name) for p in ALGORITHMS[params.algorithm] if p.name not in SHOWN}
    names = {"window", "live_blocks", "next_block_share"} & values.keys()
    window: dict[str, Any] = {name: values.pop(name) for name in names}
    if params.algorithm == "threshold" and params.live_blocks == 1 and params.sampling is None and wishes is None:
        values |= {"mask_id": facts.mask_id, "stop_ids": facts.stop_ids, "canvas": canvas}
        return generate(model, prompt_ids, max_new_tokens, **values)
    window |= {"max_nfe": values.pop("max_nfe"), "stop_ids": facts.stop_ids, "wishes": wishes, "canvas": canvas}
    window["penalty_lambda"] = values.pop("penalty_lambda", 0.0)
    if params.sampling is not None:
        window |= {"sampling": params.sampling, "mask_id": facts.mask_id}
    window["whole_blocks"] = params.edits or not values.pop("early_exit")
    kind: Callable[..., LiveBlock] = {
        "threshold": ThresholdBlock,
        "joint_threshold": JointBlock,
        "levenshtein": LevenshteinBlock,
    }[params.algorithm]
    ids = (facts.mask_id, facts.delete_id, facts.split_id) if params.algorithm == "levenshtein" else (facts.mask_id,)

    def fresh(given: Sequence[int | None]) -> LiveBlock:
        return kind(given, params.block_size, *ids, **values)

    return generate_blocks(model, prompt_ids, max_new_tokens, fresh, **window)


@torch.no_grad()
def generate_blocks(
    model: Llada2ForDiffusion,
    prompt_ids: list[int],
    max_new_tokens: int,
    fresh: Callable[[Sequence[int | None]], LiveBlock],
    *,
    whole_blocks: bool,
    stop_ids: Iterable[int] = (),
    window: int = 1,
    live_blocks: int = 1,
    next_block_share: float = 0.0,
    max_nfe: int = 0,
    sampling: Sampling | None = None,
    mask_id: int = -1,
    wishes: Wishes | None = None,
    penalty_lambda: float = 0.0,
    canvas: Sequence[int | None] = (),
) -> Generation:
    """Decode with a window of live blocks, all of which see one another's tokens as they stand.

    The token that stands to the left of a position in its block, the mask included, has a logit lower by
    `penalty_lambda` there. With `wishes` logits change next, where a token may change.
    With `sampling` the first candidate is drawn wherever a token may change, and the best ones follow it; the noise of
    a position follows from the number of its block's step, and is that of the first step once the block is done.

    Each step is one for every live block that is not done, and edits for those that are. Then, in this order:

    *   The answer is what follows the prompt up to the first open position, or if `whole_blocks` of the first blocks
        that are done. It ends with a stop token or with the last allowed one, and after max_nfe steps (if not 0) with
        what then stands before the first open position.
    *   Of the first blocks that are done all but `window` - 1 leave: they will not change any more.
    *   The next block begins, if fewer than `live_blocks` are live from the first one on that is not done, and the last
        of them is done or has fewer open positions than `next_block_share` of it; not if a stop token has been decided
        in a live block, or if nothing of it would count.
    *   If a canvas gives all of that block, it is done at once, and all of this is done once more.
    """
    size, stops = model.config.block_size, frozenset(stop_ids)
    wanted, stops_from = [*prompt_ids, *canvas], len(prompt_ids) + last_given(canvas)
    start = len(prompt_ids) // size * size
    live, gone, gone_notes = [fresh(wanted[start : start + size])], prompt_ids[:start], [GIVEN] * start
    done = [all(live[0].fixed)]
    given = done[0]  # whether the last live block has just begun, and takes no step
    out = Generation([], "length", 0)

    def step() -> None:
        logits = model.block_causal(gone + [token for block in live for token in block.ids])[len(gone) :]
        out.forwards += 1
        for i, block in enumerate(live if penalty_lambda else []):
            for at in range(1, size):
                logits[i * size + at, block.ids[at - 1]] -= penalty_lambda
        if wishes is not None:
            stands = [None if hole else t for block in live for t, hole in zip(block.ids, block.open, strict=True)]
            first = max(len(prompt_ids) - len(gone), 0)
            known = [*gone[len(prompt_ids) :], *stands[first:]]
            for at in range(first, len(stands)):
                block, here = live[at // size], at % size
                if may_change(block, here):
                    index = len(gone) + at - len(prompt_ids)
                    others = [token for i, token in enumerate(known) if token is not None and i != index]
                    logits[at] = torch.tensor(wishes.changed(logits[at].tolist(), index, others))
        best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :CANDIDATES]  # of equals the lowest id
        chances = logits.softmax(-1).gather(1, best)
        scores = [list(zip(*each, strict=True)) for each in zip(best.tolist(), chances.tolist(), strict=True)]
        narrow = [1.0]
        for i, block in enumerate(live):
            mine = scores[i * size : (i + 1) * size]
            for at in range(size):
                if sampling is not None and may_change(block, at):
                    here = i * size + at
                    key = hashed(sampling.seed, len(gone) + here, 0 if done[i] else block.step_index)
                    one, gap = drawn(logits[here], mask_id, sampling, key)
                    mine[at] = [one, *(other for other in mine[at][:-1] if other[0] != one[0])]
                    narrow.append(gap)
            if done[i]:
                block.edit(mine)
            else:
                done[i] = block.step(mine)
        out.margins.append(min([gap for block in live for gap in block.gaps] + narrow))

    while max_new_tokens:
        if not given:
            step()
        spent = 0 < max_nfe == out.forwards
        leading = (done + [False]).index(False)
        counts = live[:leading] if whole_blocks and not spent else live
        is_open = [hole for block in counts for hole in block.open] + [True]
        tokens = gone + [token for block in counts for token in block.ids][: is_open.index(True)]
        notes = gone_notes + [note for block in counts for note in block.notes]
        answer = tokens[len(prompt_ids) :][:max_new_tokens]
        ends = (i + 1 for i, token in enumerate(answer) if token in stops and len(prompt_ids) + i >= stops_from)
        end = next(ends, None)
        if end is not None or len(answer) == max_new_tokens or spent:
            out.token_ids = answer[:end]
            out.notes = notes[len(prompt_ids) :][: len(out.token_ids)]
            out.finish = "length" if end is None else "stop"
            break

        while leading >= window:
            block, leading = live.pop(0), leading - 1
            done.pop(0)
            gone, gone_notes = gone + block.ids, gone_notes + block.notes
        limit = len(prompt_ids) + max_new_tokens
        standing = [(token, hole) for block in live for token, hole in zip(block.ids, block.open, strict=True)]
        counting = standing[max(stops_from - len(gone), 0) :]
        if not live or (
            len(live) - leading < live_blocks
            and (done[-1] or sum(live[-1].open) < next_block_share * size)
            and len(gone) + len(live) * size < limit
            and stops.isdisjoint(token for token, hole in counting if not hole)
        ):
            start = len(gone) + len(live) * size
            live.append(fresh(wanted[start : start + size]))
            done.append(all(live[-1].fixed))
            given = done[-1]
        else:
            given = False
    return out


def may_change(block: LiveBlock, at: int) -> bool:
    """Whether a step may put a token there."""
    return block.open[at] or (block.edited and not block.fixed[at])


def drawn(logits: Tensor, mask_id: int, how: Sampling, key: int) -> tuple[tuple[int, float], float]:
    """The token whose logit and noise are highest in sum, its probability, and how far it was from being another one.

    Of tokens above which there are fewer than top_k, with at most top_p of the mass, and which have at least min_p
    times the best one's probability.
    """
    scaled = logits.double() / how.temperature
    scaled[mask_id] = float("-inf")
    chances = scaled.softmax(-1).tolist()
    falling = sorted(range(len(chances)), key=lambda token: -chances[token])
    top, before, margins = chances[falling[0]], 0.0, [1.0]
    kept: list[int] = []
    for rank, token in enumerate(falling):
        chance = chances[token]
        equal = rank > 0 and chance == chances[falling[rank - 1]]
        margins += [abs(before - how.top_p)] * (how.top_p < 1)
        margins += [abs(math.log(max(chance, TINY) / top / how.min_p))] if how.min_p > 0 else []
        if not equal and (rank >= how.top_k or before > how.top_p or chance < how.min_p * top):
            margins.append(math.log(chances[kept[-1]] / max(chance, TINY)))  # in floating point they might be equal
            break
        kept.append(token)
        before += chance
    scores = {token: float(scaled[token]) + gumbel(key, token) for token in kept}
    best = max(kept, key=lambda token: scores[token])
    margins += [scores[best] - score for token, score in scores.items() if token != best]
    return (best, chances[best] / sum(chances[token] for token in kept)), min(margins)


def gumbel(key: int, token: int) -> float:
    """Noise of a token: a hash of the key (two words) and the id, as a number in (0, 1), as Gumbel's distribution."""
    word = 2**32
    x = token ^ key % word
    x = (x ^ x >> 16) * 0x7FEB352D % word ^ key // word
    x = (x ^ x >> 15) * 0x846CA68B % word
    uniform = min(((x ^ x >> 16) + 0.5) / word, 1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def hashed(seed: int, position: int, step: int) -> int:
    """64 bits: SplitMix64's finaliser, applied to the seed and then to each of the other two."""
    bits = 0
    for number in (seed, position, step):
        bits = ((bits ^ number) + 0x9E3779B97F4A7C15) % 2**64
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        bits ^= bits >> 31
    return bits


def edge(chance: float, threshold: float) -> float:
    """How far a probability is from the threshold, which nothing can fall below if it is 0."""
    return abs(chance - threshold) if threshold else 1.0


def logit_gap(candidates: list[tuple[int, float]]) -> float:
    """Difference in logit of the first two."""
    (_, best), (_, next_best) = candidates[:2]
    return abs(math.log(max(best, TINY)) - math.log(max(next_best, TINY)))


class ThresholdBlock:
    """A block under the threshold decode of LLaDA2.0; see reference.generate."""

    edited = False

    def __init__(self, given: Sequence[int | None], size: int, mask_id: int, *, threshold: float, steps: int) -> None:
        stands = [*given, *[None] * (size - len(given))]
        self.size, self.mask_id = size, mask_id
        self.threshold, self.steps = threshold, steps
        self.ids = [mask_id if token is None else token for token in stands]
        self.open = [token is None for token in stands]
        self.fixed = [token is not None for token in stands]
        self.notes = [GIVEN] * size
        self.step_index = 0
        self.gaps: list[float] = []

    def edit(self, candidates: Candidates) -> None:
        """Nothing is edited."""
        self.gaps = [1.0]

    def step(self, candidates: Candidates) -> bool:
        """One step; returns whether it was the block's last."""
        allowed = [[(t, p) for t, p in each if t != self.mask_id] for each in candidates]
        token, conf = map(list, zip(*(each[0] for each in allowed), strict=True))
        order = sorted((i for i in range(self.size) if self.open[i]), key=lambda i: (-conf[i], i))
        least = min(quota(self.step_index, self.size, self.steps), len(order))
        sure = [i for i in order if conf[i] > self.threshold]
        chosen = sure if len(sure) >= least else order[:least]
        self.step_index += 1
        self.gaps = [1.0] + [edge(conf[i], self.threshold) for i in order] + [logit_gap(allowed[i]) for i in chosen]
        if len(sure) < least < len(order):
            self.gaps.append(conf[order[least - 1]] - conf[order[least]])
        for i in chosen:
            self.ids[i], self.open[i], self.notes[i] = token[i], False, (self.step_index, conf[i])
        return not any(self.open)


class JointBlock:
    """A block under the editing decode of LLaDA2.1.

    A step decides every open position with probability > threshold, or the most confident one, and replaces every
    decided position, given ones excepted, whose best token is another one with probability > edit_threshold. Steps
    that begin with nothing open are counted; the block is done when one changes nothing, or when nothing is open and
    max_post_edit_steps have been made. Once done it is still edited, as long as it is live.
    """

    edited = True

    def __init__(
        self,
        given: Sequence[int | None],
        size: int,
        mask_id: int,
        *,
        threshold: float,
        edit_threshold: float,
        max_post_edit_steps: int,
    ) -> None:
        stands = [*given, *[None] * (size - len(given))]
        self.size, self.mask_id = size, mask_id
        self.threshold, self.edit_threshold, self.budget = threshold, edit_threshold, max_post_edit_steps
        self.ids = [mask_id if token is None else token for token in stands]
        self.open = [token is None for token in stands]
        self.fixed = [token is not None for token in stands]
        self.notes = [GIVEN] * size
        self.step_index = self.post_edit_steps = 0
        self.gaps: list[float] = []

    def edit(self, candidates: Candidates) -> None:
        """One step after the last."""
        self.step(candidates)

    def step(self, candidates: Candidates) -> bool:
        """One step; returns whether it was the block's last."""
        allowed = [[(t, p) for t, p in each if t != self.mask_id] for each in candidates]
        token, conf = map(list, zip(*(each[0] for each in allowed), strict=True))
        order = sorted((i for i in range(self.size) if self.open[i]), key=lambda i: (-conf[i], i))
        chosen = [i for i in order if conf[i] > self.threshold] or order[:1]
        self.step_index += 1
        self.gaps = [1.0] + [edge(conf[i], self.threshold) for i in order] + [logit_gap(allowed[i]) for i in chosen]
        if len(order) > 1 and conf[order[0]] <= self.threshold:
            self.gaps.append(conf[order[0]] - conf[order[1]])
        if not order:
            self.post_edit_steps += 1
        decided = [i for i in range(self.size) if not self.open[i] and not self.fixed[i]]
        differ = [i for i in decided if token[i] != self.ids[i]]
        self.gaps += [logit_gap(allowed[i]) for i in decided]
        self.gaps += [edge(conf[i], self.edit_threshold) for i in differ]
        edited = [i for i in differ if conf[i] > self.edit_threshold]
        for i in chosen + edited:
            self.ids[i], self.open[i], self.notes[i] = token[i], False, (self.step_index, conf[i])
        spent = not any(self.open) and self.post_edit_steps >= self.budget
        return spent or (not chosen and not edited)


class LevenshteinBlock:
    """A block while LLaDA2.2 works on it: tokens, and for each whether its hole is one the block began with.

    A step takes of each position its CANDIDATES best tokens with their probabilities, best first. The best of them that
    is allowed counts: never the mask for a hole, and in the last step no mask, DELETE or SPLIT for anybody.

    *   While there are original holes, take the holes above `threshold`; if they are fewer than the schedule's number
        plus the newer holes, take that many, the most confident. Without original holes take every hole.
    *   Replace what is decided and differs from a token above `edit_threshold`, perhaps by the mask.
    *   Steps that begin without original holes are counted, anew when such a hole comes back unless
        `cumulative_budget`; the first past `max_post_edit_steps` is the last, and so is the one at the hard cap.
    *   If an earlier one of the last SEEN steps began with this very block, the least confident position that would
        change takes its best candidate that is none of the last TRIED tokens written there.
    *   DELETE drops its position; SPLIT puts a mask before the token it stands for; masks fill the end, or it is cut.
    """

    edited = True

    def __init__(
        self,
        given: Sequence[int | None],
        size: int,
        mask_id: int,
        delete_id: int,
        split_id: int,
        *,
        threshold: float = 0.5,
        edit_threshold: float = 0.0,
        steps: int | None = None,
        max_post_edit_steps: int = 16,
        cumulative_budget: bool = False,
    ) -> None:
        prompt = [token for token in given if token is not None]
        self.given, self.size = len(prompt), size
        self.mask_id, self.delete_id, self.split_id = mask_id, delete_id, split_id
        self.threshold, self.edit_threshold, self.steps = threshold, edit_threshold, steps or size
        self.budget, self.cumulative = max_post_edit_steps, cumulative_budget
        self.ids = prompt + [mask_id] * (size - len(prompt))
        self.fixed = [i < len(prompt) for i in range(size)]
        self.original = [True] * size
        self.notes = [(0, 0.0)] * size
        self.step_index = self.post_edit_steps = 0
        self.tried: list[list[int]] = [[] for _ in range(size)]
        self.seen: list[list[int]] = []
        self.gaps: list[float] = []

    @property
    def open(self) -> list[bool]:
        """Where its holes are."""
        return [i >= self.given and token == self.mask_id for i, token in enumerate(self.ids)]

    def edit(self, candidates: Candidates) -> None:
        """Once done it stays as it is: an edit could open it again."""
        self.gaps = [1.0]

    def step(self, candidates: Candidates) -> bool:
        """One step; returns whether it was the block's last."""
        size, given = self.size, self.given
        holes = [i for i in range(given, size) if self.ids[i] == self.mask_id]
        original = [i for i in holes if self.original[i]]
        if original and not self.cumulative:
            self.post_edit_steps = 0
        if not original:
            self.post_edit_steps += 1
        last = self.post_edit_steps > self.budget or self.step_index >= size + self.budget

        def allowed(i: int) -> list[tuple[int, float]]:
            never = {self.mask_id, self.delete_id, self.split_id} if last else {self.mask_id} if i in holes else set()
            return [(token, chance) for token, chance in candidates[i] if token not in never]

        token, conf = map(list, zip(*(allowed(i)[0] for i in range(size)), strict=True))
        self.gaps = [1.0] + [edge(conf[i], self.threshold) for i in holes]
        taken = holes
        if original and not last:
            order = sorted(holes, key=lambda i: (-conf[i], i))
            least = quota(self.step_index, size, self.steps) + len(holes) - len(original)
            sure = [i for i in holes if conf[i] > self.threshold]
            taken = sure if len(sure) >= least else order[:least]
            if len(sure) < least < len(holes):
                self.gaps.append(conf[order[least - 1]] - conf[order[least]])
        decided = [i for i in range(given, size) if i not in holes]
        edited = [i for i in decided if token[i] != self.ids[i] and conf[i] > self.edit_threshold]
        self.gaps += [edge(conf[i], self.edit_threshold) for i in decided if token[i] != self.ids[i]]
        written = taken + edited
        self.gaps += [logit_gap(allowed(i)) for i in taken + decided]

        if self.ids in self.seen and not last:
            changing = sorted((i for i in written if token[i] != self.ids[i]), key=lambda i: (conf[i], i))
            if changing:
                weakest = changing[0]
                if len(changing) > 1:
                    self.gaps.append(conf[changing[1]] - conf[weakest])
                self.gaps += [logit_gap(list(two)) for two in pairwise(allowed(weakest))]
                fresh = [t for t, _ in allowed(weakest) if t not in self.tried[weakest]]
                token[weakest] = fresh[0] if fresh else token[weakest]
        self.seen = ([list(self.ids)] + self.seen)[:SEEN]
        for i in written:
            if token[i] not in self.tried[i]:
                self.tried[i] = ([token[i]] + self.tried[i])[:TRIED]

        self.step_index += 1
        result: list[tuple[int, bool, tuple[int, float]]] = []
        for i in range(size):
            as_it_was = (self.ids[i], self.original[i], self.notes[i])
            if i not in written:
                result.append(as_it_was)
            elif token[i] == self.split_id:
                result += [(self.mask_id, False, (0, 0.0)), as_it_was]
            elif token[i] != self.delete_id:
                result.append((token[i], self.original[i], (self.step_index, conf[i])))
        result = (result + [(self.mask_id, False, (0, 0.0))] * size)[:size]
        self.ids, self.original, self.notes = map(list, zip(*result, strict=True))
        return last or not written
