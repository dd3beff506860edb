"""PyTorch's operators of this package: functions that the dispatcher knows, with what autograd and tracing ask of them.

By the dispatcher's own registration: what `torch.library.custom_op` checks at each call took a quarter of the time that
the host needed for a forward and backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("polaformer", "FRAGMENT")


def operator(name: str, function: Callable, fake: Callable) -> Any:
    """Register a function as PyTorch's operator polaformer::name, once in a process, and return it.

    A second copy of this package (`models` beside `polaformer`) takes the operator of the first. `fake` takes the same
    arguments and makes empty outputs.
    """
    if not hasattr(torch.ops.polaformer, name):
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"polaformer::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.polaformer, name).default


def differentiable(forward: Any, setup_context: Callable, backward: Callable) -> None:
    """Give an operator a derivative: what an autograd.Function has, the first output being what gradients flow to."""
    name = forward.name().removeprefix("polaformer::")
    if torch._C._dispatch_has_kernel_for_dispatch_key(forward.name(), "Autograd"):  # of the other copy
        return

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = forward(*arguments)
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)
            setup_context(ctx, arguments, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            return Function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*arguments)

    _LIBRARY.impl(name, call, "Autograd")
