"""NaLaFormer's kernels: explicit N×n matrices, derivatives, zeros, and the limit in which one is the other.

pytest tests/test_norm_aware.py
"""

import math

import pytest
import torch
from test_polarity_pp import tokens, turned_by_hand
from torch import Tensor

from models.attention import PolaReductionAttention, PolaSequenceAttention, PolaWindowAttention
from models.kernels import kernel_of, norm_aware
from models.nalaformer import NalaMapAttention, for_both_halves
from models.ops.linear_attention import eager
from models.ops.rotary import rotary_table
from models.options import AttentionOptions

KINDS = ("norm_aware", "nala_cosine")
BACKENDS = ("eager", "reference")
CPU = torch.device("cpu")


def kernel(kind: str, backend: str = "eager", h: int = 2, d: int = 4) -> torch.nn.Module:
    return kernel_of(kind)(h * d, h, AttentionOptions(kind, backend=backend))


def features_of_one(kind: str, u: Tensor, query: bool) -> tuple[Tensor, Tensor]:
    """The two halves of one token's features, channel by channel."""
    norm = u.square().sum().sqrt()
    exponent = 3 * (0.5 + torch.tanh(norm))
    halves = []
    for channel in u:
        direction = channel / norm
        size = direction.abs() ** exponent if query else channel.abs() ** 3
        if kind == "norm_aware":
            halves.append((size * (channel > 0), size * (channel < 0)))
        else:
            phase = math.pi / 4 * torch.tanh(20 * direction)
            halves.append((size * phase.cos(), size * phase.sin()))
    first, second = zip(*halves, strict=True)
    return torch.stack(first), torch.stack(second)


def explicit(kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
    h, d = 2, q.shape[-1] // 2
    rows = []
    for b in range(len(q)):
        heads = []
        for head in range(h):
            part = slice(head * d, (head + 1) * d)
            queries = [
                torch.stack(each) for each in zip(*(features_of_one(kind, u, True) for u in q[b, :, part]), strict=True)
            ]
            keys = [
                torch.stack(each)
                for each in zip(*(features_of_one(kind, u, False) for u in k[b, :, part]), strict=True)
            ]
            real = torch.ones(len(k[b])) if mask is None else mask[b].double()
            norm = sum(x @ y.T for x, y in zip(queries, keys, strict=True)) * real
            weights = norm
            if grid is not None:
                turned = [[turned_by_hand(x[None], grid)[0] for x in side] for side in (queries, keys)]
                weights = sum(x @ y.T for x, y in zip(*turned, strict=True)) * real
            count = real.sum().clamp(min=1)
            heads.append(weights / count @ v[b, :, part] / (norm.sum(dim=1, keepdim=True) / count + 1e-6))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "masked", "turned"])
def test_equals_the_explicit_matrix_in_float64_with_all_gradients(kind, backend, case):
    q, k, v = tokens(2, 8, 6, 6 if case == "turned" else 5, 6 if case == "turned" else 5)
    mask = None
    if case == "masked":
        mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    grid = (2, 3) if case == "turned" else None
    table = for_both_halves(rotary_table(grid, 4, torch.float64, CPU)) if grid else None
    out = kernel(kind, backend)(q, k, v, key_mask=mask, rotary=table)
    expected = explicit(kind, q, k, v, mask, grid)
    # cos·cos + sin·sin of opposite directions cancels, to 1e-16, which a normaliser of little more than 1e-6 divides
    atol = 1e-12 if kind == "norm_aware" else 1e-9
    assert torch.allclose(out, expected, rtol=1e-10, atol=atol)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(out, (q, k, v), cotangent), torch.autograd.grad(expected, (q, k, v), cotangent), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-8, atol=100 * atol)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_through_the_norm_twice(kind):
    q, k, v = tokens(1, 4, 4, 4, 4)
    module = kernel(kind, "eager", 1, 4)
    assert torch.autograd.gradcheck(lambda *t: module(*t), (q, k, v))
    reference = kernel(kind, "reference", 1, 4)
    assert torch.autograd.gradgradcheck(lambda *t: reference(*t), (q, k, v), atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_query_gives_zero_with_zero_gradients_and_sizes_do_not_matter(kind, backend, dtype):
    q, k, v = (t.detach().to(dtype) for t in tokens(2, 8, 6, 7, 7))
    q[0, 1], q[0, 2, :4], k[0, 3] = 0, 0, 0
    q[1] *= 1e-3 if dtype == torch.float16 else 1e-6  # whose gradient, as large as 1 over it, float16 cannot hold
    q[0, 3] *= 1e3
    k[1] *= 40  # its cube is beyond float16
    given = [t.requires_grad_() for t in (q, k, v)]
    out = kernel(kind, backend)(*given)
    exact = kernel(kind, "reference")(*(t.double() for t in given))
    assert out.dtype == dtype and not out[0, 1].any() and not out[0, 2, :4].any()
    assert (out.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0, 1].any() and not gradients[0][0, 2, :4].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [4, 32])
def test_float32_is_as_exact_as_the_literal_formulation(kind, d):
    """Means over draws: with few channels a normaliser may be what is left of terms that cancel."""
    errors = {backend: [] for backend in BACKENDS}
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(2, n, 2 * d, generator=generator).requires_grad_() for n in (9, 7, 7)]
        cotangent = torch.randn(2, 9, 2 * d, generator=generator)
        exact = [t.detach().double().requires_grad_() for t in given]
        expected = kernel(kind, "reference", 2, d)(*exact)
        expected = [expected, *torch.autograd.grad(expected, exact, cotangent.double())]
        for backend, found in errors.items():
            out = kernel(kind, backend, 2, d)(*given)
            results = [out, *torch.autograd.grad(out, given, cotangent)]
            found.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)])
    means = {backend: torch.tensor(found).log().mean(dim=0).exp() for backend, found in errors.items()}
    assert (means["eager"] <= (2 * means["reference"]).clamp(min=8 * torch.finfo(torch.float32).eps)).all(), means


def test_the_cosine_kernel_becomes_the_published_one_where_its_phase_saturates(monkeypatch):
    given = tokens(2, 8, 6, 7, 7)
    published = kernel("norm_aware")(*given)
    distances = []
    for slope in (20.0, 1e3, 1e9):
        monkeypatch.setattr(norm_aware, "PHASE_SLOPE", slope)
        distances.append((kernel("nala_cosine")(*given) - published).abs().max().item())
    assert distances[0] > 1e-4 > distances[1] > distances[2] and distances[2] < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_and_masked_keys_do_not_matter(kind, backend):
    module = kernel(kind, backend)
    for which in range(3):
        given = [t.detach() for t in tokens(2, 8, 6, 6, 6)]
        given[which][0, 2, 1] = torch.nan
        bad = ~module(*given).isfinite()
        assert bad[0, 2, :4].any() and not bad[1].any() and not bad[0, :, 4:].any()
    q, k, v = (t.detach() for t in tokens(1, 8, 5, 6, 6))
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    noise = torch.where(mask[:, :, None], 0.0, torch.nan)
    assert torch.equal(module(q, k + noise, v + noise, key_mask=mask), module(q, k, v, key_mask=mask))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_change_the_result_and_nothing_of_the_features_is_saved(kind, monkeypatch):
    q, k, v = tokens(5, 8, 30, 21, 21)
    module, saved = kernel(kind), dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    results = []
    for elements in (2**19, 2 * 30 * 8, 7 * 8):
        monkeypatch.setattr(eager, "BLOCK_ELEMENTS", elements)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = module(q, k, v)
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), (q, k, v))])
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(other, results[0], strict=True))
    sizes = [t.numel() * t.element_size() for t in (q, k, v)]
    state = 5 * 2 * 5 * 8 * 8
    assert sum(saved.values()) == sum(sizes) + state


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_takes_the_kernels(kind):
    options = AttentionOptions(kind, kernel_size=3)
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    calls = {
        PolaWindowAttention(8, 2, (3, 3), options): lambda module: module(x),
        PolaReductionAttention(8, 2, (3, 3), options): lambda module: module(x, (3, 3)),
        PolaSequenceAttention(8, 2, options): lambda module: module(x, torch.arange(18).reshape(2, 9) % 4 > 0),
        NalaMapAttention(8, 2, options): lambda module: module(x, (3, 3)),
    }
    for module, call in calls.items():
        assert not {"power", "scale", "s1", "s2"} & module.state_dict().keys()
        call(module).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
