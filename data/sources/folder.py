"""Images in a folder for each class."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from data.findings import Layout, Report, chunks
from data.sources.base import DataError, Decoder, Picture, UnreadableImage, decode, require_folder
from data.sources.zip_index import PackedNames


class FolderSource:
    """`root/<class>/…/image`: one class per folder.

    `classes` fixes the order of the labels (the training set's for validation); by default the folders' names, sorted.
    Raises DataError where the folder is absent, empty, has no class folders, or folders that are no known class.
    """

    def __init__(self, root: Path, classes: tuple[str, ...] | None = None, decoder: Decoder = decode) -> None:
        require_folder(root)
        # names that start with a dot are tools' folders, such as .ipynb_checkpoints
        folders = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")))
        if not folders:
            loose = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root))
            if loose:
                raise DataError(
                    f"{root} holds {loose} images but no class folders; expected {root}/<class>/<image>: move every"
                    " image into a folder named after its class (tools.prepare_imagenet does that for ImageNet's val/)"
                )
            raise DataError(f"{root} is empty; expected {root}/<class>/<image>")
        if classes is not None and (strange := sorted(set(folders) - set(classes))):
            raise DataError(
                f"{root} has {len(strange)} class folders that the training set lacks: {', '.join(strange[:5])}"
            )
        self.classes = classes or folders
        self.num_classes = len(self.classes)
        index = {name: i for i, name in enumerate(self.classes)}
        present = {name: index[name] for name in folders}
        prefix, labels = os.path.join(root, ""), array("i")

        def files() -> Iterator[bytes]:
            for folder in folders:  # one by one, so that only one folder's names are Python objects at a time
                one_class = {folder: index[folder]}
                for path, label in make_dataset(str(root), one_class, extensions=IMG_EXTENSIONS, allow_empty=True):
                    labels.append(label)
                    yield os.fsencode(path.removeprefix(prefix))

        self._prefix, self._decoder = prefix, decoder
        self._names = PackedNames(files())
        self.labels = np.array(labels)
        if empty := sorted(set(present.values()).difference(np.unique(self.labels).tolist())):
            names = ", ".join(self.classes[i] for i in empty[:5])
            raise DataError(f"{root}: {len(empty)} class folders hold no image ({names}); fill or remove them")

    def name(self, index: int) -> str:
        return self._prefix + os.fsdecode(self._names[index])

    def load(self, index: int) -> Picture:
        name = self.name(index)
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror}") from error
        return self._decoder(data, name)


PLACE_VAL = "`python -m tools.prepare_imagenet DATA_PATH --val-ground-truth FILE` moves them into class folders"


def check_folder(root: Path, split: str, report: Report) -> Layout | None:
    """Class folders of one split; loose images, empty folders and other files are findings."""
    folder = root / split
    if not folder.is_dir():
        report.error(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}")
        return None
    classes: list[str] = []
    samples: list[tuple[str, int]] = []
    loose: list[str] = []
    empty: list[str] = []
    other: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):  # a tool's, as the loader sees it
            continue
        if not entry.is_dir():
            (loose if entry.name.lower().endswith(IMG_EXTENSIONS) else other).append(entry.path)
            continue
        walked = sorted(os.walk(entry.path, followlinks=True))
        paths = [os.path.join(parent, name) for parent, _, files in walked for name in sorted(files)]
        images = [path for path in paths if path.lower().endswith(IMG_EXTENSIONS)]
        samples += [(path, len(classes)) for path in images]
        other += [path for path in paths if not path.lower().endswith(IMG_EXTENSIONS)]
        empty += [] if images else [entry.path]
        classes.append(entry.name)
    if loose and not classes:
        fix = PLACE_VAL if split == "val" else "move every image into a folder named after its class"
        report.error(f"{folder} is flat: {len(loose):,} images and no class folders; {fix}", loose)
    elif loose:
        fix = f"; {PLACE_VAL}" if split == "val" else ""
        report.error(f"{folder}: {len(loose):,} images lie outside the class folders and are not used{fix}", loose)
    elif not classes:
        report.error(f"{folder} is empty, expected {folder}/<class>/<image>")
    if empty:
        report.error(f"{folder}: {len(empty)} class folders hold no image; fill or remove them", empty)
    if other:
        report.warn(f"{folder}: {len(other):,} files are no images by their extension and are not used", other)
    return Layout(tuple(classes), Counter(label for _, label in samples), chunks(split, None, samples))
