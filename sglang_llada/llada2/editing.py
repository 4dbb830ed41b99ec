"""The references of LLaDA2.1's and 2.2's editing decodes: all recomputed each step, positions walked over in Python."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from sglang_llada.config import ALGORITHMS, DecodeConfig
from sglang_llada.llada2.checkpoint import CheckpointFacts
from sglang_llada.llada2.reference import Generation, Llada2ForDiffusion, generate, quota


def generate_as(
    params: DecodeConfig, model: Llada2ForDiffusion, prompt_ids: list[int], max_new_tokens: int, facts: CheckpointFacts
) -> Generation:
    """The reference of whatever the parameters ask for."""
    ids: dict[str, Any] = {"mask_id": facts.mask_id, "stop_ids": facts.stop_ids}
    if params.algorithm == "levenshtein":
        ids |= {"delete_id": facts.delete_id, "split_id": facts.split_id}
    values = {p.name: getattr(params, p.name) for p in ALGORITHMS[params.algorithm]}
    loop = {"threshold": generate, "joint_threshold": generate_joint, "levenshtein": generate_levenshtein}
    out: Generation = loop[params.algorithm](model, prompt_ids, max_new_tokens, **ids, **values)  # type: ignore[operator]
    return out


@torch.no_grad()
def generate_joint(
    model: Llada2ForDiffusion,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    mask_id: int,
    stop_ids: Iterable[int] = (),
    threshold: float = 0.7,
    edit_threshold: float = 0.5,
    max_post_edit_steps: int = 16,
) -> Generation:
    """Joint-threshold decode of LLaDA2.1, greedy, one block after the other.

    A step decides every open position with probability > threshold, or the most confident one, and replaces every
    decided position of the block, the prompt's excepted, whose best token is another one with probability >
    edit_threshold. Steps that begin with nothing open are counted; the block is done when one changes nothing, and the
    first past max_post_edit_steps changes nothing. The answer ends with the first stop token or the last allowed token
    of a block that is done.
    """
    size, stops = model.config.block_size, frozenset(stop_ids)
    known = list(prompt_ids)
    limit = len(prompt_ids) + max_new_tokens
    out = Generation([], "length", 0)
    while len(known) < limit:
        start = len(known) // size * size
        first = len(known) - start
        block = known[start:] + [mask_id] * (size - first)
        is_open = [i >= first for i in range(size)]
        decided_in = [0] * size
        step = post_edit_steps = 0
        while True:
            logits = model.block_causal(known[:start] + block)[start:]
            out.forwards += 1
            step += 1
            probs = logits.softmax(-1)
            logits[:, mask_id] = float("-inf")
            best = [min(row.eq(row.max()).nonzero().flatten().tolist()) for row in logits]
            conf = [probs[i, best[i]].item() for i in range(size)]
            gaps = [1.0]  # to the nearest decision that could have gone the other way
            candidates = sorted((i for i in range(size) if is_open[i]), key=lambda i: (-conf[i], i))
            chosen = [i for i in candidates if conf[i] > threshold] or candidates[:1]
            gaps += [abs(conf[i] - threshold) for i in candidates]
            if candidates and conf[candidates[0]] <= threshold and len(candidates) > 1:
                gaps.append(conf[candidates[0]] - conf[candidates[1]])
            if not candidates:
                post_edit_steps += 1
            edited = []
            if candidates or post_edit_steps <= max_post_edit_steps:
                for i in range(first, size):
                    if not is_open[i]:
                        two = logits[i].topk(2).values
                        gaps += [(two[0] - two[1]).item()] + [abs(conf[i] - edit_threshold)] * (best[i] != block[i])
                        if best[i] != block[i] and conf[i] > edit_threshold:
                            edited.append(i)
            for i in chosen:
                two = logits[i].topk(2).values
                gaps.append((two[0] - two[1]).item())
            out.margins.append(min(gaps))
            for i in chosen + edited:
                block[i], is_open[i], decided_in[i] = best[i], False, step
            if not chosen and not edited:
                break
        keep = size
        for i in range(first, size):
            if block[i] in stops or start + i + 1 == limit:
                keep = i + 1
                break
        known += block[first:keep]
        out.token_ids += block[first:keep]
        out.step_map += decided_in[first:keep]
        if known[-1] in stops:
            out.finish = "stop"
            break
    return out


CANDIDATES, TRIED, SEEN = 5, 4, 64  # what is looked at and remembered; see generate_levenshtein


@torch.no_grad()
def generate_levenshtein(
    model: Llada2ForDiffusion,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    mask_id: int,
    delete_id: int,
    split_id: int,
    stop_ids: Iterable[int] = (),
    **params: Any,
) -> Generation:
    """Inserting and deleting decode of LLaDA2.2, greedy, one block after the other; params as for LevenshteinBlock."""
    size, stops = model.config.block_size, frozenset(stop_ids)
    known = list(prompt_ids)
    limit = len(prompt_ids) + max_new_tokens
    out = Generation([], "length", 0)
    while len(known) < limit:
        start = len(known) // size * size
        first = len(known) - start
        block = LevenshteinBlock(known[start:], size, mask_id, delete_id, split_id, **params)
        done = False
        while not done:
            logits = model.block_causal(known[:start] + block.ids)[start:]
            out.forwards += 1
            probs = logits.softmax(-1)
            best = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:CANDIDATES] for row in logits.tolist()]
            done = block.step([[(i, row[i].item()) for i in ids] for row, ids in zip(probs, best, strict=True)])
            out.margins.append(min(block.gaps))
        keep = size
        for i in range(first, size):
            if block.ids[i] in stops or start + i + 1 == limit:
                keep = i + 1
                break
        known += block.ids[first:keep]
        out.token_ids += block.ids[first:keep]
        if known[-1] in stops:
            out.finish = "stop"
            break
    return out


def gap(candidates: list[tuple[int, float]]) -> float:
    """Difference in logit of the two best."""
    (_, best), (_, next_best) = candidates[:2]
    return math.log(max(best, 1e-30)) - math.log(max(next_best, 1e-30))


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

    def __init__(
        self,
        given: list[int],
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
        self.given, self.size = len(given), size
        self.mask_id, self.delete_id, self.split_id = mask_id, delete_id, split_id
        self.threshold, self.edit_threshold, self.steps = threshold, edit_threshold, steps or size
        self.budget, self.cumulative = max_post_edit_steps, cumulative_budget
        self.ids = given + [mask_id] * (size - len(given))
        self.original = [True] * size
        self.step_index = self.post_edit_steps = 0
        self.tried: list[list[int]] = [[] for _ in range(size)]
        self.seen: list[list[int]] = []
        self.gaps: list[float] = []

    def step(self, candidates: list[list[tuple[int, float]]]) -> bool:
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
        self.gaps = [1.0] + [abs(conf[i] - self.threshold) for i in holes]
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
        self.gaps += [abs(conf[i] - self.edit_threshold) for i in decided if token[i] != self.ids[i]]
        written = taken + edited
        self.gaps += [gap(allowed(i)) for i in taken + decided]

        if self.ids in self.seen and not last:
            changing = sorted((i for i in written if token[i] != self.ids[i]), key=lambda i: (conf[i], i))
            if changing:
                weakest = changing[0]
                if len(changing) > 1:
                    self.gaps.append(conf[changing[1]] - conf[weakest])
                self.gaps += [gap(list(two)) for two in pairwise(allowed(weakest))]
                fresh = [t for t, _ in allowed(weakest) if t not in self.tried[weakest]]
                token[weakest] = fresh[0] if fresh else token[weakest]
        self.seen = ([list(self.ids)] + self.seen)[:SEEN]
        for i in written:
            if token[i] not in self.tried[i]:
                self.tried[i] = ([token[i]] + self.tried[i])[:TRIED]

        result: list[tuple[int, bool]] = []
        for i in range(size):
            if i not in written:
                result.append((self.ids[i], self.original[i]))
            elif token[i] == self.split_id:
                result += [(self.mask_id, False), (self.ids[i], self.original[i])]
            elif token[i] != self.delete_id:
                result.append((token[i], self.original[i]))
        result = (result + [(self.mask_id, False)] * size)[:size]
        self.ids, self.original = [t for t, _ in result], [o for _, o in result]
        self.step_index += 1
        return last or not written
