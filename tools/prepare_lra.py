"""Prepare a task of Long Range Arena for training: generate it, or convert its published files, to a token cache.

python tools/prepare_lra.py listops --out DIR                            generate ListOps, 100,000 samples
python tools/prepare_lra.py listops --out DIR --samples 20000 2000 2000 --min-length 0 --max-length 65 --max-depth 3
python tools/prepare_lra.py pathfinder --out DIR --images 20000          generate Pathfinder images
python tools/prepare_lra.py pathfinder --out DIR --source lra_release    convert the release's
python tools/prepare_lra.py text --source aclImdb_v1.tar.gz --out data/imdb    convert what you downloaded
python tools/prepare_lra.py fashion-mnist --out DIR                      a stand-in for image, from Debian's package

Generated data is also left in the release's own files. It is the same for every number of workers. An interrupted
preparation continues when the same command is given again; a cache is complete once manifest.json is there, and in a
finished folder the same command verifies it. docs/lra_data.md has formats, sources and what generated data is like.

Exit codes: 0 finished; 2 a mistake, damaged or absent data, or a full disk; 130 Ctrl-C.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as tools/prepare_lra.py: what it imports lies beside tools/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.sources.base import DataError
from data.sources.bundled import FASHION_MNIST
from data.sources.token_cache import MANIFEST, TASKS, Manifest, open_cache, read_manifest
from tools.command_line import answer, file_path, number, program, whole
from tools.lra import listops, pathfinder
from tools.lra.cache import Content, publish, write_arrays
from tools.lra.files import ADVICE
from tools.lra.generate import generate_listops, generate_pathfinder
from tools.lra.pictures import read_cifar, read_fashion_mnist, read_pathfinder
from tools.lra.texts import LISTOPS_SIZES, read_listops, read_retrieval, read_text
from tools.prepared_folder import SETTINGS, STATE, owned, require_same_settings
from utils.environment import cores
from utils.parallel import WorkerLost

FORMER = {"borders": pathfinder.BORDERS[0]}  # of folders from before there was the option


@dataclass(frozen=True)
class Job:
    """A task, what its cache depends on (named after the options), and how its content comes about.

    `content(state)` is what to write. Where it is `generated`, that leaves files in the output folder and in `state`,
    from which an interrupted run continues; a conversion begins anew.
    """

    task: str
    settings: dict[str, Any]
    seed: int
    content: Callable[[Path], Content]
    generated: bool = False


# -- One preparation


def prepare(out: Path, job: Job) -> Manifest:
    """Make the cache `out`, or verify it if it is there; one that is damaged is made anew. Raises DataError."""
    state = out / STATE
    settings = {"task": job.task, "codec": TASKS[job.task][0], **job.settings}
    if (out / MANIFEST).exists():
        found = read_manifest(out)
        if found.task != job.task:
            raise DataError(f"{out} holds a cache of the task {found.task}, expected {job.task}; name another --out")
        if not (state / SETTINGS).exists():
            raise DataError(f"{out} holds a cache that was prepared elsewhere; name another --out, or delete it")
    elif out.exists() and not state.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} holds other files; name a new folder as --out")
    with owned(state):
        if job.generated or (state / SETTINGS).exists():
            require_same_settings(state, settings, former=FORMER)
        if (out / MANIFEST).exists():
            try:
                cache = open_cache(out)
                cache.verify()
                print(f"{out} is complete already")
                return cache.manifest
            except DataError as error:
                print(f"made anew: {error}", file=sys.stderr)
                (out / MANIFEST).unlink()
        manifest = write_arrays(state, job.content(state), job.seed)
        require_same_settings(state, settings, former=FORMER)
        publish(out, state, manifest)
        for path in state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        return manifest


def _listops_job(options: argparse.Namespace) -> Job:
    if options.source is not None:
        _refuse_with_source(options, "samples", "min_length", "max_length", "max_depth", "max_args", "seed")
        return _converted("listops", options, read_listops)
    parameters = listops.Parameters(**_given(options, "min_length", "max_length", "max_depth", "max_args"))
    try:
        parameters.require_reachable()
    except listops.Unreachable as error:
        raise DataError(str(error)) from error
    samples = dict(zip(LISTOPS_SIZES, options.samples, strict=True)) if options.samples else dict(LISTOPS_SIZES)
    seed = options.seed or 0
    settings = {"seed": seed, "samples": list(samples.values()), **asdict(parameters)}

    def content(state: Path) -> Content:
        made = read_listops(generate_listops(options.out, state, parameters, samples, seed, options.workers))
        words = "regenerated"
        if parameters != listops.Parameters():
            words += f" with lengths {parameters.min_length + 1} to {parameters.max_length - 1}, depth"
            words += f" {parameters.max_depth}, up to {parameters.max_args} arguments"
        made.title, made.sizes = f"ListOps ({words}, seed {seed})", samples
        return made

    return _generated("listops", listops.VERSION, settings, content)


def _pathfinder_job(options: argparse.Namespace) -> Job:
    seed = options.seed or 0
    if options.source is not None:
        _refuse_with_source(options, "images", "target_contrast", "borders")
        parameters = pathfinder.Parameters(**_given(options, "contour_length"))
        folder = pathfinder.FOLDERS[parameters.contour_length]

        def read(source: Path) -> Content:
            return read_pathfinder(source, folder, parameters.contour_length, seed, options.workers)

        return _converted("pathfinder", options, read, seed=seed, contour_length=parameters.contour_length)
    parameters = pathfinder.Parameters(**_given(options, "contour_length", "target_contrast", "borders"))
    folder = pathfinder.FOLDERS[parameters.contour_length]
    images = options.images or 200_000
    settings = {"seed": seed, "images": images, **asdict(parameters)}

    def content(state: Path) -> Content:
        root = generate_pathfinder(options.out, parameters, images, seed, options.workers)
        made = read_pathfinder(root, folder, parameters.contour_length, seed, options.workers)
        contrast = f", target contrast {parameters.target_contrast:g}" if parameters.target_contrast != 0.75 else ""
        borders = f", borders {parameters.borders}" if parameters.borders != pathfinder.BORDERS[0] else ""
        made.title += f" (regenerated{contrast}{borders}, {images:,} images, seed {seed})"
        return made

    return _generated("pathfinder", pathfinder.VERSION, settings, content)


def _generated(task: str, version: int, settings: dict[str, Any], read: Callable[[Path], Content]) -> Job:
    """What is read back from the files that were made; the manifest's source are parameters and these files."""

    def content(state: Path) -> Content:
        made = read(state)
        parameters = {key: value for key, value in settings.items() if key != "seed"}
        about = {"kind": "generator", "generator": task, "version": version, "parameters": parameters}
        made.source, made.published = {**about, "files": made.source["files"]}, {}
        return made

    return Job(task, {"version": version, **settings}, settings["seed"], content, generated=True)


def _conversion(
    task: str, read: Callable[..., Content], *, seeded: bool = True, **settings: Any
) -> Callable[[argparse.Namespace], Job]:
    """The job of a task that is read only, with a seed where its order or what is held out is drawn."""

    def job(options: argparse.Namespace) -> Job:
        seed = {"seed": options.seed or 0} if seeded else {}
        return _converted(task, options, partial(read, **seed), **seed, **settings)

    return job


def _converted(task: str, options: argparse.Namespace, read: Callable[[Path], Content], **settings: Any) -> Job:
    if options.source is None:
        raise DataError(f"{task} needs --source: {ADVICE[task]}")
    settings = {"source": str(options.source.resolve()), **settings}
    return Job(task, settings, settings.get("seed", 0), lambda state: read(options.source))


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _refuse_with_source(options: argparse.Namespace, *names: str) -> None:
    if given := _given(options, *names):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DataError(f"{flags} is for generated data, and --source names data that is there; leave one of them out")


# -- Command line


def _parser() -> argparse.ArgumentParser:
    parser = program("python tools/prepare_lra.py", __doc__)
    tasks = parser.add_subparsers(dest="command", metavar="TASK", required=True)

    def add(name: str, job: Callable[[argparse.Namespace], Job], help: str, *, source: str, seed: str = "") -> Callable:
        task = tasks.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        task.set_defaults(job=job)
        task.add_argument("--out", metavar="DIR", type=file_path, required=True, help="new folder for the cache")
        default = FASHION_MNIST if name == "fashion-mnist" else None
        task.add_argument("--source", metavar="PATH", type=file_path, default=default, help=source)
        if seed:
            task.add_argument("--seed", metavar="N", type=whole(0), help=f"{seed} (default 0)")
        if name in ("listops", "pathfinder"):
            count = cores()
            task.add_argument(
                "--workers", metavar="N", type=whole(1), default=count, help=f"processes (default {count})"
            )
        return task.add_argument

    what = "nested operations on digits, generated or from the release"
    source = "convert the release's listops-1000 instead of generating"
    option = add("listops", _listops_job, what, source=source, seed="of the samples")
    sizes = ("TRAIN", "VAL", "TEST")
    option("--samples", metavar=sizes, nargs=3, type=whole(1), help="how many (default 96000 2000 2000)")
    option("--min-length", metavar="N", type=whole(0), help="samples are longer than this (default 500)")
    option("--max-length", metavar="N", type=whole(2), help="samples are shorter than this (default 2000)")
    option("--max-depth", metavar="N", type=whole(2, 100), help="of a tree, digits included (default 10)")
    most = whole(2, listops.MOST_ARGS)
    option("--max-args", metavar="N", type=most, help="of an operator, at least 2 (default 10)")

    what = "are two marked ends those of one dashed contour; generated or from the release"
    source = "convert the release's pathfinder32 instead of generating"
    option = add("pathfinder", _pathfinder_job, what, source=source, seed="of the images, and of the split")
    option("--images", metavar="N", type=whole(10), help="how many, 80/10/10 (default 200000)")
    lengths, what = (
        sorted(pathfinder.FOLDERS),
        "paddles of a target: 14 (default; what Long Range Arena reports), 9 or 6",
    )
    option("--contour-length", metavar="N", type=int, choices=lengths, help=what)
    what = "brightness of the targets, of the distractors' (default 0.75, as in Long Range Arena; 1: alike)"
    option("--target-contrast", metavar="SHARE", type=number(0, 1, open_low=True), help=what)
    what = "of the search for places: clipped (default), or unclipped, which leaves the few distractors of the original"
    option("--borders", choices=pathfinder.BORDERS, help=f"{what} program as it runs (docs/lra_data.md)")

    source, job = "aclImdb_v1.tar.gz or aclImdb", _conversion("text", read_text)
    add("text", job, "sentiment of IMDb reviews, by bytes", source=source, seed="of the order of train")
    what, job = (
        "is there a citation between two papers of AAN, by bytes",
        _conversion("retrieval", read_retrieval, seeded=False),
    )
    add("retrieval", job, what, source="the release's tsv_data")
    source, held_out = "cifar-10-python.tar.gz or cifar-10-batches-py", "of what is held out as val"
    add("image", _conversion("image", read_cifar), "CIFAR-10 in grey, by pixels", source=source, seed=held_out)
    source = f"folder of the four idx files (default {FASHION_MNIST})"
    job = _conversion("image", read_fashion_mnist, data="fashion-mnist")
    add("fashion-mnist", job, "Fashion-MNIST as a stand-in for image", source=source, seed=held_out)
    return parser


def summary(out: Path, manifest: Manifest) -> str:
    """What the cache holds, a line per split."""
    lines = [f"{out}: {manifest.title}"]
    for split, record in manifest.splits.items():
        size = sum(file.bytes for file in record.files.values())
        lines.append(f"{split}: {record.samples:,} samples, {size / 1e6:.1f} MB")
    lines.append(f"longest document: {manifest.longest:,} symbols")
    if empty := manifest.source.get("empty_images_left_out"):
        lines.append(f"empty image files left out: {empty}")
    for split, answers in manifest.baselines.items():
        lines += [f"{split}: {name} {accuracy:.1%}" for name, accuracy in answers.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(argv)
    return answer(lambda: run(options), mistakes=(DataError, OSError, WorkerLost))


def run(options: argparse.Namespace) -> None:
    """Prepare the task that the command line names."""
    print(summary(options.out, prepare(options.out, options.job(options))))


if __name__ == "__main__":
    sys.exit(main())
