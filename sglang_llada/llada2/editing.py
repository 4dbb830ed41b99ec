"""The reference of LLaDA2.1's editing decode: all recomputed each step, positions walked over in Python."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sglang_llada.llada2.reference import Generation, Llada2ForDiffusion


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
