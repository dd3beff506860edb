"""Derivatives beyond a plain backward pass, of whole models and of every kernel with masked keys.

pytest tests/test_model_derivatives.py
"""

import copy

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import models  # noqa: F401  # registers the variants with timm
from models.attention import PolaSequenceAttention
from models.kernels import KERNELS
from models.options import AttentionOptions

SWIN = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "softmax_window_size": 4}
PVT = {"embed_dims": (8, 8, 12, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "attn_type": "LLSS"}
PP = {"embed_dims": (8, 8, 12, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "projection": 20}
SIZES = {"pola_swin_tiny": SWIN | {"window_size": 10}, "pola_pvt_tiny": PVT, "pola_pp_b0": PP, "nalaformer_xt": PP}
IMAGES = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    """Of L and S stages, in float64, with windows that do not divide their maps: masks for padding and shift."""
    torch.manual_seed(0)
    made = timm.create_model(request.param, img_size=(64, 96), num_classes=3, **SIZES[request.param]).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def along(model):
    """Logits on the images times 1 + s: (2, 3) from a number."""
    return lambda s: model(IMAGES * (1 + s))


def slope(function, step=1e-5):
    """The derivative of a function of a number at 0, by differences."""
    return (function(torch.tensor(step).double()) - function(torch.tensor(-step).double())) / (2 * step)


def gradient(function, s):
    s = s.detach().requires_grad_()
    return torch.autograd.grad(function(s).square().sum(), s)[0]


ZERO = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "hessian"])
def test_models_have_the_derivatives_of_torch_func(model, transform):
    """Softmax stages too, whose fused kernel on a CPU has neither forward-mode AD nor a gradient of a batched mask."""
    logits = along(model)
    found, expected = {
        "jvp": lambda: (torch.func.jvp(logits, (ZERO,), (torch.ones_like(ZERO),))[1], slope(logits)),
        "jacfwd": lambda: (torch.func.jacfwd(logits)(ZERO), slope(logits)),
        "jacrev": lambda: (torch.func.jacrev(logits)(ZERO), slope(logits)),
        "hessian": lambda: (
            torch.func.hessian(lambda s: logits(s).square().sum())(ZERO),
            slope(lambda s: gradient(logits, s)),
        ),
    }[transform]()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert found.abs().max() > 1e-4


def test_gradients_of_each_image_and_of_an_ensemble(model):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, images):
        return torch.func.functional_call(model, parameters, (images,)).square().sum()

    def both(gradients):
        return [gradients[name] for name in parameters]

    samples = torch.func.vmap(torch.func.grad(lambda p, image: loss(p, image[None])), (None, 0))(parameters, IMAGES)
    expected = torch.autograd.grad(model(IMAGES).square().sum(), list(model.parameters()))
    for value, wanted in zip(both(samples), expected, strict=True):
        torch.testing.assert_close(value.sum(0), wanted, rtol=1e-8, atol=1e-10)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    stacked, buffers = torch.func.stack_module_state([model, other])
    template = copy.deepcopy(model).to("meta")
    ensemble = torch.func.vmap(lambda p, b: torch.func.functional_call(template, (p, b), (IMAGES,)))(stacked, buffers)
    torch.testing.assert_close(ensemble, torch.stack([model(IMAGES), other(IMAGES)]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_a_model_with_a_backend_by_name_refuses_them(name):
    made = timm.create_model("pola_pvt_tiny", img_size=64, backend=name, **PVT)
    images = IMAGES[:, :, :, :64].float()
    with pytest.raises(ValueError, match=rf"{name} backend is differentiable once.*MODEL\.LA\.BACKEND"):
        torch.func.jvp(made, (images,), (images,))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_kernel_has_every_derivative(kernel, masked):
    """Backwards, forwards, twice and batched; a row of padding alone among them."""
    torch.manual_seed(0)
    layer = PolaSequenceAttention(4, 2, AttentionOptions(attention=kernel, backend="reference", kernel_size=3)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, not masked], [not masked] * 3])
    # a second backward pass of softmax attention has to be asked for: nothing announces it to the forward pass
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(lambda x: layer(x, mask), x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), x, check_fwd_over_rev=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_torch_func_needs_no_option_of_any_kernel(kernel):
    torch.manual_seed(0)
    layers = [
        PolaSequenceAttention(4, 2, AttentionOptions(attention=kernel, backend=backend, kernel_size=3)).double()
        for backend in ("auto", "reference")
    ]
    layers[0].load_state_dict(layers[1].state_dict())
    x, mask = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False], [True] * 3])
    for transform in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        found, expected = (transform(lambda x, layer=layer: layer(x, mask).square().sum())(x) for layer in layers)
        assert torch.equal(found, expected) and (found != 0).any()
