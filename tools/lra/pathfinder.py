"""Pathfinder images: two dashed contours among distractors; are the two marked ends those of one contour?

After Linsley et al. 2018 (arXiv 1805.08315) with Long Range Arena's parameters (Tay et al. 2021, arXiv 2011.04006). An
image is a function of (seed, its number) and the parameters.

The collision tests run on bitmaps: a set of pixels is one Python integer, so that a shape is moved by a shift, added by
`|`, compared by `&`, and grown by a disc with a few shifts. All shapes of a paddle are drawn once: its head is a whole
pixel and its tail is rounded on the grid of twice the resolution, so there are few.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1  # of what a seed gives: raised when images of the same seed change
SIZE = 32
PADDING = 1  # width of the border that nothing is drawn into
SCALE = 2  # how much finer paddles and markers are drawn
LENGTH, THICKNESS, MARGIN = 2, 0.5, 1  # of a paddle
SEED_DISTANCE = 7  # between the tips of the two targets
MARKER_RADIUS = 1.5
CONTINUITY = 1.0  # turns are weighted by cos(continuity × turn)²
OVERLAP = 1  # shared pixels of two paddles' surroundings that are no collision
PADDLE_TRIES, DISTRACTOR_TRIES = 3, 5
DISTRACTOR_PADDLES = 20  # of all distractors together; how many distractors that makes depends on their length
FEWEST_FREE = SIZE * SIZE // 100  # starting places below which no further distractor is tried
BORDERS = ("clipped", "unclipped")  # of the search for starting places: see `searchable`
FOLDERS = {14: "curv_contour_length_14", 9: "curv_contour_length_9", 6: "curv_baseline"}  # by contour length

# A bitmap has OUTSIDE pixels around the image, all of them occupied, so that no shape wraps into another row.
OUTSIDE = 8
STRIDE = SIZE + 2 * OUTSIDE
ALL = (1 << STRIDE * STRIDE) - 1


def bit(row: int, column: int) -> int:
    """Place of a pixel in a bitmap."""
    return (row + OUTSIDE) * STRIDE + column + OUTSIDE


def bitmap(pixels: np.ndarray) -> int:
    """Bitmap of a boolean (32, 32) image."""
    whole = np.zeros((STRIDE, STRIDE), dtype=bool)
    whole[OUTSIDE:-OUTSIDE, OUTSIDE:-OUTSIDE] = pixels
    return int.from_bytes(np.packbits(whole, bitorder="little").tobytes(), "little")


INSIDE = bitmap(np.pad(np.ones((SIZE - 2 * PADDING,) * 2, dtype=bool), PADDING))
EMPTY = ALL & ~INSIDE  # the occupancy before anything is drawn


def grown(bits: int) -> int:
    """The bitmap and every pixel within the margin of it: a disc of radius 1."""
    return bits | bits << 1 | bits >> 1 | bits << STRIDE | bits >> STRIDE


# -- Shapes

REACH = 7  # pixels round its head that the patch of a shape covers: the length, the margin and the filter's tails
PATCH = 2 * REACH + 1


@dataclass(frozen=True)
class Shape:
    """Something drawn round a pixel: brightness 0 to 1, float32 (15, 15) with that pixel in the middle, and its
    surroundings, which others must not touch, as steps from it in a bitmap and as a bitmap round pixel (7, 7)."""

    brightness: np.ndarray
    steps: tuple[int, ...]
    bits: int

    def at(self, place: int) -> int:
        """The surroundings round another place of a bitmap."""
        step = place - bit(REACH, REACH)
        return self.bits << step if step >= 0 else self.bits >> -step


FINE = PATCH * SCALE + 1
MIDDLE_OF_FINE = REACH * SCALE + 1
RINGING = 0.005  # brightness below which a pixel is a ripple of the filter and no ink: the background is exactly 0


def _drawn(draw_on_fine_grid: Callable[[ImageDraw.ImageDraw], None]) -> Shape:
    """The shape of white ink on a grid of half pixels, in which the patch's middle is the pixel MIDDLE_OF_FINE.

    The grids share pixel centres, where the filter has its zeros: a straight paddle leaves nothing beside it.
    """
    fine = Image.new("L", (FINE, FINE))
    draw_on_fine_grid(ImageDraw.Draw(fine))
    box = (0.5, 0.5, FINE - 0.5, FINE - 0.5)
    brightness = np.asarray(fine.resize((PATCH, PATCH), Image.Resampling.LANCZOS, box), dtype=np.float32) / 255
    brightness = np.where(brightness < RINGING, np.float32(0), brightness)
    ink = np.argwhere(np.asarray(fine) > 0)
    centres = np.argwhere(np.ones((PATCH, PATCH))) * SCALE + 1
    distance = np.linalg.norm(centres[:, None] - ink[None], axis=2).min(1).reshape(PATCH, PATCH)
    covered = distance <= MARGIN * SCALE
    pixels = np.zeros((SIZE, SIZE), dtype=bool)
    pixels[:PATCH, :PATCH] = covered
    steps = tuple(bit(row, column) - bit(REACH, REACH) for row, column in np.argwhere(covered).tolist())
    return Shape(brightness, steps, bitmap(pixels))


@cache
def paddle(rows: int, columns: int) -> Shape:
    """A paddle whose tail is that many half pixels away from its head, which is a whole pixel."""
    line = (MIDDLE_OF_FINE, MIDDLE_OF_FINE, MIDDLE_OF_FINE + columns, MIDDLE_OF_FINE + rows)
    return _drawn(lambda draw: draw.line(line, fill=255, width=round(THICKNESS * SCALE)))


@cache
def marker() -> Shape:
    """The disc on a marked end."""
    low, high = MIDDLE_OF_FINE - MARKER_RADIUS * SCALE, MIDDLE_OF_FINE + MARKER_RADIUS * SCALE
    return _drawn(lambda draw: draw.ellipse((low, low, high, high), fill=255))


FRACTIONS = 8  # steps per pixel in which the ring of candidates is tabulated


@cache
def ring(row: int, column: int) -> tuple[tuple[int, float, float], ...]:
    """The distinct pixels on the circle of radius length + margin round a point (row, column) / 8 of a pixel past a
    pixel's middle: steps in a bitmap from that pixel, and the unit vector (rows, columns) that points there."""
    y, x, radius = row / FRACTIONS, column / FRACTIONS, LENGTH + MARGIN
    angles = np.radians(np.arange(360))
    pixels = {
        (int(r), int(c))
        for r, c in np.rint(np.stack([y + radius * np.sin(angles), x + radius * np.cos(angles)], axis=1))
    }
    return tuple(
        (r * STRIDE + c, (r - y) / math.hypot(r - y, c - x), (c - x) / math.hypot(r - y, c - x))
        for r, c in sorted(pixels)
    )


# -- Snakes


def next_paddle(direction: tuple[float, float]) -> Shape:
    """The paddle behind a head that was reached in this direction."""
    return paddle(-round(SCALE * LENGTH * direction[0]), -round(SCALE * LENGTH * direction[1]))


def first_paddle(direction: tuple[float, float]) -> Shape:
    """The paddle from a tip in this direction."""
    return next_paddle((-direction[0], -direction[1]))


class Collision(Exception):
    """A snake that cannot go on."""


class Snake:
    """A chain of paddles on an occupancy bitmap that several share.

    The last paddle is not in the occupancy yet: the next one begins inside its surroundings. `others` are the last
    paddles of the other snakes that grow at the same time.
    """

    def __init__(self, tip: tuple[int, int], direction: tuple[float, float]) -> None:
        """From a pixel (row, column) towards a unit vector (rows, columns)."""
        self.tip = self.head = tip
        self.direction = direction
        self.pivot = (tip[0] - MARGIN * direction[0], tip[1] - MARGIN * direction[1])
        shape = first_paddle(direction)
        self.drawn = [(shape, tip)]
        self.last = shape.at(bit(*tip))

    def grow(self, occupied: int, others: int, generator: random.Random) -> int:
        """Draw one more paddle; returns the occupancy with the one before it. Raises Collision."""
        reach = LENGTH + 2 * MARGIN
        y, x = self.pivot[0] + reach * self.direction[0], self.pivot[1] + reach * self.direction[1]
        row, column = round(y), round(x)
        if not (PADDING <= row < SIZE - PADDING and PADDING <= column < SIZE - PADDING):
            raise Collision
        middle, taken = bit(row, column), occupied | others
        blocked = grown(taken) >> middle - REACH * STRIDE
        ahead_y, ahead_x = self.direction
        candidates, total = [], 0.0
        for step, up, right in ring(round((y - row) * FRACTIONS), round((x - column) * FRACTIONS)):
            cosine = up * ahead_y + right * ahead_x  # of the turn, for a continuity of 1
            if cosine > 0 and not blocked >> step + REACH * STRIDE & 1:
                total += cosine * cosine
                candidates.append((total, step))
        if not candidates:
            raise Collision
        for _ in range(PADDLE_TRIES):
            chosen = generator.random() * total
            place = middle + next((step for limit, step in candidates if limit > chosen), candidates[-1][1])
            head = (place // STRIDE - OUTSIDE, place % STRIDE - OUTSIDE)
            distance = math.hypot(head[0] - y, head[1] - x)
            direction = ((head[0] - y) / distance, (head[1] - x) / distance)
            shape = next_paddle(direction)
            surroundings = shape.at(place)
            if (surroundings & taken).bit_count() <= OVERLAP:
                break
        else:
            raise Collision
        occupied |= self.last
        self.pivot, self.direction, self.head, self.last = (y, x), direction, head, surroundings
        self.drawn.append((shape, head))
        return occupied


# -- Images


@dataclass(frozen=True)
class Parameters:
    """What images depend on beside the seed.

    `contour_length` counts the paddles of a target; distractors have a third of them. `target_contrast` is the
    brightness of the targets' paddles, of the distractors' as 1: with Long Range Arena's 0.75 distractors are brighter.
    `borders` is one of BORDERS.
    """

    contour_length: int = 14
    target_contrast: float = 0.75
    borders: str = "clipped"

    @property
    def distractor_length(self) -> int:
        return self.contour_length // 3


@dataclass(frozen=True)
class Drawing:
    """An image, uint8 (32, 32); 1 where the marks are on one contour, else 0; the contours' ink, bool (2, 32, 32); the
    pixels (row, column) of the two marks; how many distractors there are."""

    image: np.ndarray
    label: int
    targets: np.ndarray
    marks: tuple[tuple[int, int], tuple[int, int]]
    distractors: int


INK = 0.2  # brightness from which a pixel counts as a contour's
DISTRACTOR_CONTRAST, MARKER_CONTRAST = 2.0, 1.0  # a paddle is thinner than a pixel: at 2 it is as bright as a marker


def draw(parameters: Parameters, seed: int, number: int) -> Drawing:
    """Image `number` of a seed."""
    generator = random.Random(f"pathfinder {seed} {number}")
    while True:
        try:
            targets, occupied = _targets(parameters, generator)
            break
        except Collision:
            continue
    distractors = _distractors(parameters, occupied, generator)
    label, first = int(generator.random() < 0.5), int(generator.random() < 0.5)
    start, end = targets[first], targets[first if label else 1 - first]
    marks = (start.tip, end.head)

    ink = np.zeros((2, STRIDE, STRIDE), dtype=np.float32)
    for snake, own in zip(targets, ink, strict=True):
        for shape, head in snake.drawn:
            _add(own, shape, head, 1.0)
    canvas = ink.max(0) * np.float32(parameters.target_contrast * DISTRACTOR_CONTRAST)
    for snake in distractors:
        for shape, head in snake.drawn:
            _add(canvas, shape, head, DISTRACTOR_CONTRAST)
    for mark in marks:
        _add(canvas, marker(), mark, MARKER_CONTRAST)
    image = canvas[OUTSIDE:-OUTSIDE, OUTSIDE:-OUTSIDE]
    low, high = image.min(), image.max()
    stretched = np.rint((image - low) * (255 / (high - low))).astype(np.uint8)
    shown = ink[:, OUTSIDE:-OUTSIDE, OUTSIDE:-OUTSIDE] > INK
    return Drawing(stretched, label, shown, marks, len(distractors))


def _add(canvas: np.ndarray, shape: Shape, place: tuple[int, int], contrast: float) -> None:
    """Draw a shape round a pixel (row, column) where it is brighter than what is there."""
    row, column = place[0] + OUTSIDE - REACH, place[1] + OUTSIDE - REACH
    patch = canvas[row : row + PATCH, column : column + PATCH]
    np.maximum(patch, shape.brightness * np.float32(contrast), out=patch)


# -- Growing both targets, and distractors


def _direction(generator: random.Random) -> tuple[float, float]:
    angle = math.radians(int(generator.random() * 360) - 180)
    return math.sin(angle), math.cos(angle)


def searchable(direction: tuple[float, float]) -> bool:
    """Whether the original program, as it runs, finds places to start in this direction.

    Its search dilates the occupancy by a first paddle. Where that covers nothing but pixels outside the image the
    dilation gives the lowest float, and the search then returns no place at all. It takes a paddle beside the pixel it
    is for: here it begins one to the right and below, and has to reach back over the pixel of the lower right corner.
    """
    down, right = direction
    return down + right < 0 and abs(down - right) <= MARGIN + THICKNESS / 2  # from the pixel to the paddle's axis


def _starts(occupied: int, direction: tuple[float, float]) -> np.ndarray:
    """Places, in a bitmap, of the tips from which a first paddle in this direction touches nothing."""
    touching = 0
    for step in first_paddle(direction).steps:
        touching |= occupied >> step if step >= 0 else occupied << -step
    packed = np.frombuffer((INSIDE & ~touching).to_bytes(STRIDE * STRIDE // 8, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(packed, bitorder="little"))


def _targets(parameters: Parameters, generator: random.Random) -> tuple[list[Snake], int]:
    """Two snakes that begin near each other in the middle, and the occupancy with both; raises Collision."""
    border = 2 * SEED_DISTANCE
    row, column = (border + int(generator.random() * (SIZE - 2 * border)) for _ in range(2))
    first = Snake((row, column), _direction(generator))
    if parameters.borders == "unclipped" and not searchable(first.direction):
        raise Collision
    angle = generator.random() * 2 * math.pi
    tip = first.tip[0] + SEED_DISTANCE * math.sin(angle), first.tip[1] + SEED_DISTANCE * math.cos(angle)
    second = Snake((round(tip[0]), round(tip[1])), _direction(generator))
    if (second.last & (EMPTY | first.last)).bit_count() > OVERLAP:
        raise Collision
    occupied = EMPTY
    for _ in range(parameters.contour_length - 1):
        occupied = first.grow(occupied, second.last, generator)
        occupied = second.grow(occupied, first.last, generator)
    return [first, second], occupied | first.last | second.last


def _distractors(parameters: Parameters, occupied: int, generator: random.Random) -> list[Snake]:
    """As many short snakes as find room, at most what 20 paddles make; unclipped borders end it at the first that fails
    in all its tries, as in the original program."""
    found: list[Snake] = []
    length, unclipped = parameters.distractor_length, parameters.borders == "unclipped"
    for _ in range(DISTRACTOR_PADDLES // length):
        for _ in range(DISTRACTOR_TRIES):
            direction = _direction(generator)
            if unclipped and not searchable(direction):
                continue
            places = _starts(occupied, direction)
            if len(places) < FEWEST_FREE:
                return found
            row, column = divmod(int(places[int(generator.random() * len(places))]), STRIDE)
            snake, taken = Snake((row - OUTSIDE, column - OUTSIDE), direction), occupied
            try:
                for _ in range(length - 1):
                    taken = snake.grow(taken, 0, generator)
            except Collision:
                continue
            found.append(snake)
            occupied = taken | snake.last
            break
        else:
            if unclipped:
                break
    return found
