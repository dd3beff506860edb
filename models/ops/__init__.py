"""Operations with a readable reference and faster implementations of the same function."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block whose dtypes are those of its tensors; the meta device has no autocast that could be switched off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@torch.compiler.assume_constant_result  # in torch.compile 2.11, inside of which PyTorch's own answer is always yes
def is_exporting() -> bool:
    """Whether torch.export traces this."""
    return torch.compiler.is_exporting()
