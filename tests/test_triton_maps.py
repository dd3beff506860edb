"""The Triton kernels with the feature maps of PolaFormer++ and NaLaFormer, in the interpreter or on a GPU.

Each against the reference in float64: an error of at most twice that of the eager backend, or a few units of the dtype.
The map of polarity attention has test_attention_accuracy.py.

pytest tests/test_triton_maps.py
"""

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.attention import PolaMapAttention
from models.kernels import kernel_of
from models.ops.linear_attention import triton as kernels
from models.ops.linear_attention import triton_maps
from models.ops.rotary import rotary_table
from models.options import AttentionOptions

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # log2(0) is meant

KINDS = ("polarity_pp", "norm_aware")
EPSILONS = 8


def kernel(kind: str, backend: str, h: int, d: int) -> torch.nn.Module:
    module = kernel_of(kind)(h * d, h, AttentionOptions(kind, backend=backend)).to(DEVICE)
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():  # rates that differ
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def inputs(B: int, N: int, n: int, C: int, dtype: torch.dtype, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(B, length, C, generator=generator, dtype=torch.float64) for length in (N, n, n)]
    drawn[0], drawn[1] = size * drawn[0], size * drawn[1]
    return [t.to(DEVICE, dtype).requires_grad_() for t in drawn]


def run(module: torch.nn.Module, given: list[Tensor], grid: tuple[int, int] | None, **further: Tensor) -> list[Tensor]:
    """Output, and the gradients of the inputs and of what is learned."""
    q, position = given[0], further.get("position")
    dtype = torch.promote_types(q.dtype, torch.float32)
    table = rotary_table(grid, 2 * module.head_dim, dtype, q.device) if grid else None
    out = module(*given, rotary=table, **further)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [*given, *module.parameters(), *([] if position is None else [position])]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(q.dtype).to(out))]


def check(kind: str, case: str, d: int, dtype: torch.dtype, *, size: float = 1.0) -> None:
    h = 2
    B, N, n, grid, further = 2, 63, 49, None, {}
    if case == "turned":
        N, n, grid = 77, 77, (7, 11)
    if case == "surrounded":
        further["key_mask"] = torch.rand(B, n, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
        further["position"] = (0.3 * torch.randn(n, h * d, device=DEVICE)).requires_grad_()
    given = inputs(B, N, n, h * d, dtype, size)
    exact_given = [t.detach().double().requires_grad_() for t in given]
    exact_further = {
        k: t if t.dtype == torch.bool else t.detach().double().requires_grad_() for k, t in further.items()
    }
    exact = run(kernel(kind, "reference", h, d).double(), exact_given, grid, **exact_further)
    eager = run(kernel(kind, "eager", h, d), given, grid, **further)
    values = run(kernel(kind, "triton", h, d), given, grid, **further)
    for i, (value, plain, expected) in enumerate(zip(values, eager, exact, strict=True)):
        error, allowed = ((t.double() - expected).norm() / expected.norm() for t in (value, plain))
        allowed = max(2 * allowed, EPSILONS * torch.finfo(dtype).eps)
        assert error <= allowed, f"tensor {i}: relative error {error:.1e} exceeds {allowed:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "surrounded", "turned"])
@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        *((d, torch.float32) for d in (2, 24)),
        (32, torch.bfloat16),
        *(pytest.param(d, torch.float32, marks=pytest.mark.slow) for d in (16, 40, 64)),
        pytest.param(32, torch.float16, marks=pytest.mark.slow),
        pytest.param(64, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(64, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_as_exact_as_those_of_eager(kind, case, d, dtype):
    check(kind, case, d, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-4, 12.0])
def test_small_and_large_tokens(kind, size):
    """exp(x) − 1 keeps the digits of small x, and exp those of an x of 40."""
    check(kind, "turned", 8, torch.float32, size=size)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_channels_and_long_sequences_in_parts(kind):
    given = inputs(1, 1200, 1100, 9, torch.float32, 1.0)
    for value, expected in zip(
        run(kernel(kind, "triton", 1, 9), given, None), run(kernel(kind, "eager", 1, 9), given, None), strict=True
    ):
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_zero_and_nan_stays(kind):
    q, k, v = inputs(1, 20, 20, 8, torch.float32, 1.0)
    with torch.no_grad():
        q[0, 3], k[0, 5] = 0.0, 0.0
    out, grad_q, grad_k, *_ = run(kernel(kind, "triton", 2, 4), [q, k, v], (4, 5))
    assert (out[0, 3] == 0).all()
    assert (grad_q[0, 3] == 0).all()
    assert (grad_k[0, 5] == 0).all()
    assert grad_q.isfinite().all()
    assert grad_k.isfinite().all()
    with torch.no_grad():
        q[0, 7, 1] = torch.nan  # of the first head
    out, *_ = run(kernel(kind, "triton", 2, 4), [q, k, v], (4, 5))
    assert out[0, 7, :4].isnan().any()
    assert out[0, 7, 4:].isfinite().all()
    assert out[0, :7].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_with_the_backend_that_is_named(kind):
    torch.manual_seed(0)
    options = [AttentionOptions(kind, kernel_size=3, backend=backend) for backend in ("eager", "triton")]
    eager, ours = (PolaMapAttention(16, 2, each).to(DEVICE) for each in options)
    ours.load_state_dict(eager.state_dict())
    x = torch.randn(2, 20, 16, device=DEVICE)
    with torch.profiler.profile() as record:
        out = ours(x, (4, 5))
    assert any(event.name.startswith("polaformer::") for event in record.events())
    assert torch.allclose(out, eager(x, (4, 5)), atol=1e-5)
    assert kernel_of(kind).announce(options[1], torch.device(DEVICE)) == f"{kind} attention backend: triton"
    assert kernel_of("relu").announce(AttentionOptions("relu"), torch.device(DEVICE)) == "relu attention"
    with pytest.raises(ValueError, match=f"{kind} attention's triton backend cannot run: it takes up to 64 channels"):
        kernel(kind, "triton", 1, 66)(*inputs(1, 3, 3, 66, torch.float32, 1.0))
    with pytest.raises(ValueError, match="backend 'triton' is no backend of relu attention, expected auto, eager"):
        kernel_of("relu").announce(AttentionOptions("relu", backend="triton"), torch.device(DEVICE))


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_counted_as_those_of_eager(kind):
    given = inputs(2, 35, 35, 16, torch.float32, 1.0)
    counts = []
    for backend in ("eager", "triton"):
        with FlopCounterMode(display=False) as counter:
            kernel(kind, backend, 2, 8)(*given).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@triton.jit
def _no_turn(x, cos, sin, T: tl.constexpr, DP: tl.constexpr):
    return x


@triton.jit
def _never_small(x, PRECISION: tl.constexpr):
    return tl.exp2(x * 1.4426950408889634) - 1.0


@triton.jit
def _constant_exponent(u, PRECISION: tl.constexpr):
    norm = tl.sqrt(tl.sum(u * u, axis=1))[:, None]
    return norm, u / norm, norm * 0.0, norm * 0.0 + 3.0


@triton.jit
def _not_through_the_norm(direction, norm, tanh, p, slope, log, grad_positive, grad_negative):
    return triton_maps.pull_back(direction, slope, grad_positive, grad_negative) * p / norm


@triton.jit
def _rates_of_the_first_head(rates, head, channels, D: tl.constexpr, ALPHA: tl.constexpr):
    rates += channels
    return tl.load(rates, mask=channels < D)[None, :], tl.load(rates + D, mask=channels < D)[None, :]


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(
    ("kind", "room", "name", "wrong"),
    [
        ("polarity_pp", kernels, "turn", _no_turn),
        ("norm_aware", kernels, "turn", _no_turn),
        ("polarity_pp", triton_maps, "expm1", _never_small),
        ("polarity_pp", kernels, "load_rates", _rates_of_the_first_head),
        ("norm_aware", kernels, "norm_of", _constant_exponent),
        ("norm_aware", kernels, "pull_back_directed", _not_through_the_norm),
    ],
)
def test_a_planted_error_is_noticed(kind, room, name, wrong, monkeypatch):
    size = 1e-4 if name == "expm1" else 1.0
    check(kind, "turned", 8, torch.float32, size=size)
    monkeypatch.setattr(room, name, wrong)
    if name == "turn":  # which is called by a function of its own
        monkeypatch.setattr(triton_maps, name, wrong)
    with pytest.raises(AssertionError, match="exceeds"):
        check(kind, "turned", 8, torch.float32, size=size)
