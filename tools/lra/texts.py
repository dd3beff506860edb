"""The files of the tasks that are text: ListOps, retrieval (AAN), text (IMDb).

Readers take what `--source` names and return a `Content`. They raise DataError, which names file and line, for what is
absent, damaged, or not what it should be. Retrieval is larger than memory; it is streamed.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.base import DataError, read_file
from data.sources.token_cache import Split
from tools.lra import files, listops
from tools.lra.cache import Content, Sample
from tools.lra.files import find, label_of, new_source, note, shown, table
from tools.prepared_folder import FolderDigest

LONGEST_TEXT = 4000  # bytes of a document that are kept


def _tables(task: str, source: Path, folder: str, pattern: str, names: Iterable[str]) -> dict[str, Path]:
    """The tables of one of the release's folders, whose names `pattern` makes, all beside that of train."""
    first = pattern.format("train")
    found = find(task, source, files.below_release(folder, first), first).parent
    return {name: find(task, found, [file], file) for name in names if (file := pattern.format(name))}


# -- ListOps

LISTOPS_FOLDER = "listops-1000"
LISTOPS_SIZES = {"train": 96_000, "val": 2_000, "test": 2_000}
LISTOPS_HEADER = [b"Source", b"Target"]

# Operators become single bytes that no text holds. Then every byte is a symbol, a space, or unknown.
_STAND_INS = {name.encode(): bytes([0xF0 + i]) for i, name in enumerate(listops.OPERATORS)}
_UNKNOWN, _SPACE = 255, 254
_SYMBOL_OF = bytearray([_UNKNOWN] * 256)
_SYMBOL_OF[ord(" ")] = _SPACE
for _number, _name in enumerate(listops.SYMBOLS):
    _SYMBOL_OF[_STAND_INS.get(_name.encode(), _name.encode())[0]] = _number
_IS_SYMBOL = bytes(symbol < len(listops.SYMBOLS) for symbol in range(256))


def listops_symbols(text: bytes, where: str) -> bytes:
    """The symbols of a Source column; parentheses are dropped. Raises DataError for a word that is no symbol."""
    words = text.translate(None, b"()")
    marked = words
    for name, stand_in in _STAND_INS.items():
        marked = marked.replace(name, stand_in)
    symbols = marked.translate(bytes(_SYMBOL_OF))
    if _UNKNOWN in symbols or b"\1\1" in symbols.translate(_IS_SYMBOL):  # two symbols in one word are none
        known = {name.encode() for name in listops.SYMBOLS}
        strange = next(word for word in words.split() if word not in known)
        raise DataError(f"{where}: {shown(strange)} is no ListOps symbol, expected {' '.join(listops.SYMBOLS)}")
    return symbols.translate(None, bytes([_SPACE]))


def read_listops(path: Path) -> Content:
    """`basic_{train,val,test}.tsv`. Trees must be complete; values are computed anew in val and test."""
    tables, source = _tables("listops", path, LISTOPS_FOLDER, "basic_{}.tsv", LISTOPS_SIZES), new_source("listops-1000")

    def samples(split: str) -> Iterator[Sample]:
        lines = table(tables[split], 2, source)
        header = next(lines, None)
        if header is None or header.columns != LISTOPS_HEADER:
            raise DataError(f"{tables[split]} does not begin with the header Source<TAB>Target")
        for where, (text, target) in lines:
            symbols, label = listops_symbols(text, where), label_of(target, 10, where)
            if split == "train":
                operators = sum(symbols.count(kind) for kind in range(listops.FIRST_OPERATOR, listops.CLOSE))
                if not symbols or symbols.count(listops.CLOSE) != operators:
                    raise DataError(f"{where}: {operators} operators, {symbols.count(listops.CLOSE)} of them closed")
            else:
                try:
                    value = listops.evaluate(symbols)
                except ValueError as error:
                    raise DataError(f"{where}: {error}") from error
                if value != label:
                    raise DataError(f"{where}: Target is {label}, and the value of Source {value}")
            yield Sample(label, (symbols,))

    return Content(
        task="listops",
        title="ListOps",
        classes=tuple(map(str, range(10))),
        splits={split: samples(split) for split in LISTOPS_SIZES},
        source=source,
        sizes=LISTOPS_SIZES,
        published=LISTOPS_SIZES,
        baselines=listops_baselines,
    )


def listops_baselines(splits: Mapping[str, Split]) -> dict[str, dict[str, float]]:
    """Reference accuracies on val and test; constants are fitted on train."""
    train = splits["train"]
    constants = listops.Constants.fit(train.tokens[train.offsets[:-1]], train.labels)
    return {
        name: listops.baselines([split.document(i) for i in range(len(split.labels))], split.labels, constants)
        for name, split in splits.items()
        if name != "train"
    }


# -- Retrieval

RETRIEVAL_FILES = {"train": "train", "val": "eval", "test": "test"}
RETRIEVAL_SIZES = {"train": 147_086, "val": 18_090, "test": 17_437}


def read_retrieval(path: Path) -> Content:
    """`new_aan_pairs.{train,eval,test}.tsv`: label, two ids, two texts; no header, no quoting."""
    tables = _tables("retrieval", path, "tsv_data", "new_aan_pairs.{}.tsv", RETRIEVAL_FILES.values())
    source = new_source("tsv_data")

    def samples(split: str) -> Iterator[Sample]:
        for where, (label, _, _, one, two) in table(tables[RETRIEVAL_FILES[split]], 5, source):
            yield Sample(label_of(label, 2, where), (one[:LONGEST_TEXT], two[:LONGEST_TEXT]))

    return Content(
        task="retrieval",
        title="AAN retrieval",
        classes=("no citation", "citation"),
        splits={split: samples(split) for split in RETRIEVAL_FILES},
        source=source,
        sizes=RETRIEVAL_SIZES,
        published=RETRIEVAL_SIZES,
    )


# -- Text

IMDB_ARCHIVE, IMDB_FOLDER = "aclImdb_v1.tar.gz", "aclImdb"
IMDB_SIZES = {"train": 25_000, "test": 25_000}
IMDB_CLASSES = ("neg", "pos")
_REVIEW = re.compile(r"(train|test)/(neg|pos)/(\d+)_\d+\.txt$")


def read_text(path: Path, seed: int) -> Content:
    """The reviews of aclImdb, from its archive or its folder; train in an order that `seed` draws."""
    candidates = [IMDB_ARCHIVE, f"{IMDB_FOLDER}/train", "train"]
    if path.is_file():
        candidates = [""]
    found = find("text", path, candidates, f"{IMDB_ARCHIVE} or {IMDB_FOLDER}")
    source = new_source("aclImdb")
    reviews: dict[str, list[tuple[int, int, bytes]]] = {"train": [], "test": []}  # of each split: label, id, text
    for name, text in _imdb_archive(found, source) if found.is_file() else _imdb_folder(found.parent, source):
        if match := _REVIEW.search(name):
            split, label, number = match.groups()
            reviews[split].append((IMDB_CLASSES.index(label), int(number), text[:LONGEST_TEXT]))
    for split, entries in reviews.items():
        for label, name in enumerate(IMDB_CLASSES):
            if not any(entry[0] == label for entry in entries):
                raise DataError(f"{found} holds no reviews in {split}/{name}: {files.ADVICE['text']}")
        entries.sort()
    order = np.random.default_rng(seed).permutation(len(reviews["train"])).tolist()
    train = [reviews["train"][i] for i in order]
    return Content(
        task="text",
        title="IMDb reviews",
        classes=("negative", "positive"),
        splits={
            split: [Sample(label, (text,)) for label, _, text in entries]
            for split, entries in (("train", train), ("test", reviews["test"]))
        },
        source=source,
        published=IMDB_SIZES,
        held_out_share=0.1,
    )


def _imdb_archive(path: Path, source: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    files.require_md5(path, IMDB_ARCHIVE)
    yield from files.archive_members(path)
    note(source, path.name, files.record_of(path))


def _imdb_folder(root: Path, source: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for split in IMDB_SIZES:
        for label in IMDB_CLASSES:
            folder, digest = root / split / label, FolderDigest()
            for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
                if name.endswith(".txt"):
                    data = read_file(folder / name)
                    digest.add(name, data)
                    yield f"{split}/{label}/{name}", data
            note(source, f"{split}/{label}", files.record_of_all(digest))
