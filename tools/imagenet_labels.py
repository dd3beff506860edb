"""The classes of ImageNet's flat validation folder, from any of the files in which they are published."""

import re
from collections.abc import Sequence
from pathlib import Path

from data.sources.base import DataError

NUMBERED = re.compile(r"_(\d+)\.\w+$")  # ILSVRC2012_val_00000293.JPEG


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_class_ids(path: Path) -> dict[int, str]:
    """WordNet id by number, from the devkit's meta.mat, lines `number id …`, or lines `id …` that count from 1.

    Raises DataError for another layout, and for a sorted list of ImageNet's 1,000 ids without numbers: the devkit does
    not number them in that order, so the labels would be wrong without anything failing.
    """
    if path.suffix == ".mat":
        from scipy.io import loadmat  # comes with scikit-learn

        try:
            rows = loadmat(path, squeeze_me=True)["synsets"]
            return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        except Exception as error:  # a damaged file may fail in any way
            raise DataError(f"{path} is not the devkit's meta.mat: {error}") from error
    lines = _lines(path)
    numbered = [re.match(r"(\d{1,9})[\s,]+(\S+)", line) for line in lines]
    if all(numbered):
        return {int(match[1]): match[2] for match in numbered if match}
    if any(numbered):
        raise DataError(f"{path}: some lines begin with a number and others do not")
    names = [line.split()[0] for line in lines]
    if len(names) >= 1000 and names == sorted(names):
        raise DataError(
            f"{path} lists {len(names)} ids in alphabetical order without numbers; the devkit numbers its classes in"
            " another order. Use its meta.mat, or write `number id` on every line"
        )
    return dict(enumerate(names, start=1))


def read_ground_truth(path: Path, names: Sequence[str], class_ids: Path | None) -> dict[str, str]:
    """The class of every validation image in `names` (file names without folder).

    Accepts Kaggle's LOC_val_solution.csv (`name,id box …`), lines `name id`, and the devkit's
    ILSVRC2012_validation_ground_truth.txt: one number per image in the order of their names, which `class_ids` turns
    into WordNet ids. Raises DataError where it does not fit the images.
    """
    lines = _lines(path)
    if all(re.fullmatch(r"\d{1,9}", line) for line in lines):
        return _from_numbers(path, [int(line) for line in lines], sorted(names), class_ids)
    table: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = re.split(r"[\s,]+", line)
        if words[0] == "ImageId":
            continue
        if len(words) < 2 or words[1].isdecimal():
            raise DataError(f"{path} line {number}: expected `name id` or `name,id box …`, received {line[:80]!r}")
        table[Path(words[0]).stem] = words[1]
    lacking = [name for name in names if Path(name).stem not in table]
    if lacking:
        raise DataError(f"{path} does not name {len(lacking)} of {len(names)} images, for example {lacking[0]}")
    return {name: table[Path(name).stem] for name in names}


def _from_numbers(path: Path, numbers: list[int], names: list[str], class_ids: Path | None) -> dict[str, str]:
    if class_ids is None:
        raise DataError(
            f"{path} holds class numbers; --class-ids names the file that turns them into WordNet ids: the devkit's"
            " meta.mat, or a text file with `number id` lines"
        )
    if len(numbers) != len(names):
        raise DataError(f"{path} has {len(numbers)} lines, and val/ holds {len(names)} images; every one is needed")
    for place, name in enumerate(names, start=1):
        if (match := NUMBERED.search(name)) and int(match[1]) != place:
            raise DataError(f"the image in place {place} of val/ is {name}: line {place} of {path} is not its own")
    ids = read_class_ids(class_ids)
    if unknown := sorted(set(numbers) - set(ids)):
        raise DataError(f"{class_ids} has no id for class number {unknown[0]} of {path}")
    return {name: ids[number] for name, number in zip(names, numbers, strict=True)}
