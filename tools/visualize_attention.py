"""Attention maps of images: a PNG grid for each and one HTML page. docs/attention_maps.md says what they show.

example: python tools/visualize_attention.py cat.jpg dog.jpg --checkpoint max_acc.pth --output attention
         python tools/visualize_attention.py cat.jpg --checkpoint F --layers all --heads all --points 60,80 150,40
         python tools/visualize_attention.py --checkpoint F --list
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.colors import to_hex
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from config import image_size
from data.transforms import Normalise, evaluation_transform
from logger import printable
from models.attention_maps import COMBINED, LayerRecord, attention_layers, choose_layers, kernel_in, record
from models.kernels import KERNELS
from tools.checkpoints import LoadedModel, add_checkpoint_arguments, find_images, open_checkpoint, read_image
from tools.command_line import answer, file_path, program, say, some_of, whole
from tools.overlays import COLOURS, ground, key_map, paint, token_at
from tools.pages import data_uri, render_page

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
    "norm_aware": "NaLaFormer's linear attention: equal signs count, by a power that the query's norm makes",
    "nala_cosine": "the same by NaLaFormer's paper: channels count by the cosine of the difference of their phases",
    DEPTHWISE: "with the depthwise convolution's weights added; colour follows the square root of the weight",
}


@dataclass(frozen=True)
class Panel:
    """One map over the image."""

    picture: Image.Image
    where: str  # the query it belongs to
    weights: str  # its range

    @property
    def caption(self) -> str:
        return f"{self.where}: {self.weights}"


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

    @property
    def layers(self) -> list[list[Row]]:
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.layer)]


# -- Maps


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
    seen = record(loaded.model, Normalise.of(loaded.config, torch.device("cpu"))(pixels[None]), layers)
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
            shown = {f"query {number}": row for number, row in enumerate(weights, start=1)}
            if not depthwise:
                shown["all queries"] = layer.received(head=head, stream=stream)[0].mean(dim=0)
            gamma = SIGNED_GAMMA if depthwise else 1.0
            signed = depthwise or layer.rotary is not None
            panels = [
                Panel(paint(base, key_map(layer, row), gamma=gamma), where, _range(row, signed))
                for where, row in shown.items()
            ]
            for panel, point in zip(panels, points, strict=False):  # all queries have no ring
                _ring(panel.picture, point, pixels)
            uniform = 1 / layer.k.shape[3]
            rows.append(Row(layer.name, layer.kind, layer.key_grid, head, name, uniform, panels))
    return rows


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


# -- PNG


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
    size = (2 * margin + label + columns * (width + gap) - gap, top + len(page.rows) * pitch + margin)
    canvas = Image.new("RGB", size, "#ffffff")
    draw = ImageDraw.Draw(canvas)

    def text(x: float, y: float, words: str, size: int, fill: str, *, bold: bool = False, **named: Any) -> None:
        draw.text((x, y), words, fill=fill, font=_font(size, bold), **named)

    canvas.paste(page.picture, (margin + label, margin))
    x = margin + label + width + 16
    text(margin, margin, page.name, 15, "#111111", bold=True)
    text(x, margin, page.prediction.replace(", ", "\n"), 13, "#333333", spacing=6)
    legend = Image.fromarray((COLOURS(np.linspace(0, 1, 180))[None, :, :3] * 255).astype(np.uint8)).resize((180, 12))
    canvas.paste(legend, (x, top - 74))
    for place, words, anchor in ((0, "−largest", "la"), (90, "0", "ma"), (180, "largest", "ra")):
        text(x + place, top - 57, words, 11, "#333333", anchor=anchor)
    y = top
    for rows in page.layers:
        draw.line((margin, y - gap, canvas.width - margin, y - gap), fill="#bbbbbb")
        text(margin, y, rows[0].layer, 14, "#111111", bold=True)
        text(margin, y + 20, f"{rows[0].kind}, {rows[0].grid[0]}×{rows[0].grid[1]} keys", 12, "#555555")
        for row in rows:
            text(margin, y + 52, row.stream.replace("+", "\n+ "), 14, "#111111", spacing=4)
            text(margin, y + 94, f"{row.head_name}\nuniform {row.uniform * 100:.2g} %", 12, "#555555", spacing=4)
            for column, panel in enumerate(row.panels):
                left = margin + label + column * (width + gap)
                canvas.paste(panel.picture, (left, y))
                text(left, y + height + 3, panel.caption, 12, "#333333")
            y += pitch
    return canvas


# -- HTML


def page_html(pages: Sequence[Page], source: str) -> str:
    """One self-contained page: pictures inside, no scripts, nothing fetched."""
    used = {name for page in pages for row in page.rows for name in (row.stream, row.stream[-len(DEPTHWISE) :])}
    return render_page(
        Path(__file__).with_suffix(".html"),
        {"data_uri": data_uri},
        pages=pages,
        source=source,
        colours=[to_hex(COLOURS(level)) for level in np.linspace(0, 1, 13)],
        meanings={name.removeprefix("+"): text for name, text in MEANING.items() if name in used},
    )


# -- Command line


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
    parser = program("python tools/visualize_attention.py", __doc__)
    add = parser.add_argument
    add("images", metavar="IMAGE", type=file_path, nargs="*", help="image files, or folders of them")
    add_checkpoint_arguments(parser)
    add("--list", action="store_true", help="print the model's layers and heads, and stop")
    which = "layers as --list names them, or all; default: the last of each stage"
    add("--layers", metavar="A,B", default="", help=which)
    add("--heads", metavar="0,1", type=_heads, help="mean (default), all, or numbers")
    which = "query points, in pixels of the image as the model sees it (resized and cropped); default: the centre and"
    add("--points", metavar="x,y", type=_point, nargs="+", help=f"{which} the middle of two quarters")
    which = f"maps of polarity layers: {', '.join(MAPS)}"
    add("--streams", metavar="A,B", type=some_of(MAPS, "map"), default=DEFAULT_MAPS, help=which)
    which = f"longer side of each map (default {SIZE})"
    add("--size", metavar="PIXELS", type=whole(SMALLEST_SIZE), default=SIZE, help=which)
    add("--output", metavar="DIR", type=file_path, default=Path("attention"), help="default: attention")
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
    transform, exif = evaluation_transform(loaded.config, image_size(loaded.config)), loaded.config.DATA.EXIF
    images = [(path, read_image(path, transform, exif=exif)) for path in find_images(arguments.images)]
    pages, taken = list[Page](), set[str]()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path, pixels in images:
        height, width = pixels.shape[1:]
        points = arguments.points or [(int(x * width), int(y * height)) for x, y in DEFAULT_POINTS]
        chosen = {"layers": layers, "heads": arguments.heads, "points": points, "maps": arguments.streams}
        page = draw_page(loaded, pixels, printable(path.name), **chosen, size=arguments.size)
        stem = Path(page.name).stem[:100]  # escapes may make it longer than a name can be
        names = (f"{stem}{f'-{number}' if number > 1 else ''}.png" for number in count(1))
        file = arguments.output / next(name for name in names if name not in taken)
        taken.add(file.name)
        draw_grid(page).save(file)
        pages.append(page)
        say(f"{path}: {file}")
    target = arguments.output / "index.html"
    source = printable(f"{loaded.config.MODEL.NAME}, {arguments.checkpoint.name}")
    target.write_text(page_html(pages, source), encoding="utf-8")
    say(f"all {len(pages)} images: {target}")


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
