"""The kernels that polarity attention is compared with: the op against explicit N×n matrices, and the config values.

pytest tests/test_linear_attention.py
"""

import copy
import json

import pytest
import torch
import torch.fx
from conftest import config_file
from torch.nn import functional as F

from config import load_config
from models import build_model
from models.attention import PolaReductionAttention, PolaWindowAttention
from models.attention_maps import record
from models.diagnostics import inspect_step
from models.kernels import kernel_of
from models.ops.linear_attention import linear_attention_eager, linear_attention_reference
from models.options import AttentionOptions

KINDS = ("softmax", "relu", "elu", "focused")


def kernel_attention(kind, q, k, v, *, scale=None, position=None, key_mask=None):
    """A kernel by itself on (B, N, h, d), with this scale in place of a learned one; gradients reach the scale."""
    h, d = q.shape[2:]
    kernel = kernel_of(kind)(h * d, h, AttentionOptions(attention=kind, learn_scale=False))
    kernel.divisor = lambda: None if scale is None else scale.flatten()
    position = None if position is None else position.flatten(1)
    return kernel(q.flatten(2), k.flatten(2), v.flatten(2), position=position, key_mask=key_mask).unflatten(-1, (h, d))


def _inputs(B=2, N=9, n=7, h=2, d=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v, position = normal(B, N, h, d), normal(B, n, h, d), normal(B, n, h, d), normal(n, h, d)
    scale = (0.5 + torch.rand(h, d, generator=generator, dtype=torch.float64)).to(dtype)
    return [t.requires_grad_() for t in (q, k, v, scale, position)]


def _mask():
    return torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)


def _kernel(kind, query, key):
    """The unnormalised weight of one query and one key, both (d,)."""
    if kind == "softmax":
        return torch.exp((query * key).sum() / len(query) ** 0.5)
    if kind == "elu":
        return (torch.where(query > 0, query + 1, query.exp()) * torch.where(key > 0, key + 1, key.exp())).sum()
    query, key = query.clamp(min=0), key.clamp(min=0)
    if kind == "focused":
        query, key = (x**3 * x.square().sum().sqrt() / x.pow(6).sum().sqrt() if x.any() else x for x in (query, key))
    return (query * key).sum()


def _explicit(kind, q, k, v, scale, position, mask, eps):
    """Every weight of the N×n matrix by itself, one image, head and pair of tokens after the other."""
    out = []
    for b in range(q.shape[0]):
        real = range(k.shape[1]) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for i in range(q.shape[1]):
            for head in range(q.shape[2]):
                query = q[b, i, head] / scale[head]
                keys = [(k[b, j, head] + position[j, head]) / scale[head] for j in real]
                weights = torch.stack([_kernel(kind, query, key) for key in keys])
                total = weights.sum() + (0 if kind == "softmax" else eps * len(keys))
                out.append((weights[:, None] * v[b, list(real), head]).sum(dim=0) / total)
    return torch.stack(out).reshape(q.shape)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_explicit_matrix_in_float64(kind, masked):
    inputs = _inputs()
    mask = _mask() if masked else None
    q, k, v, scale, position = inputs
    out = kernel_attention(kind, q, k, v, scale=scale, position=position, key_mask=mask)
    expected = _explicit(kind, *inputs, mask, 1e-6)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-13)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_keys_have_no_influence_and_a_row_without_keys_is_zero(kind):
    q, k, v, _, _ = _inputs()
    mask = _mask()
    mask[1] = False
    out = kernel_attention(kind, q, k, v, key_mask=mask)
    noise = torch.where(mask[:, :, None, None], 0.0, torch.nan)
    noisy = kernel_attention(kind, q, k + noise, v + noise, key_mask=mask)
    assert torch.equal(out, noisy)
    assert (out[1] == 0).all() and (out[0] != 0).any()
    gradients = torch.autograd.grad(noisy.square().sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][~mask] == 0).all() and (gradients[2][~mask] == 0).all()
    short = kernel_attention(kind, q[:1], k[:1, mask[0]], v[:1, mask[0]])
    assert torch.allclose(out[:1], short, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_finite_and_close_to_float64_over_its_range(kind, magnitude):
    """The third powers and the products of 300 are beyond 65,504, those of 0.001 below float16's smallest number."""
    q, k, v, _, _ = _inputs(d=16, dtype=torch.float16)
    with torch.no_grad():
        q.mul_(magnitude)
        k.mul_(magnitude)
    exact = kernel_attention(kind, q.double(), k.double(), v.double())
    with torch.autocast("cpu", torch.float16):
        out = kernel_attention(kind, q, k, v)
    assert out.dtype == torch.float16
    # softmax's weights follow its scores, whose rounding grows with them: a bound only where they are moderate
    if kind != "softmax" or magnitude <= 1:
        assert (out.double() - exact).norm() / exact.norm() < 4 * torch.finfo(torch.float16).eps
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert out.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_zero_rows_are_finite(kind):
    q, k, v, _, _ = _inputs(dtype=torch.float32)
    with torch.no_grad():
        q[0, 3] = 0
        k[0, 2] = 0
        k[1] = -1  # no positive part anywhere
    out = kernel_attention(kind, q, k, v)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_focusing_keeps_the_norm_and_sharpens_the_direction():
    q = torch.tensor([[[[3.0, -5.0, 4.0]]]])
    k = torch.eye(3)[None, :, None]
    v = torch.eye(3)[None, :, None]
    row = kernel_attention("focused", q, k, v)[0, 0, 0]  # attention over three keys, the unit vectors
    assert torch.allclose(row, torch.tensor([27.0, 0.0, 64.0]) / 91, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", ""])
def test_an_unknown_kind_is_answered_with_the_valid_ones(kind):
    with pytest.raises(
        ValueError,
        match=f"'{kind}' is unknown, expected one of .*relu, elu, focused, .*polarity, polarity_pp, softmax",
    ):
        kernel_of(kind)


def test_the_normaliser_s_epsilon_is_added_to_a_mean_over_keys():
    q, k, v, _, _ = _inputs()
    weights = torch.einsum("bihf,bjhf->bhij", q.relu(), k.relu())
    expected = torch.einsum("bhij,bjhd->bihd", weights / (weights.sum(-1, keepdim=True) + 0.1 * k.shape[1]), v)
    assert torch.allclose(linear_attention_reference([q.relu()], k.relu(), v, eps=0.1), expected, rtol=1e-12)
    eager = linear_attention_eager(q, k, v, kernel_of("relu").feature_map, (None,), eps=0.1)
    assert torch.allclose(eager, expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# As config values of the attention module
# ---------------------------------------------------------------------------------------------------------------------

SWIN = "DATA.IMG_SIZE 32 MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,1,1,1] MODEL.SWIN.NUM_HEADS [1,2,2,4] "
PVT = "DATA.IMG_SIZE 32 MODEL.LA.PVT_LA_SR_RATIOS 2111 "


def _config(name, options):
    return load_config(config_file(name), (f"MODEL.NUM_CLASSES 5 {SWIN if 'swin' in name else PVT}" + options).split())


def _build(name, options):
    torch.manual_seed(0)
    return build_model(_config(name, options))


ALTERNATIVES = [f"MODEL.LA.ATTENTION {kind}" for kind in KINDS] + ["MODEL.LA.LEARN_EXPONENT False"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("pola_swin_t", options) for options in [*ALTERNATIVES, "MODEL.LA.GATE False"]]
    + [("pola_pvt_t", f"MODEL.LA.GATE False {options}") for options in ALTERNATIVES[-2:]],
)
def test_every_parameter_of_every_alternative_gets_a_gradient(name, options):
    model = _build(name, f"MODEL.LA.ATTN_TYPE LLLL {options}")
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_differs_from_polarity_by_the_kernel_alone(kind):
    """The same state dict without `power`, and the output that the explicit matrix gives in the kernel's place."""
    torch.manual_seed(0)
    module = PolaWindowAttention(8, 2, (3, 3), AttentionOptions(kernel_size=3, attention=kind)).double()
    polarity = PolaWindowAttention(8, 2, (3, 3), AttentionOptions(kernel_size=3))
    assert [name for name in polarity.state_dict() if name != "power"] == list(module.state_dict())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v, g = F.linear(x, module.qkvg.weight, module.qkvg.bias).chunk(4, dim=-1)
    scale, position = F.softplus(module.scale).reshape(2, 4), module.positional_encoding.reshape(9, 2, 4)
    rows = _explicit(kind, *(t.reshape(2, 9, 2, 4) for t in (q, k, v)), scale, position, None, 1e-6)
    expected = module.proj((rows.flatten(2) + module.dwc(v, (3, 3))) * g)
    assert torch.allclose(module(x), expected, rtol=1e-11, atol=1e-12)


def test_without_a_gate_the_projection_is_smaller_and_the_output_ungated():
    torch.manual_seed(0)
    gated, plain = (
        PolaReductionAttention(8, 2, (4, 4), AttentionOptions(kernel_size=3, gate=gate)) for gate in (True, False)
    )
    state = gated.state_dict()
    state["qg.weight"], state["qg.bias"] = state["qg.weight"][:8], state["qg.bias"][:8]
    plain.load_state_dict(state)
    with torch.no_grad():
        gated.qg.weight[8:], gated.qg.bias[8:] = 0, 1  # a gate of 1 everywhere
    x = torch.randn(2, 16, 8)
    assert torch.allclose(plain(x, (4, 4)), gated(x, (4, 4)), atol=1e-6)


def test_a_fixed_exponent_is_the_one_a_learnable_exponent_starts_at():
    learnable, fixed = (_build("pola_swin_t", f"MODEL.LA.ALPHA 3 MODEL.LA.LEARN_EXPONENT {on}") for on in (True, False))
    assert not [name for name in fixed.state_dict() if name.endswith("power")]
    fixed.load_state_dict({name: value for name, value in learnable.state_dict().items() if not name.endswith("power")})
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(fixed.eval()(images), learnable.eval()(images), atol=1e-6)
    assert (fixed.layers[0].blocks[0].attn.exponent() == 2.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_made_of_every_kind(kind):
    record_of = record(_build("pola_swin_t", f"MODEL.LA.ATTENTION {kind}"), torch.randn(1, 3, 32, 32)).layers
    layer = record_of["layers.0.blocks.0"]
    assert layer.kind == kind
    rows = layer.rows([0, 5])
    assert torch.allclose(rows.sum(dim=-1), torch.ones(rows.shape[:-1]), atol=1e-3) and rows.min() >= 0


def test_maps_are_made_without_a_gate():
    layers = record(_build("pola_swin_t", "MODEL.LA.GATE False"), torch.randn(1, 3, 32, 32)).layers
    assert layers["layers.0.blocks.0"].kind == "polarity" and layers["layers.0.blocks.0"].g is None


@pytest.mark.parametrize("options", ["MODEL.LA.ATTENTION elu", "MODEL.LA.GATE False"])
def test_torch_fx_traces_every_alternative(options):
    model = _build("pola_swin_t", options).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


@pytest.mark.parametrize("options", ["MODEL.LA.ATTENTION elu", "MODEL.LA.LEARN_EXPONENT False"])
def test_the_report_on_a_step_covers_models_with_other_kinds(options):
    model = _build("pola_swin_t", options)
    before = copy.deepcopy(model.state_dict())
    report = inspect_step(model, lambda: model(torch.randn(1, 3, 32, 32)).sum().backward())
    assert report["first_module_not_finite"] is None and json.dumps(report)
    (seen, *_) = report["attention"].values()
    own = {"exponent", "normaliser_same", "normaliser_opposite"} if "EXPONENT" in options else {"normaliser_elu"}
    assert seen.keys() == {"scale", *own}
    assert model.state_dict().keys() == before.keys()
