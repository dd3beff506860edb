"""How fast the generators of Long Range Arena are: python -m benchmarks.lra_generators

ListOps: seconds of a whole preparation of 100,000 samples (trees, tables, token cache) with two processes. Pathfinder:
seconds per image on one core, drawn and written as PNG, for each contour length. A gate comes first: reference answers
are the original generator's within a few points, and the share of exact zeros is what docs/lra_data.md says.
"""

import contextlib
import io
import math
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import common
from benchmarks.common import CPU, Bar, Outcome, Spread, WrongResultError
from data.sources.token_cache import Manifest, read_manifest
from tools.lra import pathfinder
from tools.prepare_lra import main as prepare_lra

LISTOPS_BAR = 120.0  # seconds for 100,000 samples
PATHFINDER_BAR = 0.06  # seconds per image of contour length 14
ORIGINAL = {14: 0.126, 9: 0.032, 6: 0.015}  # seconds per image of the original generator, on another machine's core
# Measured on the original generator.
ANSWERS = {"majority class": 0.173, "best constant per root operator": 0.366, "operators to depth 1": 0.484}
ZEROS = {14: 0.648, 9: 0.704, 6: 0.727}  # of the images here
TOLERANCE = 0.015  # of the zeros


def measure_listops(samples: int, workers: int) -> dict[str, Any]:
    """Seconds of one preparation, and the reference answers on its test split.

    Raises WrongResultError where an answer is right more, or less, often than on samples of the original generator.
    """
    with tempfile.TemporaryDirectory() as name:
        sizes = (samples - 2 * (samples // 50), samples // 50, samples // 50)  # 96 %, 2 %, 2 %
        command = ["listops", "--out", f"{name}/out", "--workers", str(workers), "--samples", *map(str, sizes)]
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, status = common.timed(CPU, lambda: prepare_lra(command))
        if status:
            raise WrongResultError("the preparation has failed")
        manifest = read_manifest(Path(name) / "out")
    answers = _mean_answers(manifest)
    tolerance = 0.02 + 2 / math.sqrt(2 * sizes[-1])  # the second: four standard errors
    for answer, expected in ANSWERS.items():
        if abs(answers[answer] - expected) > tolerance:
            raise WrongResultError(f"ListOps: {answer} is right in {answers[answer]:.1%}, expected {expected:.1%}")
    return {"samples": samples, "workers": workers, "seconds": seconds, "answers": answers}


def _mean_answers(manifest: Manifest) -> dict[str, float]:
    """Over val and test, which are of one size."""
    splits = manifest.baselines.values()
    return {name: statistics.mean(split[name] for split in splits) for name in next(iter(splits))}


def measure_pathfinder(images: int, repeats: int) -> dict[str, Any]:
    """Seconds per image of each contour length, drawn and written by this process.

    Raises WrongResultError where another share of the pixels is 0 than is documented.
    """
    zeros = {}
    for length, expected in ZEROS.items():
        drawings = [pathfinder.draw(pathfinder.Parameters(length), 0, number) for number in range(images)]
        zeros[length] = statistics.mean(float((drawing.image == 0).mean()) for drawing in drawings)
        if abs(zeros[length] - expected) > TOLERANCE:
            raise WrongResultError(f"Pathfinder {length}: {zeros[length]:.1%} of the pixels are 0, not {expected:.1%}")
    with tempfile.TemporaryDirectory() as folder:
        path, number = Path(folder) / "image.png", iter(range(images, 10**9))

        def draw_all(length: int) -> None:
            for _ in range(images):
                drawing = pathfinder.draw(pathfinder.Parameters(length), 0, next(number))
                Image.fromarray(drawing.image).save(path)

        samples = common.interleaved_seconds(CPU, {length: partial(draw_all, length) for length in ZEROS}, repeats)
    return {
        "images": images,
        "repeats": repeats,
        "seconds_per_image": {length: Spread.of(samples[length], 1 / images) for length in ZEROS},
        "zeros": zeros,
    }


def measure(options: Namespace) -> Outcome:
    """Both generators, a table of each."""
    drawn = measure_pathfinder(options.images, options.repeats)
    listops = measure_listops(options.samples, options.workers)
    per_image = drawn["seconds_per_image"]
    common.print_table(
        "Pathfinder, one core",
        ("contour length", "ms per image", "pixels of 0", "200,000 images, hours", "original's ms, elsewhere"),
        (
            (
                str(length),
                spread.text(1e3, 2),
                f"{drawn['zeros'][length]:.1%}",
                f"{spread.median * 200_000 / 3600:.2f}",
                f"{1e3 * ORIGINAL[length]:g}",
            )
            for length, spread in per_image.items()
        ),
    )
    common.print_table(
        f"ListOps, {listops['samples']:,} samples, {listops['workers']} processes: {listops['seconds']:.0f} s",
        ("answer", "right"),
        ((name, f"{share:.1%}") for name, share in listops["answers"].items()),
    )
    per_samples = listops["seconds"] * 1e5 / listops["samples"]
    bars = [
        Bar("ListOps: seconds per 100,000 samples", per_samples, LISTOPS_BAR, "at most"),
        Bar("Pathfinder 14: ms per image and core", per_image[14].median * 1e3, PATHFINDER_BAR * 1e3, "at most"),
    ]
    return Outcome({"listops": listops, "pathfinder": drawn}, bars)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("lra_generators", __doc__, threads=1, repeats=9)
    parser.add_argument("--samples", type=int, default=100_000, help="of ListOps")
    parser.add_argument("--workers", type=int, default=2, help="processes for ListOps")
    parser.add_argument("--images", type=int, default=100, help="of each contour length, in each round")
    common.run(parser.parse_args(arguments), measure, packages=["numpy", "pillow"])


if __name__ == "__main__":
    main()
