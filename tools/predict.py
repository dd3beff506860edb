"""Classify images with a checkpoint: its most probable classes, by name.

example: python tools/predict.py --checkpoint FILE.pth image.jpg folder/
         python tools/predict.py --checkpoint FILE.pth folder/ --topk 1 --output predictions.csv

Images pass through the evaluation transform of the checkpoint's configuration, and the model computes as `--eval` does.
A folder stands for every image below it. Files that are no complete images are named at the end; the rest is
classified.

Exit codes: 0 every image is classified; 1 some are not readable; 2 a mistake.
"""

import sys
from pathlib import Path

if not __package__:  # run as tools/predict.py: what it imports lies beside tools/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from config import evaluation_config, image_size
from data.imagenet import readable_names
from data.sources.base import TURNED, DataError, UnreadableImage, decode, read_file
from data.transforms import Normalise, evaluation_transform
from logger import printable
from models import build_model
from models.loading import load_resized
from tools.checkpoints import LoadedModel, add_checkpoint_arguments, find_images, open_checkpoint
from tools.command_line import answer, file_path, program, say, whole
from utils.devices import device_type
from utils.environment import cores
from utils.files import file_digest
from utils.precision import autocast, autocast_dtype, exact_float32

FORMATS = ("table", "csv", "json")


class Prediction(NamedTuple):
    """The most probable classes of an image, best first, and the softmax probability of each.

    `turned`: its EXIF data ask for a rotation that was not applied.
    """

    file: str
    labels: list[int]
    probabilities: list[float]
    turned: bool = False

    def named(self, names: Sequence[str]) -> list[tuple[int, str, float]]:
        """Label, name and probability of each."""
        return [(label, names[label], p) for label, p in zip(self.labels, self.probabilities, strict=True)]


class Unreadable(NamedTuple):
    file: str
    reason: str


class Readable(NamedTuple):
    """An image as the model's uint8 input, and whether it is `turned`."""

    file: str
    pixels: Tensor
    turned: bool


class _Images(Dataset[Readable | Unreadable]):
    """The image of each path, or why it cannot be read."""

    def __init__(self, paths: Sequence[Path], config: CfgNode, exif: bool) -> None:
        self.paths, self.exif = paths, exif
        self.transform = evaluation_transform(config, image_size(config))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Readable | Unreadable:
        path, notes = self.paths[index], list[str]()
        name = printable(path)
        try:
            image = decode(read_file(path), name, exif=self.exif, notes=notes)
        except UnreadableImage as error:
            return Unreadable(name, str(error).removeprefix(f"{name}: "))
        return Readable(name, self.transform(image), TURNED in notes)


def at_evaluation_size(loaded: LoadedModel, source: str) -> LoadedModel:
    """The model at TEST.IMG_SIZE, its position tables resized as `--eval` does, where the configuration sets that."""
    sized = evaluation_config(loaded.config)
    if image_size(sized) == image_size(loaded.config):
        return loaded
    model = build_model(sized, loaded.model.num_classes)
    load_resized(model, loaded.model.state_dict(), loaded.config, source)
    return LoadedModel(model.eval(), sized, loaded.classes)


@torch.inference_mode()
def predict(
    loaded: LoadedModel,
    paths: Sequence[Path],
    *,
    topk: int,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    exif: bool | None = None,
) -> Iterator[Prediction | Unreadable]:
    """A result for each path, in their order; `topk` classes, or all where there are fewer.

    `exif`: in place of the configuration's DATA.EXIF.
    """
    model = loaded.model.to(device)
    normalise = Normalise.of(loaded.config, device)
    amp_dtype = autocast_dtype(loaded.config.AMP_DTYPE, device) if loaded.config.TEST.AMP else None
    loader = DataLoader(
        _Images(paths, loaded.config, loaded.config.DATA.EXIF if exif is None else exif),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
    )
    for batch in loader:
        results: Iterator[tuple[list[int], list[float]]] = iter(())
        if images := [sample.pixels for sample in batch if isinstance(sample, Readable)]:
            with exact_float32(), autocast(device, amp_dtype):
                logits = model(normalise(torch.stack(images).to(device)))
            best = logits.float().softmax(dim=-1).topk(min(topk, model.num_classes))
            results = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for sample in batch:
            if isinstance(sample, Unreadable):
                yield sample
            else:
                yield Prediction(sample.file, *next(results), turned=sample.turned)


# -- Output


def as_table(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """A paragraph an image: probability in percent and class name."""
    return "".join(
        f"{prediction.file}\n" + "".join(f"  {100 * p:6.2f} %  {name}\n" for _, name, p in prediction.named(names))
        for prediction in predictions
    )


def as_csv(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """A row for each image and rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "label", "class", "probability"])
    for prediction in predictions:
        for rank, (label, name, probability) in enumerate(prediction.named(names), start=1):
            writer.writerow([prediction.file, rank, label, name, f"{probability:.6g}"])
    return text.getvalue()


def as_json(
    predictions: Sequence[Prediction], names: Sequence[str], unreadable: Sequence[Unreadable], about: dict[str, str]
) -> str:
    """An object: what made the predictions, the predictions, and the files that are no images."""
    keys = ("label", "class", "probability")
    rows = [
        {"file": each.file, "classes": [dict(zip(keys, entry, strict=True)) for entry in each.named(names)]}
        for each in predictions
    ]
    content = {**about, "predictions": rows, "unreadable": [entry._asdict() for entry in unreadable]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


# -- Command line


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's word for a device that is not there
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used here: expected {' or '.join(dict.fromkeys(('cpu', device_type())))}"
        ) from error
    return device


def _parser() -> argparse.ArgumentParser:
    parser = program("tools/predict.py", __doc__)
    add = parser.add_argument
    add("images", metavar="IMAGE", type=file_path, nargs="+", help="image files, and folders of them")
    add_checkpoint_arguments(parser, opts=True)
    add("--topk", metavar="K", type=whole(), default=5, help="classes an image; default 5")
    add("--format", choices=FORMATS, help="default: by the ending of --output, else table")
    add("--output", metavar="FILE", type=file_path, help="write there instead of standard output")
    add("--batch-size", metavar="N", type=whole(), default=32, help="default 32")
    what = "processes that decode images where there is more than a batch of them; default 4, or the number of cores"
    add("--workers", metavar="N", type=whole(), default=min(4, cores()), help=what)
    what = "turn images as their EXIF data say, or not; default: as the checkpoint was trained (DATA.EXIF)"
    add("--exif", action=argparse.BooleanOptionalAction, help=what)
    what = "cpu, cuda, cuda:N, mps or xpu; default: the accelerator, where there is one"
    add("--device", type=_device, default=device_type(), help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    return answer(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Classify what the command line names; 1 where some files are no images."""
    ending = arguments.output.suffix.removeprefix(".").lower() if arguments.output else ""
    form = arguments.format or (ending if ending in FORMATS else "table")
    paths = find_images(arguments.images)
    loaded = open_checkpoint(arguments)
    if loaded.config.MODEL.SWIN.IN_CHANS != 3:
        raise DataError(f"{arguments.checkpoint} takes {loaded.config.MODEL.SWIN.IN_CHANS} channels, images give 3")
    results = list(
        predict(
            at_evaluation_size(loaded, str(arguments.checkpoint)),
            paths,
            topk=arguments.topk,
            batch_size=arguments.batch_size,
            device=arguments.device,
            workers=min(arguments.workers, len(paths) // arguments.batch_size),
            exif=arguments.exif,
        )
    )
    predictions = [result for result in results if isinstance(result, Prediction)]
    unreadable = [result for result in results if isinstance(result, Unreadable)]
    names = readable_names(loaded.classes, loaded.model.num_classes)
    if form == "json":
        about = {
            "checkpoint": printable(arguments.checkpoint),
            "sha256": file_digest(arguments.checkpoint),
            "weights": "model_ema" if arguments.ema else "model",
        }
        text = as_json(predictions, names, unreadable, about)
    else:
        text = (as_csv if form == "csv" else as_table)(predictions, names)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    if turned := [prediction.file for prediction in predictions if prediction.turned]:
        say(
            f"{len(turned)} images carry a rotation in their EXIF data that was not applied, such as {turned[0]};"
            " --exif applies it",
            file=sys.stderr,
        )
    for entry in unreadable:
        say(f"unreadable: {entry.file}: {entry.reason}", file=sys.stderr)
    if unreadable:
        say(f"{len(unreadable)} of {len(paths)} files are no complete images", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
