"""Noise for draws: of each position and token a number that hashes seed, position, step and id, and nothing else.

It is the same on every rank, in every batch and however the vocabulary is cut. Added to logits, noise of Gumbel's
distribution makes the highest of them a draw from their softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = (1 << 32) - 1
UNIT, MOST = 2.0**-32, 1 - 2.0**-24


def hashed(seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """64 bits from each triple of int64, as int64."""
    return mix(mix(mix(seed) ^ position) ^ step)


def mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64 that wrap."""
    z = x + -0x61C8864680B583EB
    z = (z ^ logical_shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ logical_shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ logical_shift(z, 31)


def logical_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(key: Tensor, ids: Tensor) -> Tensor:
    """Noise fp32 [P, v] of positions with these keys, int64 [P], for token ids, int64 [v]."""
    uniform = ((words(key, ids).float() + 0.5) * UNIT).clamp(max=MOST)
    return -(-torch.log1p(-uniform)).log()  # so that small exponentials, which win, are told apart finely


def words(key: Tensor, ids: Tensor) -> Tensor:
    """32 bits of each, int64 [P, v]: a hash of two multiplications (Wellons 2018), with half of the key before each."""
    low, high = key[:, None] & WORD, key[:, None] >> 32 & WORD
    x = ids ^ low
    x = (x ^ x >> 16) * 0x7FEB352D & WORD ^ high
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16
