"""Images in parquet files, as the Hugging Face Hub stores data sets, through the optional package `datasets`.

It converts them once into its Arrow cache, which every process maps into memory: images are read in any order.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.findings import CHUNK, Layout, Report, Task
from data.sources.base import MOST_CLASSES, DataError, Decoder, Picture, UnreadableImage, decode, require_package
from logger import get_logger, printable
from utils import distributed

IMAGE_NAMES = ("image", "img")  # where several columns hold images
LABEL_NAMES = ("label", "labels")


def parquet_files(root: Path, split: str) -> list[Path]:
    """Those of a split in a folder, or in the one below it that has some, as the Hub's have; for train all, where none
    has a split's name."""
    below = {path.parent for path in root.glob("*/*.parquet")}
    folders = [root, root / "data", *(below if len(below) == 1 else ())]
    found = next((files for folder in folders if (files := sorted(folder.glob("*.parquet")))), [])
    named = [path for path in found if path.name.startswith(split)]
    unnamed = not any(path.name.startswith(("train", "val", "test")) for path in found)
    return found if split == "train" and unnamed else named


def _column(names: Sequence[str], usual: Sequence[str], what: str, files: Sequence[Path]) -> str:
    """The one column of `names`, or that of a usual name. Raises DataError."""
    chosen = names if len(names) == 1 else [name for name in names if name in usual]
    if len(chosen) != 1:
        raise DataError(
            f"{files[0]} has {len(names)} columns that may be {what} ({', '.join(names) or 'none'}), expected one, or"
            f" one called {' or '.join(usual)}"
        )
    return chosen[0]


def columns_of(features: Any, label: str, files: Sequence[Path]) -> tuple[str, str]:
    """The columns of images and labels by the types of all. Raises DataError where they are not told apart.

    `label` is DATA.LABEL_COLUMN; empty: the only one with class names, else the only one of integers.
    """
    import datasets

    def is_image(kind: Any) -> bool:
        held = kind.get("bytes") if isinstance(kind, dict) else kind
        return isinstance(kind, datasets.Image) or getattr(held, "dtype", "") in ("binary", "large_binary")

    images = [name for name, kind in features.items() if is_image(kind)]
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    whole = [name for name, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
    if label and label not in whole:
        raise DataError(
            f"DATA.LABEL_COLUMN {label}: {files[0]} has the columns of integers {', '.join(whole) or 'none'}"
        )
    image = _column(images, IMAGE_NAMES, "images", files)
    return image, label or _column(named or whole, LABEL_NAMES, "labels (DATA.LABEL_COLUMN names one)", files)


def _require_readable(files: Sequence[Path]) -> None:
    """Raise DataError, naming it, for a file that is no parquet."""
    import pyarrow.parquet

    for path in files:
        try:
            pyarrow.parquet.ParquetFile(path).close()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no parquet file, or a damaged one: {printable(error)}") from None


class ParquetImages:
    """The image column of a split, which lies in files that are mapped into memory: cheap to send to a process."""

    def __init__(self, dataset: Any, column: str, split: str) -> None:
        self._dataset, self._column, self._split = dataset, column, split

    def name(self, index: int) -> str:
        cell = self._dataset.data.column(self._column)[index]
        fields = [cell.type.field(i).name for i in range(cell.type.num_fields)]
        path = cell["path"].as_py() if cell.is_valid and "path" in fields else None
        return printable(f"{self._split}/{index}" + (f"/{path}" if path else ""))

    def encoded(self, index: int) -> bytes:
        """The image file. Raises UnreadableImage where the cell is empty."""
        value = self._dataset.data.column(self._column)[index].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise UnreadableImage(f"{self.name(index)}: the parquet file holds no bytes of it")
        return bytes(data)


class ParquetSource:
    """The images of a split; class names are those of the label column, where it has them.

    Raises DataError where the package is not installed, files are absent or damaged, the disk has no room for the
    cache, or columns are not found.
    """

    def __init__(self, root: Path, split: str, label: str = "", decoder: Decoder = decode) -> None:
        require_package("parquet")
        import datasets

        files = parquet_files(root, split)
        if not files:
            raise DataError(
                f"{root} holds no {split}*.parquet, nor does the folder below it; of a set without validation images"
                " DATA.VAL_FRACTION 0.2 divides those there are"
            )
        _require_readable(files)
        if distributed.local_rank():
            datasets.disable_progress_bars()
        builder = datasets.load_dataset_builder("parquet", data_files={split: [str(path.resolve()) for path in files]})
        cache, size = Path(builder.cache_dir), sum(path.stat().st_size for path in files)
        if not cache.exists():
            existing = next(folder for folder in cache.parents if folder.exists())
            free = shutil.disk_usage(existing).free
            get_logger().info(
                "%s: %d parquet files are converted once, to about %.2g GB in %s (HF_DATASETS_CACHE chooses the place)",
                split,
                len(files),
                size / 1e9,
                cache,
            )
            if free < size:
                raise DataError(
                    f"{existing} has {free / 1e9:.1f} GB free of {size / 1e9:.1f} GB; HF_DATASETS_CACHE moves it"
                )
        try:
            builder.download_and_prepare()  # under a lock: one process of a node converts, the others wait
            dataset = builder.as_dataset(split=split)
        except Exception as error:  # the package fails in any way
            raise DataError(
                f"{files[0].parent}: {split}*.parquet cannot be read together: {printable(error)}"
            ) from error
        image, column = columns_of(dataset.features, label, files)
        labels = dataset.data.column(column)
        names = getattr(dataset.features[column], "names", None)
        self.classes = None if names is None else tuple(map(printable, names))
        self.labels = np.zeros(0, dtype=np.int64) if labels.null_count else labels.to_numpy()
        last = (MOST_CLASSES if self.classes is None else len(self.classes)) - 1
        if not len(self.labels) or self.labels.min() < 0 or self.labels.max() > last:
            raise DataError(
                f"{files[0].parent}: column {column} of {split} lacks labels, or has some outside of 0 to {last}"
            )
        self.num_classes = int(self.labels.max()) + 1 if self.classes is None else len(self.classes)
        self.images, self._decoder = ParquetImages(dataset, image, split), decoder

    def name(self, index: int) -> str:
        return self.images.name(index)

    def load(self, index: int) -> Picture:
        return self._decoder(self.images.encoded(index), self.name(index))


def check_parquet(root: Path, split: str, label: str, report: Report) -> Layout | None:
    """The files of a split, and what examines their images."""
    try:
        source = ParquetSource(root, split, label)
    except DataError as error:
        report.error(str(error))
        return None
    tasks = []
    for start in range(0, len(source.labels), CHUNK):
        labels = tuple(source.labels[start : start + CHUNK].tolist())
        tasks.append(Task(split, root, labels=labels, images=len(labels), source=source.images, start=start))
    return Layout(source.classes, tasks)
