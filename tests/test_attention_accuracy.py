"""Every backend of the op, its output and all its gradients, against the float64 reference.

pytest tests/test_attention_accuracy.py

Triton's kernels run in its interpreter where there is no GPU, on shapes that leave it time.
"""

import functools
import itertools

import pytest
import torch
import triton
import triton.language as tl
from attention_accuracy import (
    CHANNELS,
    DTYPES,
    LENGTHS,
    assert_accurate,
    make_inputs,
    make_mask,
    run,
)
from conftest import DEVICE

from models.ops import polarity_attention as package
from models.ops.linear_attention import eager as core
from models.ops.linear_attention import triton as kernels
from models.ops.linear_attention import triton_maps, triton_op
from models.ops.polarity_attention import eager, native, polarity_attention

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) in the interpreter is meant

# Every length of queries with another one of keys; the slow test has all pairs.
PAIRS = [(N, LENGTHS[(i + 3) % len(LENGTHS)]) for i, N in enumerate(LENGTHS)]
INTERPRETED_PAIRS = [(1, 49), (63, 1), (130, 196)]
# Every number of channels in float32; the other types at a power of two, at one more and at a large one. The slow test
# has them all, each at every pair.
INTERPRETED_SIZES = [*((d, torch.float32) for d in CHANNELS), *itertools.product((32, 33, 96), DTYPES[1:])]
BACKENDS = ["eager", "native", "triton"]
DRAWS_OF_ONE_KEY = 32
DRAWS_INTERPRETED = 4


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def _check_shape(backend, N, n, d, dtype, masked, surroundings=False, draws=1):
    """Enough heads that the norms average: where a gradient happens to cancel, everybody's rounding error is large.

    With a single key the output is its value, whatever q and k are. Their gradients, and the exponent's, are what is
    left of terms that cancel but for eps, and everybody's relative error is rounding over that remainder. The query
    with the smallest one decides the norm, so that with few queries two equally exact computations differ by chance:
    over 60 draws by up to a factor of 3 (7 queries) or 8 (1 query), while the geometric means of their errors differ by
    a tenth. There the means over several draws are compared, within the same bound.
    """
    device = _device(backend)
    seeds = range(max(draws, DRAWS_OF_ONE_KEY if n == 1 and N < 49 else 1))
    inputs = (
        make_inputs(N, n, d, dtype, h=16 if min(N, n) < 100 else 4, surroundings=surroundings, device=device, seed=seed)
        for seed in seeds
    )
    assert_accurate(backend, next(inputs), make_mask(1, n).to(device) if masked else None, further_draws=inputs)


@pytest.mark.parametrize(
    ("backend", "d", "dtype"),
    [
        *(("eager", *size) for size in itertools.product(CHANNELS, DTYPES)),
        *(("native", *size) for size in INTERPRETED_SIZES),
    ],
    ids=str,
)
def test_the_usual_range(backend, d, dtype):
    """A quarter of the pairs for each d and dtype; over all of them, every pair with and without a mask."""
    turn = 3 * CHANNELS.index(d) + DTYPES.index(dtype)
    for i in range(turn % 4, len(PAIRS), 4):
        N, n = PAIRS[i]
        _check_shape(backend, N, n, d, dtype, masked=turn // 4 % 2 == 0, surroundings=N in (7, 196))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", CHANNELS)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_every_pair_of_lengths(backend, d, dtype):
    for N, n, masked in itertools.product(LENGTHS, LENGTHS, (False, True)):
        _check_shape(backend, N, n, d, dtype, masked)


@pytest.mark.parametrize(
    ("d", "dtype"), INTERPRETED_SIZES if DEVICE == "cpu" else itertools.product(CHANNELS, DTYPES), ids=str
)
def test_triton_in_the_usual_range(d, dtype):
    """All pairs on a GPU. The interpreter gets one for each d and dtype, so that each dtype gets all."""
    pairs = list(enumerate(PAIRS if DEVICE == "cuda" else INTERPRETED_PAIRS))
    if DEVICE != "cuda":
        turn = (CHANNELS.index(d) + DTYPES.index(dtype)) % len(pairs)
        pairs = pairs[turn : turn + 1]
    for i, (N, n) in pairs:
        _check_shape("triton", N, n, d, dtype, masked=i % 2 == 0, surroundings=i % 3 == 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", CHANNELS)
def test_triton_at_every_pair_it_is_interpreted_at(d, dtype):
    """Means over draws: the terms of the gradient of `scale` cancel too.

    At 130 queries, 196 keys and d = 33 in float32, the first draw's error is 2.3 times that of the plain computation;
    over 145 draws the geometric means are 7.5e-07 and 6.5e-07.
    """
    for (N, n), masked in itertools.product([*INTERPRETED_PAIRS, (196, 500)], (False, True)):
        _check_shape("triton", N, n, d, dtype, masked, surroundings=masked, draws=DRAWS_INTERPRETED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("low", "high", "largest_exponent"),
    [(1e-20, 1e-3, 5.0), (1e-3, 1e3, 5.0), (0.03, 30.0, 10.0), (1e2, 1e3, 5.0), (1e-20, 1e-18, 2.0)],
)
def test_outside_the_usual_range(backend, low, high, largest_exponent):
    inputs = make_inputs(
        63, 49, 24, torch.float32, low=low, high=high, largest_exponent=largest_exponent, device=_device(backend)
    )
    assert_accurate(backend, inputs, multiple=16.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_infinite_or_nan_as_long_as_the_sums_are_representable(backend, dtype):
    """|u| up to 1,000 with exponents up to 5, up to 30 with exponents up to 10; float16 features would overflow."""
    for low, high, largest_exponent in ((1e2, 1e3, 5.0), (1.0, 30.0, 10.0), (1e-20, 1e3, 5.0)):
        inputs = make_inputs(
            49, 196, 32, dtype, low=low, high=high, largest_exponent=largest_exponent, device=_device(backend)
        )
        cotangent = torch.ones_like(inputs[0])
        assert all(t.isfinite().all() for t in run(backend, inputs, None, cotangent))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", ["zeros", "zero row", "masked row", "positive", "negative", "opposite", "least exponent"]
)
def test_special_values(backend, dtype, case):
    inputs = make_inputs(63, 49, 24, dtype, B=1, surroundings=False, device=_device(backend))
    q, k, _, exponent = inputs
    mask = None
    with torch.no_grad():
        if case == "zeros":
            q[:, ::2, :, ::3] = 0
            k[:, ::3, :, ::2] = 0
        elif case == "zero row":
            q[0, 5] = 0
            k[0, 7] = 0
        elif case == "masked row":
            mask = torch.zeros(1, 49, dtype=torch.bool, device=q.device)
        elif case == "least exponent":  # |u|^(p−1) is 1 at u = 0, and the gradient still 0
            exponent.fill_(1.0)
            q[0, 3], k[0, :, :, 2] = 0, 0
        else:
            q.abs_()
            k.abs_()
            if case != "positive":
                k.neg_()
            if case == "negative":
                q.neg_()
    values = run(backend, inputs, mask, torch.ones_like(q))
    assert all(t.isfinite().all() for t in values)
    out, grad_q, grad_k, *_ = values
    if case == "masked row":
        assert all((t == 0).all() for t in values)
        return
    assert_accurate(backend, inputs)
    if case == "zero row":
        assert (out[0, 5] == 0).all()
    if case in ("zeros", "least exponent"):
        assert (grad_q[q == 0] == 0).all() and (grad_k[k == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_images_with_masks_of_their_own(backend):
    device = _device(backend)
    inputs = make_inputs(63, 49, 16, torch.float32, B=3, surroundings=True, device=device)
    mask = make_mask(3, 49).to(device)
    cotangent = torch.randn(3, 63, 2, 16, generator=torch.Generator().manual_seed(3)).to(device)
    exact = run("reference", [t.detach().double().requires_grad_() for t in inputs], mask, cotangent)
    for value, expected in zip(run(backend, inputs, mask, cotangent), exact, strict=True):
        assert (value - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_are_read_by_their_strides(backend):
    """What a projection gives: slices of one tensor, here also with their images reversed in memory."""
    device = _device(backend)
    inputs = make_inputs(49, 49, 24, torch.float32, B=2, device=device)
    packed = torch.stack([t.detach() for t in inputs[:3]], dim=3).transpose(0, 1).contiguous().transpose(0, 1)
    views = [t.requires_grad_() for t in packed.unbind(3)]
    assert not any(t.is_contiguous() for t in views)
    upstream = torch.randn(2, 24, 2, 49, generator=torch.Generator().manual_seed(3)).to(device).permute(0, 3, 2, 1)
    expected = run(backend, inputs, None, upstream.contiguous())
    for value, wanted in zip(run(backend, [*views, inputs[3]], None, upstream), expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="a file without contents, mapped, is no memory of a GPU")
@pytest.mark.parametrize("axis", [1, 2])
def test_offsets_of_tokens_and_heads_do_not_fit_32_bits(axis, tmp_path):
    """The third token's, or head's, at 2 · 2³⁰ elements. The file has as many before it: where a wrong offset leads."""
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32 + 1024, dtype=torch.float16)
    inputs = make_inputs(3, 3, 4, torch.float16, h=3)
    upstream = torch.randn(1, 3, 3, 4, generator=torch.Generator().manual_seed(3)).half()
    expected = run("triton", inputs, None, upstream)
    strides = [0, 16, 16, 1]
    strides[axis] = 2**30
    views = []
    for i, tensor in enumerate([*inputs[:3], upstream]):
        views.append(memory.as_strided(tensor.shape, strides, storage_offset=2**31 + 128 * i))
        views[-1].copy_(tensor.detach())
    *tokens, upstream = views
    tokens = [view.requires_grad_() for view in tokens]
    for value, wanted in zip(run("triton", [*tokens, inputs[3]], None, upstream), expected, strict=True):
        assert torch.equal(value, wanted)


def test_blocks_do_not_change_the_result(monkeypatch):
    """Blocks over images and over tokens, with a last one that is smaller."""
    inputs = make_inputs(63, 49, 24, torch.float64, B=5, surroundings=True)
    mask = make_mask(5, 49)
    cotangent = torch.randn(5, 63, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = run("eager", inputs, mask, cotangent)
    for elements in (2 * 63 * 48, 20 * 48):  # two images, twenty tokens
        monkeypatch.setattr(core, "BLOCK_ELEMENTS", elements)
        for value, expected in zip(run("eager", inputs, mask, cotangent), whole, strict=True):
            assert torch.allclose(value, expected, rtol=1e-12, atol=1e-13)


def test_a_split_sequence_gives_the_same_every_time():
    """Few long sequences: several programs sum one state, in a fixed order."""
    inputs = make_inputs(700, 1000, 16, torch.float32, h=1, device=DEVICE)
    parts, length = triton_op.Launch(*inputs, *[None] * 5, "power", 1e-6).sum_parts(kernels.state_kernel, 1000)
    assert parts == 3 and (parts - 1) * length < 1000 <= parts * length
    first, second = (run("triton", inputs, None, torch.ones_like(inputs[0])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_accurate("triton", inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Planted errors: the checks above can fail
# ---------------------------------------------------------------------------------------------------------------------


ERRORS = [
    "a wrong sign of the negative features",
    "a wrong sign of a gradient",
    "no swap of the halves",
    "a mask that is one key off",
]
BACKWARD_SWAP = "no swap of the halves in backward"  # the kernels have one exchange for both directions


def _check(backend: str) -> None:
    inputs = make_inputs(63, 49, 16, torch.float32, surroundings=True, device=_device(backend))
    assert_accurate(backend, inputs, make_mask(1, 49).to(_device(backend)))


def _one_key_off(function):
    """`function` with its key mask, the argument before the last, rolled by one."""

    def wrapped(*arguments):
        *front, key_mask, eps = arguments
        return function(*front, None if key_mask is None else key_mask.roll(1, dims=1), eps)

    return wrapped


def _plant_in_blocks(backend, error, monkeypatch):
    """In eager or native."""
    feature_map = {"eager": eager.PolarityFeatures, "native": native.NativePolarityFeatures}[backend]
    if error == "a wrong sign of the negative features":
        features = feature_map.key_features

        def wrong(self, tokens):
            positive, negative = features(self, tokens).chunk(2, dim=-1)
            return torch.cat([positive, -negative], dim=-1)

        monkeypatch.setattr(feature_map, "key_features", wrong)
    elif error == "a wrong sign of a gradient":
        backward = feature_map.key_backward
        monkeypatch.setattr(feature_map, "key_backward", lambda self, *rest: -backward(self, *rest))
    elif error in ("no swap of the halves", BACKWARD_SWAP):
        name = "_readout" if error != BACKWARD_SWAP else "_readout_backward"
        read = getattr(core, name)

        def wrong(t, streams, *rest):
            return read(t, [stream._replace(exchanged=False) for stream in streams], *rest)

        monkeypatch.setattr(core, name, wrong)
    else:
        name = f"polarity_attention_{backend}"
        monkeypatch.setattr(package, name, _one_key_off(getattr(package, name)))


def _plant_in_triton(error, monkeypatch):
    if error == "a wrong sign of the negative features":

        @triton.jit
        def wrong(signed):
            return tl.where(signed > 0.0, signed, 0.0), tl.where(signed < 0.0, signed, 0.0)

        monkeypatch.setattr(triton_maps, "split", wrong)
    elif error == "a wrong sign of a gradient":

        @triton.jit
        def wrong(u, slope, grad_positive, grad_negative):
            return slope * tl.where(u > 0.0, grad_positive, tl.where(u < 0.0, grad_negative, 0.0))

        monkeypatch.setattr(kernels, "pull_back", wrong)
    elif error == "no swap of the halves":

        @triton.jit
        def wrong(positive, negative, channels, BORDER: tl.constexpr):
            return positive, negative

        monkeypatch.setattr(kernels, "_exchange", wrong)
    else:
        monkeypatch.setattr(package, "_polarity_attention_triton", _one_key_off(package._polarity_attention_triton))


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(("backend", "error"), [*itertools.product(BACKENDS, ERRORS), ("eager", BACKWARD_SWAP)])
def test_a_planted_error_is_noticed(backend, error, monkeypatch):
    _check(backend)
    if backend == "triton":
        _plant_in_triton(error, monkeypatch)
    else:
        _plant_in_blocks(backend, error, monkeypatch)
    with pytest.raises(AssertionError, match="exceeds"):
        _check(backend)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_eager_backend_is_as_exact(compiler):
    """Traced in one piece, for any batch size; inductor's code takes a minute to compile."""
    op = functools.partial(polarity_attention, backend="eager")
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    for B in (4, 5):
        inputs = make_inputs(196, 500, 24, torch.float32, B=B)
        for tensor in inputs[:3]:
            torch._dynamo.mark_dynamic(tensor, 0)  # an error where the code fits one batch size only
        cotangent = torch.randn(B, 196, 2, 24, generator=torch.Generator().manual_seed(2))
        exact = run("reference", [t.detach().double().requires_grad_() for t in inputs], None, cotangent)
        out = compiled(*inputs)
        for value, expected in zip((out, *torch.autograd.grad(out, inputs, cotangent)), exact, strict=True):
            assert (value - expected).norm() <= 8 * torch.finfo(torch.float32).eps * expected.norm()
