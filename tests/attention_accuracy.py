"""How far an implementation of the op is from the float64 reference, and how far it may be.

The bound is a small multiple of the error that the literal formulation makes in the same dtype, or a few units of that
dtype's precision, whichever is larger.
"""

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.baseline import literal_polarity_attention
from models.ops.polarity_attention import polarity_attention

NAMES = ("output", "q", "k", "v", "exponent", "scale", "position")
EPSILONS = 8
CHANNELS = (8, 16, 24, 32, 33, 40, 48, 64, 96, 128)
LENGTHS = (1, 7, 49, 63, 196, 500, 1000, 3136)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spread(shape: tuple[int, ...], generator: torch.Generator, low: float, high: float) -> Tensor:
    logarithms = torch.empty(shape, dtype=torch.float64).uniform_(math.log(low), math.log(high), generator=generator)
    return logarithms.exp() * torch.empty(shape, dtype=torch.float64).bernoulli_(0.5, generator=generator).mul_(2).sub_(
        1
    )


def make_inputs(
    N: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    *,
    B: int = 1,
    h: int = 2,
    seed: int = 0,
    low: float = 0.03,
    high: float = 10.0,
    largest_exponent: float = 5.0,
    surroundings: bool = False,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v in `dtype`, exponent and, with surroundings, scale and position in float32: leaves that require grad.

    Magnitudes of q and k lie between `low` and `high`, uniform in their logarithm.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = [spread((B, m, h, d), generator, low, high).to(dtype) for m in (N, n)]
    tensors.append(torch.randn(B, n, h, d, generator=generator, dtype=torch.float64).to(dtype))
    tensors.append(1 + (largest_exponent - 1) * torch.rand(h, d, generator=generator))
    if surroundings:
        tensors += [0.5 + torch.rand(h, d, generator=generator), 0.3 * torch.randn(n, h, d, generator=generator)]
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def make_mask(B: int, n: int, seed: int = 1) -> Tensor:
    """About 60 % real keys, at least one in each image."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, n // 2] = True
    return mask


def run(backend: str, inputs: list[Tensor], key_mask: Tensor | None, cotangent: Tensor) -> list[Tensor]:
    """Output, and the gradient of every input."""
    q, k, v, exponent, *surroundings = inputs
    scale, position = surroundings or (None, None)
    if backend == "literal":
        if key_mask is not None:  # of one image: the baseline has no mask, and sees the real keys alone
            real = key_mask[0]
            k, v, position = k[:, real], v[:, real], None if position is None else position[real]
        out = literal_polarity_attention(q, k, v, exponent, scale=scale, position=position)
    else:
        out = polarity_attention(q, k, v, exponent, scale=scale, position=position, key_mask=key_mask, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def relative_errors(
    backend: str, inputs: list[Tensor], key_mask: Tensor | None = None, multiple: float = 2.0
) -> dict[str, tuple[float, float]]:
    """(relative L2 error against the float64 reference, that which is allowed) of the output and each gradient."""
    dtype = inputs[0].dtype
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    cotangent = cotangent.to(inputs[0].device)
    exact = run("reference", [t.detach().double().requires_grad_() for t in inputs], key_mask, cotangent)
    literal = run("literal", [t.detach().to(dtype).requires_grad_() for t in inputs], key_mask, cotangent)
    if not all(t.isfinite().all() for t in literal):  # float16 features overflow: then the same in float32, rounded
        literal = run("literal", [t.detach().float().requires_grad_() for t in inputs], key_mask, cotangent)
        literal = [t.to(dtype) for t in literal]
    values = run(backend, inputs, key_mask, cotangent)
    floor = EPSILONS * torch.finfo(dtype).eps
    return {
        name: (_relative(value, expected), max(multiple * _relative(plain, expected), floor))
        for name, value, plain, expected in zip(NAMES, values, literal, exact, strict=False)
    }


def _relative(value: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    difference = (value.double() - expected).norm()
    return (difference / norm).item() if norm > 0 else difference.item()


def assert_accurate(
    backend: str,
    inputs: list[Tensor],
    key_mask: Tensor | None = None,
    multiple: float = 2.0,
    further_draws: Iterable[list[Tensor]] = (),
) -> None:
    """`further_draws` are inputs of the same shape: then the geometric means over all draws are compared."""
    draws = [relative_errors(backend, each, key_mask, multiple) for each in (inputs, *further_draws)]
    for name in draws[0]:
        error, allowed = (_geometric_mean([draw[name][i] for draw in draws]) for i in (0, 1))
        assert error <= allowed, f"relative error {error:.2e} of {name} exceeds {allowed:.2e}"


def _geometric_mean(values: list[float]) -> float:
    return values[0] if len(values) == 1 else statistics.geometric_mean(max(value, 1e-30) for value in values)
