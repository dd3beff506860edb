"""A checkpoint of an image model, and image files, as the tools that look at them take them from the command line."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from yacs.config import CfgNode

from config import ConfigError, config_from_tree, load_config
from data.sources.base import DataError, Picture, UnreadableImage, decode, read_file
from data.sources.listing import Listing
from logger import printable
from models import CheckpointError, load
from models.classifier import TrainableModel
from models.registry import IMAGES, body_of
from tools.command_line import file_path


def add_checkpoint_arguments(parser: argparse.ArgumentParser, *, opts: bool = False) -> None:
    """--checkpoint, --ema, --cfg and where asked for --opts: a model and its weights, for `open_checkpoint`."""
    parser.add_argument("--checkpoint", metavar="FILE", type=file_path, required=True, help=".pth or .safetensors file")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    parser.add_argument("--cfg", metavar="FILE", help="YAML configuration, for a file that carries none")
    parser.set_defaults(opts=[])
    if opts:
        what = "overrides of --cfg, for example DATA.IMG_SIZE 384"
        parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help=what)


class LoadedModel(NamedTuple):
    """A model of images in evaluation mode on the CPU, with the file's configuration (frozen) and class names."""

    model: TrainableModel
    config: CfgNode
    classes: list[str] | None


def load_model(path: Path, *, ema: bool = False, config: CfgNode | None = None) -> LoadedModel:
    """The image model of a checkpoint, as `models.load` rebuilds it. Raises CheckpointError for one of sequences."""
    model = load(path, "ema" if ema else "model", config=config)
    if body_of(model.config).reads != IMAGES:
        raise CheckpointError(f"{path} holds a model of sequences ({type(model).__name__}), expected one of images")
    classes = None if model.classes is None else [printable(name) for name in model.classes]
    return LoadedModel(model, config or config_from_tree(model.config, str(path))[0], classes)


def given_config(arguments: argparse.Namespace) -> CfgNode | None:
    """That of --cfg and --opts. Raises ConfigError for --opts alone."""
    if arguments.opts and not arguments.cfg:
        raise ConfigError("--opts belongs to --cfg")
    return load_config(arguments.cfg, arguments.opts) if arguments.cfg else None


def open_checkpoint(arguments: argparse.Namespace) -> LoadedModel:
    """What `add_checkpoint_arguments` asked for."""
    return load_model(arguments.checkpoint, ema=arguments.ema, config=given_config(arguments))


def read_image(path: Path, transform: Callable[[Picture], Tensor], *, exif: bool = False) -> Tensor:
    """uint8 (3, H, W) of an image file after a transform. Raises UnreadableImage for what is none or cannot be read."""
    if not path.exists():
        raise UnreadableImage(f"{path}: No such file or directory; name an image file or a folder of images")
    return transform(decode(read_file(path), printable(path), exif=exif))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as they are named, and of folders every image below them, sorted; what `Listing` leaves out is left out.

    Raises DataError for a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        listing = Listing(path, classes=False)
        images = sorted(
            map(Path, [*listing.loose, *(file for name in listing.folders for file in listing.images(name))])
        )
        if not images:
            raise DataError(f"{path} holds no images ({', '.join(IMG_EXTENSIONS)})")
        found += images
    return found
