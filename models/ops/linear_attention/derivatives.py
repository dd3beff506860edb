"""Which derivatives a backend with a backward pass of its own has: the plain ones, once. The reference has all."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def beyond_plain(*tensors: Tensor | None) -> str | None:
    """What now asks for other derivatives of these tensors, or None."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func (grad, vmap, jvp, ...) transforms it"
    if forward_ad._current_level < 0:  # no tangents anywhere, without asking each tensor
        return None
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None):
        return "forward-mode AD gives it a tangent"
    return None


def refusal(backend: str, reason: str) -> str:
    return (
        f"polarity attention's {backend} backend is differentiable once, by a plain backward pass, and {reason};"
        " backend='reference' (MODEL.LA.BACKEND of a model) has every derivative"
    )


def check_backward(backend: str, grad_out: Tensor) -> None:
    """Raises RuntimeError where a backward pass has to be differentiable, or to take a batch of gradients at once."""
    if torch.compiler.is_compiling():  # with gradients on, whatever was asked for
        return
    reason = beyond_plain(grad_out)
    if torch.is_grad_enabled():
        reason = "create_graph=True asks for more"
    elif torch._C._functorch.is_legacy_batchedtensor(grad_out):
        reason = "is_grads_batched=True or vectorize=True asks for many at once"
    if reason is not None:
        raise RuntimeError(refusal(backend, reason))
