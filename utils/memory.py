"""Memory: what autograd holds between forward and backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(function: Callable[[], object], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds for the backward pass of `function()`.

    Whole storages, each once however many saved tensors share it; those of `excluded` (parameters) do not count, those
    of inputs do when an operation saves them.
    """
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            storages[storage.data_ptr()] = storage  # keeps it alive: no other storage takes the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        result = function()
    total = sum(storage.nbytes() for storage in storages.values())
    del result  # until here, so that the graph outlives the count
    return total
