"""Charts as inline SVG that follows the page's colours, light or dark; they show without scripts and on paper."""

import io
import re
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from utils.curves import GRID, MUTED, PALETTE, Panel, draw_panels, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERROR_COLOUR = (208, 84, 0)
# What page.css chooses in place of the colours of the drawing.
COLOURS = {MUTED: "var(--muted)", GRID: "var(--grid)"} | {c: f"var(--c{i})" for i, c in enumerate(PALETTE)}


def chart(panel: Panel) -> Markup:
    """A panel's picture; title, unit and legend are the page's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    draw_panels(figure, [panel], captions=False)
    return as_svg(figure, f"{panel.title} by {panel.x_label}")


def matrix(errors: np.ndarray, size: int, label: str) -> Markup:
    """Errors between blocks of `size` classes (B, B), a pixel each.

    The opacity is the root of an entry's share of the largest, so that rare confusions can be seen too.
    """
    from matplotlib.figure import Figure

    pixels = np.full((*errors.shape, 4), (*ERROR_COLOUR, 0), dtype=np.uint8)
    pixels[..., 3] = np.rint(255 * np.sqrt(errors / (errors.max() or 1)))
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(pixels, interpolation="none")
    ticks = np.arange(0, len(errors), max(1, len(errors) // 5))
    axes.set_xticks(ticks, ticks * size)
    axes.set_yticks(ticks, ticks * size)
    plain_axes(axes, "predicted class", "label")
    return as_svg(figure, label)


def as_svg(figure: "Figure", label: str) -> Markup:
    """The figure as an <svg> element with real text, of the width of what holds it; `label` says what it shows.

    No text of a run may be in the figure: only the label is escaped.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # clip paths and marks are named by the salt: equally at each drawing, and differently in each chart of a page
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True)
    whole = buffer.getvalue()
    drawing = whole[whole.index('<g id="figure') : whole.rindex("</svg>")]
    drawing = re.sub(r'<(g|image)([^>]*) id="[^"]*"', r"<\1\2", drawing)  # counted anew in each drawing, and unused
    drawing = re.sub(r"#[0-9a-f]{6}\b", lambda colour: COLOURS.get(colour[0], colour[0]), drawing)
    drawing = re.sub(r"font-family: [^;]*; |(?<=\.\d{3})\d+", "", drawing)  # the page's font; thousandths of a point
    drawing = re.sub(r"\s+", " ", drawing).replace("> <", "><")
    width, height = 72 * figure.get_size_inches()
    head = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, label)
    return head + Markup(drawing) + Markup("</svg>")
