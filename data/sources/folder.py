"""Images in a folder for each class."""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

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
