"""What a pyramid of feature maps costs over the plain forward pass: python -m benchmarks.features

Of each variant, in evaluation mode and interleaved in one process: `model(x)`, `model.forward_intermediates(x)` with
all stages, and `timm.create_model(…, features_only=True)(x)`, all on the same weights in memory; `model(x)` a second
time shows what the machine's unrest makes of equal work. A gate comes first: the intermediates' last tokens are those
of `forward_features`, and both ways give the same maps.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import timm
import torch

from benchmarks.common import (
    Bar,
    Spread,
    WrongResultError,
    argument_parser,
    gated,
    interleaved,
    prepare_process,
    print_bars,
    print_table,
    ratios,
    timed,
    write_result,
)
from models import list_models

FEATURES_BAR = 1.03  # times the forward pass, at most
CONTENDERS = ("forward", "forward again", "forward_intermediates", "features_only")


@torch.inference_mode()
def measure(name: str, batch_size: int, image_size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each contender, and ratios to the forward pass within each round.

    Raises:
        WrongResultError: maps or tokens that differ.
    """
    model: Any = timm.create_model(name, img_size=image_size).eval().to(device)
    backbone: Any = timm.create_model(name, img_size=image_size, features_only=True).eval().to(device)
    backbone.model.load_state_dict(model.state_dict(), strict=False, assign=True)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    tokens, maps = model.forward_intermediates(images)
    if not torch.equal(tokens, model.forward_features(images)):
        raise WrongResultError(f"{name}: forward_intermediates and forward_features differ")
    if not all(torch.equal(a, b) for a, b in zip(maps, backbone(images), strict=True)):
        raise WrongResultError(f"{name}: forward_intermediates and features_only differ")
    calls = (model, model, model.forward_intermediates, backbone)
    runs = {key: partial(_seconds, device, partial(call, images)) for key, call in zip(CONTENDERS, calls, strict=True)}
    samples = interleaved(runs, repeats, warmup=2)
    return {
        "model": name,
        "milliseconds": {key: asdict(Spread.of(1e3 * each for each in samples[key])) for key in CONTENDERS},
        "ratio": {key: asdict(ratios(samples[key], samples["forward"])) for key in CONTENDERS[1:]},
    }


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    return timed(device, call)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Gate, measure, print, write. Exits with the reason, before anything is timed, when the gate finds an error."""
    parser = argument_parser("features", __doc__ or "", device=True)
    defaults = ["pola_swin_tiny", "pola_pvt_tiny"]
    parser.add_argument("--models", nargs="+", choices=list_models(), default=defaults, metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--repeats", type=int, default=101, help="timed rounds")
    options = parser.parse_args(arguments)
    prepare_process(options.threads)
    device = torch.device(options.device)
    with gated():
        setting = (options.batch_size, options.image_size, options.repeats, device)
        records = [measure(name, *setting) for name in options.models]
    rows = []
    bars = []
    for record in records:
        for key in CONTENDERS:
            ratio = Spread(**record["ratio"][key]).text(digits=3) if key != "forward" else "1"
            rows.append((record["model"], key, Spread(**record["milliseconds"][key]).text(), ratio))
        for key in CONTENDERS[2:]:
            measured = record["ratio"][key]["median"]
            bars.append(Bar(f"{record['model']}: {key} over forward", measured, FEATURES_BAR, "at most"))
    title = f"batch {options.batch_size}, {options.image_size}²: median (smallest to largest)"
    print_table(title, ("model", "call", "ms", "× forward"), rows)
    print_bars(bars)
    content = {
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "repeats": options.repeats,
        "models": records,
    }
    path = write_result(options.output, "features", device, content, bars, packages=["timm"])
    print(f"\nwrote {path.name} to {options.output}")


if __name__ == "__main__":
    main()
