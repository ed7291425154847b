"""Small copies between host and device that neither side waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """``array`` on the device. An ordinary copy would make the host wait for all queued work."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def index_on(rows: list[int], device: torch.device) -> torch.Tensor:
    """Row numbers as an index, [len(rows)] int64 on the device."""
    return to_device(np.array(rows, dtype=np.int64), device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the host; from a GPU its values are there once the stream has passed."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
