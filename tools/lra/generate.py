"""Generated data in the files of Long Range Arena's release. What is begun continues; all files are the same however
many processes work, and however often they were interrupted.

ListOps: chunks of samples are kept in the state folder; the tables appear once all are complete, and are written again
where one has lost lines. Pathfinder: a batch's images are written in place, and its metadata file once they all are; a
batch of which something is missing or damaged is drawn again.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.sources.base import DataError
from tools.lra import listops, pathfinder
from tools.lra.pictures import PATHFINDER_FOLDER
from tools.lra.texts import LISTOPS_FOLDER, LISTOPS_HEADER
from utils.files import write_atomically
from utils.parallel import parallel

# -- ListOps

FRUITLESS = 40  # chunks without a new tree, after which there are held to be no more


def generate_listops(
    out: Path, state: Path, parameters: listops.Parameters, samples: dict[str, int], seed: int, workers: int
) -> Path:
    """Write the table of each split, with that many samples, below `out`; returns their folder.

    No tree comes twice, in one split or two. Raises DataError where the parameters allow fewer trees.
    """
    folder, chunks = out / LISTOPS_FOLDER, state / "chunks"
    tables = {folder / f"basic_{split}.tsv": count for split, count in samples.items()}
    if all(path.exists() and _lines(path) == 1 + count for path, count in tables.items()):
        return folder
    chunks.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    header = b"\t".join(LISTOPS_HEADER) + b"\n"
    trees = _distinct_trees(chunks, parameters, sum(samples.values()), seed, workers)
    for split, count in samples.items():
        with (state / f"basic_{split}.tsv").open("wb") as file:
            file.write(header)
            for _ in range(count):
                codes, value = next(trees)
                file.write(f"{listops.source_text(codes)}\t{value}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    for split in samples:
        os.replace(state / f"basic_{split}.tsv", folder / f"basic_{split}.tsv")
    return folder


def _lines(path: Path) -> int:
    """How many lines end in a file."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(partial(file.read, 1 << 20), b""))


def _distinct_trees(
    chunks: Path, parameters: listops.Parameters, total: int, seed: int, workers: int
) -> Iterator[tuple[bytes, int]]:
    """As many trees, no two alike, as codes and values."""
    seen: set[bytes] = set()
    number = fruitless = 0
    with tqdm(total=total, desc="trees", disable=None) as bar:
        while len(seen) < total:
            needed = range(number, number + -(-(total - len(seen)) // listops.CHUNK))
            number = needed.stop
            work = partial(_finished_chunk, chunks, parameters, seed)
            for path in parallel(work, needed, workers):
                before = len(seen)
                for codes, value in _read_chunk(path):
                    digest = hashlib.blake2b(codes, digest_size=16).digest()
                    if digest not in seen and len(seen) < total:
                        seen.add(digest)
                        yield codes, value
                bar.update(len(seen) - before)
                fruitless = fruitless + 1 if len(seen) == before else 0
                if fruitless == FRUITLESS:
                    raise DataError(
                        f"only {len(seen):,} different trees were found, {total:,} are wanted; fewer --samples, other"
                        " lengths, a larger depth or more arguments are needed"
                    )


def _finished_chunk(chunks: Path, parameters: listops.Parameters, seed: int, number: int) -> Path:
    """The file of a chunk, which an earlier run may have left. Raises DataError where trees cannot be found."""
    path = chunks / f"{number:06d}.npz"
    try:
        _read_chunk(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged: the archive has checksums
        try:
            trees = listops.draw_chunk(parameters, seed, number)
        except listops.Unreachable as error:
            raise DataError(str(error)) from error
        buffer = io.BytesIO()
        np.savez(
            buffer,
            codes=np.frombuffer(b"".join(codes for codes, _ in trees), dtype=np.uint8),
            lengths=np.array([len(codes) for codes, _ in trees], dtype=np.int32),
            values=np.array([value for _, value in trees], dtype=np.uint8),
        )
        write_atomically(path, buffer.getvalue())
    return path


def _read_chunk(path: Path) -> list[tuple[bytes, int]]:
    with np.load(path, allow_pickle=False) as arrays:
        codes, ends, values = arrays["codes"].tobytes(), np.cumsum(arrays["lengths"]).tolist(), arrays["values"]
    starts = [0, *ends[:-1]]
    return [(codes[a:b], value) for a, b, value in zip(starts, ends, values.tolist(), strict=True)]


# -- Pathfinder

BATCH = 1000  # images in a folder
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk, which PIL does not look at to its end


def generate_pathfinder(out: Path, parameters: pathfinder.Parameters, images: int, seed: int, workers: int) -> Path:
    """Write that many images below `out`; returns the folder that holds `imgs` and `metadata`.

    Raises DataError where there are metadata of other images.
    """
    folder = out / PATHFINDER_FOLDER / pathfinder.FOLDERS[parameters.contour_length]
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    batches = [range(first, min(first + BATCH, images)) for first in range(0, images, BATCH)]
    names = {f"{batch}.npy" for batch in range(len(batches))}
    if strange := sorted({path.name for path in (folder / "metadata").glob("*.npy")} - names):
        raise DataError(
            f"{folder / 'metadata' / strange[0]} is not of the {images:,} images that are generated here; remove it"
        )
    work = partial(_finished_batch, folder, parameters, seed)
    with tqdm(total=images, desc="images", unit="img", disable=None) as bar:
        for batch, _ in zip(batches, parallel(work, batches, workers), strict=True):
            bar.update(len(batch))
    return folder


def _finished_batch(folder: Path, parameters: pathfinder.Parameters, seed: int, numbers: range) -> None:
    """Draw a batch, unless its metadata file and all its images are there and whole."""
    batch = numbers.start // BATCH
    metadata, images = folder / "metadata" / f"{batch}.npy", folder / "imgs" / str(batch)
    paths = [images / f"sample_{place}.png" for place in range(len(numbers))]
    if metadata.exists() and _lines(metadata) == len(numbers) and all(map(_is_whole, paths)):
        return
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, number in enumerate(numbers):
        drawing = pathfinder.draw(parameters, seed, number)
        Image.fromarray(drawing.image).save(paths[place])
        lines.append(
            f"imgs/{batch} {paths[place].name} {place} {drawing.label} {pathfinder.CONTINUITY}"
            f" {parameters.contour_length} {parameters.distractor_length} {pathfinder.LENGTH} {pathfinder.THICKNESS}"
            f" {pathfinder.MARGIN} 1\n"  # one contrast for all
        )
    write_atomically(metadata, "".join(lines).encode())


def _is_whole(path: Path) -> bool:
    """Whether a PNG's checksums are right up to its end: after a power cut any part of a file may be missing."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()
    except Exception:  # a decoder may fail in any way
        return False
    return data.endswith(PNG_END)
