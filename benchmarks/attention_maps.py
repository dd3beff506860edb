"""Time and memory of one image's attention maps: python -m benchmarks.attention_maps.

All layers of a freshly initialised official model on one image: recording the forward pass, then for three query points
and all queries the rows of every map (all heads) that tools/visualize_attention.py shows, painted over the image. Each
model has a process of its own, whose largest resident memory is what counts. A gate comes first: the rows of polarity
layers, applied to the values, give what the op gives.
"""

import resource
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import CPU, Bar, Outcome, Spread, WrongResultError, relative_error
from config import image_size
from data.transforms import Normalise
from models import build_model
from models.attention_maps import LayerRecord, attention_layers, record
from models.classifier import Classifier
from models.ops.polarity_attention import polarity_attention
from tools.checkpoints import LoadedModel
from tools.visualize_attention import DEFAULT_MAPS, DEFAULT_POINTS, draw_page

MODELS = ("pola_swin_t", "pola_pvt_t", "pola_swin_b")
SECONDS_BAR = 2.0
MEMORY_BAR = 1024  # MiB, libraries and model included
ROWS_ERROR = 1e-5  # largest relative L2 difference of float32 outputs that passes the gate
GATE_QUERIES = 64


def measure_models(options: Namespace) -> Outcome:
    """Each in a process of its own, and a table of them."""
    records = [
        common.in_fresh_process(measure, name, options.repeats, threads=options.threads) for name in options.models
    ]
    common.print_table(
        "Attention maps of one image: all layers, 3 query points and all queries, mean of heads",
        ("model", "layers", "forward (ms)", "recording (ms)", "all maps, painted (ms)", "CPU time", "MiB", "before"),
        (
            (
                f"{each['model']}, {each['image_size']}²",
                str(each["layers"]),
                *(each[key].text(1e3, 0) for key in ("forward", "recording", "maps")),
                f"{each['maps_cpu_seconds'] * 1e3:.0f}",
                f"{each['peak_mib']:.0f}",
                f"{each['before_mib']:.0f}",
            )
            for each in records
        ),
    )
    bars = []
    for each in records:
        bars.append(Bar(f"{each['model']}: all maps (s)", each["maps"].median, SECONDS_BAR, "at most"))
        bars.append(Bar(f"{each['model']}: the whole process (MiB)", each["peak_mib"], MEMORY_BAR, "at most"))
    return Outcome({"models": records}, bars)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a forward pass, of recording one, and of all painted maps; memory of this process before and after."""
    config = common.configuration(name)
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, Classifier)
    loaded = LoadedModel(model.eval(), config, None)
    height, width = image_size(config)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    images = Normalise(CPU)(pixels[None])
    layers = list(attention_layers(loaded.model))
    points = [(x * width, y * height) for x, y in DEFAULT_POINTS]
    before = _peak_mib()

    def maps() -> object:
        return draw_page(loaded, pixels, name, layers=layers, heads=None, points=points, maps=DEFAULT_MAPS)

    with torch.no_grad():
        check_rows(record(loaded.model, images).layers)
        calls = {
            "forward": lambda: loaded.model(images),
            "recording": lambda: record(loaded.model, images),
            "maps": maps,
        }
        samples = common.interleaved_seconds(CPU, calls, repeats)
        start = time.process_time()
        maps()
        cpu_seconds = time.process_time() - start
    return {
        "model": name,
        "image_size": height,
        "layers": len(layers),
        **{key: Spread.of(values) for key, values in samples.items()},
        "maps_cpu_seconds": cpu_seconds,
        "before_mib": before,
        "peak_mib": _peak_mib(),
    }


def check_rows(layers: dict[str, LayerRecord]) -> None:
    """Raises WrongResultError where rows of a polarity layer applied to its values differ from what the op gives."""
    for layer in layers.values():
        exponent = layer.kernel.exponent()
        if exponent is None or len(layer.query_places) > 1:
            continue
        queries = torch.linspace(0, layer.grid[0] * layer.grid[1] - 1, GATE_QUERIES).round().long()
        q, k, v = (tensor[:, 0].transpose(1, 2) for tensor in (layer.q, layer.k, layer.v))
        expected = polarity_attention(q, k, v, exponent)[:, queries].transpose(1, 2)
        halves = [
            layer.rows(queries, stream=stream) @ layer.v[:, 0][..., list(layer.channels(stream))]
            for stream in layer.kernel.streams
        ]
        if (error := relative_error(torch.cat(halves, dim=-1), expected)) > ROWS_ERROR:
            raise WrongResultError(f"rows of {layer.name} give other outputs than the op: relative error {error:.1e}")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("attention_maps", __doc__, repeats=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="CONFIG", help="names in configs/")
    common.run(parser.parse_args(arguments), measure_models, recorded="repeats")


if __name__ == "__main__":
    main()
