"""Sampling, for positions of requests that ask for it: one draw per position and step, from whole logits (whole.py).

The tokens' distribution is the softmax of logits / temperature, the mask left out, cut by top-k, top-p and min-p as the
host's sampler cuts it and scaled to 1 again. The draw takes the token at which the distribution's sum, in order of ids,
passes a number in [0, 1). That number is a hash of the request's seed, the position and the number of its decode step,
so it depends on nothing else: not on the batch, its order, the number of ranks or what ran before. The probability of
the drawn token in this distribution is the confidence by which an algorithm decides.

Here is the definition, by sorting; on a CUDA device a kernel does the same without it (sampling_triton.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_llada.decode.contract import Draws

UNIT = 2.0**-53


def draw(logits: Tensor, mask_id: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Sampled tokens, int64 [P], and their probabilities, fp32 [P], from logits fp32 [P, V], which are spoilt.

    A position whose logits hold a NaN or plus infinity, or only minus infinity, has token -1 and probability 0.
    """
    if logits.is_cuda:
        from sglang_llada.decode import sampling_triton

        return sampling_triton.draw(logits, mask_id, draws)
    return draw_sorted(logits, mask_id, draws)


def warm_up(vocabulary: int, mask_id: int, device: torch.device | str) -> None:
    """Draw once, so that no request waits for a kernel to be compiled."""
    one = torch.ones(1, device=device)
    how = Draws(temperature=one, top_k=one.long(), top_p=one, min_p=one * 0, noise=one.double() * 0, whole=0)
    draw(torch.zeros(1, vocabulary, device=device), mask_id, how)


def draw_sorted(logits: Tensor, mask_id: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """As draw, in torch."""
    sound = logits.amax(-1).isfinite()
    logits[:, mask_id] = float("-inf")
    chances = (logits / draws.temperature[:, None]).softmax(-1)
    uncut, cut = slice(draws.whole), slice(draws.whole, None)
    token, prob = sample(chances[uncut], draws.noise[uncut])
    if draws.whole < len(chances):
        left = cut_off(chances[cut], draws.top_k[cut], draws.top_p[cut], draws.min_p[cut])
        others = sample(left, draws.noise[cut])
        token, prob = torch.cat((token, others[0])), torch.cat((prob, others[1]))
    return token.where(sound, -1), prob.where(sound, 0.0)


def cut_off(chances: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities [P, V] with 0 where they are cut.

    Of a list in falling order, of equals the lowest id first, the first top_k stay, of those the ones before which at
    most top_p has been summed up, and those with at least min_p times the first one's probability.
    """
    falling, order = chances.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    rank = torch.arange(chances.shape[-1], device=chances.device)
    stays = (rank < top_k[:, None]) & (before <= top_p[:, None]) & (falling >= falling[:, :1] * min_p[:, None])
    # Back in order of ids: a draw from the falling list would hang on the order of nearly equal ones.
    return chances.masked_fill(~torch.zeros_like(stays).scatter(-1, order, stays), 0.0)


def sample(chances: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of weights [P, V] the id that noise [P] falls on, and its share of the sum, fp32 [P]."""
    upto = chances.double().cumsum(-1)
    total = upto[:, -1:]
    token = torch.searchsorted(upto, total * noise[:, None].clamp(max=1 - 2 * UNIT), right=True)
    token = token.clamp(max=chances.shape[-1] - 1)  # a row of NaN
    return token[:, 0], (chances.gather(-1, token) / total).float()[:, 0]


def uniform(seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """A number in [0, 1) from each triple of int64: 53 bits of a hash, as fp64."""
    bits = mix(mix(mix(seed) ^ position) ^ step)
    return (logical_shift(bits, 11)).double() * UNIT


def mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64 that wrap."""
    z = x + -0x61C8864680B583EB
    z = (z ^ logical_shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ logical_shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ logical_shift(z, 31)


def logical_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
