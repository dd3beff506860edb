"""Writing a token cache: samples are streamed to the arrays of data/sources/token_cache.py, the manifest comes last."""

import io
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.sources.base import DataError
from data.sources.token_cache import ARRAYS, CODECS, MANIFEST, TASKS, Manifest, Split, SplitRecord, array_name
from tools.lra.files import record_of
from utils.files import write_atomically


class Sample(NamedTuple):
    """A label, and the raw symbols of each document."""

    label: int
    documents: tuple[Any, ...]  # of bytes or uint8 (length,)


@dataclass
class Content:
    """What goes into a cache. Splits are read once, in their order, and only then is `source` complete.

    `sizes` are for the progress bar. `published` are the sizes that the data set is known to have: where there are
    others, the title says that it is incomplete. `held_out_share` of train, at its end, serves as validation.
    `baselines` computes the manifest's from the written arrays.
    """

    task: str
    title: str
    classes: tuple[str, ...]
    splits: dict[str, Iterable[Sample]]
    source: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    published: dict[str, int] = field(default_factory=dict)
    held_out_share: float = 0.0
    baselines: Callable[[Mapping[str, Split]], dict[str, dict[str, float]]] | None = None


def write_arrays(state: Path, content: Content, seed: int) -> Manifest:
    """Write the arrays into `state`; returns what they come to.

    Raises DataError where a split has no samples, and what reading the source raises.
    """
    codec, documents = TASKS[content.task]
    records, longest = {}, 0
    for split, samples in content.splits.items():
        bar = tqdm(samples, desc=split, total=content.sizes.get(split), unit=" samples", disable=None)
        count, longest_here = _write_split(state, split, bar, documents)
        if not count:
            raise DataError(f"the source of {content.title} holds no samples for {split}")
        longest = max(longest, longest_here)
        names = [array_name(split, name) for name in ARRAYS]
        records[split] = SplitRecord(count, {name: record_of(state / name) for name in names})
    baselines = content.baselines({split: _mapped(state, split) for split in records}) if content.baselines else {}
    title = content.title
    sizes = [(split, records[split].samples, published) for split, published in content.published.items()]
    if missing := "; ".join(f"{split} has {n:,} of {size:,} samples" for split, n, size in sizes if n != size):
        title += f", incomplete: {missing}"
        print(f"warning: {title}", file=sys.stderr)
    return Manifest(
        task=content.task,
        title=title,
        codec=codec,
        symbols=CODECS[codec],
        documents=documents,
        classes=content.classes,
        longest=longest,
        seed=seed,
        held_out=int(records["train"].samples * content.held_out_share),
        source=content.source,
        splits=records,
        baselines=baselines,
    )


def publish(out: Path, state: Path, manifest: Manifest) -> None:
    """Move the arrays from `state` to `out`, then write the manifest, which makes them a cache."""
    for record in manifest.splits.values():
        for name in record.files:
            os.replace(state / name, out / name)
    write_atomically(out / MANIFEST, manifest.dump().encode())


def _mapped(folder: Path, split: str) -> Split:
    return Split(**{name: np.load(folder / array_name(split, name), mmap_mode="r") for name in ARRAYS})


def _write_split(folder: Path, split: str, samples: Iterable[Sample], documents: int) -> tuple[int, int]:
    """The number of samples, and the length of the longest document."""
    offsets, labels, longest = array("q", [0]), array("B"), 0
    with _array_file(folder / array_name(split, "tokens"), ARRAYS["tokens"]) as tokens:
        for sample in samples:
            assert len(sample.documents) == documents, f"{len(sample.documents)} documents, expected {documents}"
            labels.append(sample.label)
            for document in sample.documents:
                tokens.write(document)
                longest = max(longest, len(document))
                offsets.append(offsets[-1] + len(document))
    for name, values in (("offsets", offsets), ("labels", labels)):
        with _array_file(folder / array_name(split, name), ARRAYS[name]) as file:
            file.write(values)
    return len(labels), longest


@contextmanager
def _array_file(path: Path, dtype: np.dtype) -> Iterator[IO[bytes]]:
    """A new .npy file with one axis that is as long as what is written into it."""
    with path.open("wb") as file:
        start = file.write(_header(dtype, 0))
        yield file
        length = (file.tell() - start) // dtype.itemsize
        file.seek(0)
        header = _header(dtype, length)
        assert len(header) == start, "the header of an array has grown over its contents"
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def _header(dtype: np.dtype, length: int) -> bytes:
    """NumPy leaves room in it for any length of one axis."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
