"""Images in a folder for each class."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.findings import Layout, Report, chunks
from data.sources.base import DataError, Decoder, Picture, decode, read_file, require_folder
from data.sources.listing import Listing
from data.sources.zip_index import PackedNames
from logger import get_logger, printable


class FolderSource:
    """`root/<class>/…/image`: one class per folder.

    `classes` fixes the order of the labels (the training set's for validation); by default the folders' names, sorted.
    Raises DataError where the folder is absent, empty, has no class folders, or folders that are no known class.
    """

    def __init__(self, root: Path, classes: tuple[str, ...] | None = None, decoder: Decoder = decode) -> None:
        require_folder(root)
        listing = Listing(root)
        folders = class_folders(listing)
        if not folders:
            if listing.loose:
                raise DataError(
                    f"{root} holds {len(listing.loose)} images but no class folders; expected {root}/<class>/<image>:"
                    " move every image into a folder named after its class (tools.prepare_imagenet does that for"
                    " ImageNet's val/)"
                )
            raise DataError(f"{root} is empty; expected {root}/<class>/<image>")
        if classes is not None and (strange := sorted(set(folders) - set(classes))):
            raise DataError(
                f"{root} has {len(strange)} class folders that the training set lacks: {', '.join(strange[:5])}"
            )
        self.classes = classes or tuple(folders)
        self.num_classes = len(self.classes)
        index = {name: i for i, name in enumerate(self.classes)}
        prefix, labels = os.path.join(root, ""), array("i")

        def files() -> Iterator[bytes]:
            for name, folder in folders.items():  # one by one: only one folder's names are Python objects at a time
                for path in listing.images(folder):
                    labels.append(index[name])
                    yield os.fsencode(path.removeprefix(prefix))

        self._prefix, self._decoder = prefix, decoder
        self._names = PackedNames(files())
        self.labels = np.array(labels)
        if empty := sorted({index[name] for name in folders}.difference(np.unique(self.labels).tolist())):
            names = ", ".join(self.classes[i] for i in empty[:5])
            raise DataError(f"{root}: {len(empty)} class folders hold no image ({names}); fill or remove them")
        if remark := listing.remark():
            get_logger().info("%s", remark)

    def path(self, index: int) -> str:
        """Where an image is, which need not be printable."""
        return self._prefix + os.fsdecode(self._names[index])

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def load(self, index: int) -> Picture:
        return self._decoder(read_file(self.path(index)), self.name(index))


def class_folders(listing: Listing) -> dict[str, str]:
    """The folder of each class name. Raises DataError where two folders have one name."""
    folders = {printable(folder): folder for folder in listing.folders}
    if len(folders) < len(listing.folders):
        twice = next(name for name, count in Counter(map(printable, listing.folders)).items() if count > 1)
        raise DataError(f"{printable(listing.root)} has two class folders that are written {twice}; rename one")
    return folders


PLACE_VAL = "`python -m tools.prepare_imagenet DATA_PATH --val-ground-truth FILE` moves them into class folders"


def check_folder(folder: Path, split: str, report: Report) -> Layout | None:
    """Class folders of one split; loose images, empty folders and other files are findings."""
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        report.error(f"{folder} {problem}; of images without val/ DATA.VAL_FRACTION 0.2 divides those there are")
        return None
    samples: list[tuple[str, int]] = []
    empty: list[str] = []
    listing = Listing(folder)
    try:
        classes = class_folders(listing)
        for label, name in enumerate(classes.values()):
            images = list(listing.images(name))
            samples += [(path, label) for path in images]
            empty += [] if images else [os.path.join(folder, name)]
    except DataError as error:
        report.error(str(error))
        return None
    loose = listing.loose
    if loose and not classes:
        fix = PLACE_VAL if split == "val" else "move every image into a folder named after its class"
        report.error(f"{folder} is flat: {len(loose):,} images and no class folders; {fix}", loose)
    elif loose:
        fix = f"; {PLACE_VAL}" if split == "val" else ""
        report.error(f"{folder}: {len(loose):,} images lie outside the class folders and are not used{fix}", loose)
    elif not classes:
        report.error(f"{folder} is empty, expected {folder}/<class>/<image>")
    for tell, paths, what in (
        (report.error, empty, "class folders hold no image; fill or remove them"),
        (report.warn, listing.other, "files are no images by their extension and are not used"),
        (report.warn, listing.repeated, "links lead to folders that are listed already"),
    ):
        if paths:
            tell(f"{folder}: {len(paths):,} {what}", paths)
    if listing.left_out:
        report.facts.append(
            f"{folder}: {len(listing.left_out):,} hidden or system files and folders are left out, such as"
            f" {listing.left_out[0]}"
        )
    return Layout(tuple(classes), chunks(split, None, samples))
