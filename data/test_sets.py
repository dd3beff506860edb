"""The test sets that ImageNet models are published with: where their images lie, and which class each one shows.

Everything is told by WordNet ids. A model's outputs have ids: the class names in its checkpoint or, without names,
ImageNet's 1,000 in order (timm's ImageNetInfo). A benchmark's folders have ids, or numbers that stand for them. Nothing
depends on the order of the folders. docs/evaluation.md says where each data set comes from.
"""

import json
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from yacs.config import CfgNode

from config import Plan
from data.builders import builder_of
from data.imagenet import imagenet_ids
from data.loaders import Batches, Loaders, evaluation_batches
from data.sources.base import DataError, decoder_for
from data.sources.image_files import data_format, open_source
from data.sources.listing import Listing
from data.transforms import Images

TITLES = {
    "val": "validation images",
    "real": "ImageNet-ReaL",
    "v2": "ImageNet-V2",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
    "c": "ImageNet-C",
}
# Images of each as published, of ImageNet-C in each of its parts.
PUBLISHED_IMAGES = {"real": 50_000, "v2": 10_000, "a": 7_500, "r": 30_000, "sketch": 50_889, "c": 50_000}
SEVERITIES = (1, 2, 3, 4, 5)
# Mean error of AlexNet over the five severities in percent: Hendrycks & Dietterich, "Benchmarking Neural Network
# Robustness to Common Corruptions and Perturbations", ICLR 2019 (arXiv 1903.12261), the denominators of mCE.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6,
    "shot_noise": 89.4,
    "impulse_noise": 92.3,
    "defocus_blur": 82.0,
    "glass_blur": 82.6,
    "motion_blur": 78.6,
    "zoom_blur": 79.8,
    "snow": 86.7,
    "frost": 82.7,
    "fog": 81.9,
    "brightness": 56.5,
    "contrast": 85.3,
    "elastic_transform": 64.6,
    "pixelate": 71.8,
    "jpeg_compression": 60.7,
}
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published too, and no part of mCE
CORRUPTION_GROUPS = ("noise", "blur", "weather", "digital", "extra")  # folders of the published archives
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")


@cache
def _subset_ids(benchmark: str) -> tuple[str, ...]:
    """The 200 classes of ImageNet-A or -R, from timm, sorted."""
    content = pkgutil.get_data("timm.data", f"_info/imagenet_{benchmark}_synsets.txt")
    assert content is not None
    return tuple(sorted(content.decode().split()))


def output_ids(names: Sequence[str] | None, num_classes: int, source: str) -> tuple[str, ...]:
    """The WordNet id of each output of the model in `source`, which stores the class `names` or none.

    Raises DataError where they are no ids of ImageNet's classes, or where without names there are not 1,000.
    """
    if names:
        if strange := [name for name in names if name not in imagenet_ids()]:
            raise DataError(
                f"{source}: {len(strange)} of its {len(names)} classes are none of ImageNet's 1,000 WordNet ids"
                f" ({', '.join(strange[:5])}), so its outputs do not map to this benchmark; --benchmark val evaluates"
                " on its own data set"
            )
        return tuple(names)
    if num_classes != len(imagenet_ids()):
        raise DataError(
            f"{source} stores no class names and has {num_classes} classes, expected names or ImageNet's 1,000 classes"
        )
    return imagenet_ids()


@dataclass(frozen=True)
class Part:
    """Images that get a result of their own; `open` gives this process's share of them."""

    name: str
    open: Callable[[], Batches]


@dataclass(frozen=True)
class EvaluationSet:
    """What to evaluate on. Labels index `classes`; `outputs` are the model's outputs that stand for them, None for all
    in their order; `missing` names the parts that the published data set has and this one lacks; `description` says
    what own data are, where they say so themselves, and `reference` what answers without a model score on them, by
    name, as fractions."""

    name: str
    parts: tuple[Part, ...]
    classes: tuple[str, ...] | None
    num_classes: int
    outputs: tuple[int, ...] | None = None
    missing: tuple[str, ...] = ()
    real_labels: tuple[frozenset[int], ...] | None = None  # by image number less 1: the labels among `classes`
    description: str = ""
    reference: Mapping[str, float] = field(default_factory=dict)
    own_split: str | None = None  # of own data, where what --eval is on has a name other than val

    @property
    def split(self) -> str:
        """What the results' files are called after."""
        return self.own_split or self.name


def own_images(config: CfgNode, loaders: Loaders, class_names: Sequence[str] | None, source: str) -> EvaluationSet:
    """The data set's own validation images, with their own labels or (TEST.BENCHMARK real) the ReaL ones."""
    part = Part("", lambda: loaders.val)
    if config.TEST.BENCHMARK == "val":
        return EvaluationSet(
            "val",
            (part,),
            loaders.classes,
            loaders.num_classes,
            description=loaders.description,
            reference=loaders.reference or {},
            own_split=builder_of(config).evaluation_split,
        )
    ids = output_ids(class_names, loaders.num_classes, source)
    if loaders.classes and loaders.classes != ids:
        raise DataError(
            f"{config.DATA.DATA_PATH}: the class folders of val/ ({', '.join(loaders.classes[:3])}, …) are not the"
            f" classes of {source} ({', '.join(ids[:3])}, …) in their order"
        )
    return EvaluationSet("real", (part,), ids, len(ids), real_labels=read_real_labels(config.TEST.REAL_LABELS, ids))


def read_real_labels(path: str, ids: Sequence[str]) -> tuple[frozenset[int], ...]:
    """For each of ImageNet's validation images, in the order of their numbers, the outputs that are right for it.

    `path` is a list of lists of class indices as JSON; empty for timm's copy. `ids` are the model's classes: a label
    that is none of them has no output. Raises DataError for another layout.
    """
    try:
        content = Path(path).read_bytes() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        assert content is not None
        labels = json.loads(content)
        if not all(type(label) is int and 0 <= label < len(imagenet_ids()) for own in labels for label in own):
            raise ValueError("a label is no integer from 0 to 999")
    except OSError as error:
        raise DataError(f"TEST.REAL_LABELS {path}: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"TEST.REAL_LABELS {path}: expected a JSON list with a list of class indices (0 to 999) for every"
            f" validation image, as in real.json of the reassessed ImageNet ({error})"
        ) from error
    output = {name: i for i, name in enumerate(ids)}
    outputs = [output.get(name) for name in imagenet_ids()]
    # −1: an image whose labels are all foreign to the model is labelled none the less, and wrong whatever it says
    return tuple(frozenset(-1 if outputs[label] is None else outputs[label] for label in own) for own in labels)


def image_number(name: str) -> int:
    """The number in the name of an ImageNet validation image, from 1. Raises DataError for another name."""
    found = VALIDATION_NAME.search(name)
    if not found:
        raise DataError(f"{name}: ReaL labels belong to file names such as ILSVRC2012_val_00000293.JPEG")
    return int(found[1])


def open_test_set(config: CfgNode, plan: Plan, ids: tuple[str, ...], source: str) -> EvaluationSet:
    """ImageNet-V2, -A, -R, -Sketch or -C in DATA.DATA_PATH, for a model whose outputs have these WordNet ids.

    Raises DataError where the folder is absent, or its classes do not map to those of the benchmark and the model.
    """
    name, root = config.TEST.BENCHMARK, Path(config.DATA.DATA_PATH)
    if not config.DATA.DATA_PATH or not root.is_dir():
        raise DataError(
            f"{TITLES[name]}: the folder {config.DATA.DATA_PATH!r} does not exist; --data-path names the one that holds"
            f" {'a folder per corruption' if name == 'c' else 'its class folders'} (docs/evaluation.md)"
        )
    classes, outputs = ids, None
    if name in ("a", "r"):  # as their authors do: the best of the benchmark's own classes
        classes = _subset_ids(name)
        if lacking := [each for each in classes if each not in ids]:
            raise DataError(
                f"{source} lacks {len(lacking)} of the {len(classes)} classes of {TITLES[name]}:"
                f" {', '.join(lacking[:5])}"
            )
        outputs = tuple(ids.index(each) for each in classes)
    labels = {each: label for label, each in enumerate(classes)}
    folders, missing = ({"": root}, ()) if name != "c" else _corruptions(root)
    for folder in folders.values():
        if data_format(config, folder) == "folder":  # all of them before the first is evaluated
            _relabelling(name, Listing(folder).folders, labels, folder)

    def opener(folder: Path) -> Callable[[], Batches]:
        def open_part() -> Batches:
            images = open_source(config, folder, folder, decoder=decoder_for(config, "val"))
            if images.classes is None or "" in images.classes:
                raise DataError(f"{folder}: the map file does not give every class folder a label of its own")
            relabel = torch.tensor(_relabelling(name, images.classes, labels, folder))
            return evaluation_batches(config, Images(), images, plan, cropped=name == "c", relabel=relabel)

        return open_part

    parts = tuple(Part(part, opener(folder)) for part, folder in folders.items())
    return EvaluationSet(name, parts, classes, len(classes), outputs, missing)


def _relabelling(name: str, folders: Sequence[str], labels: dict[str, int], root: Path) -> list[int]:
    """The benchmark's label for each of its class folders. Raises DataError where one has none."""
    if name == "v2":  # numbered by class index, so that their alphabetical order is not that of the classes
        numbers = {str(index): each for index, each in enumerate(imagenet_ids())}
        ids = [numbers.get(folder, "") for folder in folders]
        expected = "a class index from 0 to 999"
    else:
        ids, expected = list(folders), "a WordNet id"
    if strange := [folder for folder, each in zip(folders, ids, strict=True) if each not in labels]:
        raise DataError(
            f"{root}: {len(strange)} of {len(folders)} folders are no class of {TITLES[name]} that the model knows"
            f" ({', '.join(strange[:5])}); expected {expected} for each, such as"
            f" {'0' if name == 'v2' else next(iter(labels))}"
        )
    return [labels[each] for each in ids]


def _corruptions(root: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folders of ImageNet-C by `corruption/severity`, and which of the 75 that mCE needs are missing.

    A corruption's folder lies in the root or in that of its group, as the published archives have it.
    """
    found: dict[str, Path] = {}
    for corruption in (*ALEXNET_ERRORS, *EXTRA_CORRUPTIONS):
        places = [root / corruption, *(root / group / corruption for group in CORRUPTION_GROUPS)]
        for severity in SEVERITIES:
            folders = [place / str(severity) for place in places if (place / str(severity)).is_dir()]
            if folders:
                found[f"{corruption}/{severity}"] = folders[0]
    needed = [f"{corruption}/{severity}" for corruption in ALEXNET_ERRORS for severity in SEVERITIES]
    if not found:
        raise DataError(
            f"{root} holds no corruption of ImageNet-C; expected {root}/<corruption>/<severity>/<WordNet id>/, such as"
            f" {needed[0]}; it holds {', '.join(Listing(root).folders[:5]) or 'no folder'}"
        )
    return found, tuple(part for part in needed if part not in found)
