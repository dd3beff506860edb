"""All that lies between two projections as one operation of Triton: equal to its parts, and in how many launches.

pytest tests/test_gated.py
"""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import PolaMapAttention, PolaReductionAttention, PolaWindowAttention
from models.ops.linear_attention import gated, triton_local, triton_op
from models.options import AttentionOptions

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # log2(0) is meant

Layer = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]


def layer(layout: str, kernel: str = "polarity", dim: int = 16, **options) -> Layer:
    """An eager layer whose parameters all count, how it is called, and the shape of its input."""
    torch.manual_seed(0)
    given = AttentionOptions(kernel, backend="eager", **{"kernel_size": 3, **options})
    if layout == "window":
        module = PolaWindowAttention(dim, 2, (5, 7), given)
        found = module, lambda m, x: m(x), (3, 35, dim)
    elif layout.startswith("reduced"):
        module = PolaReductionAttention(dim, 2, (6, 8), given, sr_ratio=int(layout[-1]))
        found = module, lambda m, x: m(x, (6, 8)), (2, 48, dim)
    else:
        module = PolaMapAttention(dim, 2, given)
        found = module, lambda m, x: m(x, (6, 7)), (2, 42, dim)
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    module.to(DEVICE)
    return found


def in_one_piece(module: nn.Module) -> nn.Module:
    ours = copy.deepcopy(module)
    ours.options = dataclasses.replace(module.options, backend="triton")
    return ours


def run(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = call(module, x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], upstream, allow_unused=True)
    return {"out": out.detach(), **dict(zip(["x", *names], gradients, strict=True))}


def check(found: Layer, dtype: torch.dtype = torch.float32) -> None:
    module, call, shape = found
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        expected, values = run(module, call, x), run(in_one_piece(module), call, x)
    bound = 2e-5 if dtype == torch.float32 else 3e-2
    for name, value in values.items():
        if expected[name] is None:
            assert value is None, name
        else:
            assert value.dtype == expected[name].dtype
            error = (value - expected[name]).float().norm() / expected[name].float().norm()
            assert error <= bound, f"{name}: relative error {error:.1e} exceeds {bound:.0e}"


def sum_in_parts(monkeypatch) -> None:
    """Also of short sequences; what is remembered of others stays as it is."""
    monkeypatch.setattr(triton_op, "MIN_TOKENS_OF_A_SUM", 8)
    monkeypatch.setattr(triton_op, "parts_of_a_sum", triton_op.parts_of_a_sum.__wrapped__)


@pytest.fixture
def pieces(monkeypatch):
    """How often the operation ran."""
    calls = []
    forward = gated.gated_forward
    monkeypatch.setattr(gated, "gated_forward", lambda *a: calls.append(1) or forward(*a))
    return calls


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("window", {}),
        ("window", {"gate": False, "kernel_size": 5}),
        ("window", {"learn_exponent": False, "kernel_size": 1}),
        ("window", {"learn_scale": False, "dim": 24}),
        ("reduced 1", {}),
        ("reduced 2", {"kernel_size": 5}),
        ("map", {"kernel": "polarity_pp"}),
        *(
            pytest.param(layout, options, marks=pytest.mark.slow)
            for layout, options in [
                ("window", {"kernel": "norm_aware"}),
                ("window", {"kernel": "polarity_pp"}),
                ("reduced 2", {"gate": False}),
                ("map", {"kernel": "polarity_pp", "kernel_size": 5}),
            ]
        ),
    ],
    ids=str,
)
def test_equals_the_parts_with_all_gradients(layout, options, pieces):
    check(layer(layout, **options))
    assert pieces == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["window", "reduced 2"])
def test_under_autocast(layout, dtype, pieces):
    check(layer(layout), dtype)
    assert pieces == [1]


def test_many_tiles_and_parts_are_summed_in_order(monkeypatch):
    """Of sequences that several programs share, and of tiles that one program takes one after the other."""
    sum_in_parts(monkeypatch)
    monkeypatch.setattr(gated, "PROGRAMS", 0.02)
    monkeypatch.setattr(gated, "TILE_ELEMENTS", 256)
    found = layer("reduced 1")
    check(found)
    module, call, shape = found
    first, second = (run(in_one_piece(module), call, torch.ones(shape, device=DEVICE)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masked_watched_offloaded_and_traced_layers_take_the_parts(pieces):
    module, call, shape = layer("window")
    ours, x = in_one_piece(module), torch.randn(shape, device=DEVICE)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=DEVICE)
    mask[:, -3:] = False
    assert torch.allclose(ours(x, mask), module(x, mask), atol=1e-5)
    ours.mix = ours.mix  # as models/diagnostics.py does
    assert torch.allclose(call(ours, x), call(module, x), atol=1e-5)
    del ours.mix
    handle = ours.dwc.register_forward_hook(lambda *arguments: None)
    call(ours, x)
    handle.remove()
    torch.export.export(ours, (x,))
    assert pieces == []
    call(ours, x)
    assert pieces == [1]


def test_opcheck_and_compile():
    module, call, shape = layer("window", dim=8)
    ours, x = in_one_piece(module), torch.randn(shape[0], shape[1], 8, device=DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), call(module, x), atol=1e-5)
    raw, projected = ours.raw(), ours.qkvg(x).detach().requires_grad_()
    position = ours.positional_encoding[0].detach().requires_grad_()
    arguments = (projected, None, None, raw.first.detach().requires_grad_(), raw.second.detach().requires_grad_())
    arguments += (position, None, None, ours.dwc.weight, ours.dwc.bias, 2, True, "power", 3.0, 7)
    torch.library.opcheck(torch.ops.polaformer.gated_linear_attention, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """What a GPU would be asked to do: kernels of Triton by name, and operators of PyTorch that touch elements."""

    FREE = frozenset({"empty", "new_empty", "empty_like", "detach", "alias"})  # besides views

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        runner = type(triton_op.state_kernel)
        plain = runner.run

        def recorded(kernel, *arguments, **named):
            self.names.append(kernel.__name__)
            self.depth = True
            try:
                return plain(kernel, *arguments, **named)
            finally:
                self.depth = False

        self.depth = False  # inside of a kernel, whose interpreter copies
        monkeypatch.setattr(runner, "run", recorded)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "polaformer":  # what happens inside counts
            inside = {gated.gated_forward: gated.forward, gated.gated_backward: gated.backward}[func]
            with self:
                return inside(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not self.depth and func.namespace == "aten" and not is_view and name not in self.FREE:
            self.names.append(name)
        return out


@pytest.mark.parametrize(
    ("layout", "kernel", "in_parts", "forward", "backward"),
    [
        ("window", "polarity", False, 3, 5),
        ("reduced 1", "polarity", False, 3, 5),
        ("reduced 1", "polarity", True, 4, 6),
        ("map", "polarity_pp", False, 3, 4),
    ],
)
def test_launches_between_the_projections(layout, kernel, in_parts, forward, backward, monkeypatch):
    """At most 4 forward and 6 backward, with the sums of sequences that several programs share."""
    if in_parts:
        sum_in_parts(monkeypatch)
    module, call, shape = layer(layout, kernel)
    ours = in_one_piece(module)
    launches = Launches(monkeypatch)
    seen: dict[str, list[str]] = {}
    attend = ours.in_one_piece

    def watched(x, kv, *rest, **named):
        with launches:
            out = attend(x, kv, *rest, **named)
        seen["forward"] = list(launches.names)
        given = [t for t in (x, kv) if t is not None]
        launches.names.clear()
        leaves = [*given, *(p for n, p in ours.named_parameters() if not n.startswith(("q", "kv", "proj", "sr")))]
        upstream = torch.ones_like(out)
        with launches:
            torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        seen["backward"] = list(launches.names)
        return out

    ours.in_one_piece = watched
    call(ours, torch.randn(shape, device=DEVICE))
    assert len(seen["forward"]) == forward, seen["forward"]
    assert len(seen["backward"]) == backward, seen["backward"]


@triton.jit
def _over_the_edge(row, column, HEIGHT, WIDTH, place, sign: tl.constexpr, K: tl.constexpr):
    down, right = sign * (place // K - K // 2), sign * (place % K - K // 2)
    inside = (row + down >= 0) & (row + down < HEIGHT)
    return down * WIDTH + right, inside[:, None]


@triton.jit
def _without_slope(x):
    return x * 0.0


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep the functions they were compiled with")
@pytest.mark.parametrize(("name", "wrong"), [("_neighbour", _over_the_edge), ("sigmoid", _without_slope)])
def test_a_planted_error_is_noticed(name, wrong, monkeypatch):
    monkeypatch.setattr(triton_local, name, wrong)
    with pytest.raises(AssertionError, match="exceeds"):
        check(layer("window"))
