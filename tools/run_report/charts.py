"""Figures as small inline SVG that follows the page's colours, light or dark: lines over epochs, blocks of a matrix.

A chart is drawn here, in full, so that it shows without scripts and on paper; page.js adds the values under the pointer
from the numbers that stand beside it.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.curves import thin

POINTS = 400  # of a line at most
WIDTH, HEIGHT = 440, 250  # of a chart, in its own units: about CSS pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36  # margins around the plot
LOG_RANGE = 50  # values that span more than this are drawn on a logarithmic axis


class Line(NamedTuple):
    """One line of a chart. `colour` is the number of its run; `style` solid, faint or dashed."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int
    style: str = "solid"


class Axis(NamedTuple):
    """Values to positions along one side of the plot, and the values that get a tick."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float]

    def place(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)


def number(value: float) -> str:
    """A value for people: about four digits, thousands as k, very small ones as powers of ten."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g} M"
    if size >= 1e4:
        return f"{value / 1e3:.4g} k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 6)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [f * 10.0**d for d in decades[::every] for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]


def _axis(values: np.ndarray, start: float, end: float, count: int, *, tight: bool, allow_log: bool = False) -> Axis:
    """`tight`: from the lowest to the highest value, without the room that keeps lines off the frame."""
    low, high = float(values.min()), float(values.max())
    log = allow_log and low > 0 and high / low > LOG_RANGE
    if log:
        if not tight:
            low, high = low / 1.15, high * 1.15
        return Axis(low, high, start, end, True, _log_ticks(low, high))
    if high == low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    elif not tight:
        room = 0.05 * (high - low)
        low, high = (0.0 if 0 <= low <= 2 * room else low - room), high + room
    return Axis(low, high, start, end, False, _linear_ticks(low, high, count))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; NaN breaks the line, and a point between two breaks becomes a dot."""
    pieces, pen = [], "M"
    finite = np.isfinite(y)
    for i, (across, down) in enumerate(zip(x, y, strict=True)):
        if not finite[i]:
            pen = "M"
            continue
        pieces.append(f"{pen}{across:.1f} {down:.1f}")
        alone = pen == "M" and (i + 1 == len(x) or not finite[i + 1])
        if alone:
            pieces.append("h.01")
        pen = "L"
    return "".join(pieces)


def swatch(colour: int, style: str = "solid") -> str:
    """The short line that stands for a run in a legend."""
    line = f'<path class="line {style} c{colour}" d="M1 4H21"/>'
    return f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">{line}</svg>'


def line_chart(
    title: str, unit: str, lines: Sequence[Line], *, x_label: str = "epoch", spikes: bool = False, note: str = ""
) -> str:
    """A <figure> with axes, legend and hidden values; empty where no line has a finite value.

    spikes: values that span more than LOG_RANGE get a logarithmic axis.
    """
    drawn = []
    for line in lines:
        x, y = thin(line.x, line.y, POINTS)
        if np.isfinite(y).any():
            drawn.append(line._replace(x=x, y=y))
    if not drawn:
        return ""
    xs = np.concatenate([line.x for line in drawn])
    ys = np.concatenate([line.y[np.isfinite(line.y)] for line in drawn])
    across = _axis(xs, LEFT, WIDTH - RIGHT, 6, tight=True)
    up = _axis(ys, HEIGHT - BOTTOM, TOP, 5, tight=False, allow_log=spikes)
    if up.log:
        unit += ", log scale"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title} by {x_label}")}" tabindex="0">'
    ]
    for tick, y in zip(up.ticks, up.place(np.array(up.ticks)), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    for tick, x in zip(across.ticks, across.place(np.array(across.ticks)), strict=True):
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    # faint lines below the ones they accompany
    for line in sorted(drawn, key=lambda line: line.style != "faint"):
        path = _path(across.place(line.x), up.place(line.y))
        parts.append(f'<path class="line {line.style} c{line.colour}" d="{path}"/>')
    parts.append("</svg>")
    names = "".join(f"<span>{swatch(line.colour, line.style)}{escape(line.label)}</span>" for line in drawn)
    legend = f'<div class="legend">{names}</div>' if len(drawn) > 1 else ""
    values = {
        "x": x_label,
        "plot": [LEFT, TOP, WIDTH - RIGHT, bottom],
        "xs": [across.low, across.high],
        "ys": [up.low, up.high],
        "log": up.log,
        "lines": [
            {
                "label": line.label,
                "colour": line.colour,
                "x": [float(f"{value:.5g}") for value in line.x],
                "y": [float(f"{value:.5g}") if math.isfinite(value) else None for value in line.y],
            }
            for line in drawn
        ],
    }
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>'
        f'</figcaption><div class="plot">{"".join(parts)}</div>{legend}'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + f'<script type="application/json">{embedded(values)}</script></figure>'
    )


def embedded(values: object) -> str:
    """JSON that may stand inside a <script> element."""
    return json.dumps(values, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


# ---------------------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------------------


def data_uri(image: Image.Image, format: str, **options: object) -> str:
    """An image as a data: URI."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shade(share: np.ndarray) -> np.ndarray:
    """Opacity for a share of the largest value: the root, so that rare confusions can be seen too."""
    return np.sqrt(np.clip(share, 0, 1))


def matrix_picture(values: np.ndarray, colour: tuple[int, int, int]) -> str:
    """A PNG's data URI, one pixel per entry: one colour whose opacity is `shade`, for light and dark pages alike."""
    largest = values.max()
    pixels = np.zeros((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = np.rint(255 * shade(values / largest if largest else values))
    return data_uri(Image.fromarray(pixels, "RGBA"), "PNG", optimize=True)
