"""What a pyramid of feature maps costs over the plain forward pass: python -m benchmarks.features

Of each variant, in evaluation mode and interleaved in one process: `model(x)`, `model.forward_intermediates(x)` with
all stages, and `timm.create_model(…, features_only=True)(x)`, all on the same weights in memory; `model(x)` a second
time shows what the machine's unrest makes of equal work. A gate comes first: the intermediates' last tokens are those
of `forward_features`, and both ways give the same maps.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch

from benchmarks import common
from benchmarks.common import Bar, Outcome, Spread, WrongResultError, ratios
from models import list_models

FEATURES_BAR = 1.03  # times the forward pass, at most
CONTENDERS = ("forward", "forward again", "forward_intermediates", "features_only")


@torch.inference_mode()
def measure(name: str, batch_size: int, image_size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each contender, and ratios to the forward pass within each round.

    Raises WrongResultError for maps or tokens that differ.
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
    runs = {key: partial(call, images) for key, call in zip(CONTENDERS, calls, strict=True)}
    samples = common.interleaved_seconds(device, runs, repeats, warmup=2)
    return {
        "model": name,
        "milliseconds": {key: Spread.of(samples[key], 1e3) for key in CONTENDERS},
        "ratio": {key: ratios(samples[key], samples["forward"]) for key in CONTENDERS[1:]},
    }


def measure_models(options: Namespace) -> Outcome:
    """All variants that are asked for, and a table of them."""
    setting = (options.batch_size, options.image_size, options.repeats, torch.device(options.device))
    records = [measure(name, *setting) for name in options.models]
    rows, bars = [], []
    for record in records:
        for key in CONTENDERS:
            ratio = record["ratio"][key].text(digits=3) if key != "forward" else "1"
            rows.append((record["model"], key, record["milliseconds"][key].text(), ratio))
        for key in CONTENDERS[2:]:
            measured = record["ratio"][key].median
            bars.append(Bar(f"{record['model']}: {key} over forward", measured, FEATURES_BAR, "at most"))
    title = f"batch {options.batch_size}, {options.image_size}²: {common.SPREAD}"
    common.print_table(title, ("model", "call", "ms", "× forward"), rows)
    return Outcome({"models": records}, bars)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("features", __doc__, device=True, batch_size=1, image_size=224, repeats=101)
    defaults = ["pola_swin_tiny", "pola_pvt_tiny"]
    parser.add_argument("--models", nargs="+", choices=list_models(), default=defaults, metavar="NAME")
    options = parser.parse_args(arguments)
    common.run(options, measure_models, recorded="batch_size image_size repeats", packages=["timm"])


if __name__ == "__main__":
    main()
