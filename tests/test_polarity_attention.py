"""The polarity attention op against its literal reference in float64.

pytest tests/test_polarity_attention.py
"""

import itertools
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from attention_accuracy import make_inputs, make_mask, run
from conftest import DEVICE, ROOT
from conftest import run as run_training
from literal_models import polarity_core
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from config import ConfigError
from models.ops import polarity_attention as package
from models.ops.linear_attention import backends, triton_op
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


@pytest.mark.parametrize("backend", ["eager", "triton", "reference", "auto"])
@pytest.mark.parametrize(
    ("B", "N", "n", "h", "d"), [(0, 3, 5, 2, 4), (2, 0, 5, 2, 4), (2, 3, 0, 2, 4), (2, 0, 0, 2, 4), (2, 3, 5, 0, 4)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_of_nothing_comes_nothing_and_without_keys_zero(backend, B, N, n, h, d, masked):
    shapes = [(B, N, h, d), (B, n, h, d), (B, n, h, d), (h, d), (h, d), (n, h, d)]
    inputs = [torch.full(shape, 1.5, device=DEVICE, requires_grad=True) for shape in shapes]
    q, k, v, exponent, scale, position = inputs
    mask = torch.ones(B, n, dtype=torch.bool, device=DEVICE) if masked else None
    out = polarity_attention(q, k, v, exponent, scale=scale, position=position, key_mask=mask, backend=backend)
    assert out.shape == q.shape and (out == 0).all()
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


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
    with pytest.raises(ValueError, match=r"scale has shape \(8,\)"):
        polarity_attention(q, k, v, exponent, scale=torch.ones(8))
    with pytest.raises(ValueError, match=r"position has shape \(1, 3, 8\)"):
        polarity_attention(q, k, v, exponent, position=torch.ones(1, 3, 8))
    with pytest.raises(ValueError, match="expected one floating dtype"):
        polarity_attention(q, k.float(), v, exponent)
    with pytest.raises(ValueError, match="eps is 0"):
        polarity_attention(q, k, v, exponent, eps=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a backend
# ---------------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_auto_is_eager_on_a_cpu_and_the_environment_changes_it_for_a_run(monkeypatch):
    assert choose_backend("auto", CPU) == "eager"
    monkeypatch.setattr(package, "AUTO", "reference")
    assert choose_backend("auto", CPU) == "reference"
    assert choose_backend("eager", CPU) == "eager"  # a name stands
    monkeypatch.setattr(package, "AUTO", "fast")
    with pytest.raises(ValueError, match="POLARITY_ATTENTION_BACKEND 'fast' is no backend"):
        choose_backend("auto", CPU)


def test_a_named_backend_that_cannot_run_gives_its_reason(monkeypatch):
    with pytest.raises(ValueError, match="backend 'cuda' is no backend of polarity attention, expected auto, eager"):
        choose_backend("cuda", CPU)
    with pytest.raises(ValueError, match="computes in float32, bfloat16 or float16, the queries are float64"):
        choose_backend("triton", torch.device(DEVICE), torch.float64, 32)
    with pytest.raises(ValueError, match="up to 128 channels per head, the queries have 129"):
        choose_backend("triton", torch.device(DEVICE), torch.float32, 129)
    monkeypatch.setattr(triton_op, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="triton backend cannot run: it needs a CUDA device"):
        choose_backend("triton", CPU)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        choose_backend("triton", CPU)


def test_auto_on_a_gpu_depends_on_what_its_shared_memory_holds(monkeypatch):
    """An Ampere GPU (163 KB) takes bfloat16 at 128 channels and not float32; Hopper (227 KB) takes both."""
    cuda = torch.device("cuda", 0)
    for bytes_available, expected in ((166912, "eager"), (232448, "triton")):
        properties = types.SimpleNamespace(shared_memory_per_block_optin=bytes_available)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert choose_backend("auto", cuda, torch.float32, 128) == expected
        assert choose_backend("auto", cuda, torch.bfloat16, 128) == "triton"
        assert choose_backend("auto", cuda, torch.float64, 32) == "eager"


def test_a_run_announces_the_backend_that_the_environment_names(tiny):
    settings = {"POLARITY_ATTENTION_BACKEND": "reference", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "main.py", "--cfg", str(tiny), "--throughput", "--batch-size", "2"],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "polarity attention backend: reference" in result.stdout


@pytest.mark.skipif(DEVICE == "cuda", reason="triton can run there")
def test_a_run_refuses_a_backend_that_cannot_run(tiny, monkeypatch):
    monkeypatch.setattr(triton_op, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="triton backend cannot run: it needs a CUDA device"):
        run_training(tiny, "MODEL.LA.BACKEND triton")


# ---------------------------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator
# ---------------------------------------------------------------------------------------------------------------------


def _single(N=20, n=12, h=2, d=8, surroundings=True):
    inputs = make_inputs(N, n, d, torch.float32, B=2, h=h, surroundings=surroundings, device=DEVICE)
    return [*inputs, *([] if surroundings else [None, None])]


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("surroundings", [True, False])
def test_opcheck(surroundings):
    inputs = _single(surroundings=surroundings)
    mask = make_mask(2, 12).to(DEVICE) if surroundings else None
    torch.library.opcheck(torch.ops.polaformer.linear_attention, (*inputs, mask, None, None, "power", 1e-6))
    inputs = [None if t is None else t.detach() for t in inputs]
    out, state = torch.ops.polaformer.linear_attention(*inputs, mask, None, None, "power", 1e-6)
    torch.library.opcheck(
        torch.ops.polaformer.linear_attention_backward,
        (torch.ones_like(out), *inputs, mask, None, None, state, "power", 1e-6),
    )


def test_the_triton_op_compiles_in_one_piece():
    compiled = torch.compile(
        lambda *tensors: polarity_attention(*tensors, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    inputs = make_inputs(20, 12, 8, torch.float32, device=DEVICE)
    cotangent = torch.ones_like(inputs[0])
    expected = [*run("triton", inputs, None, cotangent)]
    out = compiled(*inputs)
    for value, wanted in zip((out, *torch.autograd.grad(out, inputs, cotangent)), expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.slow
def test_two_layers_compile_in_one_piece_for_any_size_with_gradients():
    def two_layers(q, k, v, exponent):
        return polarity_attention(polarity_attention(q, k, v, exponent), k, v, exponent)

    inputs = make_inputs(6, 5, 4, torch.float32, device=DEVICE)
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend="eager")
    out, expected = compiled(*inputs), two_layers(*inputs)
    gradients, wanted = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))
    for value, other in zip((out, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_products_of_the_eager_backend():
    inputs = make_inputs(20, 12, 8, torch.float32, B=2, h=3, device=DEVICE)
    counts = []
    for backend in ("eager", "triton"):
        with FlopCounterMode(display=False) as counter:
            polarity_attention(*inputs, backend=backend).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 3 * (3 * 4 * 12 * 8 * 8 + 4 * 4 * 20 * 8 * 10)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives beyond a plain backward pass
# ---------------------------------------------------------------------------------------------------------------------


def _derivative_inputs(dtype=torch.float64):
    """q, k, v, exponent, scale and position with zeros in q and k + position, and a masked key that is NaN."""
    inputs = [t.detach().to(dtype) for t in make_inputs(4, 3, 4, dtype, low=0.3, high=2.0, surroundings=True)]
    inputs[3] += 2  # so smooth at 0 that differences agree with its derivatives
    inputs[0][0, 1, 0] = 0
    inputs[1][0, :, 1, 2] = -inputs[5][:, 1, 2]
    inputs[1][0, 2], inputs[5][2] = math.nan, math.nan
    return inputs, torch.tensor([[True, True, False]])


def _attention_of(backend, mask):
    def attention(q, k, v, exponent, scale, position):
        return polarity_attention(
            q, k, v, exponent, scale=scale, position=position, key_mask=mask.to(q.device), eps=0.1, backend=backend
        )

    return attention


def test_the_reference_has_every_derivative():
    """First ones backwards and forwards, second ones, alone and batched; at zeros, and beside a masked NaN."""
    inputs, mask = _derivative_inputs()
    real = [t.nan_to_num(1.0).requires_grad_() for t in inputs]
    attention = _attention_of("reference", mask)
    assert torch.autograd.gradcheck(attention, real, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attention, real, check_fwd_over_rev=True)
    every = tuple(range(6))
    expected, values = (
        torch.func.hessian(lambda *t: attention(*t).square().sum(), argnums=every)(*(t.detach() for t in tensors))
        for tensors in (real, inputs)
    )
    for rows, wanted in zip(values, expected, strict=True):
        assert all(torch.equal(value, other) for value, other in zip(rows, wanted, strict=True))


def test_the_second_derivative_by_the_exponent_at_zeros_is_zero():
    q, k, v, exponent = _inputs()
    with torch.no_grad():
        q[..., 0], k[..., 0] = 0, 0
        exponent[:, 1] = 1.0
        q[..., 1], k[..., 1] = 0, 0

    def loss(exponent):
        return polarity_attention(q, k, v, exponent, backend="reference").square().sum()

    for second in (
        torch.func.hessian(loss)(exponent.detach()),  # forward over backward
        torch.autograd.functional.hessian(loss, exponent.detach()),  # backward twice
    ):
        assert (second[:, :2] == 0).all() and (second[:, :, :, :2] == 0).all() and second.isfinite().all()
        assert (second[:, 2:, :, 2:] != 0).any()


def _jvp(f, inputs):
    return torch.func.jvp(f, inputs, tuple(torch.ones_like(t) for t in inputs))[1]


def _forward_mode(f, inputs):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]
        return forward_ad.unpack_dual(f(*duals)).tangent


def _one_gradient(f, q, *rest):
    return torch.func.grad(lambda q: f(q, *rest).square().sum())(q)


def _sample_gradients(f, q, *rest):
    return torch.func.vmap(lambda row: _one_gradient(f, row[None], *rest))(torch.cat([q, 2 * q]))


TRANSFORMS = {
    "jvp": _jvp,
    "forward mode": _forward_mode,
    "grad": lambda f, inputs: _one_gradient(f, *inputs),
    "vmap": lambda f, inputs: torch.func.vmap(lambda v: f(*inputs[:2], v, *inputs[3:]))(torch.stack([inputs[2]] * 2)),
    "vmap of grad": lambda f, inputs: _sample_gradients(f, *inputs),
    "jacrev": lambda f, inputs: torch.func.jacrev(f, argnums=3)(*inputs),
    "jacfwd": lambda f, inputs: torch.func.jacfwd(f, argnums=4)(*inputs),
    "hessian": lambda f, inputs: torch.func.hessian(lambda *t: f(*t).square().sum(), argnums=3)(*inputs),
    "jvp of grad": lambda f, inputs: _jvp(lambda *t: _one_gradient(f, *t), inputs),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_take_the_reference_and_refuse_other_names(transform, monkeypatch):
    """On a GPU `auto` would be triton, whose tangents were silently 0."""
    inputs, mask = _derivative_inputs(torch.float32)
    inputs = tuple(t.nan_to_num(1.0).to(DEVICE) for t in inputs)
    expected = TRANSFORMS[transform](_attention_of("reference", mask), inputs)
    assert expected.isfinite().all() and (expected != 0).any()
    assert torch.equal(TRANSFORMS[transform](_attention_of("auto", mask), inputs), expected)
    for backend in ("eager", "triton"):
        with pytest.raises(ValueError, match=f"{backend} backend is differentiable once.*backend='reference'") as error:
            TRANSFORMS[transform](_attention_of(backend, mask), inputs)
        assert "\n" not in str(error.value)
        monkeypatch.setattr(package, "AUTO", backend)
        with pytest.raises(ValueError, match=f"{backend} backend is differentiable once"):
            TRANSFORMS[transform](_attention_of("auto", mask), inputs)
        monkeypatch.undo()


def _tangent_of_a_gradient(out, tensor):
    with forward_ad.dual_level():
        torch.autograd.grad(out, tensor, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


BACKWARD_PASSES = {
    "create_graph=True": lambda out, tensor: torch.autograd.grad(out.sum(), tensor, create_graph=True),
    "is_grads_batched=True": lambda out, tensor: torch.autograd.grad(
        out, tensor, torch.ones(2, *out.shape, device=out.device), is_grads_batched=True
    ),
    r"torch\.func": lambda out, tensor: torch.func.vmap(lambda g: torch.autograd.grad(out, tensor, g))(
        torch.ones(2, *out.shape, device=out.device)
    ),
    "forward-mode AD": _tangent_of_a_gradient,
}


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
@pytest.mark.parametrize("reason", BACKWARD_PASSES)
def test_a_backward_pass_that_is_not_plain_is_refused(backend, reason):
    inputs = make_inputs(20, 12, 8, torch.float32, device=DEVICE)
    out = polarity_attention(*inputs, backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend} backend is differentiable once.*{reason}.*backend='reference'"):
        BACKWARD_PASSES[reason](out, inputs[0])


def test_little_is_kept_for_the_backward_pass():
    """q, k, v, the parameters and the state: 2d(d + 1) floats a head."""
    inputs = make_inputs(500, 300, 32, torch.float32, B=2, h=3)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        polarity_attention(*inputs, backend="eager")
    assert sum(kept.values()) == 4 * (sum(t.numel() for t in inputs) + 2 * 3 * 33 * 64)
