"""Time of an attention layer between its two projections: python -m benchmarks.attention_layer --device cuda.

The layer in one piece (models/ops/linear_attention/gated.py), the same backend in parts, with PyTorch's convolution and
gate, and the eager backend; forward and backward, without the projections. A gate comes first: equal results.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import DTYPES, Bar, Outcome, Spread, WrongResultError, relative_error
from models.attention import KernelAttention, PolaMapAttention, PolaWindowAttention
from models.options import AttentionOptions

# Maps or windows of a batch of 128 at 224², their side, channels and heads: stages of Pola-Swin-T and of pola_pp_b1.
LAYERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "cuda": {
        "Pola-Swin-T, stage 1": (PolaWindowAttention, "polarity", 8192, 7, 96, 3),
        "Pola-Swin-T, stage 3": (PolaWindowAttention, "polarity", 512, 7, 384, 12),
        "PolaFormer++, 28²": (PolaMapAttention, "polarity_pp", 128, 28, 96, 3),
    },
    "cpu": {"windows": (PolaWindowAttention, "polarity", 2, 3, 16, 2)},
}
LARGEST_ERROR = 2e-2  # of bfloat16
CONTENDERS = ("one piece", "parts", "eager")


def contender(name: str, layer: KernelAttention, device: torch.device) -> KernelAttention:
    """From the projection to what is projected again."""
    backend = "eager" if name == "eager" or device.type == "cpu" else "triton"
    layer.options = replace(layer.options, backend=backend)
    if name != "one piece":
        layer.in_one_piece = lambda *arguments, **named: None  # type: ignore[method-assign]
    layer.proj = torch.nn.Identity()
    layer.qkvg = torch.nn.Identity()
    return layer.to(device)


def measure(options: Namespace) -> Outcome:
    records: list[dict[str, Any]] = []
    bars, device = [], torch.device(options.device)
    for title, (layout, kernel, count, side, dim, heads) in LAYERS[options.device].items():
        calls: dict[str, Callable[[], Tensor]] = {}
        for name in CONTENDERS:
            torch.manual_seed(0)
            given = AttentionOptions(kernel)
            layer = (
                layout(dim, heads, (side, side), given) if layout is PolaWindowAttention else layout(dim, heads, given)
            )
            run = contender(name, layer, device)
            x = torch.randn(count, side**2, 4 * dim, device=device, dtype=DTYPES[options.dtype])
            x.requires_grad_()
            further = () if layout is PolaWindowAttention else ((side, side),)
            calls[name] = partial(step, run, x, further)
        expected = calls["eager"]()
        for name in CONTENDERS[:2]:
            if (error := relative_error(calls[name](), expected)) > LARGEST_ERROR:
                raise WrongResultError(f"{title}: {name} differs from eager by {error:.1e}")
        samples = common.interleaved_seconds(device, calls, options.repeats, warmup=3)
        records.append({"layer": title, **{name: Spread.of(samples[name]) for name in CONTENDERS}})
        ratio = common.ratios(samples["parts"], samples["one piece"]).median
        bars.append(Bar(f"{title}: parts over one piece", ratio, 1.0))
    rows = ((each["layer"], *(each[name].text(1e3, 2) for name in CONTENDERS)) for each in records)
    common.print_table("Between the projections, forward and backward (ms)", ("layer", *CONTENDERS), rows)
    return Outcome({"layers": records}, bars)


def step(run: Callable[..., Tensor], x: Tensor, further: tuple[Any, ...]) -> Tensor:
    """The gradient of x, which depends on the result and on every part."""
    out = run(x, *further)
    return torch.autograd.grad(out.float().square().sum(), x)[0]


def main() -> None:
    parser = common.argument_parser("attention_layer", __doc__, device=True, repeats=20)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    common.run(parser.parse_args(), measure, recorded="dtype repeats")


if __name__ == "__main__":
    main()
