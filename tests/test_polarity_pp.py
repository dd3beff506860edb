"""PolaFormer++'s kernel and the core below it: explicit N×n matrices, derivatives, ranges, and what is saved.

pytest tests/test_polarity_pp.py
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from models.attention import PolaMapAttention, PolaReductionAttention, PolaSequenceAttention, PolaWindowAttention
from models.kernels import kernel_of
from models.kernels.polarity_pp import ExponentialFeatures
from models.ops import rotary
from models.ops.linear_attention import eager, linear_attention_eager
from models.ops.rotary import Rotary, frequencies, rotary_table, rotate
from models.options import AttentionOptions

BACKENDS = ("eager", "reference")
CPU = torch.device("cpu")


def kernel(h: int = 2, d: int = 6, backend: str = "eager", dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """With rates that differ."""
    module = kernel_of("polarity_pp")(h * d, h, AttentionOptions("polarity_pp", backend=backend)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    for parameter in (module.s1, module.s2):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k, v or as many as there are shapes of (N or n)."""
    B, C, *lengths = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in lengths]


def explicit(module, q, k, v, *, position=None, key_mask=None, grid=None) -> Tensor:
    """Every weight of the N×n matrix by itself, with angles of our own."""
    h, d = module.num_heads, module.head_dim
    rates = [torch.sigmoid(s[0, :, 0]) for s in (module.s1, module.s2)]
    if position is not None:
        k = k + position
    if key_mask is not None:
        k, v = k.masked_fill(~key_mask[:, :, None], 0.0), v.masked_fill(~key_mask[:, :, None], 0.0)
    q, k, v = (t.unflatten(-1, (h, d)) for t in (q, k, v))
    out = []
    for head in range(h):
        queries, keys, values = q[:, :, head], k[:, :, head], v[:, :, head]
        positive, negative = queries.clamp(min=0), (-queries).clamp(min=0)
        found = torch.cat([keys.clamp(min=0), (-keys).clamp(min=0)], dim=-1).exp() - 1
        real = torch.ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        count = real.sum(dim=1).clamp(min=1)[:, None, None]
        border = (d + 1) // 2
        for halves, rate, part in (
            ((positive, negative), rates[0][head], values[..., :border]),
            ((negative, positive), rates[1][head], values[..., border:]),
        ):
            features = (torch.cat(halves, dim=-1) * rate).exp() - 1
            norm = features @ found.mT * real[:, None] / count
            weights = norm
            if grid is not None:
                weights = turned_by_hand(features, grid) @ turned_by_hand(found, grid).mT * real[:, None] / count
            out.append((weights @ part) / (norm.sum(dim=-1, keepdim=True) + 1e-6))
    return torch.cat(out, dim=-1)


def turned_by_hand(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pair by pair, with a 2×2 matrix each."""
    width = x.shape[-1]
    theta = frequencies(width).double()
    turned = torch.empty_like(x)
    for token in range(grid[0] * grid[1]):
        for pair in range(width // 2):
            place = token // grid[1] if pair < width // 4 else token % grid[1]
            angle = place * theta[pair % (width // 4)]
            a, b = x[..., token, 2 * pair], x[..., token, 2 * pair + 1]
            turned[..., token, 2 * pair] = a * angle.cos() - b * angle.sin()
            turned[..., token, 2 * pair + 1] = b * angle.cos() + a * angle.sin()
    return turned


CASES = {
    "plain": {"lengths": (9, 7, 7)},
    "position": {"lengths": (5, 7, 7), "position": True},
    "masked": {"lengths": (9, 7, 7), "mask": True, "position": True},
    "turned": {"lengths": (12, 12, 12), "grid": (3, 4)},
    "turned and masked": {"lengths": (12, 12, 12), "grid": (4, 3), "mask": True},
    "odd channels": {"lengths": (6, 8, 8), "d": 5},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_explicit_matrix_in_float64_with_all_gradients(case, backend):
    given = CASES[case]
    d, lengths, grid = given.get("d", 6), given["lengths"], given.get("grid")
    module = kernel(2, d, backend)
    q, k, v = tokens(2, 2 * d, *lengths)
    (position,) = tokens(1, 2 * d, lengths[1], seed=3)
    position = position[0].detach().requires_grad_() if given.get("position") else None
    mask = None
    if given.get("mask"):
        mask = torch.rand(2, lengths[1], generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, 0], mask[1] = True, False  # a row without keys
    table = rotary_table(grid, 2 * d, torch.float64, CPU) if grid else None
    out = module(q, k, v, position=position, key_mask=mask, rotary=table)
    expected = explicit(module, q, k, v, position=position, key_mask=mask, grid=grid)
    assert torch.allclose(out, expected, rtol=1e-11, atol=1e-12)
    assert mask is None or not out[1].any()
    inputs = [t for t in (q, k, v, position, module.s1, module.s2) if t is not None]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_gradcheck_of_the_own_backward_and_second_derivatives_of_the_reference(turned):
    table = rotary_table((2, 3), 8, torch.float64, CPU) if turned else None
    q, k, v = tokens(1, 4, 6, 6, 6)
    rates = [torch.rand(1, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def op(q, k, v, *rates):
        q, k, v = (t.unflatten(-1, (1, 4)) for t in (q, k, v))
        return linear_attention_eager(q, k, v, ExponentialFeatures, rates, rotary=table)

    assert torch.autograd.gradcheck(op, (q, k, v, *rates))
    module = kernel(1, 4, "reference")
    assert torch.autograd.gradgradcheck(lambda *t: module(*t, rotary=table), (q, k, v))
    eager_kernel = kernel(1, 4, "eager")
    out = eager_kernel(q, k, v, rotary=table)
    with pytest.raises(RuntimeError, match="eager backend is differentiable once"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(ValueError, match=r"torch\.func .* backend='reference'"):
        torch.func.grad(lambda q: eager_kernel(q, k, v).sum())(q)
    auto_kernel = kernel(1, 4, "auto")
    auto = torch.func.grad(lambda q: auto_kernel(q, k, v, rotary=table).sum())(q.detach())
    assert torch.allclose(auto, torch.autograd.grad(out.sum(), q)[0], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 12.0])
def test_low_precision_is_computed_in_float32(dtype, magnitude):
    """exp overflows float16 from 11 on; in float32 the product of two does not while their exponents stay below 88."""
    given = [
        t.detach() * s for t, s in zip(tokens(2, 16, 20, 20, 20, dtype=dtype), (magnitude, magnitude, 1), strict=True)
    ]
    given = [t.to(dtype).clamp(-35, 35).requires_grad_() for t in given]
    out = kernel(2, 8, "eager", dtype)(*given)
    exact = kernel(2, 8, "reference")(*(t.double() for t in given))
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < 6 * torch.finfo(dtype).eps
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.float().square().sum(), given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_of_zeros_gives_zero_and_tiny_ones_keep_their_digits(backend):
    q, k, v = tokens(1, 8, 5, 7, 7, dtype=torch.float32)
    with torch.no_grad():
        q[0, 2] = 0
        q[0, 3] = 1e-9
        k[0, 1] = 0
    module = kernel(2, 4, backend, torch.float32)
    out = module(q, k, v)
    assert not out[0, 2].any()
    exact = kernel(2, 4, "reference")(*(t.double() for t in (q, k, v)))
    assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-12)  # exp(x) − 1 would be 0 at 1e-9
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 200.0])
@pytest.mark.parametrize("which", ["q", "k", "v", "s1", "position"])
def test_what_is_not_finite_or_overflows_is_not_finite_in_the_output(which, value, backend):
    module = kernel(1, 4, backend, torch.float32)
    given = dict(zip("qkv", (t.detach() for t in tokens(2, 4, 6, 6, 6, dtype=torch.float32)), strict=True))
    position = torch.zeros(6, 4)
    if which == "s1":
        if value != value:
            module.s1.data[0, 0, 0, 1] = value
        else:
            return  # a sigmoid has no other way to be not finite
    elif which == "position":
        position[3, 1] = value
    else:
        given[which][0, 3, 1] = value
    bad = ~module(*given.values(), position=position).isfinite()
    if which == "v" and value == 200.0:
        assert not bad.any()
        return
    assert bad[0, 3].any()
    assert bad[1].any() == (which in ("s1", "position"))  # the other image


def test_masked_keys_have_no_influence_whatever_stands_there():
    q, k, v = tokens(2, 8, 5, 6, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    for backend in BACKENDS:
        module = kernel(2, 4, backend)
        noise = torch.where(mask[:, :, None], 0.0, torch.nan)
        clean, noisy = (module(q, k + n, v + n, key_mask=mask) for n in (torch.zeros_like(noise), noise))
        assert torch.equal(clean, noisy)
        gradients = torch.autograd.grad(noisy.square().sum(), (q, k, v, module.s1, module.s2))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[1][~mask].any() and not gradients[2][~mask].any()


@pytest.mark.parametrize("kind", ["polarity_pp", "relu", "elu", "focused"])
def test_own_backward_equals_autograd_block_by_block(kind, monkeypatch):
    """Every kernel with a feature map, against the formula by autograd, in blocks over images and tokens."""
    d, results = 8, []
    q, k, v = tokens(5, 16, 30, 21, 21)
    (position,) = (t[0].detach().requires_grad_() for t in tokens(1, 16, 21, seed=9))
    mask = torch.rand(5, 21, generator=torch.Generator().manual_seed(1)) < 0.7
    for backend, elements in (("reference", 2**19), ("eager", 2**19), ("eager", 2 * 30 * 16), ("eager", 7 * 16)):
        monkeypatch.setattr(eager, "BLOCK_ELEMENTS", elements)
        torch.manual_seed(0)
        module = kernel_of(kind)(2 * d, 2, AttentionOptions(kind, backend=backend)).double()
        for parameter in module.parameters():
            parameter.data.normal_()
        out = module(q, k, v, position=position, key_mask=mask)
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), [q, k, v, position, *module.parameters()])])
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["polarity_pp", "relu", "focused"])
def test_nothing_of_the_size_of_the_features_is_saved(kind):
    module = kernel_of(kind)(16, 2, AttentionOptions(kind, backend="auto"))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = tokens(4, 16, 500, 500, 500, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(q, k, v)
    size = q.numel() * q.element_size()
    assert 3 * size <= sum(saved.values()) < 3.2 * size  # q, k and v


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles(dynamic):
    module = kernel(2, 8, "auto", torch.float32)
    table = rotary_table((4, 5), 16, torch.float32, CPU)
    compiled = torch.compile(lambda *t: module(*t, rotary=table), dynamic=dynamic, fullgraph=True)
    given = tokens(2, 16, 20, 20, 20, dtype=torch.float32)
    out, expected = compiled(*given), module(*given, rotary=table)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
    parameters = [*given, module.s1, module.s2]
    for found, wanted in zip(
        torch.autograd.grad(out.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_without_elements_the_output_is_empty_or_zero():
    module = kernel(2, 4, "eager")
    for B, N, n in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q, k, v = tokens(B, 8, N, n, n)
        out = module(q, k, v)
        assert out.shape == (B, N, 8) and not out.any()
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("layout", "arguments", "call"),
    [
        (PolaWindowAttention, ((3, 3),), lambda module, x: module(x)),
        (PolaReductionAttention, ((3, 3),), lambda module, x: module(x, (3, 3))),
        (PolaSequenceAttention, (), lambda module, x: module(x, torch.ones(2, 9, dtype=torch.bool))),
        (PolaMapAttention, (), lambda module, x: module(x, (3, 3))),
    ],
)
def test_every_layout_takes_the_kernel_and_changes_nothing_else(layout, arguments, call):
    """The layout's own parameters, in their order, without `power` and `scale`; two rates in their place."""
    own, polarity = (
        layout(8, 2, *arguments, AttentionOptions(kind, kernel_size=3)) for kind in ("polarity_pp", "polarity")
    )
    names = [name for name in polarity.state_dict() if name not in ("power", "scale")]
    if layout is PolaMapAttention:
        assert list(own.state_dict())[2:] == names
    assert [name for name in own.state_dict() if name not in ("s1", "s2")] == names
    assert own.s1.shape == own.s2.shape == (1, 2, 1, 8) and not own.s1.any()
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    call(own, x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in own.parameters())


def test_copies_and_pickles_keep_the_function():
    module, given = kernel(), tokens(1, 12, 3, 4, 4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*given), module(*given)) and other.state_dict().keys() == {"s1", "s2"}


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ---------------------------------------------------------------------------------------------------------------------


def test_turns_are_by_rows_in_the_first_half_and_by_columns_in_the_second():
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    table = rotary_table((2, 3), 12, torch.float64, CPU)
    turned = rotate(x, table)
    assert torch.allclose(turned, turned_by_hand(x, (2, 3)), atol=1e-14)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])  # row 0, column 0
    into = rotary.turn(x, torch.complex(*table), torch.empty_like(x))
    assert torch.allclose(into, turned, atol=1e-15)
    assert torch.allclose(rotary.turn(into, torch.complex(*table).conj(), torch.empty_like(x)), x, atol=1e-14)
    with pytest.raises(ValueError, match="6 channels cannot be turned by rows and columns: expected a multiple of 4"):
        frequencies(6)


def test_tables_are_kept_by_size_dtype_and_device_and_usable_by_any_later_call():
    first = rotary_table((5, 7), 16, torch.float32, CPU)
    assert rotary_table((5, 7), 16, torch.float32, CPU).cos is first.cos
    assert rotary_table((7, 5), 16, torch.float32, CPU).cos is not first.cos
    assert rotary_table((5, 7), 16, torch.float64, CPU).cos.dtype == torch.float64
    assert rotary_table((5, 7), 16, torch.float32, torch.device("meta")).cos.device.type == "meta"
    with torch.inference_mode():
        made = rotary_table((3, 11), 16, torch.float32, CPU)
    assert not made.cos.is_inference() and isinstance(made, Rotary)
    x = torch.ones((), requires_grad=True)
    (x * made.cos.sum()).backward()
    assert x.grad is not None
    with torch._subclasses.FakeTensorMode():
        rotary_table((2, 13), 16, torch.float32, CPU)
    assert type(rotary_table((2, 13), 16, torch.float32, CPU).cos) is Tensor


def test_a_table_that_a_transform_asked_for_first_is_usable_afterwards():
    x = torch.randn(1, 6, 8)

    def turned(x: Tensor) -> Tensor:
        return rotate(x, rotary_table((2, 3), 8, torch.float32, CPU))

    rotary._remembered_table.cache_clear()
    first = torch.func.functionalize(turned)(x)
    assert torch.equal(turned(x), first)


@pytest.mark.parametrize("kind", ["polarity_pp", "relu", "elu", "focused"])
def test_a_tangent_of_the_values_alone_is_carried(kind):
    q, k, v = (t.detach() for t in tokens(1, 8, 5, 5, 5))
    module, tangent = kernel_of(kind)(8, 2, AttentionOptions(kind)).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        out = module(q, k, torch.autograd.forward_ad.make_dual(v, tangent))
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert torch.allclose(found, module(q, k, tangent), rtol=1e-9)  # linear in the values
