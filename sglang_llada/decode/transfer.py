"""From the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on the device. A copy from pageable memory would first wait for all that is enqueued there."""
    return host if torch.device(device).type == "cpu" else host.pin_memory().to(device, non_blocking=True)
