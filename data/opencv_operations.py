"""The operations of timm's augmentation policies on uint8 arrays (H, W, 3) by OpenCV, in place of Pillow's.

Policies stay timm's: it draws which operations an image gets and how strong they are, and calls the function of the
same name here. All but rotations give Pillow's pixels, one grey level off here and there; OpenCV rotates with another
cubic kernel (a = -3/4, Pillow's -1) and rounds where Pillow cuts fractions off. docs/data.md has the deviations.
"""

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from data.sources.base import Picture

WEIGHTS: dict[Image.Resampling, Callable[[np.ndarray], np.ndarray]] = {  # of pixels, by their distance
    Image.Resampling.NEAREST: lambda x: np.where(x <= 0.5, 1.0, 0.0),
    Image.Resampling.BILINEAR: lambda x: np.maximum(1 - x, 0),
    Image.Resampling.BICUBIC: lambda x: np.where(
        x < 1, (x - 2) * x * x + 1, np.where(x < 2, ((5 - x) * x - 8) * x + 4, 0)
    ),
}
FILTERS = {
    Image.Resampling.NEAREST: cv2.INTER_NEAREST,
    Image.Resampling.BILINEAR: cv2.INTER_LINEAR,
    Image.Resampling.BICUBIC: cv2.INTER_CUBIC,
}
LEVELS = np.arange(256)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
CUT = 1e-3 - 0.5  # added before OpenCV rounds, it cuts fractions off as Pillow does

Array = np.ndarray  # uint8 (H, W, 3)


def to_array(image: Picture) -> Array:
    # Loader processes are what runs side by side; and one that is forked from OpenCV's threads would wait for them.
    cv2.setNumThreads(0)
    return np.ascontiguousarray(image.permute(1, 2, 0)) if isinstance(image, torch.Tensor) else np.asarray(image)


def to_tensor(image: Array) -> torch.Tensor:
    return torch.from_numpy(np.stack(cv2.split(image)))  # half the time of a transposed copy


class Flip:
    """torchvision's RandomHorizontalFlip or RandomVerticalFlip, for arrays."""

    def __init__(self, p: float, horizontal: bool) -> None:
        self.p, self.axis = p, int(horizontal)

    def __call__(self, image: Array) -> Array:
        return cv2.flip(image, self.axis) if torch.rand(1) < self.p else image


# -- Geometry


def _slide(image: Array, pixels: np.ndarray, *, resample: Image.Resampling, fillcolor: tuple[int, ...]) -> Array:
    """Each row y as it is `pixels[y]` further to the right: first a fraction of a pixel, then whole ones."""
    height, width, channels = image.shape
    whole = np.floor(pixels + 0.5).astype(int)
    weights = WEIGHTS[resample](np.abs(np.arange(-2, 3) - (pixels - whole)[:, None]))  # of 5 pixels: (H, 5)
    if (pixels == pixels[0]).all():  # a translation
        moved = cv2.filter2D(image, -1, weights[:1], delta=CUT, borderType=cv2.BORDER_REPLICATE)
    else:
        padded = torch.from_numpy(cv2.copyMakeBorder(image, 0, 0, 2, 2, cv2.BORDER_REPLICATE)).view(height, -1).float()
        sums = torch.zeros(height, width * channels)
        for neighbour, weight in enumerate(torch.from_numpy(weights).float().split(1, dim=1)):
            sums.addcmul_(padded[:, neighbour * channels :][:, : width * channels], weight)
        moved = cv2.addWeighted(sums.numpy(), 1, sums.numpy(), 0, CUT, dtype=cv2.CV_8U).reshape(image.shape)

    result = np.empty_like(image)
    result.reshape(height, -1)[:] = np.tile(np.array(fillcolor, np.uint8), width)
    shifts = np.clip(whole, -width, width)
    starts = [0, *np.flatnonzero(np.diff(shifts)) + 1, height]  # of rows that move alike
    for top, bottom in itertools.pairwise(starts):
        shift = int(shifts[top])
        if shift < 0:
            result[top:bottom, -shift:] = moved[top:bottom, : width + shift]
        else:
            result[top:bottom, : width - shift] = moved[top:bottom, shift:]
    return result


def shear_x(image: Array, factor: float, **how: Any) -> Array:
    return _slide(image, factor * (np.arange(len(image)) + 0.5), **how)


def translate_x_rel(image: Array, pct: float, **how: Any) -> Array:
    return _slide(image, np.full(len(image), pct * image.shape[1]), **how)


def shear_y(image: Array, factor: float, **how: Any) -> Array:
    return cv2.transpose(shear_x(cv2.transpose(image), factor, **how))


def translate_y_rel(image: Array, pct: float, **how: Any) -> Array:
    return cv2.transpose(translate_x_rel(cv2.transpose(image), pct, **how))


def rotate(image: Array, degrees: float, *, resample: Image.Resampling, fillcolor: tuple[int, ...]) -> Array:
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image,
        cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1),
        (width, height),
        flags=FILTERS[resample],
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fillcolor,
    )


# -- Levels


def _look_up(image: Array, levels: np.ndarray) -> Array:
    """`levels`: (256,) for all channels or (256, 3), cut off to uint8."""
    return cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8).reshape(1, 256, -1))


def _histogram(image: Array) -> np.ndarray:
    """(256, 3), whole numbers."""
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(3)]
    return np.stack(counts, axis=1).astype(np.int64)


def auto_contrast(image: Array, **_: Any) -> Array:
    used = _histogram(image) > 0
    low, high = used.argmax(axis=0), 255 - used[::-1].argmax(axis=0)
    scale = 255 / np.maximum(high - low, 1)
    stretched = np.trunc(LEVELS[:, None] * scale - low * scale)
    return _look_up(image, np.where(high > low, stretched, LEVELS[:, None]))


def equalize(image: Array, **_: Any) -> Array:
    counts = _histogram(image)
    last = 255 - (counts[::-1] > 0).argmax(axis=0)
    step = (image.shape[0] * image.shape[1] - counts[last, range(3)]) // 255
    levels = (step // 2 + counts.cumsum(axis=0) - counts) // np.maximum(step, 1)
    return _look_up(image, np.where(step > 0, levels, LEVELS[:, None]))


def invert(image: Array, **_: Any) -> Array:
    return ~image


def posterize(image: Array, bits_to_keep: int, **_: Any) -> Array:
    return image & np.uint8(0xFF00 >> min(max(bits_to_keep, 0), 8) & 0xFF)


def solarize(image: Array, thresh: int, **_: Any) -> Array:
    return _look_up(image, np.where(thresh > LEVELS, LEVELS, 255 - LEVELS))


def solarize_add(image: Array, add: int, thresh: int = 128, **_: Any) -> Array:
    return _look_up(image, np.where(thresh > LEVELS, LEVELS + add, LEVELS))


def _blend_levels(image: Array, level: int, factor: float) -> Array:
    """Away from one grey `level`, or towards it."""
    return _look_up(image, level + np.float32(factor) * (LEVELS - level).astype(np.float32))


def brightness(image: Array, factor: float, **_: Any) -> Array:
    return _blend_levels(image, 0, factor)


def contrast(image: Array, factor: float, **_: Any) -> Array:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return _blend_levels(image, int(mean + 0.5), factor)


# -- Neighbours and channels


def _blend(other: Array, image: Array, factor: float) -> Array:
    """Away from an `other` image, or towards it."""
    return cv2.addWeighted(image, factor, other, 1 - factor, CUT)


def color(image: Array, factor: float, **_: Any) -> Array:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(grey, image, factor)


def sharpness(image: Array, factor: float, **_: Any) -> Array:
    smooth = image.copy()  # at the edges Pillow does not smooth
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


OPERATIONS = {
    function.__name__: function
    for function in (
        *(shear_x, shear_y, translate_x_rel, translate_y_rel, rotate),
        *(auto_contrast, equalize, invert, posterize, solarize, solarize_add, brightness, contrast),
        *(color, sharpness),
    )
}
