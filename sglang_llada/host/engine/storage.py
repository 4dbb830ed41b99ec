"""Which weights KV in storage was computed with: it is a part of a file's name, so that no other weights find it.

The host knows KV in storage by its tokens and by the model's name. Here a file also has a name for the weights: what
they sum up to, so that a later server with the same ones finds it, and one with others does not, whatever both are
called. An update changes it. KV that is kept over an update because the user says so goes on under a name that nobody
else has, for who else finds it would take it for what one set of weights has computed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 22  # numbers that are summed at a time, which bounds the memory that it takes
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@dataclass(slots=True)
class Named:
    """The name of this process's weights; empty where no storage has to know it."""

    weights: str = ""


current = Named()


def file_name(original: Callable[[Any, str], str], storage: Any, key: str) -> str:
    """Around the host's name of a file for a key."""
    return original(storage, f"{key}.{current.weights}" if current.weights else key)


def forget_weights(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what the host does after an update: flush the cache, after which the new ones are named, or keep it."""
    if current.weights:
        current.weights = uuid.uuid4().hex
    return original(updater, *args, **kwargs)


def name_weights(scheduler: Any) -> None:
    """Name a scheduler's weights by what they are, if it has tiers; while no KV of others is left but in storage."""
    if scheduler.enable_hierarchical_cache:
        current.weights = fingerprint(scheduler.tp_worker.model_runner.model)


def name_anew(flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """After the host's flush of its cache, of device and host memory."""
    if flushed and current.weights:
        name_weights(scheduler)
    return flushed


def fingerprint(model: nn.Module) -> str:
    """The same for the same parameters under the same names, and another for others."""
    found = hashlib.sha256()
    sums = [(name, parameter, sums_of(parameter)) for name, parameter in model.named_parameters()]
    numbers = torch.cat([each for _, _, each in sums]).tolist()  # the one read of the device
    for name, parameter, _ in sums:
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    found.update(repr(numbers).encode())
    return found.hexdigest()[:16]


def sums_of(tensor: Tensor) -> Tensor:
    """Sums of a tensor's bits as whole numbers, each times its place, modulo 2^64; int64 [chunks]."""
    bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
    places = torch.arange(1, CHUNK + 1, device=bits.device)
    return torch.stack([(part * places[: len(part)]).sum() for part in bits.split(CHUNK)])
