"""Attention maps of images: a PNG grid for each and one HTML page. docs/attention_maps.md says what they show.

python tools/visualize_attention.py cat.jpg dog.jpg --checkpoint max_acc.pth --output attention
python tools/visualize_attention.py cat.jpg --checkpoint F --layers layers.0.blocks.0 --heads all --points 60,80 150,40
python tools/visualize_attention.py --checkpoint F --list
"""

import argparse
import base64
import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from config import image_size
from data.transforms import Normalise, evaluation_transform
from models.attention_maps import COMBINED, LayerRecord, attention_layers, choose_layers, kernel_in, record
from models.kernels import KERNELS
from tools.checkpoints import LoadedModel, add_checkpoint_arguments, find_images, open_checkpoint, read_image
from tools.command_line import answer, some_of, whole
from tools.overlays import COLOURS, ground, key_map, paint, token_at

DEPTHWISE = "+depthwise"
STREAMS = dict.fromkeys(name for kernel in KERNELS.values() if kernel.streams for name in (COMBINED, *kernel.streams))
MAPS = (*STREAMS, *(stream + DEPTHWISE for stream in STREAMS))
DEFAULT_MAPS = ("combined", "same", "opposite", "combined+depthwise")
DEFAULT_POINTS = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))  # fractions of width and height
SIZE = 192  # longer side of one map in the pictures, in pixels
SMALLEST_SIZE = 128  # the text beside a row of maps needs that much
SIGNED_GAMMA = 0.5  # the convolution's weights are far larger than attention's: without it nothing else would show
Point = tuple[float, float]  # x, y in pixels of the model's input
MEANING = {
    "combined": "mean of both streams over the value channels that read them",
    "same": "same-signed stream: read by the first half of each head's value channels",
    "opposite": "opposite-signed stream: read by the second half",
    "softmax": "softmax attention of this layer, with its position bias and mask where it has them",
    "relu": "plain ReLU linear attention of this layer",
    "elu": "linear attention of this layer with 1 + ELU features",
    "focused": "focused linear attention of this layer",
    DEPTHWISE: "with the depthwise convolution's weights added; colour follows the square root of the weight",
}


@dataclass(frozen=True)
class Panel:
    """One map over the image."""

    picture: Image.Image
    where: str  # the query it belongs to
    weights: str  # its range


@dataclass(frozen=True)
class Row:
    """One map of one layer and head (None: their mean): a panel for each query point, and one for all queries."""

    layer: str
    kind: str
    grid: tuple[int, int]
    head: int | None
    stream: str
    uniform: float
    panels: list[Panel]

    @property
    def head_name(self) -> str:
        return "mean of heads" if self.head is None else f"head {self.head}"


@dataclass(frozen=True)
class Page:
    """All maps of one image."""

    name: str
    picture: Image.Image
    prediction: str
    rows: list[Row]


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


def last_of_each_stage(model: nn.Module) -> list[str]:
    """The deepest attention layer on each size of token map."""
    names = list(attention_layers(model))
    return [name for name, after in zip(names, [*names[1:], ""], strict=True) if _stage(name) != _stage(after)]


def _stage(layer: str) -> str:
    return layer.rpartition(".")[0]


def describe(model: nn.Module) -> str:
    """A line for each attention layer, as `--list` prints them."""
    lines = []
    shown = last_of_each_stage(model)
    for name, module in attention_layers(model).items():
        remark = " (default)" if name in shown else ""
        lines.append(f"{name:<20} {kernel_in(module).name:<9} heads 0 to {module.num_heads - 1:<3}{remark}".rstrip())
    return "\n".join(lines)


def draw_page(
    loaded: LoadedModel,
    pixels: Tensor,
    name: str,
    *,
    layers: Sequence[str],
    heads: Sequence[int] | str | None,
    points: Sequence[Point],
    maps: Sequence[str],
    size: int = SIZE,
) -> Page:
    """All maps of one image, uint8 (3, H, W), `size` pixels on its longer side. `heads`: numbers, "all", or None for
    their mean."""
    height, width = pixels.shape[1:]
    cell = (round(size * width / max(height, width)), round(size * height / max(height, width)))
    base = ground(pixels, cell)
    seen = record(loaded.model, Normalise(torch.device("cpu"))(pixels[None]), layers)
    rows = []
    for layer in layers:
        rows += _layer_rows(seen.layers.pop(layer), pixels, base, heads, points, maps)
    return Page(name, _marked(pixels, points, cell), _prediction(seen.output[0], loaded.classes), rows)


def _layer_rows(
    layer: LayerRecord,
    pixels: Tensor,
    base: np.ndarray,
    heads: Sequence[int] | str | None,
    points: Sequence[Point],
    maps: Sequence[str],
) -> list[Row]:
    size = (pixels.shape[2], pixels.shape[1])
    queries = [token_at(point, size, layer.grid) for point in points]
    chosen = range(layer.num_heads) if heads == "all" else heads
    rows = []
    if layer.kernel.streams:
        names = [name for name in maps if name.removesuffix(DEPTHWISE) in layer.own_streams]
    else:  # one map, with and without the depthwise branch where that is asked for and there is one
        with_branch = layer.convolution is not None and any(name.endswith(DEPTHWISE) for name in maps)
        names = [layer.kind] + [layer.kind + DEPTHWISE] * with_branch
    for name in names:
        stream, depthwise = name.removesuffix(DEPTHWISE), name.endswith(DEPTHWISE)
        for head in [None] if chosen is None else chosen:
            assert not isinstance(head, str)
            weights = layer.rows(queries, head=head, stream=stream, depthwise=depthwise)[0].mean(dim=0)
            panels = [
                Panel(_panel(base, pixels, layer, row, depthwise, point), f"{number}", _range(row, depthwise))
                for number, (point, row) in enumerate(zip(points, weights, strict=True), start=1)
            ]
            if not depthwise:
                received = layer.received(head=head, stream=stream)[0].mean(dim=0)
                panels.append(
                    Panel(_panel(base, pixels, layer, received, False), "all queries", _range(received, False))
                )
            uniform = 1 / layer.k.shape[3]
            rows.append(Row(layer.name, layer.kind, layer.key_grid, head, name, uniform, panels))
    return rows


def _panel(
    base: np.ndarray, pixels: Tensor, layer: LayerRecord, weights: Tensor, depthwise: bool, point: Point | None = None
) -> Image.Image:
    picture = paint(base, key_map(layer, weights), gamma=SIGNED_GAMMA if depthwise else 1.0)
    if point is not None:
        _ring(picture, point, pixels)
    return picture


def _ring(picture: Image.Image, point: Point, pixels: Tensor, number: int | None = None) -> None:
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    x, y = (point[0] + 0.5) * width / pixels.shape[2], (point[1] + 0.5) * height / pixels.shape[1]
    for radius, colour in ((6, "#05040c"), (5, "#ffffff")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
    if number is not None:
        left = x + 11 if x < width - 24 else x - 20
        draw.text((left, y - 9), str(number), "#ffffff", _font(15, bold=True), stroke_width=2, stroke_fill="#05040c")


def _marked(pixels: Tensor, points: Sequence[Point], cell: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(cell, Image.Resampling.BICUBIC)
    for number, point in enumerate(points, start=1):
        _ring(picture, point, pixels, number)
    return picture


def _range(weights: Tensor, signed: bool) -> str:
    """The largest weight in per cent, or smallest and largest."""
    if signed:
        return f"{weights.min() * 100:+.2g} to {weights.max() * 100:+.2g} %".replace("-", "−")
    return f"up to {weights.max() * 100:.2g} %"


def _prediction(logits: Tensor, classes: Sequence[str] | None) -> str:
    probability, best = logits.softmax(dim=0).topk(min(3, len(logits)))
    names = [classes[i] if classes else f"class {i}" for i in best.tolist()]
    return ", ".join(f"{name} {p:.1%}" for name, p in zip(names, probability.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# PNG
# ---------------------------------------------------------------------------------------------------------------------


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    family = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(family), size)


def draw_grid(page: Page) -> Image.Image:
    """A row of panels for each map, its layer and kind beside it; the image with the query points on top."""
    width, height = page.picture.size
    label, gap, caption, margin = 210, 8, 20, 20
    columns = max(len(row.panels) for row in page.rows)
    pitch = max(height, SMALLEST_SIZE) + caption + gap
    top = margin + max(height, SMALLEST_SIZE) + 2 * margin
    canvas = Image.new(
        "RGB",
        (2 * margin + label + columns * (width + gap) - gap, top + len(page.rows) * pitch + margin),
        "#ffffff",
    )
    draw = ImageDraw.Draw(canvas)
    canvas.paste(page.picture, (margin + label, margin))
    x = margin + label + width + 16
    draw.text((margin, margin), page.name, fill="#111111", font=_font(15, bold=True))
    draw.text((x, margin), "\n".join(page.prediction.split(", ")), fill="#333333", font=_font(13), spacing=6)
    legend = Image.fromarray((COLOURS(np.linspace(0, 1, 180))[None, :, :3] * 255).astype(np.uint8)).resize((180, 12))
    canvas.paste(legend, (x, top - 74))
    draw.text((x, top - 57), "−largest", fill="#333333", font=_font(11))
    draw.text((x + 90, top - 57), "0", fill="#333333", font=_font(11), anchor="ma")
    draw.text((x + 180, top - 57), "largest", fill="#333333", font=_font(11), anchor="ra")
    for number, row in enumerate(page.rows):
        y = top + number * pitch
        first = number == 0 or page.rows[number - 1].layer != row.layer
        if first:
            draw.line((margin, y - gap, canvas.width - margin, y - gap), fill="#bbbbbb")
            draw.text((margin, y), row.layer, fill="#111111", font=_font(14, bold=True))
            draw.text((margin, y + 20), f"{row.kind}, {row.grid[0]}×{row.grid[1]} keys", "#555555", _font(12))
        draw.text((margin, y + 52), row.stream.replace("+", "\n+ "), fill="#111111", font=_font(14), spacing=4)
        note = f"{row.head_name}\nuniform {row.uniform * 100:.2g} %"
        draw.text((margin, y + 94), note, fill="#555555", font=_font(12), spacing=4)
        for column, panel in enumerate(row.panels):
            left = margin + label + column * (width + gap)
            canvas.paste(panel.picture, (left, y))
            title = f"query {panel.where}" if panel.where.isdigit() else panel.where
            draw.text((left, y + height + 3), f"{title}: {panel.weights}", fill="#333333", font=_font(12))
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1c1f; --quiet: #5d616a; --line: #dfe1e6;
  --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #131417; --ink: #e9eaee; --quiet: #a0a5b0; --line: #30333a; --card: #1d1f24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 0; } h3 { font-size: 1rem; margin: 0; }
p, li { max-width: 46rem; } .quiet { color: var(--quiet); font-size: .9rem; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
.subject { display: flex; gap: 1rem; flex-wrap: wrap; align-items: flex-start; }
.layer { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem;
  margin-top: 1rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 44%), 1fr)); gap: .7rem;
  margin: .3rem 0 1rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
.maps img { width: 100%; } figcaption { font-size: .8rem; color: var(--quiet); margin-top: .2rem; }
.scale { height: .8rem; width: min(20rem, 100%); border-radius: 4px; }
.ends { display: flex; justify-content: space-between; width: min(20rem, 100%); font-size: .8rem; color: var(--quiet); }
code { font-size: .95em; }
"""


def page_html(pages: Sequence[Page], source: str) -> str:
    """One self-contained page: pictures inside, no scripts, nothing fetched."""
    stops = ", ".join(
        f"rgb({', '.join(str(round(255 * c)) for c in COLOURS(level)[:3])})" for level in np.linspace(0, 1, 13)
    )
    used = {name for page in pages for row in page.rows for name in (row.stream, row.stream[-len(DEPTHWISE) :])}
    meanings = "".join(
        f"<li><b>{html.escape(name.removeprefix('+'))}</b>: {text}</li>"
        for name, text in MEANING.items()
        if name in used
    )
    body = "".join(_image_html(page) for page in pages)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Attention maps of {html.escape(source)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>Attention maps</h1><p class='quiet'>{html.escape(source)}</p>"
        "<p>Each map is a row of the matrix that a layer applies to its values: the weight that the query marked with a"
        " ring gives to every place. <b>All queries</b> is the mean over every query: the attention that a place"
        " receives. Every map has its own scale, from 0 to its largest weight, which stands below it; a map of equal"
        f" weights would have the weight called uniform.</p><div class='scale' style='background:"
        f" linear-gradient(to right, {stops})'></div><div class='ends'><span>−largest</span><span>0</span>"
        f"<span>largest</span></div><ul>{meanings}</ul></header>{body}</body></html>\n"
    )


def _image_html(page: Page) -> str:
    parts = [
        f"<section><div class='subject'>{_img(page.picture, f'{page.name} with its query points')}"
        f"<div><h2>{html.escape(page.name)}</h2><p class='quiet'>{html.escape(page.prediction)}</p></div></div>"
    ]
    for number, row in enumerate(page.rows):
        if number == 0 or page.rows[number - 1].layer != row.layer:
            parts.append("</div>" if number else "")
            parts.append(
                f"<div class='layer'><h3><code>{html.escape(row.layer)}</code></h3>"
                f"<p class='quiet'>{row.kind}, {row.grid[0]}×{row.grid[1]} keys, uniform {row.uniform * 100:.2g} %</p>"
            )
        title = f"{row.stream.replace('+', ' + ')}, {row.head_name}"
        parts.append(f"<div>{title}</div><div class='maps'>")
        for panel in row.panels:
            where = f"query {panel.where}" if panel.where.isdigit() else panel.where
            alt = f"{row.layer}, {title}, {where}"
            parts.append(
                f"<figure>{_img(panel.picture, alt)}<figcaption>{where}: {panel.weights}</figcaption></figure>"
            )
        parts.append("</div>")
    return "".join(parts) + "</div></section>"


def _img(picture: Image.Image, alt: str) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    width, height = picture.size
    return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _point(text: str) -> Point:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a point; expected x,y in pixels, such as 60,80") from error
    return x, y


def _heads(text: str) -> list[int] | str | None:
    if text in ("mean", "all"):
        return None if text == "mean" else text
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected mean, all, or numbers such as 0,2")
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/visualize_attention.py",
        description="Attention maps over images: a PNG grid for each image and one HTML page (docs/attention_maps.md).",
        epilog="example: python tools/visualize_attention.py cat.jpg --points 60,80 150,40 --heads 0,1"
        " --checkpoint output/quickstart/default/max_acc.pth",
    )
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="*", help="image files, or folders of them")
    add_checkpoint_arguments(parser)
    parser.add_argument("--list", action="store_true", help="print the model's layers and heads, and stop")
    parser.add_argument(
        "--layers",
        metavar="A,B",
        default="",
        help="layers as --list names them, or all; default: the last of each stage",
    )
    parser.add_argument("--heads", metavar="0,1", type=_heads, help="mean (default), all, or numbers")
    parser.add_argument(
        "--points",
        metavar="x,y",
        type=_point,
        nargs="+",
        help="query points, in pixels of the image as the model sees it (resized and cropped); default: the centre and"
        " the middle of two quarters",
    )
    parser.add_argument(
        "--streams",
        metavar="A,B",
        type=some_of(MAPS, "map"),
        default=DEFAULT_MAPS,
        help=f"maps of polarity layers: {', '.join(MAPS)}",
    )
    parser.add_argument(
        "--size",
        metavar="PIXELS",
        type=whole(SMALLEST_SIZE),
        default=SIZE,
        help=f"longer side of each map (default {SIZE})",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("attention"), help="default: attention")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write the pictures and the page that the command line asks for."""
    loaded = open_checkpoint(arguments)
    if arguments.list:
        print(describe(loaded.model))
        return
    if arguments.layers in ("", "all"):
        layers = list(attention_layers(loaded.model)) if arguments.layers else last_of_each_stage(loaded.model)
    else:
        layers = choose_layers(loaded.model, arguments.layers.split(","))
    transform = evaluation_transform(loaded.config, image_size(loaded.config))
    images = [(path, read_image(path, transform)) for path in find_images(arguments.images)]
    pages: list[Page] = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path, pixels in images:
        height, width = pixels.shape[1:]
        points = arguments.points or [(int(x * width), int(y * height)) for x, y in DEFAULT_POINTS]
        page = draw_page(
            loaded,
            pixels,
            path.name,
            layers=layers,
            heads=arguments.heads,
            points=points,
            maps=arguments.streams,
            size=arguments.size,
        )
        taken = sum(Path(other.name).stem == path.stem for other in pages)
        file = arguments.output / f"{path.stem}{f'-{taken + 1}' if taken else ''}.png"
        draw_grid(page).save(file)
        pages.append(page)
        print(f"{path}: {file}")
    target = arguments.output / "index.html"
    target.write_text(page_html(pages, f"{loaded.config.MODEL.NAME}, {arguments.checkpoint.name}"), encoding="utf-8")
    print(f"all {len(pages)} images: {target}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for a mistake, which is answered in one line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.images and not arguments.list:
        parser.error("name at least one IMAGE, or --list to see the model's layers")
    torch.set_flush_denormal(True)  # small powers are denormals, which a CPU handles many times slower
    return answer(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
