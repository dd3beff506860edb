"""Prepare an image folder for training: verify, resize, and write a folder, zip files with maps, or tar shards.

python -m tools.prepare_imagenet IMAGENET --val-ground-truth LOC_val_solution.csv       place a flat val/ into classes
python -m tools.prepare_imagenet IMAGENET OUTPUT --format shards --short-side 256 --workers 16

Every image is decoded whole. The output is the same, byte for byte, for every number of workers. An interrupted run
continues when the same command is given again: finished parts are verified and kept. In a finished folder the same
command verifies everything and mends what is damaged.

Exit codes: 0 finished; 1 unreadable images, listed in OUTPUT/unreadable.txt; 2 a mistake or a full disk; 130 Ctrl-C.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

if not __package__:  # run as tools/prepare_imagenet.py: what it imports lies beside tools/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from data.sources.base import TURNED, DataError, UnreadableImage, decode, orientation, read_file, require_folder
from data.sources.folder import FolderSource
from data.sources.listing import is_folder_name, is_image, is_litter
from data.sources.shards import INDEX_FILE, Index, Shard
from logger import printable
from tools.command_line import answer, file_path, program, say, whole
from tools.imagenet_labels import read_ground_truth
from tools.prepared_folder import STATE, FolderDigest, owned, require_same_settings
from utils.environment import cores
from utils.files import file_digest, written
from utils.parallel import WorkerLost, parallel

SPLITS = ("train", "val")
REPORT = "unreadable.txt"
DETAILS = 8  # of these examples at most in a message


class Entry(NamedTuple):
    """An image of the input: its path, its path below the split's folder (`class/…/name`), its label."""

    path: str
    member: str
    label: int


# -- Input


def _images(root: Path, pattern: str) -> list[Path]:
    paths = (path for path in root.glob(pattern) if not is_litter(str(path.relative_to(root))))
    return [path for path in paths if path.is_file() and is_image(path.name)]


def _flat_val(root: Path, ground_truth: Path, class_ids: Path | None) -> list[tuple[Path, str]]:
    """Every image of `root`, loose or in a class folder already, with its class."""
    require_folder(root)
    loose, placed = _images(root, "*"), _images(root, "*/*")
    names = [path.name for path in loose + placed]
    if len(set(names)) < len(names):
        twice = min(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{root} holds two images named {twice}")
    if not names:
        raise DataError(f"{root} holds no images")
    classes = read_ground_truth(ground_truth, names, class_ids)
    if strange := sorted(name for name in set(classes.values()) if not is_folder_name(name)):
        raise DataError(
            f"{ground_truth} leads to the class {strange[0]!r}, which is no name of a class folder: expected no / and"
            " no dot at its start"
        )
    for path in placed:
        if path.parent.name != classes[path.name]:
            raise DataError(f"{path}: {ground_truth} says that its class is {classes[path.name]}")
    return [(path, classes[path.name]) for path in loose + placed]


def place_val(root: Path, ground_truth: Path, class_ids: Path | None) -> tuple[int, int]:
    """Move the loose images of `root`/val into a folder per class; returns (moved, in place already).

    Raises DataError before anything is moved where the ground truth does not fit the images or the training classes.
    """
    val, train = root / "val", root / "train"
    images = _flat_val(val, ground_truth, class_ids)
    if train.is_dir():
        _require_known({name for _, name in images}, FolderSource(train).classes, ground_truth)
    loose = [(path, name) for path, name in images if path.parent == val]
    for folder in {name for _, name in loose}:
        (val / folder).mkdir(exist_ok=True)
    for path, name in tqdm(loose, desc="placing", disable=None):
        path.rename(val / name / path.name)
    return len(loose), len(images) - len(loose)


def _require_known(names: set[str], classes: tuple[str, ...], ground_truth: Path) -> None:
    if strange := sorted(names - set(classes)):
        raise DataError(
            f"{ground_truth} leads to {len(strange)} classes that train/ lacks, for example {strange[0]}; is"
            " --class-ids the right file?"
        )


def list_input(
    root: Path, ground_truth: Path | None = None, class_ids: Path | None = None
) -> tuple[tuple[str, ...], dict[str, list[Entry]]]:
    """Class names, and per split every image in the order in which the image folder would list it."""
    require_folder(root)
    train = FolderSource(root / "train")
    sources: dict[str, list[Entry]] = {"train": _entries(root / "train", train)}
    if ground_truth is None:
        sources["val"] = _entries(root / "val", FolderSource(root / "val", train.classes))
        return train.classes, sources
    images = _flat_val(root / "val", ground_truth, class_ids)
    _require_known({name for _, name in images}, train.classes, ground_truth)
    label = {name: i for i, name in enumerate(train.classes)}
    sources["val"] = sorted(
        (Entry(str(path), f"{name}/{path.name}", label[name]) for path, name in images), key=lambda e: e[1:]
    )
    return train.classes, sources


def _entries(root: Path, source: FolderSource) -> list[Entry]:
    paths = map(source.path, range(len(source.labels)))
    return [Entry(p, Path(p).relative_to(root).as_posix(), n) for p, n in zip(paths, source.labels, strict=True)]


# -- One image


def prepare_image(path: str, short_side: int | None, quality: int) -> tuple[bytes, bool]:
    """The bytes to store, and whether they are new: a JPEG with the short side given, else the file as it is.

    Images that are not larger are kept. Raises UnreadableImage for what does not decode whole.
    """
    data = read_file(path)
    image = decode(data, printable(path), notes=(notes := list[str]()))
    if short_side is None or min(image.size) <= short_side:
        return data, False
    scale = short_side / min(image.size)
    width, height = (max(short_side, int(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    more = {}
    if TURNED in notes:  # or DATA.EXIF would have nothing to obey
        more["exif"] = exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation(image)
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality, **more)
    return buffer.getvalue(), True


def _jpeg_name(member: str) -> str:
    """The name under which an image is stored once it has become a JPEG."""
    return member if member.lower().endswith((".jpg", ".jpeg")) else f"{member}.jpg"


# -- One unit of work


@dataclass(frozen=True)
class Unit:
    """Consecutive images that are prepared together: a shard, a part of a zip, or that many files of a folder."""

    output: Path
    format: str
    split: str
    number: int
    first: int  # place of its first image in the split
    entries: list[Entry]
    short_side: int | None
    quality: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    @property
    def manifest(self) -> Path:
        return self.output / STATE / f"{self.name}.json"

    @property
    def archive(self) -> Path:
        """The tar file that holds it: the shard itself, or what a zip is put together from."""
        return (self.output if self.format == "shards" else self.output / STATE) / f"{self.name}.tar"


@dataclass
class Result:
    """What a unit, or a whole split, came to. `digest` is that of the archive, or of all the folder's files."""

    images: int = 0
    resized: int = 0
    bytes_in: int = 0
    bytes: int = 0
    digest: str = ""
    members: list[str] = field(default_factory=list)  # folder only: the files written
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # path and reason


def _written(path: Path, state: Path) -> AbstractContextManager[IO[bytes]]:
    """A new file that appears under `path` once it is complete; until then it is written apart from the output."""
    return written(path, state / "temporary" / f"{os.getpid()}-{path.name}")


def _write_json(path: Path, tree: dict[str, Any], state: Path) -> None:
    with _written(path, state) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())


def _finished(unit: Unit) -> Result | None:
    """The result of a unit that an earlier run finished and whose files are still what it wrote."""
    try:
        result = Result(**json.loads(unit.manifest.read_text(encoding="utf-8")))
        if result.unreadable:  # tried again: the files may have been mended
            return None
        if unit.format == "folder":
            digest = FolderDigest()
            for member in result.members:
                digest.add(member, (unit.output / unit.split / member).read_bytes())
            found = digest.hexdigest()
        else:
            found = file_digest(unit.archive)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return result if found == result.digest else None


def run_unit(unit: Unit) -> Result:
    """Prepare one unit, unless an earlier run did; its manifest is written last."""
    if finished := _finished(unit):
        return finished
    result, state = Result(), unit.output / STATE
    if unit.format == "folder":
        digest = FolderDigest()
        for _, member, data in _prepared(unit, result):
            target = unit.output / unit.split / member
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = state / "temporary" / str(os.getpid())  # the target's name may fill what a name can be
            temporary.write_bytes(data)  # no fsync per image: a restart verifies the digest
            os.replace(temporary, target)
            result.members.append(member)
            digest.add(member, data)
        result.digest = digest.hexdigest()
    else:
        with _written(unit.archive, state) as file, tarfile.open(fileobj=file, mode="w", **TAR) as archive:  # type: ignore[call-overload]
            for place, member, data in _prepared(unit, result):
                if unit.format == "zip":
                    _add_member(archive, member, data)
                    continue
                stem, extension = os.path.splitext(member)
                key = f"{unit.first + place:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', Path(stem).name)[:64]}"
                extension = extension.lower().replace(".jpeg", ".jpg")
                _add_member(archive, key + extension, data)
                _add_member(archive, f"{key}.cls", str(unit.entries[place].label).encode())
        result.digest = file_digest(unit.archive)
    _write_json(unit.manifest, asdict(result), state)
    return result


TAR = {"format": tarfile.GNU_FORMAT, "encoding": "utf-8"}


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and group 0: the bytes depend on names and contents alone
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _prepared(unit: Unit, result: Result) -> Iterator[tuple[int, str, bytes]]:
    """(place in the unit, name to store under, bytes) of every readable image, counted in `result`."""
    for place, entry in enumerate(unit.entries):
        try:
            data, resized = prepare_image(entry.path, unit.short_side, unit.quality)
        except UnreadableImage as error:
            name = printable(entry.path)
            result.unreadable.append((name, str(error).removeprefix(f"{name}: ")))
            continue
        result.images += 1
        result.resized += resized
        result.bytes_in += os.path.getsize(entry.path)
        result.bytes += len(data)
        yield place, _jpeg_name(entry.member) if resized else entry.member, data


# -- The whole data set


@dataclass(frozen=True)
class Options:
    """What the output depends on, beside the input."""

    format: str = "folder"
    short_side: int | None = None
    resize_val: bool = False
    quality: int = 90
    shard_images: int = 1000
    seed: int = 0


def prepare(
    root: Path,
    output: Path,
    options: Options,
    *,
    workers: int = 1,
    skip_unreadable: bool = False,
    ground_truth: Path | None = None,
    class_ids: Path | None = None,
) -> dict[str, Result]:
    """Write `root`'s train/ and val/ to `output`; returns what each split came to.

    Unreadable images are left out where `skip_unreadable` allows it. Else the readable ones are prepared and kept, and
    zip files and the index of shards, which make the data set usable, stay unwritten. Raises DataError.
    """
    classes, splits = list_input(root, ground_truth, class_ids)
    state = output / STATE
    inside = [split for split in SPLITS if output.resolve().is_relative_to((root / split).resolve())]
    if inside or output.resolve() == root.resolve():
        raise DataError(f"the output folder {output} is the input; name another one")
    if output.exists() and not state.exists() and any(output.iterdir()):
        raise DataError(f"the output folder {output} holds other files; name a new one")
    _require_names(splits, options)
    with owned(state):
        require_same_settings(state, _settings(options, splits), {"input": "other input images"})
        shutil.rmtree(state / "temporary", ignore_errors=True)  # what an interrupted run had begun to write
        (state / "temporary").mkdir()
        totals = {
            split: _prepare_split(output, options, split, splits[split], workers, skip_unreadable) for split in SPLITS
        }
        unreadable = [f"{path}\t{reason}\n" for total, _ in totals.values() for path, reason in total.unreadable]
        report = output / REPORT
        if unreadable:
            report.write_text("".join(unreadable), encoding="utf-8")
        else:
            report.unlink(missing_ok=True)
        if options.format == "shards" and (skip_unreadable or not unreadable):
            index = Index(
                classes, {s: [Shard(*entry) for entry in shards if entry[1]] for s, (_, shards) in totals.items()}
            )
            with _written(output / INDEX_FILE, state) as file:
                file.write(index.dump().encode())
        shutil.rmtree(state / "temporary")
    return {split: total for split, (total, _) in totals.items()}


def _require_names(splits: dict[str, list[Entry]], options: Options) -> None:
    """Raise DataError where two images would be stored under one name; in shards they have numbers."""
    for split, entries in splits.items():
        taken: dict[str, str] = {}
        for _, member, _ in entries if options.format != "shards" else ():
            name = _jpeg_name(member) if options.short_side else member
            first = taken.setdefault(printable(name) if options.format == "zip" else name, member)
            if first != member:
                raise DataError(f"{split}/{first} and {split}/{member} would be stored under one name; rename one")


def _settings(options: Options, splits: dict[str, list[Entry]]) -> dict[str, Any]:
    """What an output is made from: the options, and a digest of the input's names and labels."""
    listing = hashlib.sha256()
    for split, entries in splits.items():
        for entry in entries:
            listing.update(f"{split}\t{entry.member}\t{entry.label}\n".encode("utf-8", "surrogateescape"))
    return {**asdict(options), "input": listing.hexdigest()}


def _prepare_split(
    output: Path, options: Options, split: str, entries: list[Entry], workers: int, skip_unreadable: bool
) -> tuple[Result, list[tuple[str, int, int]]]:
    """The split's totals, and (name, images, bytes) of its shards."""
    if options.format == "zip" and (finished := _finished_zip(output, split)):
        _remove_parts(output, split)
        return finished, []
    if options.format == "shards" and split == "train":  # a shard of one class would make batches of one class
        order = np.random.default_rng(options.seed).permutation(len(entries))
        entries = [entries[i] for i in order]
    size = options.shard_images
    short_side = options.short_side if split == "train" or options.resize_val else None
    parts = enumerate(range(0, len(entries), size))
    units = [
        Unit(output, options.format, split, number, first, entries[first : first + size], short_side, options.quality)
        for number, first in parts
    ]
    total, shards = Result(), []
    with tqdm(total=len(entries), desc=split, unit="img", disable=None) as bar:
        for unit, result in zip(units, parallel(run_unit, units, workers), strict=True):
            for name in ("images", "resized", "bytes_in", "bytes"):
                setattr(total, name, getattr(total, name) + getattr(result, name))
            total.unreadable += result.unreadable
            if options.format == "shards":
                shards.append((unit.archive.name, result.images, unit.archive.stat().st_size))
            bar.update(len(unit.entries))
    if options.format == "zip" and (skip_unreadable or not total.unreadable):
        _assemble_zip(output, split, units, total)
    return total, shards


def _finished_zip(output: Path, split: str) -> Result | None:
    """What the zip and map of an earlier run came to, where they are still what it wrote."""
    try:
        record = json.loads((output / STATE / f"{split}.json").read_text(encoding="utf-8"))
        found = [file_digest(output / name) for name in (f"{split}.zip", f"{split}_map.txt")]
        return Result(**record["result"]) if found == record["digests"] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _assemble_zip(output: Path, split: str, units: list[Unit], total: Result) -> None:
    """Put the zip and its map together from the units' archives, in order, and remove these."""
    state, lines = output / STATE, []
    with _written(output / f"{split}.zip", state) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for unit in tqdm(units, desc=f"{split}.zip", disable=None):
            labels = {entry.member.partition("/")[0]: entry.label for entry in unit.entries}
            with tarfile.open(unit.archive, **TAR) as part:  # type: ignore[call-overload]
                for member in part:
                    content = part.extractfile(member)
                    assert content is not None
                    name = printable(member.name)
                    archive.writestr(zipfile.ZipInfo(name), content.read())
                    lines.append(f"{name}\t{labels[member.name.partition('/')[0]]}\n")
                    part.members = []  # or it remembers every member
    with _written(output / f"{split}_map.txt", state) as file:
        file.write("".join(lines).encode())
    digests = [file_digest(output / name) for name in (f"{split}.zip", f"{split}_map.txt")]
    _write_json(state / f"{split}.json", {"digests": digests, "result": asdict(total)}, state)
    _remove_parts(output, split)


def _remove_parts(output: Path, split: str) -> None:
    """Remove what a finished zip was put together from."""
    for path in (output / STATE).glob(f"{split}-*"):
        path.unlink()


# -- Command line


def _parser() -> argparse.ArgumentParser:
    parser = program("python -m tools.prepare_imagenet", __doc__)
    add = parser.add_argument
    add("input", metavar="INPUT", type=file_path, help="folder that holds train/ and val/")
    add("output", metavar="OUTPUT", type=file_path, nargs="?", help="new folder for the prepared data set")
    add("--format", choices=("folder", "zip", "shards"), default="folder")
    add("--short-side", metavar="PIXELS", type=whole(1), help="resize larger training images to this")
    add("--resize-val", action="store_true", help="resize validation images too (accuracy changes)")
    add("--quality", metavar="1-95", type=whole(1, 95), default=90, help="of resized JPEGs (default 90)")
    what = "images per shard, or per part that an interrupted run keeps (default 1000)"
    add("--shard-images", metavar="N", type=whole(1), default=1000, help=what)
    add("--seed", metavar="N", type=whole(0), default=0, help="of the order of training shards")
    add("--workers", metavar="N", type=whole(1), default=cores(), help="processes")
    add("--skip-unreadable", action="store_true", help="leave unreadable images out and exit with 0")
    what = "classes of a flat val/: LOC_val_solution.csv, `name id` lines, or ILSVRC2012_validation_ground_truth.txt"
    add("--val-ground-truth", metavar="FILE", type=file_path, help=what)
    what = "WordNet ids of the ground truth's numbers: meta.mat or text"
    add("--class-ids", metavar="FILE", type=file_path, help=what)
    return parser


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def summary(totals: dict[str, Result]) -> str:
    """A line per split."""
    return "".join(
        f"{split}: {total.images:,} images ({total.resized:,} resized, {total.images - total.resized:,} kept as they"
        f" were), {_size(total.bytes_in)} → {_size(total.bytes)}, {len(total.unreadable):,} unreadable\n"
        for split, total in totals.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.output is None and arguments.val_ground_truth is None:
        parser.error("OUTPUT is required, or --val-ground-truth FILE to place the images of a flat val/")
    if arguments.class_ids and not arguments.val_ground_truth:
        parser.error("--class-ids belongs to --val-ground-truth")
    return answer(lambda: run(arguments), mistakes=(DataError, OSError, WorkerLost))


def run(arguments: argparse.Namespace) -> int:
    """Place the validation images, or prepare the data set; 1 where images are unreadable and none may be."""
    if arguments.output is None:
        moved, placed = place_val(arguments.input, arguments.val_ground_truth, arguments.class_ids)
        say(f"{arguments.input / 'val'}: {moved:,} images moved into class folders, {placed:,} were in place")
        return 0
    totals = prepare(
        arguments.input,
        arguments.output,
        Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__}),
        workers=arguments.workers,
        skip_unreadable=arguments.skip_unreadable,
        ground_truth=arguments.val_ground_truth,
        class_ids=arguments.class_ids,
    )
    print(summary(totals), end="")
    unreadable = [name for total in totals.values() for name, _ in total.unreadable]
    if not unreadable:
        return 0
    say(
        f"{len(unreadable)} unreadable images are listed in {arguments.output / REPORT}: "
        + ", ".join(unreadable[:DETAILS])
        + (" …" if len(unreadable) > DETAILS else "")
    )
    if arguments.skip_unreadable:
        return 0
    print("the data set is not finished: replace them and give the same command again, or add --skip-unreadable")
    return 1


if __name__ == "__main__":
    sys.exit(main())
