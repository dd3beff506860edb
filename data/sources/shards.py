"""Tar shards: `shards.json` lists them with their counts; training streams them, evaluation reads every image once.

A split is one long sequence of images, its shards one after the other: in the index's order for evaluation, in an order
drawn from (seed, epoch) for training. Every process owns a range of that sequence and every loader process ("stream") a
range of its process's, so that all processes have the same number of batches however many shards there are; a shard
that two ranges share is read by both, each taking its part. Training draws from a shuffle buffer of encoded images.
"""

import functools
import itertools
import json
import random
import re
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.datasets import Sample, SampleRandomness, too_many_unreadable
from data.findings import Layout, Report, Task
from data.samplers import Draw
from data.sources.base import LARGEST_FILE, DataError, Decoder, Picture, UnreadableImage, decode, label_of
from data.sources.listing import is_image, is_litter
from logger import printable

INDEX_FILE = "shards.json"
INDEX_VERSION = 1
META = re.compile(r"__[^/]*__($|/)")  # files of WebDataset's own
MEND = "python main.py … --check-data examines every shard, tools.prepare_imagenet writes them anew"


class Shard(NamedTuple):
    """One tar file: its name in the data set's folder, how many images it holds, its size in bytes."""

    name: str
    images: int
    bytes: int


class Index(NamedTuple):
    """The contents of `shards.json`: class names by label, and the shards of each split in order."""

    classes: tuple[str, ...]
    splits: dict[str, list[Shard]]

    def dump(self) -> str:
        splits = {
            split: {"images": sum(shard.images for shard in shards), "shards": [shard._asdict() for shard in shards]}
            for split, shards in self.splits.items()
        }
        return json.dumps({"version": INDEX_VERSION, "splits": splits, "classes": self.classes}, indent=1) + "\n"


def read_index(root: Path) -> Index:
    """Read `root`/shards.json. Raises DataError where it is absent, damaged, or of another version."""
    path = root / INDEX_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist; tools.prepare_imagenet --format shards writes it")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        if tree["version"] != INDEX_VERSION:
            raise DataError(f"{path} is of version {printable(tree['version'])[:80]}, expected {INDEX_VERSION}")
        splits = {
            split: [Shard(str(s["name"]), s["images"], s["bytes"]) for s in entry["shards"]]
            for split, entry in tree["splits"].items()
        }
        for split, shards in splits.items():
            for shard in shards:
                whole = type(shard.images) is int and type(shard.bytes) is int and shard.images > 0
                if not whole or printable(shard.name) != shard.name:
                    raise DataError(
                        f"{path}: {printable(shard.name)} has {shard.images} images in {shard.bytes} bytes, expected"
                        f" a printable name, whole numbers, and at least one image; {MEND}"
                    )
            if sum(shard.images for shard in shards) != tree["splits"][split]["images"]:
                raise DataError(f"{path}: the counts of the {split} shards do not add up to its total")
        classes = tree["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{path}: classes is no list of names; {MEND}")
        if len(set(classes)) < len(classes):
            raise DataError(f"{path} names a class more than once; {MEND}")
        return Index(tuple(map(printable, classes)), splits)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no index of shards ({error!r}); tools.prepare_imagenet writes one") from error


def file_problem(root: Path, shard: Shard) -> str | None:
    """What is wrong with the file of `shard` as far as its size tells."""
    path = root / shard.name
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    if not path.is_file():
        return f"{path} is no regular file"
    if size != shard.bytes:
        return f"{path} has {size} bytes, {INDEX_FILE} says {shard.bytes}"
    return None


def _shuffle() -> Callable[..., Any]:
    """WebDataset's shuffle buffer."""
    try:
        from webdataset.filters import shuffle  # slow to import, and only shards need it
    except ModuleNotFoundError:
        raise DataError("tar shards are read by the package webdataset: pip install webdataset") from None
    return shuffle


class Encoded(NamedTuple):
    """An image as it lies in its shard. `position` is its place in the split, shards in the index's order."""

    position: int
    name: str
    data: bytes
    label: int


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample of a shard, as WebDataset has them: neighbouring files of one name, by extension.

    Raises OSError or TarError where the shard is damaged.
    """
    try:
        yield from _samples(path)
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # that of a compression, or of a header's numbers
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, members = "", dict[str, bytes]()
    with path.open("rb", buffering=1 << 20) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # or it remembers every member
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            meta = META.match(member.name) is not None
            if not (member.isreg() and stem and dot) or meta or is_litter(member.name):
                continue
            if folder + slash + stem != key and members:
                yield key, members
                members = {}
            key, extension = folder + slash + stem, extension.lower()
            if extension in members:
                raise tarfile.ReadError(f"it has two files {printable(member.name)} one after the other")
            if sum(map(len, members.values())) + member.size > LARGEST_FILE:
                raise tarfile.ReadError(f"{printable(key)} has more than {LARGEST_FILE:,} bytes")
            content = archive.extractfile(member)
            assert content is not None, "regular files have content"
            members[extension] = content.read()
    if members:
        yield key, members


def image_member(members: Iterable[str]) -> str | None:
    """The extension under which a sample holds its image."""
    return next((extension for extension in members if is_image(f".{extension}")), None)


class ShardSplit:
    """The shards of one split. What is kept is one entry a shard, nothing per image.

    Raises DataError where the index or a shard is absent, a shard has another size than the index says, the split is
    empty, or webdataset is not installed.
    """

    def __init__(self, root: Path, split: str, decoder: Decoder = decode) -> None:
        index = read_index(root)
        self.decoder = decoder
        self.root, self.classes, self.num_classes = root, index.classes, len(index.classes)
        self.shards = index.splits.get(split, [])
        if not self.shards:
            raise DataError(f"{root / INDEX_FILE} lists no images of the split {split}")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise DataError(f"{root / INDEX_FILE} lists a shard of {split} more than once; {MEND}")
        problems = [problem for shard in self.shards if (problem := file_problem(root, shard))]
        if problems:
            raise DataError(f"{len(problems)} of {len(self.shards)} {split} shards are damaged: {problems[0]}; {MEND}")
        self.num_images = sum(shard.images for shard in self.shards)
        self._first = list(itertools.accumulate((shard.images for shard in self.shards), initial=0))
        _shuffle()

    def read(self, order: Sequence[int], begin: int, end: int) -> Iterator[Encoded]:
        """The images `begin` to `end` of the sequence that the shards make in `order`; other shards stay closed."""
        first = 0  # of this shard, in the sequence
        for number in order:
            images = self.shards[number].images
            if first < end and first + images > begin:
                yield from self._read_shard(number, max(begin - first, 0), min(end - first, images))
            first += images

    def _read_shard(self, number: int, begin: int, end: int) -> Iterator[Encoded]:
        """Raises DataError where the shard is not what the index says: other images, no label, an unreadable tar."""
        shard, count = self.shards[number], 0
        path = self.root / shard.name
        try:
            samples = read_samples(path)
            for key, members in itertools.islice(samples, end):
                count += 1
                if count == shard.images and next(samples, None):
                    raise DataError(f"{path} holds more than the {shard.images} images of {INDEX_FILE}; {MEND}")
                if count > begin:
                    yield self._encoded(number, count - 1, printable(key), members)
        except (OSError, tarfile.TarError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
            raise DataError(f"{path}: {reason} after {count} of {shard.images} images; {MEND}") from error
        if count < end:
            raise DataError(f"{path} holds {count} images, {INDEX_FILE} says {shard.images}; {MEND}")

    def _encoded(self, number: int, place: int, key: str, members: dict[str, bytes]) -> Encoded:
        path = self.root / self.shards[number].name
        extension, written = image_member(members), members.get("cls", b"")
        label = label_of(written)
        if extension is None or label is None or label >= self.num_classes:
            raise DataError(
                f"{path}: sample {key} has the members {sorted(members)} and the label {written.strip()[:20]!r},"
                f" expected an image and a cls member from 0 to {self.num_classes - 1}; {MEND}"
            )
        name = f"{printable(path)}/{key}.{extension}"
        return Encoded(self._first[number] + place, name, members[extension], label)


# -- Ranges and the shuffle buffer


def stream_sizes(images: int, batch_size: int, streams: int) -> list[int]:
    """How many of a process's images each of its streams holds when batch b comes from stream b % `streams`.

    That is the order in which a DataLoader takes batches from its workers. Only the last batch may be smaller.
    """
    batches = -(-images // batch_size)
    sizes = [len(range(stream, batches, streams)) * batch_size for stream in range(streams)]
    if batches:
        sizes[(batches - 1) % streams] -= batches * batch_size - images
    return sizes


class _Slot:
    """A place in the shuffle buffer for the image at `position` of the sequence."""

    __slots__ = ("encoded", "position")

    def __init__(self, position: int, encoded: Encoded | None = None) -> None:
        self.position, self.encoded = position, encoded


def shuffled(
    read: Callable[[int, int], Iterator[Encoded]],
    begin: int,
    end: int,
    *,
    buffer: int,
    generator: random.Random,
    skip: int = 0,
) -> Iterator[Encoded]:
    """The images `begin` to `end` through WebDataset's shuffle buffer, without the first `skip` that it would yield.

    What the buffer draws depends on counts and `generator` alone. So the skipped draws are made with empty places, and
    reading begins with the earliest image that is still in the buffer then: `read(first, end)` is asked for nothing
    before it. The first draw needs a quarter of the buffer, which grows to its size from there.
    """
    empty: dict[int, _Slot] = {}  # in the buffer, with nothing read yet
    images: Iterator[Encoded] | None = None
    fed = begin

    def feed() -> Iterator[_Slot]:
        nonlocal fed
        while fed < end:
            if images is None:
                slot = empty[fed] = _Slot(fed)
            else:
                slot = _Slot(fed, next(images))
            fed += 1
            yield slot

    draws = _shuffle()(buffer, initial=buffer // 4, rng=generator)(feed())
    for _ in range(skip):
        del empty[next(draws).position]
    first = min(empty, default=fed)
    images = read(first, end)
    for position in range(first, fed):
        encoded = next(images)
        if slot := empty.pop(position, None):
            slot.encoded = encoded
    for slot in draws:
        yield slot.encoded


# -- Data sets


class ShardDataset(IterableDataset[Sample]):
    """A process's range of a split, all of it shared out. `len()` is the number of its images, over all its streams."""

    def __init__(
        self,
        split: ShardSplit,
        transform: Callable[[Picture], torch.Tensor],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.split, self.transform, self.batch_size, self.rank = split, transform, batch_size, rank
        self.begin, self.end = (part * split.num_images // world_size for part in (rank, rank + 1))

    def __len__(self) -> int:
        return self.end - self.begin

    def _range(self, images: int, stream: int, streams: int) -> tuple[int, int]:
        """Begin and end of a stream's part of the first `images` of this process."""
        sizes = stream_sizes(images, self.batch_size, streams)
        begin = self.begin + sum(sizes[:stream])
        return begin, begin + sizes[stream]


def _this_stream() -> tuple[int, int]:
    """Index of this loader process, and how many there are; a main process that loads itself is the only one."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


class ShardEvalDataset(ShardDataset):
    """Every image exactly once over all processes; an unreadable one raises."""

    def __iter__(self) -> Iterator[Sample]:
        begin, end = self._range(len(self), *_this_stream())
        for encoded in self.split.read(range(len(self.split.shards)), begin, end):
            image = self.transform(self.split.decoder(encoded.data, encoded.name))
            yield Sample(image, encoded.label, position=encoded.position, name=encoded.name)


class ShardTrainDataset(ShardDataset):
    """Augmented images of one epoch, streamed. A sample's randomness is a function of (seed, epoch, its index).

    Shard order: a function of (seed, epoch). The buffer's draws: of (seed, epoch, rank, stream). So an epoch continued
    at any batch equals the unbroken one for the same number of processes and loader processes; none and one loader
    process are the same. An unreadable image is replaced by the next of its stream (after the last, by the next of the
    sequence) and reported in `Sample.unreadable`; more than `max_unreadable` in a row raise.

    The images that `world_size` does not divide, and those of a process's last incomplete batch, are left out of that
    epoch: those at the ends of the ranges, other ones in each.
    """

    def __init__(
        self,
        split: ShardSplit,
        transform: Callable[[Picture], torch.Tensor],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        buffer: int,
        max_unreadable: int,
    ) -> None:
        super().__init__(split, transform, batch_size=batch_size, rank=rank, world_size=world_size)
        share = split.num_images // world_size
        self.begin, self.end = rank * share, (rank + 1) * share
        self.seed, self.buffer, self.max_unreadable = seed, buffer, max_unreadable
        # epoch and first sample, in memory that loader processes which outlive an epoch see too
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Iterate over `epoch`, from this process's sample `start` on, a multiple of the batch size."""
        self._position.copy_(torch.tensor([epoch, start]))

    def __iter__(self) -> Iterator[Sample]:
        epoch, start = self._position.tolist()
        worker, streams = _this_stream()
        first = start // self.batch_size
        # a DataLoader's first batch always comes from its worker 0, so on continuing the workers change streams
        stream = (worker + first) % streams
        skip = len(range(stream, first, streams)) * self.batch_size
        begin, end = self._range(len(self) // self.batch_size * self.batch_size, stream, streams)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split.shards)).tolist()
        words = np.random.SeedSequence((self.seed, epoch, self.rank, stream)).generate_state(4)
        read, generator = functools.partial(self.split.read, order), random.Random(words.tobytes())
        drawn = shuffled(read, begin, end, buffer=self.buffer, generator=generator, skip=skip)
        substitutes = itertools.chain(read(end, self.split.num_images), read(0, end))
        return self._samples(epoch, end - begin - skip, itertools.chain(drawn, substitutes))

    def _samples(self, epoch: int, count: int, images: Iterator[Encoded]) -> Iterator[Sample]:
        ahead: deque[Encoded] = deque()  # drawn and not yet yielded: more than one only beside unreadable images
        for _ in range(count):
            unreadable: list[str] = []
            while True:
                if len(unreadable) == len(ahead):
                    ahead.append(next(images))
                encoded = ahead[len(unreadable)]
                try:
                    image = self.split.decoder(encoded.data, encoded.name)
                    break
                except UnreadableImage as error:
                    unreadable.append(str(error))
                    if len(unreadable) > self.max_unreadable:
                        size = self.split.num_images
                        raise too_many_unreadable(len(unreadable), size, self.max_unreadable, unreadable) from error
            with SampleRandomness(self.seed, Draw(epoch, ahead[0].position)):
                sample = Sample(self.transform(image), encoded.label, tuple(unreadable))
            ahead.popleft()
            yield sample


def check_shards(root: Path, split: str, index: Index, report: Report) -> Layout | None:
    """The shards of one split against the index."""
    shards = index.splits.get(split, [])
    if not shards:
        report.error(f"{root / INDEX_FILE} lists no {split} shards")
        return None
    if problems := [problem for shard in shards if (problem := file_problem(root, shard))]:
        report.error(f"{len(problems)} of {len(shards)} {split} shards are missing or of another size", problems)
    if unlisted := sorted({path.name for path in root.glob(f"{split}-*.tar")} - {shard.name for shard in shards}):
        report.warn(f"{len(unlisted)} {split} shards are not in {INDEX_FILE} and are not used", unlisted)
    if twice := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
        report.error(f"{INDEX_FILE} lists {len(twice)} {split} shards more than once", twice)
    present = (shard for shard in shards if (root / shard.name).is_file())
    return Layout(index.classes, [Task(split, root / shard.name, images=shard.images) for shard in present])
