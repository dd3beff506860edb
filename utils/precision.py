"""Numerical precision: which type autocast uses, and float32 that really is float32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from utils.devices import has_bfloat16


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type called bfloat16 or float16; auto is bfloat16 where the device computes in it, else float16."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype`, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 off in matrix products and convolutions, and back to what it was after."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
