"""Image files that a command line names, as the input of a model."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.datasets import DataError, Picture, decode


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and the images below the folders among them, sorted.

    Raises DataError for a path that does not exist, and for a folder without images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and f.name.lower().endswith(IMG_EXTENSIONS))
            if not found:
                raise DataError(f"{path} holds no images; expected files ending in {', '.join(IMG_EXTENSIONS)}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist; name an image file or a folder of images")
    return files


def read_image(path: Path, transform: Callable[[Picture], Tensor]) -> Tensor:
    """uint8 (3, H, W) of an image file after a transform. Raises UnreadableImage for what is no image."""
    return transform(decode(path.read_bytes(), str(path)))
