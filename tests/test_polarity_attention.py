"""The polarity attention op against its literal reference in float64.

pytest tests/test_polarity_attention.py
"""

import itertools

import pytest
import torch
from literal_models import polarity_core

from models.ops.polarity_attention import choose_backend, polarity_attention


def _inputs(B=2, N=11, n=7, h=3, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, m, h, d, generator=generator, dtype=torch.float64) for m in (N, n, n))
    exponent = 1 + 4 * torch.rand(h, d, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (q, k, v, exponent)]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize(("d", "N", "n"), [(8, 11, 7), (5, 1, 1), (1, 3, 4), (32, 49, 49), (33, 64, 1), (24, 2, 63)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_explicit_form_in_float64(backend, d, N, n, masked):
    q, k, v, exponent = _inputs(d=d, N=N, n=n)
    mask = None
    if masked:
        mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[:, 0] = True
    out = polarity_attention(q, k, v, exponent, key_mask=mask, backend=backend)
    expected = torch.empty_like(out)
    for b, head in itertools.product(range(2), range(3)):
        real = None if mask is None else mask[b]
        expected[b, :, head] = polarity_core(
            q[b : b + 1, :, head], k[b : b + 1, :, head], v[b : b + 1, :, head], exponent[head], real
        )[0]
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-13)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v, exponent), cotangent)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v, exponent), cotangent), strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    inputs = _inputs(B=1, N=4, n=3, h=2, d=4)
    assert torch.autograd.gradcheck(polarity_attention, inputs)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_gradients_at_zero_and_in_all_zero_rows_are_finite(backend):
    q, k, v, exponent = _inputs(dtype=torch.float32)
    with torch.no_grad():
        q[0, 3] = 0
        k[0, :, :, 2] = 0
        q[1] = 0
        exponent[0, 0] = 1.0  # the smallest exponent: its base gradient at 0 is that of |u|
    out = polarity_attention(q, k, v, exponent, backend=backend)
    assert (out[1] == 0).all()
    out.sum().backward()
    for tensor in (q, k, v, exponent):
        assert tensor.grad.isfinite().all()


def test_exponent_gradient_at_exact_zeros_is_zero():
    q, k, v, exponent = _inputs()
    with torch.no_grad():
        q[..., 0] = 0
        k[..., 0] = 0
    polarity_attention(q, k, v, exponent).sum().backward()
    assert (exponent.grad[:, 0] == 0).all()
    assert (exponent.grad[:, 1:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_accumulated_in_float32(dtype):
    inputs = _inputs(N=300, n=3000, d=16, dtype=dtype)
    expected = polarity_attention(*[tensor.detach().double() for tensor in inputs], backend="reference")
    with torch.autocast("cpu", dtype):
        out = polarity_attention(*inputs)
    assert out.dtype == dtype
    error = (out.double() - expected).norm() / expected.norm()
    assert error < torch.finfo(dtype).eps  # rounding of the result alone: float32 inside
    out.sum().backward()
    assert all(tensor.grad.dtype == dtype and tensor.grad.isfinite().all() for tensor in inputs)


def test_large_powers_do_not_overflow_in_float16():
    q, k, v, exponent = _inputs(dtype=torch.float16)
    with torch.no_grad():
        q.mul_(20)
        exponent.fill_(5.0)  # 60 ** 5 is far beyond float16's 65504
    out = polarity_attention(q, k, v, exponent)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("garbage", [100.0, 1e30, float("inf"), float("nan")])
def test_masked_keys_have_no_influence_at_all(backend, garbage):
    q, k, v, exponent = _inputs()
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    out = polarity_attention(q, k, v, exponent, key_mask=mask, backend=backend)
    noise = torch.where(mask[:, :, None, None], 0.0, garbage)
    noisy = polarity_attention(q, k + noise, v - noise, exponent, key_mask=mask, backend=backend)
    assert torch.equal(out, noisy)
    gradients = torch.autograd.grad(noisy.sum(), (q, k, v, exponent))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][~mask] == 0).all()
    short = polarity_attention(q[:1], k[:1, mask[0]], v[:1, mask[0]], exponent)
    assert torch.allclose(out[:1], short, rtol=1e-12, atol=1e-14)


def test_a_row_without_real_keys_is_zero():
    q, k, v, exponent = _inputs()
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0] = True
    out = polarity_attention(q, k, v, exponent, key_mask=mask)
    assert (out[1] == 0).all()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v, exponent))


def test_streams_read_their_own_half_of_the_values():
    """Same-signed queries and keys give the first half, opposite-signed ones the second."""
    q = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    v = torch.arange(1.0, 5.0, dtype=torch.float64).reshape(1, 1, 1, 4)
    exponent = torch.full((1, 4), 2.0, dtype=torch.float64)
    same = polarity_attention(q, q, v, exponent).flatten()
    opposite = polarity_attention(q, -q, v, exponent).flatten()
    assert torch.allclose(same, torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(opposite, torch.tensor([0.0, 0.0, 3.0, 4.0], dtype=torch.float64), atol=1e-5)


def test_wrong_arguments_are_named():
    q, k, v, exponent = _inputs()
    with pytest.raises(ValueError, match="do not fit queries"):
        polarity_attention(q, k[:, :3], v, exponent)
    with pytest.raises(ValueError, match=r"exponent has shape \(3, 7\)"):
        polarity_attention(q, k, v, exponent[:, :7])
    with pytest.raises(ValueError, match="key_mask is"):
        polarity_attention(q, k, v, exponent, key_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        choose_backend("cuda")
