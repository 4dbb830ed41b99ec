"""What kernels must know of the device that they are launched on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Card(NamedTuple):
    """A kind of GPU: its compute capability, and how many multiprocessors it has."""

    capability: tuple[int, int]
    multiprocessors: int


INTERPRETER = Card((0, 0), 3)
known: dict[torch.device, Card] = {}  # what was asked once; who compiles for a device that is not there says it here


def card_of(device: torch.device) -> Card:
    """The card of a device; what is no GPU is Triton's interpreter."""
    if device not in known:
        known[device] = asked(device) if device.type == "cuda" else INTERPRETER
    return known[device]


def asked(device: torch.device) -> Card:
    """What the driver says of a GPU."""
    import torch

    card = torch.cuda.get_device_properties(device)
    return Card((card.major, card.minor), card.multi_processor_count)
