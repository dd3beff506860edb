"""Operations with a readable reference and faster implementations of the same function."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block whose dtypes are those of its tensors; the meta device has no autocast that could be switched off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
