"""What attention layers do, in numbers: entropy, rank, exponents, norms and gates, as a CSV and figures.

example: python tools/analyze.py --checkpoint max_acc.pth           on the two photographs that ship with scikit-learn
         python tools/analyze.py images/ --checkpoint max_acc.pth --metrics entropy,rank --layers layers.0.blocks.0

docs/attention_maps.md defines every measure.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor, nn

from config import image_size
from data.transforms import Normalise, evaluation_transform
from models.attention_maps import LayerRecord, MapError, attention_layers, choose_layers, kernel_in, record
from tools.checkpoints import add_checkpoint_arguments, find_images, open_checkpoint, read_image
from tools.command_line import answer, file_path, number, program, some_of, whole

METRICS = ("entropy", "rank", "exponent", "spikiness", "signs", "norm", "gate")
LEARNED = ("exponent", "spikiness")  # of the model, whatever the images
WITH_DEPTHWISE = "combined+depthwise"
QUANTILES = {"minimum": 0.0, "quartile 1": 0.25, "median": 0.5, "quartile 3": 0.75, "maximum": 1.0}
PAIRED, TOKEN_MEANS = "paired channels", "token means"


@dataclass(frozen=True)
class Seen:
    """Of the last image, by layer, what figures show token by token."""

    gates: dict[str, tuple[Tensor, Tensor]]  # as `gate_halves` gives them
    norms: dict[str, tuple[Tensor, Tensor, Tensor]]  # as `query_norms`


@dataclass(frozen=True)
class Measurement:
    """A line of the CSV: a measure of one head, the mean over the images, and the largest value that it could have."""

    layer: str
    kind: str
    head: int
    metric: str
    map: str
    value: float
    limit: float


# -- Measures


def row_entropy(rows: Tensor) -> Tensor:
    """−Σ a ln a in nats of each row's magnitudes, of (…, Q, keys) normalised to sum 1; NaN for a row of zeros."""
    rows = rows.abs()
    total = rows.sum(dim=-1, keepdim=True)
    return torch.special.entr(rows / total).sum(dim=-1).masked_fill(total[..., 0] == 0, math.nan)


def numerical_rank(rows: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Of (…, Q, keys): how many singular values are larger than `tolerance` times the largest, and the effective rank
    exp(−Σ p ln p), p the singular values over their sum (Roy and Vetterli, EUSIPCO 2007), which needs no tolerance."""
    values = torch.linalg.svdvals(rows)
    share = values / values.sum(dim=-1, keepdim=True)
    rank = (values > tolerance * values[..., :1]).sum(dim=-1).to(rows.dtype)
    return rank, torch.special.entr(share).sum(dim=-1).exp()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r over the last axis."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def gate_halves(layer: LayerRecord) -> tuple[Tensor, Tensor] | None:
    """The gate's same-signed and opposite-signed channels of one image, (h, tokens, ⌊d/2⌋) each, padding left out.

    Channel i of one half is paired with channel i of the other; for odd d the first half's last has no partner. None
    where there are no halves: without a gate, with one channel, and for kernels that apply one map to all channels.
    """
    if layer.g is None or layer.v.shape[-1] < 2 or "opposite" not in layer.streams:
        return None
    window, position = (layer.query_places >= 0).nonzero(as_tuple=True)
    gate = layer.g[0, window, :, position].transpose(0, 1)  # (h, tokens, d)
    opposite = gate[..., layer.channels("opposite").start :]
    return gate[..., : opposite.shape[-1]], opposite


def _entropy(layer: LayerRecord, queries: Tensor, tolerance: float) -> Iterator[Measurement]:
    if layer.k.shape[3] == 1:
        return  # one key: nothing to choose
    limit = math.log(layer.k.shape[3])
    for stream in layer.streams:
        for head in range(layer.num_heads):
            value = row_entropy(layer.rows(queries, head=head, stream=stream)[0, 0]).nanmean()  # of rows of weight
            yield Measurement(layer.name, layer.kind, head, "entropy", stream, value.item(), limit)


def _rank(layer: LayerRecord, queries: Tensor, tolerance: float) -> Iterator[Measurement]:
    own = layer.own_streams[0]
    maps = (own, f"{own}+depthwise") if layer.convolution is not None else (own,)
    limit = min(len(queries), layer.key_grid[0] * layer.key_grid[1])
    for name in (*maps, *layer.comparisons):
        for head in range(layer.num_heads):  # one by one: a map of all queries and heads could be large
            stream, _, branch = name.partition("+")
            rows = layer.rows(queries, head=head, stream=stream, depthwise=bool(branch))[0, 0]
            for metric, value in zip(("rank", "effective rank"), numerical_rank(rows, tolerance), strict=True):
                yield Measurement(layer.name, layer.kind, head, metric, name, value.item(), limit)


def _signs(layer: LayerRecord, queries: Tensor, tolerance: float) -> Iterator[Measurement]:
    """Of features that are turned: the share of the weights' magnitude that is negative, and the sum of a row."""
    for stream in layer.own_streams if layer.rotary is not None else ():
        for head in range(layer.num_heads):
            rows = layer.rows(queries, head=head, stream=stream)[0, 0]
            negative = rows.clamp(max=0).abs().sum() / rows.abs().sum()
            values = {"negative share": negative, "row sum": rows.sum(dim=-1).mean()}
            for metric, value in values.items():
                yield Measurement(layer.name, layer.kind, head, metric, stream, value.item(), 1.0)


def query_norms(layer: LayerRecord, queries: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Norm and exponent of queries, and entropy of their rows over the largest possible, (h, Q) each of one image; None
    for kernels whose exponent is no query's own."""
    window, position = (layer.query_places >= 0).nonzero(as_tuple=True)
    q = layer.q.new_empty(layer.grid[0] * layer.grid[1], *layer.q.shape[2::2])  # (N, h, d)
    q[layer.query_places[window, position]] = layer.q[0, window, :, position]
    if (exponents := layer.kernel.query_exponents(q)) is None or layer.k.shape[3] == 1:
        return None
    entropy = row_entropy(layer.rows(queries)[0]) / math.log(layer.k.shape[3])
    return q.norm(dim=-1)[queries].T, exponents[queries].T, entropy


def _norm(layer: LayerRecord, queries: Tensor, tolerance: float) -> Iterator[Measurement]:
    """Of NaLaFormer: what a query's norm makes of its exponent, and whether larger norms give spikier rows."""
    if (found := query_norms(layer, queries)) is None:
        return
    norms, exponents, entropy = found
    for head in range(layer.num_heads):
        real = ~entropy[head].isnan()  # rows of weight
        values = {
            "norm": (norms[head].mean(), math.inf),
            "exponent": (exponents[head].mean(), 4.5),
            "correlation of norm and entropy": (correlation(norms[head, real], entropy[head, real]), 1.0),
        }
        for name, (value, limit) in values.items():
            yield Measurement(layer.name, layer.kind, head, "norm", name, value.item(), limit)


def _gate(layer: LayerRecord, queries: Tensor, tolerance: float) -> Iterator[Measurement]:
    if (halves := gate_halves(layer)) is None:
        return
    same, opposite = halves
    pairs = {
        PAIRED: correlation(same.flatten(1), opposite.flatten(1)),
        TOKEN_MEANS: correlation(same.mean(dim=-1), opposite.mean(dim=-1)),
    }
    for name, values in pairs.items():
        for head, value in enumerate(values.tolist()):
            yield Measurement(layer.name, layer.kind, head, "gate", name, value, 1.0)


OF_IMAGES: dict[str, Callable[[LayerRecord, Tensor, float], Iterator[Measurement]]] = {
    "entropy": _entropy,
    "rank": _rank,
    "signs": _signs,
    "norm": _norm,
    "gate": _gate,
}


def learned_values(model: nn.Module, layers: Iterable[str], metric: str) -> dict[str, dict[str, Tensor]]:
    """What the kernels of layers have learned, by layer and map: exponents or spikiness, each (h, ·)."""
    modules, found = attention_layers(model), {}
    for name in layers:
        kernel = kernel_in(modules[name])
        exponents = kernel.exponent() if metric == "exponent" else None
        values = kernel.spikiness() if metric == "spikiness" else {} if exponents is None else {"": exponents}
        if values:
            found[name] = {label: each.detach() for label, each in values.items()}
    return found


def learned_measurements(model: nn.Module, layers: Iterable[str], metric: str) -> list[Measurement]:
    """Mean, standard deviation and quartiles of each head's exponents or spikiness."""
    modules, found = attention_layers(model), []
    for name, by_stream in learned_values(model, layers, metric).items():
        kernel = kernel_in(modules[name])
        limit = 1.0 if metric == "spikiness" else 1 + kernel.options.alpha
        for stream, heads in by_stream.items():
            for head, values in enumerate(heads):
                numbers = {"mean": values.mean().item(), "standard deviation": values.std(correction=0).item()}
                numbers |= {label: values.quantile(q).item() for label, q in QUANTILES.items()}
                found += [
                    Measurement(name, kernel.name, head, metric, f"{stream} {label}".strip(), value, limit)
                    for label, value in numbers.items()
                ]
    return found


def analyze(
    model: nn.Module,
    images: Iterable[Tensor],
    layers: Sequence[str],
    metrics: Sequence[str] = METRICS,
    *,
    queries: int = 512,
    tolerance: float = 1e-3,
    normalise: Normalise | None = None,
) -> tuple[list[Measurement], Seen]:
    """Measure the layers on images, uint8 (3, H, W), one at a time.

    Args:
        queries: rows that entropy and rank are measured on, evenly spaced over the map (all, where it has no more).
        tolerance: singular values below this share of the largest do not count towards the rank.
        normalise: what the model was trained with; None: ImageNet's mean and standard deviation.

    Returns:
        The measurements, averaged over the images, and what was seen in the last one.
    """
    normalise = normalise or Normalise(torch.device("cpu"))
    collected: dict[tuple[Any, ...], list[Measurement]] = {}
    seen = Seen({}, {})
    of_images = [OF_IMAGES[metric] for metric in metrics if metric in OF_IMAGES]
    for pixels in images if of_images else ():
        for layer in record(model, normalise(pixels[None]), layers).layers.values():
            count = layer.grid[0] * layer.grid[1]
            chosen = torch.linspace(0, count - 1, min(queries, count)).round().long()
            for measure in of_images:
                for found in measure(layer, chosen, tolerance):
                    key = (found.layer, found.head, found.metric, found.map)
                    collected.setdefault(key, []).append(found)
            if "gate" in metrics and (halves := gate_halves(layer)) is not None:
                seen.gates[layer.name] = halves
            if "norm" in metrics and (norms := query_norms(layer, chosen)) is not None:
                seen.norms[layer.name] = norms
    averaged = [replace(each[0], value=math.fsum(m.value for m in each) / len(each)) for each in collected.values()]
    for metric in LEARNED:
        averaged += learned_measurements(model, layers, metric) if metric in metrics else []
    return averaged, seen


def write_csv(path: Path, measurements: Iterable[Measurement]) -> None:
    """A line for each measurement."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Measurement)])
        writer.writerows(astuple(measurement) for measurement in measurements)


# -- Figures

COLOUR = {
    "combined": "#7b2d8b",
    "same": "#d9541e",
    "opposite": "#2277c9",
    WITH_DEPTHWISE: "#1f9e77",
    "softmax": "#333333",
    "relu": "#a0a0a0",
    "elu": "#c9a227",
    "focused": "#d1438b",
    "softmax+depthwise": "#66a98f",
    "relu+depthwise": "#8fd0b8",
    "elu+depthwise": "#0f5a42",
    "focused+depthwise": "#3f8f2f",
    PAIRED: "#7b2d8b",
    TOKEN_MEANS: "#d9541e",
}
SPARE_COLOURS = ("#8c6d31", "#393b79", "#637939", "#843c39", "#5254a3")  # of maps of kernels that are not named here
LABEL = {
    "combined": "polarity, combined",
    "same": "polarity, same-signed",
    "opposite": "polarity, opposite-signed",
    WITH_DEPTHWISE: "polarity, combined + depthwise",
    "softmax": "softmax on the same q and k",
    "relu": "plain ReLU linear on the same q and k",
    PAIRED: "paired channels",
    TOKEN_MEANS: "means over each half's channels",
}


FILES = {"negative share": "signs"}
VIOLINS = {
    "exponent": ("Learned exponents of all heads and channels", "p"),
    "spikiness": ("Learned spikiness of all heads and channels", "a: what multiplies inside of the exponent"),
}


def draw_figures(folder: Path, model: nn.Module, measurements: Sequence[Measurement], seen: Seen) -> list[Path]:
    """A figure for each metric, entropy.png to gate.png, for which there are measurements."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    by_metric: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        by_metric.setdefault(measurement.metric, []).append(measurement)
    figures: dict[str, Figure] = {}

    def canvas(metric: str, panels: int = 1) -> list[Any]:
        width = max(5.6, 1.6 + 0.75 * len(_layers(by_metric[metric])))
        figures[metric] = Figure(figsize=(panels * width, 4.4), layout="constrained")
        return list(figures[metric].subplots(1, panels, squeeze=False)[0])

    def share(axes: Any, metric: str, title: str, label: str, **limits: Any) -> None:
        """Values over the largest that they could have."""
        _dots(axes, by_metric[metric], lambda m: m.value / m.limit, legend=metric != "effective rank")
        axes.set(title=title, ylabel=label, **limits)

    if "entropy" in by_metric:
        label = "entropy / ln(keys); 1 is uniform"
        (axes,) = canvas("entropy")
        share(axes, "entropy", "Entropy of attention rows", label, ylim=(0, 1.03))
    if "rank" in by_metric:
        left, right = canvas("rank", 2)
        share(left, "rank", "Numerical rank", "rank / largest possible", ylim=(0, 1.03))
        share(right, "effective rank", "Effective rank", "effective rank / largest possible", ylim=(0, None))
    if "negative share" in by_metric:
        left, right = canvas("negative share", 2)
        share(left, "negative share", "Negative weights", "share of the weights' magnitude", ylim=(0, None))
        _dots(right, by_metric["row sum"], lambda m: m.value, legend=False)
        right.axhline(1, color="#888888", linestyle=":", linewidth=1)
        right.set(title="What a row sums to", ylabel="mean over rows")
    for metric, (title, label) in VIOLINS.items():
        if metric in by_metric:
            limit = by_metric[metric][0].limit
            start = limit / 2 if metric == "spikiness" else 1 + (limit - 1) / 2
            values = learned_values(model, _layers(by_metric[metric]), metric)
            (axes,) = canvas(metric)
            _violins(axes, values, start)
            axes.set(title=title, ylabel=label)
    if "norm" in by_metric:
        left, right = canvas("norm", 2)
        for place, (layer, (norms, exponents, entropy)) in enumerate(seen.norms.items()):
            colour = colormaps["plasma"](0.85 * place / max(1, len(seen.norms) - 1))
            for axes, heights in ((left, exponents), (right, entropy)):
                axes.scatter(norms.flatten(), heights.flatten(), s=5, color=colour, alpha=0.5, linewidths=0)
            left.plot([], [], "o", color=colour, label=layer)
        left.set(title="A query's norm makes its exponent", xlabel="norm of a query", ylabel="exponent")
        right.set(title="Entropy of its row", xlabel="norm of a query", ylabel="entropy / ln(keys); 1 is uniform")
        left.legend(fontsize=8, framealpha=0.85)
    if gate := by_metric.get("gate"):
        left, right = canvas("gate", 2)
        _dots(left, gate, lambda m: m.value)
        left.axhline(0, color="#888888", linewidth=0.8)
        left.set(title="Correlation of the gate's halves", ylabel="Pearson's r", ylim=(-1.05, 1.05))
        paired = [m for m in gate if m.map == PAIRED]
        shown = max(paired, key=lambda m: abs(m.value))
        same, opposite = (half[shown.head].flatten().numpy() for half in seen.gates[shown.layer])
        right.hexbin(same, opposite, gridsize=45, bins="log", cmap="magma_r", mincnt=1, linewidths=0.1)
        right.set(
            title=f"{shown.layer}, head {shown.head}: the strongest, r = {shown.value:+.2f}".replace("-", "−"),
            xlabel="gate of a same-signed channel",
            ylabel="its opposite-signed partner",
        )
    for metric, figure in figures.items():
        figure.savefig(folder / f"{FILES.get(metric, metric)}.png", dpi=130)
    return [folder / f"{FILES.get(metric, metric)}.png" for metric in figures]


def _violins(axes: Any, values: dict[str, dict[str, Tensor]], start: float) -> None:
    """A violin for each layer and stream, over all heads and channels; a line where they begin."""
    streams = list(dict.fromkeys(stream for by_stream in values.values() for stream in by_stream))
    for place_of_stream, stream in enumerate(streams):
        shift, colour = (place_of_stream - (len(streams) - 1) / 2) * 0.4, COLOUR[stream or "combined"]
        places = [place + shift for place in range(1, len(values) + 1)]
        drawn = [by_stream[stream].flatten().numpy() for by_stream in values.values()]
        parts = axes.violinplot(drawn, places, showmedians=True, widths=0.8 / len(streams))
        for body in parts["bodies"]:
            body.set(facecolor=colour, alpha=0.45)
        for line in ("cbars", "cmins", "cmaxes", "cmedians"):
            parts[line].set(color=colour, linewidth=1.2)
        if stream:
            axes.plot([], [], color=colour, label=LABEL[stream])
    axes.axhline(start, color="#888888", linestyle=":", linewidth=1)
    axes.annotate("at the start", (0.5, start), (2, 3), textcoords="offset points", color="#666666", fontsize=8)
    axes.set(xlim=(0.4, len(values) + 0.6))
    _layer_axis(axes, list(values), range(1, len(values) + 1))
    if len(streams) > 1:
        axes.legend(fontsize=8, framealpha=0.85)


def _colour(name: str) -> str:
    return COLOUR.get(name) or SPARE_COLOURS[sum(name.encode()) % len(SPARE_COLOURS)]


def _layers(measurements: Iterable[Measurement]) -> list[str]:
    return list(dict.fromkeys(measurement.layer for measurement in measurements))


def _dots(
    axes: Any, measurements: Sequence[Measurement], height: Callable[[Measurement], float], legend: bool = True
) -> None:
    """A small dot for each head, and a line through the heads' mean of each layer."""
    layers = _layers(measurements)
    maps = list(dict.fromkeys(measurement.map for measurement in measurements))
    for place_of_map, name in enumerate(maps):
        shift = (place_of_map - (len(maps) - 1) / 2) * 0.09
        means: list[float] = []
        for place, layer in enumerate(layers):
            heights = [height(m) for m in measurements if m.map == name and m.layer == layer]
            means.append(sum(heights) / len(heights) if heights else math.nan)
            axes.scatter([place + shift] * len(heights), heights, s=11, color=_colour(name), alpha=0.45, linewidths=0)
        places = [place + shift for place in range(len(layers))]
        axes.plot(places, means, "-o", color=_colour(name), linewidth=1.1, markersize=5, label=LABEL.get(name, name))
    _layer_axis(axes, layers, range(len(layers)))
    if legend:
        axes.legend(fontsize=8, framealpha=0.85)


def _layer_axis(axes: Any, layers: Sequence[str], places: Sequence[int]) -> None:
    axes.set_xticks(list(places), [name.replace("layers.", "").replace("blocks.", "") for name in layers], fontsize=8)
    if len(layers) > 6:
        axes.tick_params(axis="x", rotation=60)
    axes.set_xlabel("layer (stage.block)" if layers[0].startswith("layers.") else "layer")
    axes.grid(axis="y", alpha=0.3)


# -- Command line


def _parser() -> argparse.ArgumentParser:
    parser = program("python tools/analyze.py", __doc__)
    add = parser.add_argument
    which = "files or folders; default: scikit-learn's two photographs"
    add("images", metavar="IMAGE", type=file_path, nargs="*", help=which)
    add_checkpoint_arguments(parser)
    add("--layers", metavar="A,B", help="as tools/visualize_attention.py --list names them; default: all")
    which = f"some of {', '.join(METRICS)}; default: all"
    add("--metrics", metavar="A,B", type=some_of(METRICS, "metric"), default=METRICS, help=which)
    add("--queries", metavar="N", type=whole(), default=512, help="rows measured of each map (default 512)")
    share = number(0, 1, open_low=True, open_high=True)
    add("--tolerance", metavar="T", type=share, default=1e-3, help="of the numerical rank (default 0.001)")
    add("--output", metavar="DIR", type=file_path, default=Path("analysis"), help="default: analysis")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write the table and the figures that the command line asks for."""
    loaded = open_checkpoint(arguments)
    names = arguments.layers.split(",") if arguments.layers else attention_layers(loaded.model)
    layers = choose_layers(loaded.model, names)
    transform = evaluation_transform(loaded.config, image_size(loaded.config))
    if arguments.images:
        exif = loaded.config.DATA.EXIF
        images = [read_image(path, transform, exif=exif) for path in find_images(arguments.images)]
    else:
        from sklearn.datasets import load_sample_images  # slow to import

        images = [transform(Image.fromarray(image)) for image in load_sample_images().images]
    measurements, seen = analyze(
        loaded.model,
        images,
        layers,
        arguments.metrics,
        queries=arguments.queries,
        tolerance=arguments.tolerance,
        normalise=Normalise.of(loaded.config, torch.device("cpu")),
    )
    if not measurements:
        raise MapError(
            f"{', '.join(arguments.metrics)}: none of {', '.join(layers)} has what that describes;"
            " docs/attention_maps.md says which kernels have"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / "analysis.csv"
    write_csv(table, measurements)
    print(f"{len(measurements)} measurements of {len(layers)} layers on {len(images)} images: {table}")
    for path in draw_figures(arguments.output, loaded.model, measurements, seen):
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for a mistake, which is answered in one line."""
    arguments = _parser().parse_args(argv)
    torch.set_flush_denormal(True)  # small powers are denormals, which a CPU handles many times slower
    return answer(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
