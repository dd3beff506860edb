"""Linear attention with all that lies between two projections, by Triton: (attention + depthwise convolution of v)·g.

Three kernels forward, five backward, and no copies: the kernels read q, k, v and g where the projection left them, make
of the parameters what they need, and write into the projection's one gradient.

Letters: B images, N queries, n keys, C channels, h heads, d = C/h channels per head, K the side of the convolution.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..rotary import Rotary
from .backends import Raw
from .derivatives import check_backward
from .operators import differentiable, operator
from .triton_local import learned_backward_kernel, local_backward_kernel, local_kernel
from .triton_op import Gating, Launch, multiprocessors

EPS = 1e-6
# Of the convolution: elements of a tile, warps, and programs that each multiprocessor is given where they sum.
TILE_ELEMENTS, WARPS, PROGRAMS = 4096, 4, 4


class _Parts:
    """q, k, v and g of the projections, (B, ·, h, d) or None, and the map that is convolved."""

    def __init__(self, x: Tensor, kv: Tensor | None, local: Tensor | None, heads: int, gated: bool) -> None:
        count = (1 if kv is not None else 3) + gated
        parts = [part.unflatten(-1, (heads, -1)) for part in x.chunk(count, dim=-1)]
        self.gate = parts.pop() if gated else None
        if kv is not None:
            parts += [part.unflatten(-1, (heads, -1)) for part in kv.chunk(2, dim=-1)]
        self.q, self.k, self.v = parts
        self.local = self.v if local is None else local.unflatten(-1, (heads, -1))


def _launch(
    parts: _Parts,
    first: Tensor | None,
    second: Tensor | None,
    position: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_map: str,
    alpha: float,
) -> Launch:
    if position is not None:
        position = position.unflatten(-1, parts.q.shape[2:])
    return Launch(parts.q, parts.k, parts.v, first, second, position, None, cos, sin, feature_map, EPS, alpha)


def launch_options(channels: int, kernel_size: int, *, shared: bool = True) -> dict[str, Any]:
    """Compile-time constants of the convolution's kernels, without the number of heads, which may share its weight."""
    padded = max(16, triton.next_power_of_2(channels))
    places = triton.next_power_of_2(kernel_size**2 + 1)
    sizes = {"D": channels, "DP": padded, "T": TILE_ELEMENTS // padded, "K": kernel_size, "KP": places}
    return {**sizes, "SHARED": shared, "num_warps": WARPS, "num_stages": 2}


def _constants(call: Launch, weight: Tensor, *without: str) -> dict[str, Any]:
    options = launch_options(call.D, weight.shape[-1], shared=len(weight) == call.D)
    return {"H": call.H, **{name: value for name, value in options.items() if name not in without}}


def _forward_fake(
    x, kv, local, first, second, position, cos, sin, weight, bias, heads, gated, feature_map, alpha, width
):
    B, N, C = x.shape
    C //= (1 if kv is not None else 3) + gated
    d = C // heads
    out = x.new_empty(B, N, heads, d)
    return x.new_empty(B, N, C), out, x.new_empty(B, heads, 2, d + 1, d, dtype=torch.float32)


def _backward_fake(grad, x, kv, local, first, second, position, cos, sin, weight, bias, *rest):
    tensors = (x, kv, local, first, second, position, weight, bias)
    return tuple(x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)


def forward(
    x: Tensor,
    kv: Tensor | None,
    local: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    position: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    gated: bool,
    feature_map: str,
    alpha: float,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (B, N, C), and for the backward pass what the gate multiplies, (B, N, h, d), and attention's state."""
    parts = _Parts(x, kv, local, heads, gated)
    call = _launch(parts, first, second, position, cos, sin, feature_map, alpha)
    v, gate = parts.local, parts.gate
    result = torch.empty(call.q.shape, dtype=x.dtype, device=x.device)
    tokens = call.B * call.N
    with torch.cuda.device_of(x):
        out, state = call.forward()
        constants = _constants(call, weight, "KP")
        local_kernel[(triton.cdiv(tokens, constants["T"]) * call.H,)](
            out, v, gate, weight, bias, result,
            *v.stride()[1:3], *_strides(gate), tokens, call.N // width, width, HAS_GATE=gated, **constants,
        )  # fmt: skip
    return result.flatten(2), out, state


def backward(
    grad: Tensor,
    x: Tensor,
    kv: Tensor | None,
    local: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    position: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    state: Tensor,
    heads: int,
    gated: bool,
    feature_map: str,
    alpha: float,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, kv, local, first, second, position, weight and bias; empty where there is nothing."""
    parts = _Parts(x, kv, local, heads, gated)
    call = _launch(parts, first, second, position, cos, sin, feature_map, alpha)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_kv, grad_local, grad_first, grad_second, grad_weight, grad_bias = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (kv, local, first, second, weight, bias)
    )
    own = _Parts(grad_x, grad_kv, grad_local, heads, gated)
    grad = grad.contiguous().unflatten(-1, (heads, -1))  # maps one after the other
    v, gate = parts.local, parts.gate
    gating, of_sum = None, grad
    if gate is not None and own.gate is not None:
        of_sum = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        gating = Gating(gate, out, own.gate, of_sum)
    K = weight.shape[-1]
    tokens = call.B * call.N
    constants = _constants(call, weight)
    tiles = triton.cdiv(tokens, constants["T"])
    programs = min(tiles, max(1, PROGRAMS * multiprocessors(x.device) // heads))
    sums = call.empty(programs, heads, K * K + 1, call.D)
    with torch.cuda.device_of(x):
        moments, grad_state = call.query_backward(grad, state, own.q, gating)
        local_backward_kernel[(programs * heads,)](
            of_sum, v, weight, own.local, sums,
            *of_sum.stride()[1:3], *v.stride()[1:3], tokens, triton.cdiv(tiles, programs), call.N // width, width,
            ROW=own.local.stride(1), **constants,
        )  # fmt: skip
        key_moments = call.key_backward(state, grad_state, own.k, own.v, local=local is None)
        learned_backward_kernel[(K * K + 2, heads)](
            moments, key_moments, sums, *call.learned, grad_first, grad_second, grad_weight, grad_bias,
            len(moments), 0 if key_moments is None else len(key_moments), programs,
            MAP=feature_map, ALPHA=alpha, **_constants(call, weight, "T", "KP"),
        )  # fmt: skip
        grad_position = None if position is None else own.k.flatten(2).sum(dim=0, dtype=position.dtype)
    absent = (x.new_empty(0) if t is None else t for t in (grad_kv, grad_local, grad_first, grad_second, grad_position))
    return grad_x, *absent, grad_weight, grad_bias  # type: ignore[return-value]  # as many as are declared


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if t is None else t.stride()[1:3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.options = inputs[10:]


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    check_backward("triton", grad)
    found = gated_backward(grad, *ctx.saved_tensors, *ctx.options)
    x_and_learned, (grad_weight, grad_bias) = found[:6], found[6:]
    needed = (*x_and_learned, None, None, grad_weight, grad_bias)
    given = ctx.saved_tensors[:10]
    return (*(None if t is None else gradient for t, gradient in zip(given, needed, strict=True)), *(None,) * 5)


gated_forward = operator("gated_linear_attention", forward, _forward_fake)
gated_backward = operator("gated_linear_attention_backward", backward, _backward_fake)
differentiable(gated_forward, _setup_context, _backward)


def gated_linear_attention(
    x: Tensor,
    kv: Tensor | None,
    local: Tensor | None,
    raw: Raw,
    convolution: torch.nn.Conv2d,
    num_heads: int,
    gate: bool,
    grid: tuple[int, int],
    position: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """(attention + convolution of the map)·g, (B, N, C) in the dtype of x; differentiable once.

    Args:
        x: (B, N, ·), the channels of q, without `kv` of k and v, and with `gate` of g.
        kv: (B, n, 2C), the channels of k and v of a reduced map.
        local: (B, N, C) the map that is convolved; None: v.
        raw: the feature map and what it is made of.
        convolution: depthwise, with a kernel for each channel of a head, or of all.
        grid: (H, W), H·W = N.
        position: (n, C), added to the keys.
        rotary: turns of the tokens, for self-attention alone.
    """
    feature_map, first, second, alpha = raw
    x = x.contiguous()  # maps one after the other
    kv, local = (None if t is None else t.contiguous() for t in (kv, local))
    cos, sin = (None, None) if rotary is None else (table.float() for table in rotary)
    arguments = (position, cos, sin, convolution.weight, convolution.bias, num_heads, gate, feature_map, alpha, grid[1])
    out: Tensor = gated_forward(x, kv, local, first, second, *arguments)[0]
    return out
