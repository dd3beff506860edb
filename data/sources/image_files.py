"""Images on the disk with any classes, as ImageNet has them: a folder, zip with map files, tar shards or parquet."""

from collections.abc import Mapping
from pathlib import Path

from yacs.config import CfgNode

from config import make_plan
from data.examination import examine_layouts
from data.findings import Layout, Report
from data.sources.base import (
    DataError,
    DatasetBuilder,
    Decoder,
    Source,
    SplitSource,
    decode,
    decoder_for,
    require_folder,
)
from data.sources.folder import FolderSource, check_folder
from data.sources.parquet import ParquetSource, check_parquet, parquet_files
from data.sources.shards import INDEX_FILE, Index, ShardSplit, check_shards, read_index
from data.sources.zip import ZipSource, check_zip, warm_page_cache
from data.transforms import Images
from utils import distributed


def data_format(config: CfgNode, root: Path) -> str:
    """folder, zip, shards or parquet: what DATA.FORMAT says, or for auto what DATA.ZIP_MODE and the folder say.

    Raises DataError where they contradict each other.
    """
    indexed = (root / INDEX_FILE).is_file()
    if config.DATA.FORMAT == "auto":
        if indexed and config.DATA.ZIP_MODE:
            raise DataError(
                f"{root} holds {INDEX_FILE}, and DATA.ZIP_MODE (--zip) asks for zip files; DATA.FORMAT zip or shards"
                " decides"
            )
        if indexed or config.DATA.ZIP_MODE:
            return "shards" if indexed else "zip"
        return "parquet" if not (root / "train").is_dir() and parquet_files(root, "train") else "folder"
    return config.DATA.FORMAT


def open_source(
    config: CfgNode,
    root: Path,
    folder: Path,
    split: str = "val",
    classes: tuple[str, ...] | None = None,
    decoder: Decoder = decode,
) -> Source | ShardSplit:
    """The images of a split in the format that `data_format` finds in `root`: class folders in `folder`, or zip and
    map file, shards or parquet files of the split in `root`. Raises DataError."""
    format = data_format(config, root)
    if format == "shards":
        return ShardSplit(root, split, decoder)
    if format == "folder":
        return FolderSource(folder, classes, decoder)
    if format == "parquet":
        return ParquetSource(root, split, config.DATA.LABEL_COLUMN, decoder)
    source = ZipSource(root / f"{split}.zip", root / f"{split}_map.txt", decoder)
    if split == "train":
        source.require_every_label()
    local_rank, local_size = distributed.local_rank(), distributed.local_world_size()
    if config.DATA.CACHE_MODE == "full" and local_rank == 0:
        warm_page_cache(source.path)
    elif config.DATA.CACHE_MODE == "part":
        warm_page_cache(source.path, share=local_rank, shares=local_size)
    return source


def _root(config: CfgNode, split: str) -> Path:
    """DATA_PATH. Raises DataError where it is no folder, or lies one level too deep or too high for class folders."""
    if not config.DATA.DATA_PATH:
        raise DataError("no data set: --data-path names the folder that holds train/ and val/")
    root = Path(config.DATA.DATA_PATH)
    require_folder(root)
    if data_format(config, root) == "folder" and not (root / split).is_dir() and not config.DATA.VAL_FRACTION:
        places = (root.resolve().parent, *sorted(path for path in root.iterdir() if path.is_dir()))
        if meant := next((place for place in places if (place / "train").is_dir() and (place / "val").is_dir()), None):
            raise DataError(f"{root} holds no {split}/; did you mean --data-path {meant}?")
    return root


def _split_folder(root: Path) -> Path:
    """The class folders that DATA.VAL_FRACTION divides: those in train/, or in DATA_PATH itself."""
    return root / "train" if (root / "train").is_dir() else root


def _require_divisible(config: CfgNode, root: Path) -> None:
    """Raise DataError where DATA.VAL_FRACTION has nothing to divide, or nothing that it can."""
    files = [path for path in (root / "val", root / "val.zip") if path.exists()]
    if own := next(iter(files or parquet_files(root, "val")), None):
        raise DataError(
            f"{own} holds validation images, and DATA.VAL_FRACTION asks to take some from training: set it to 0"
        )
    if data_format(config, root) == "shards":
        raise DataError(
            "DATA.VAL_FRACTION needs images that can be read in any order; shards are streamed: set it to 0"
        )


def _split(config: CfgNode, root: Path, split: str) -> SplitSource:
    """One side of what DATA.VAL_FRACTION divides."""
    _require_divisible(config, root)
    source = open_source(config, root, _split_folder(root), "train", decoder=decoder_for(config, split))
    assert not isinstance(source, ShardSplit)
    return SplitSource(source, config.DATA.VAL_FRACTION, validation=split != "train")


def _warn_of_lone_images(classes: tuple[str, ...] | None, images: Mapping[int, int], report: Report) -> None:
    """Name the classes that DATA.VAL_FRACTION cannot divide."""
    if alone := [classes[label] if classes else str(label) for label, number in images.items() if number == 1]:
        report.warn(f"{len(alone)} classes have one image, which DATA.VAL_FRACTION leaves in training", alone)


def _check_split(
    config: CfgNode, root: Path, split: str, kind: str, index: Index | None, report: Report
) -> Layout | None:
    if index is not None:
        return check_shards(root, split, index, report)
    if kind == "folder":
        return check_folder(_split_folder(root) if config.DATA.VAL_FRACTION else root / split, split, report)
    if kind == "parquet":
        return check_parquet(root, split, config.DATA.LABEL_COLUMN, report)
    return check_zip(root, split, report)


class ImageFiles(DatasetBuilder):
    """DATA.DATASET imagenet: train/ and val/ in DATA_PATH, in the format that DATA.FORMAT names or that is found."""

    name, modality = "imagenet", Images()

    def open(self, config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> Source | ShardSplit:
        root = _root(config, split)
        if config.DATA.VAL_FRACTION:
            return _split(config, root, split)
        return open_source(config, root, root / split, split, classes, decoder_for(config, split))

    def check(self, config: CfgNode, report: Report) -> None:
        index = None
        try:
            root = _root(config, "train")
            kind = data_format(config, root)
            if config.DATA.VAL_FRACTION:
                _require_divisible(config, root)
            if kind == "shards":
                index = read_index(root)
        except DataError as error:
            if not config.DATA.DATA_PATH:  # a mistake of the command, not of the data
                raise
            report.error(str(error))
            return
        report.facts.append(f"{root}: {'image folder' if kind == 'folder' else kind}")
        layouts: dict[str, Layout] = {}
        divided = config.DATA.VAL_FRACTION > 0
        for split in ("train",) if divided else ("train", "val"):
            if layout := _check_split(config, root, split, kind, index, report):
                layouts[split] = layout
        counts = examine_layouts(layouts, make_plan(config).workers, report)
        for layout in layouts.values() if divided else ():
            _warn_of_lone_images(layout.classes, counts["train"], report)
        if index is not None:
            for split, seen in counts.items():
                if strange := sorted(label for label in seen if label >= len(index.classes)):
                    report.error(f"{split}: labels beyond the {len(index.classes)} classes", map(str, strange))
