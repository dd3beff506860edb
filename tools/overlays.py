"""Attention maps painted over images; shared by the tools that show them."""

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data.transforms import Normalise
from models.attention_maps import LayerRecord, MapError, attention_layers, kernel_in, record
from models.kernels import LinearKernel
from models.layers import Grid

# −1 to 1: negative weights blue, none dark, positive from violet over orange to light yellow.
COLOURS = LinearSegmentedColormap.from_list(
    "weights", ["#d6f6ff", "#35a2f4", "#14407f", "#05040c", "#7a1c6d", "#ed6925", "#fcffa4"]
)


# its value at −1, …, 1, in 511 steps
_TABLE = COLOURS(np.linspace(0, 1, 511))[:, :3].astype(np.float32) * 255


def ground(pixels: Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
    """What maps are painted on: an image, uint8 (3, H, W), nearly grey, float32 (height, width, 3) from 0 to 255.

    `size`: (width, height) of the result; None: the image's.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    if size is not None:
        image = image.resize(size, Image.Resampling.BICUBIC)
    base = np.asarray(image, dtype=np.float32)
    grey = base @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return 0.8 * grey[..., None] + 0.2 * base  # colours of the image must not read as weights


def paint(base: np.ndarray, weights: Tensor, *, gamma: float = 1.0) -> Image.Image:
    """Weights (rows, columns) of an image's parts over its `ground`, bilinearly enlarged: dark where they are 0,
    brightest at the largest |weight|, blue where they are negative.

    `gamma`: colour follows sign(w)·|w / largest|^gamma; 0.5 shows small weights beside large ones.
    """
    largest = weights.abs().max().clamp(min=torch.finfo(weights.dtype).tiny)
    value = (weights / largest).abs() ** gamma * weights.sign()
    level = F.interpolate(value[None, None].float(), base.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    colours = _TABLE[np.rint(level * 255).astype(np.int32) + 255]
    strength = (0.6 + 0.3 * np.abs(level))[..., None]
    return Image.fromarray((base + strength * (colours - base)).round().astype(np.uint8))


def key_map(layer: LayerRecord, weights: Tensor) -> Tensor:
    """A row over a layer's keys (…, keys) as a map (…, rows, columns)."""
    return weights.unflatten(-1, layer.key_grid).cpu()


def token_at(point: tuple[float, float], size: tuple[int, int], grid: Grid) -> int:
    """The query whose patch contains pixel (x, y) of an image of (width, height). Raises MapError for one outside."""
    (x, y), (width, height) = point, size
    if not (0 <= x < width and 0 <= y < height):
        raise MapError(f"point {x:g},{y:g} is outside of the {width}×{height} image")
    return int(y * grid[0] / height) * grid[1] + int(x * grid[1] / width)


def last_linear_layer(model: nn.Module) -> str:
    """The deepest layer of linear attention, or the deepest of all where there is none."""
    layers = attention_layers(model)
    linear = [name for name, module in layers.items() if isinstance(kernel_in(module), LinearKernel)]
    return linear[-1] if linear else list(layers)[-1]


def overlay(
    model: nn.Module,
    pixels: Tensor,
    layer: str | None = None,
    query: tuple[float, float] | None = None,
    *,
    size: tuple[int, int] | None = None,
    normalise: Normalise | None = None,
) -> Image.Image:
    """One attention map over the image it was computed from, averaged over the layer's heads.

    It shows what one layer mixes, not why the model decided as it did: no gradient and no class is involved.

    Args:
        model: as it is; put it into evaluation mode.
        pixels: uint8 (3, H, W), the size that the model was built for (what `data.evaluation_transform` gives).
        layer: a name from `attention_layers`; None: `last_linear_layer`.
        query: pixel (x, y) whose row of the combined map is shown; None: the attention that every place receives,
            averaged over all queries.
        size: (width, height) of the result; None: the image's.
        normalise: what the model was trained with; None: ImageNet's mean and standard deviation.

    Raises:
        MapError: an unknown layer, or a point outside of the image.
    """
    name = layer or last_linear_layer(model)
    device = next(model.parameters()).device
    normalise = normalise or Normalise(device)
    seen = record(model, normalise(pixels[None].to(device)), [name]).layers[name]
    if query is None:
        weights = seen.received()[0]
    else:
        weights = seen.rows([token_at(query, (pixels.shape[2], pixels.shape[1]), seen.grid)])[0, :, 0]
    return paint(ground(pixels, size), key_map(seen, weights.mean(dim=0)))
