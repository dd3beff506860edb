"""An image file as the input of a model."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data.sources.base import Picture, UnreadableImage, decode


def read_image(path: Path, transform: Callable[[Picture], Tensor]) -> Tensor:
    """uint8 (3, H, W) of an image file after a transform. Raises UnreadableImage for what is none or cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}; name an image file or a folder of images") from error
    return transform(decode(data, str(path)))
