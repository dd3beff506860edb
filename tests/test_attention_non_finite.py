"""What is not finite reaches every result that depends on it, on every backend: a broken file does not pass for whole.

pytest tests/test_attention_non_finite.py
"""

import itertools
import math

import pytest
import torch
from attention_accuracy import NAMES, make_inputs, run
from conftest import DEVICE

from models.kernels import KERNELS, LinearKernel
from models.options import AttentionOptions

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what numpy says of NaN in Triton's interpreter

BACKENDS = ["eager", "native", "triton", "reference"]
VALUES = [math.nan, math.inf, -math.inf]
IMAGE, TOKEN, HEAD, CHANNEL = 1, 3, 1, 2
# The element of each input that is not finite; the gradient that arrives is one of them.
PLACES = {
    "q": (IMAGE, TOKEN, HEAD, CHANNEL),
    "k": (IMAGE, TOKEN, HEAD, CHANNEL),
    "v": (IMAGE, TOKEN, HEAD, CHANNEL),
    "exponent": (HEAD, CHANNEL),
    "scale": (HEAD, CHANNEL),
    "position": (TOKEN, HEAD, CHANNEL),
    "incoming": (IMAGE, TOKEN, HEAD, CHANNEL),
}
MASKED = 5  # the last key, in every image


def _case(backend, dtype=torch.float32):
    device = DEVICE if backend == "triton" else "cpu"
    inputs = make_inputs(5, 6, 4, dtype, B=2, surroundings=True, device=device)
    mask = torch.arange(6, device=device).lt(MASKED).repeat(2, 1)
    cotangent = torch.randn(2, 5, 2, 4, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    return dict(zip(NAMES[1:], inputs, strict=True)), mask, cotangent


def _values(backend, inputs, mask, cotangent):
    return dict(zip(NAMES, run(backend, list(inputs.values()), mask, cotangent), strict=True))


def _dependent(name):
    """Per result, the part that depends on the element PLACES[name]: its head, of its image unless shared."""
    image = slice(None) if name in ("exponent", "scale", "position") else IMAGE
    head = (image, slice(None), HEAD)
    parts = {"output": head, "q": head, "k": head, "v": head}
    parts |= {"exponent": (HEAD,), "scale": (HEAD,), "position": (slice(None), HEAD)}
    row, channel = (IMAGE, TOKEN, HEAD), (IMAGE, slice(None), HEAD, CHANNEL)
    if name == "q":
        parts |= {"output": row, "q": row}
    elif name == "v":
        parts |= {"output": channel}
        del parts["v"]  # linear in v
    elif name == "incoming":
        parts |= {"q": row, "v": channel}
        del parts["output"]
    return parts


def _without_masked(result, values):
    """The same without masked keys, whose gradients are 0 or, beside NaN, nobody's concern."""
    axis = {"k": 1, "v": 1, "position": 0}.get(result)
    return values if axis is None else values.narrow(axis, 0, MASKED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLACES)
def test_nan_reaches_all_that_depends_on_it_and_nothing_else(backend, name):
    inputs, mask, cotangent = _case(backend)
    intact = _values(backend, inputs, mask, cotangent)
    with torch.no_grad():
        (inputs | {"incoming": cotangent})[name][PLACES[name]] = math.nan
    values = _values(backend, inputs, mask, cotangent)
    dependent = _dependent(name)
    for result, value in values.items():
        reached = torch.zeros_like(value, dtype=torch.bool)
        if result in dependent:
            reached[dependent[result]] = True
        value, reached, wanted = (_without_masked(result, t) for t in (value, reached, intact[result]))
        assert value[reached].isnan().all(), f"NaN in {name} is lost in {result}"
        assert torch.equal(value[~reached], wanted[~reached]), f"NaN in {name} changes what does not depend on it"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("exponent", [1.0, 2.5])
def test_what_is_not_finite_makes_its_rows_its_own_gradient_and_the_parameters_not_finite(
    backend, name, value, exponent
):
    """An infinite scale or exponent too, whose limit would be finite. At p = 1, |u|^(p−1) of NaN could be 1."""
    inputs, mask, cotangent = _case(backend)
    with torch.no_grad():
        inputs["exponent"].fill_(exponent)
        (inputs | {"incoming": cotangent})[name][PLACES[name]] = value
    values = _values(backend, inputs, mask, cotangent)
    dependent = _dependent(name)
    if name != "incoming":
        assert not values["output"][dependent["output"]].isfinite().any()
    own = {"v": ("q", "k"), "incoming": ("q", "k", "v")}.get(name, (name,))
    for result in (*own, "exponent", "scale"):
        place = PLACES[result] if name != "incoming" else dependent[result]
        gradient = _without_masked(result, values[result])[place]
        assert not gradient.isfinite().any(), f"{value} in {name} is lost in the gradient of {result}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["exponent", "scale"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_parameters_that_are_not_finite_are_noticed_at_every_u(backend, name, value, u):
    """1 to the power NaN is 1, 0 to the power Inf is 0, and 0 or 1 over Inf is 0."""
    inputs, _, cotangent = _case(backend)
    with torch.no_grad():
        for tensor, fill in (("q", u), ("k", u), ("position", 0.0), ("scale", 1.0)):
            inputs[tensor].fill_(fill)
        inputs[name][HEAD, CHANNEL] = value
    values = _values(backend, inputs, None, cotangent)
    assert not values["output"][:, :, HEAD].isfinite().any() and values["output"][:, :, 1 - HEAD].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value"), list(itertools.product(("k", "v"), VALUES)))
def test_masked_keys_are_never_read_as_numbers(backend, name, value):
    """With scale and position, whose gradients pass by the masked keys too."""
    inputs, mask, cotangent = _case(backend)
    expected = _values(backend, inputs, mask, cotangent)
    with torch.no_grad():
        inputs[name][:, MASKED] = value
        inputs["position"][MASKED] = value
    values = _values(backend, inputs, mask, cotangent)
    for result in NAMES:
        assert torch.equal(values[result], expected[result]), f"{value} in masked {name} changes {result}"
    assert (values["k"][:, MASKED] == 0).all() and (values["v"][:, MASKED] == 0).all()
    assert (values["position"][MASKED] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_propagates_too(backend, dtype):
    for name in PLACES:
        inputs, mask, cotangent = _case(backend, dtype)
        with torch.no_grad():
            (inputs | {"incoming": cotangent})[name][PLACES[name]] = math.nan
        values = _values(backend, inputs, mask, cotangent)
        for result, part in _dependent(name).items():
            assert _without_masked(result, values[result])[part].isnan().all(), (backend, name, result)


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if issubclass(kernel, LinearKernel)])
def test_every_feature_map_propagates_nan(name):
    """What attention maps and the report of a step that is not finite look at."""
    kernel = KERNELS[name](8, 2, AttentionOptions(attention=name))
    u = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    u[1, 1, 2] = math.nan
    features = kernel.features(u)
    assert features[1, 1].isnan().any() and features[0].isfinite().all()
