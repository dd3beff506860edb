"""The token cache of Long Range Arena: documents as raw symbols in memory-mapped arrays, described by a manifest.

    manifest.json         written last: without it there is no cache
    SPLIT.tokens.npy      uint8 (symbols of all documents,): one document after the other
    SPLIT.offsets.npy     int64 (documents + 1,): document i is tokens[offsets[i]:offsets[i + 1]]
    SPLIT.labels.npy      uint8 (samples,)

`tools/prepare_lra.py` writes it, `open_cache` reads it. Raw symbols are 0 to 14 for ListOps, bytes for text, grey
levels for images; as what a model sees them is not decided here. docs/lra_data.md describes tasks and sources.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.sources.base import DataError
from utils.files import file_digest

MANIFEST = "manifest.json"
FORMAT = 1
CLOSING_BRACKET = 14  # the symbol `]` of listops-1
CODECS = {"listops-1": 15, "bytes-1": 256, "grey-1": 256}  # how many symbols each has
TASKS = {  # the codec of each task, and the documents of one sample
    "listops": ("listops-1", 1),
    "text": ("bytes-1", 1),
    "retrieval": ("bytes-1", 2),
    "pathfinder": ("grey-1", 1),
    "image": ("grey-1", 1),
}
ARRAYS: dict[str, np.dtype] = {  # the arrays of a split
    "tokens": np.dtype(np.uint8),
    "offsets": np.dtype(np.int64),
    "labels": np.dtype(np.uint8),
}
ANEW = "delete it and prepare it again with tools/prepare_lra.py"


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256, in hexadecimal, of a file."""

    bytes: int
    sha256: str


class SplitRecord(NamedTuple):
    """How many samples a split has, and its files by name."""

    samples: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Manifest:
    """What a cache holds; `manifest.json` is this and the format's number.

    `title` is what reports print. `longest` counts the symbols of the longest document. `held_out` is how many samples
    at the end of train serve as validation where a task has no split of its own for that (text), else 0. `source` says
    what the cache was made from: files with their digests, or a generator's parameters. `baselines` are accuracies of
    reference answers by split and name (ListOps), else empty.
    """

    task: str
    title: str
    codec: str
    symbols: int
    documents: int
    classes: tuple[str, ...]
    longest: int
    seed: int
    held_out: int
    source: Mapping[str, Any]
    splits: Mapping[str, SplitRecord]
    baselines: Mapping[str, Mapping[str, float]]

    def dump(self) -> str:
        tree = {"format": FORMAT, **self.__dict__}
        tree["splits"] = {
            split: {"samples": record.samples, "files": {n: f._asdict() for n, f in record.files.items()}}
            for split, record in self.splits.items()
        }
        return json.dumps(tree, indent=1) + "\n"


def read_manifest(root: Path) -> Manifest:
    """Read `root`/manifest.json. Raises DataError where it is absent, damaged, or of another format or codec."""
    path = root / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        problem = "is not finished" if root.is_dir() and any(root.iterdir()) else "holds no token cache"
        raise DataError(f"{root} {problem} ({MANIFEST} is missing); tools/prepare_lra.py makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} is of format {found}, expected {FORMAT}; {ANEW}")
    try:
        splits = {
            split: SplitRecord(
                int(record["samples"]),
                {name: FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in record["files"].items()},
            )
            for split, record in tree["splits"].items()
        }
        manifest = Manifest(
            **{
                **{name: value for name, value in tree.items() if name != "format"},
                "classes": tuple(tree["classes"]),
                "splits": splits,
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no manifest of a token cache: {type(error).__name__} {error}") from error
    if manifest.task not in TASKS:
        raise DataError(f"{path} is of the task {manifest.task!r}, expected one of {', '.join(TASKS)}")
    expected = (codec := TASKS[manifest.task][0], CODECS[codec], TASKS[manifest.task][1])
    if (manifest.codec, manifest.symbols, manifest.documents) != expected:
        raise DataError(
            f"{path}: task {manifest.task} with codec {manifest.codec}, {manifest.symbols} symbols and"
            f" {manifest.documents} documents a sample, expected {', '.join(map(str, expected))}; {ANEW}"
        )
    return manifest


class Split(NamedTuple):
    """The arrays of one split, mapped from their files."""

    tokens: np.ndarray  # uint8 (symbols of all documents,)
    offsets: np.ndarray  # int64 (documents + 1,)
    labels: np.ndarray  # uint8 (samples,)

    def document(self, index: int) -> np.ndarray:
        """The raw symbols of a document, uint8 (length,): a view of the mapped file."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class TokenCache(NamedTuple):
    """A complete cache: its folder, what it holds, its splits by name."""

    path: Path
    manifest: Manifest
    splits: dict[str, Split]

    def verify(self) -> None:
        """Read every file once; raises DataError where one does not have the SHA-256 that the manifest records."""
        for record in self.manifest.splits.values():
            for name, file in record.files.items():
                if (found := file_digest(self.path / name)) != file.sha256:
                    raise DataError(f"{self.path / name} is damaged: SHA-256 {found}, expected {file.sha256}; {ANEW}")


def array_name(split: str, array: str) -> str:
    return f"{split}.{array}.npy"


def open_cache(root: str | Path) -> TokenCache:
    """Map the arrays of the cache in `root`.

    Raises DataError unless the manifest is there, of this format and a known codec, every file is of the size that it
    records, arrays and manifest agree, and every token is a symbol of the codec. Other damage to the contents is found
    by `TokenCache.verify`.
    """
    root = Path(root)
    manifest = read_manifest(root)
    return TokenCache(root, manifest, {split: _open_split(root, manifest, split) for split in manifest.splits})


def _open_split(root: Path, manifest: Manifest, split: str) -> Split:
    record = manifest.splits[split]
    arrays = {}
    for array, dtype in ARRAYS.items():
        path = root / (name := array_name(split, array))
        if name not in record.files:
            raise DataError(f"{root / MANIFEST} does not record {name}; {ANEW}")
        size = path.stat().st_size if path.is_file() else 0
        if size != record.files[name].bytes:
            raise DataError(f"{path} has {size:,} bytes, expected {record.files[name].bytes:,}; {ANEW}")
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; {ANEW}") from error
        if loaded.dtype != dtype or loaded.ndim != 1:
            raise DataError(f"{path} holds {loaded.dtype} with {loaded.ndim} axes, expected {dtype} with 1; {ANEW}")
        arrays[array] = loaded
    mapped = Split(**arrays)
    lengths = np.diff(mapped.offsets)
    consistent = (
        len(mapped.labels) == record.samples
        and len(lengths) == record.samples * manifest.documents
        and mapped.offsets[0] == 0
        and mapped.offsets[-1] == len(mapped.tokens)
        and lengths.min(initial=0) >= 0
        and lengths.max(initial=0) <= manifest.longest
        and mapped.labels.max(initial=0) < len(manifest.classes)
    )
    if not consistent:
        raise DataError(f"{root}: the files of {split} do not fit each other or {MANIFEST}; {ANEW}")
    if manifest.symbols < 256 and mapped.tokens.max(initial=0) >= manifest.symbols:
        position = int(mapped.tokens.argmax())
        raise DataError(
            f"{root / array_name(split, 'tokens')} holds {mapped.tokens[position]} at position {position:,}, expected"
            f" symbols from 0 to {manifest.symbols - 1}; {ANEW}"
        )
    return mapped
