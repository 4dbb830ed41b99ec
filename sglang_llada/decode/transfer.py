"""From the host to a device without waiting for it: a copy from pageable memory would first wait for all enqueued."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on the device."""
    return host if torch.device(device).type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def copy_to(static: Tensor, host: Tensor) -> None:
    """A host tensor into one that lies on a device: one copy, where to_device and copy_ would be two."""
    static.copy_(host if static.device.type == "cpu" else host.pin_memory(), non_blocking=True)
