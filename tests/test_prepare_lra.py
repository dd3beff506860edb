"""tools.prepare_lra: every published format, its traps and errors, both generators, interruption, the token cache.

pytest tests/test_prepare_lra.py
"""

import hashlib
import io
import json
import os
import random
import signal
import statistics
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, PYTHON, ROOT, run_tool
from lra_caches import write_cache
from PIL import Image
from test_fashion_mnist import idx, pictures

from data.sources.base import DataError
from data.sources.bundled import FASHION_MNIST_FILES
from data.sources.token_cache import TokenCache, open_cache
from tools.lra import files, generate, listops, pathfinder
from tools.lra.pictures import CIFAR_BATCHES, LUMA, official_grey
from tools.prepare_lra import main


def prepared(*arguments: object) -> TokenCache:
    """The cache that the tool makes with these arguments; the first is the task, the last DIR of --out."""
    *others, out = map(str, arguments)
    assert main([*others, "--out", out]) == 0
    cache = open_cache(out)
    cache.verify()
    return cache


def documents(cache: TokenCache, split: str) -> list[bytes]:
    mapped = cache.splits[split]
    return [mapped.document(i).tobytes() for i in range(len(mapped.offsets) - 1)]


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Calls the tool with a mistake: one line that begins with `error:` and exit code 2; returns the line."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


# ---------------------------------------------------------------------------------------------------------------------
# ListOps: another writing down and evaluation of trees, as nested lists [operator, argument, …]
# ---------------------------------------------------------------------------------------------------------------------

MEANING: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SMALL = ("--min-length", "4", "--max-length", "65", "--max-depth", "3", "--max-args", "5")


def parsed(text: str) -> list | str:
    """The tree of a Source column, by its parentheses alone: each pair puts one more argument to what is left of it."""
    words = iter(text.split())

    def node() -> list | str:
        if (word := next(words)) != "(":
            return [word] if word.startswith("[") else word
        left, right = node(), node()
        assert next(words) == ")" and isinstance(left, list)
        return left if right == "]" else [*left, right]

    tree = node()
    assert next(words, None) is None
    return tree


def value_of(tree: list | str, levels: int = 99) -> int | None:
    """Its value without operators that are deeper than `levels`."""
    if isinstance(tree, str):
        return int(tree)
    if not levels:
        return None
    values = [value for each in tree[1:] if (value := value_of(each, levels - 1)) is not None]
    return MEANING[tree[0]](values) if values else None


def depth_of(tree: list | str) -> int:
    return 1 if isinstance(tree, str) else 1 + max(depth_of(each) for each in tree[1:])


def operators_of(tree: list | str) -> list[list]:
    return [] if isinstance(tree, str) else [tree, *(found for each in tree[1:] for found in operators_of(each))]


def written(tree: list | str) -> str:
    """A tree as the release writes it."""
    if isinstance(tree, str):
        return tree
    text = tree[0]
    for argument in [*map(written, tree[1:]), "]"]:
        text = f"( {text} {argument} )"
    return text


def flat(tree: list | str) -> list[str]:
    """Its symbols without parentheses."""
    return [tree] if isinstance(tree, str) else [tree[0], *(word for each in tree[1:] for word in flat(each)), "]"]


def random_tree(generator: random.Random, depth: int) -> list | str:
    if depth == 1 or generator.random() < 0.4:
        return str(generator.randrange(10))
    arguments = [random_tree(generator, depth - 1) for _ in range(generator.randint(1, 4))]
    return [generator.choice(list(MEANING)), *arguments]


def listops_release(root: Path, seed: int = 0) -> dict[str, list[list | str]]:
    """listops-1000 with a few trees; returns them by split."""
    generator, trees = random.Random(seed), {}
    (root / "listops-1000").mkdir(parents=True)
    for split, count in (("train", 30), ("val", 10), ("test", 10)):
        trees[split] = [[generator.choice(list(MEANING)), "1", random_tree(generator, 5)] for _ in range(count)]
        rows = [f"{written(tree)}\t{value_of(tree)}" for tree in trees[split]]
        (root / "listops-1000" / f"basic_{split}.tsv").write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    return trees


def test_listops_files_become_symbols_without_parentheses(tmp_path, capsys):
    trees = listops_release(tmp_path / "lra_release" / "lra_release")
    cache = prepared("listops", "--source", tmp_path, tmp_path / "out")
    assert (cache.manifest.task, cache.manifest.codec, cache.manifest.symbols) == ("listops", "listops-1", 15)
    number = {name: place for place, name in enumerate("0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]".split())}
    for split, expected in trees.items():
        assert documents(cache, split) == [bytes(number[word] for word in flat(tree)) for tree in expected]
        assert cache.splits[split].labels.tolist() == [value_of(tree) for tree in expected]
    title = "ListOps, incomplete: train has 30 of 96,000 samples; val has 10 of 2,000 samples; test has 10 of 2,000"
    assert cache.manifest.title.startswith(title) and "warning: ListOps, incomplete" in capsys.readouterr().err
    table = tmp_path / "lra_release" / "lra_release" / "listops-1000" / "basic_val.tsv"
    recorded = cache.manifest.source["files"]["basic_val.tsv"]
    assert recorded == {"bytes": table.stat().st_size, "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}


def test_the_evaluator_agrees_with_one_that_follows_parentheses():
    generator, number = random.Random(1), {name: place for place, name in enumerate(listops.SYMBOLS)}
    for _ in range(400):
        tree = [generator.choice(list(MEANING)), *(random_tree(generator, 5) for _ in range(3))]
        assert parsed(written(tree)) == tree
        symbols = [number[word] for word in flat(tree)]
        assert listops.evaluate(symbols) == value_of(tree)
        for levels in range(1, 5):
            assert listops.evaluate(symbols, levels) == value_of(tree, levels), written(tree)
    med = number["[MED"]
    assert listops.evaluate([med, 4, 7, listops.CLOSE]) == 5  # 5.5, cut off
    for broken, message in {
        (med, 4): "1 operators are not closed",
        (4, 5): "the tree ends at symbol 1 of 2",
        (med, listops.CLOSE): "has no arguments",
        (listops.CLOSE,): "was never opened",
    }.items():
        with pytest.raises(ValueError, match=message):
            listops.evaluate(broken)


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory) -> Path:
    """ListOps with the parameters of Long Range Arena, 3,000 samples."""
    out = tmp_path_factory.mktemp("listops") / "out"
    assert main(["listops", "--out", str(out), "--samples", "2000", "500", "500", "--workers", "2"]) == 0
    return out


def rows(out: Path, split: str) -> list[tuple[str, int]]:
    """Source and Target of a generated table."""
    header, *lines = (out / "listops-1000" / f"basic_{split}.tsv").read_text().splitlines()
    assert header == "Source\tTarget"
    return [(source, int(target)) for source, _, target in (line.partition("\t") for line in lines)]


def test_generated_listops_are_right_distinct_and_in_the_window(regenerated):
    cache = open_cache(regenerated)
    assert cache.manifest.title == "ListOps (regenerated, seed 0)"
    assert cache.manifest.source["parameters"] == {
        "samples": [2000, 500, 500],
        "min_length": 500,
        "max_length": 2000,
        "max_depth": 10,
        "max_args": 10,
    }
    sources, arguments, kinds = [], [], []
    for split, count in (("train", 2000), ("val", 500), ("test", 500)):
        table, stored = rows(regenerated, split), documents(cache, split)
        assert len(table) == len(stored) == count == cache.manifest.splits[split].samples
        sources += [source for source, _ in table]
        assert all(500 < len(document) < 2000 for document in stored)
        assert cache.splits[split].labels.tolist() == [target for _, target in table]
        for (source, target), document in list(zip(table, stored, strict=True))[:50]:
            tree = parsed(source)
            assert written(tree) == source and value_of(tree) == target and depth_of(tree) <= 10
            assert [listops.SYMBOLS[symbol] for symbol in document] == flat(tree)
            arguments += [len(each) - 1 for each in operators_of(tree)]
            kinds += [each[0] for each in operators_of(tree)]
    assert len(set(sources)) == 3000
    assert set(arguments) == set(range(2, 11)) and set(kinds) == set(MEANING)
    share = np.bincount(arguments)[2:] / len(arguments)
    assert (abs(share - 1 / 9) < 0.03).all(), share  # longer trees have larger operators
    assert all(abs(kinds.count(kind) / len(kinds) - 0.25) < 0.02 for kind in MEANING)
    assert cache.manifest.longest == max(len(d) for s in cache.splits for d in documents(cache, s))


def test_statistics_of_generated_listops_are_those_of_the_original_generator(regenerated):
    """Measured there: 17.3 %, 36.6 %, then 48, 68, 80, 87 and 92 %; labels 0 and 9 are 17 % each, the others 7 to 9."""
    splits = open_cache(regenerated).splits
    train = splits["train"]
    constants = listops.Constants.fit(train.tokens[train.offsets[:-1]], train.labels)
    samples = [train.document(i) for i in range(2000)]
    found = listops.baselines(samples, train.labels, constants)
    expected = {"majority class": 0.173, "best constant per root operator": 0.366}
    expected |= {f"operators to depth {k}": a for k, a in enumerate((0.484, 0.68, 0.80, 0.87, 0.92), start=1)}
    assert found.keys() == expected.keys()
    assert all(abs(found[name] - expected[name]) < 0.035 for name in expected), found
    share = np.bincount(train.labels, minlength=10) / 2000
    assert (abs(share[[0, 9]] - 0.17) < 0.035).all() and (abs(share[1:9] - 0.08) < 0.03).all(), share
    lengths = [len(sample) for sample in samples]
    assert abs(np.mean(lengths) - 1033) < 40 and abs(np.median(lengths) - 980) < 50


def test_reference_answers_in_the_manifest_are_those_of_the_tables(regenerated):
    constants = {
        kind: statistics.mode(target for source, target in rows(regenerated, "train") if parsed_root(source) == kind)
        for kind in MEANING
    }
    majority = statistics.mode(target for _, target in rows(regenerated, "train"))
    baselines = open_cache(regenerated).manifest.baselines
    assert list(baselines) == ["val", "test"]
    for split, expected in baselines.items():
        table = rows(regenerated, split)
        assert expected["majority class"] == sum(target == majority for _, target in table) / 500
        by_root = [constants[parsed_root(source)] == target for source, target in table]
        assert expected["best constant per root operator"] == sum(by_root) / 500
    trees = [(parsed(source), constants[parsed_root(source)], target) for source, target in table]
    for levels in (1, 3):
        answers = [(value_of(tree, levels), constant, target) for tree, constant, target in trees]
        right = sum((constant if value is None else value) == target for value, constant, target in answers)
        assert expected[f"operators to depth {levels}"] == right / 500


def parsed_root(source: str) -> str:
    return source.lstrip("( ").partition(" ")[0]


def test_generated_listops_are_the_same_for_every_number_of_workers_and_other_for_another_seed(tmp_path):
    sizes = ("--samples", "1200", "100", "100")
    caches = {
        name: prepared("listops", *SMALL, *sizes, "--seed", seed, "--workers", workers, tmp_path / name)
        for name, seed, workers in (("one", 3, 1), ("three", 3, 3), ("other", 4, 2))
    }
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert not set(documents(caches["one"], "test")) & set(documents(caches["one"], "train"))
    assert documents(caches["one"], "test") != documents(caches["other"], "test")
    assert caches["one"].manifest.title == (
        "ListOps (regenerated with lengths 5 to 64, depth 3, up to 5 arguments, seed 3)"
    )


def test_listops_that_cannot_be_are_refused(tmp_path, refused):
    out = ("listops", "--out", tmp_path / "out", "--samples", "9000", "5", "5", "--workers", "1")
    assert "has more than 500 and fewer than 2000" in refused(*out, "--max-depth", "3", "--max-args", "5")
    depth_2 = ("--max-depth", "2", "--max-args", "2", "--min-length", "0")
    assert "only 410 different trees were found, 9,010 are wanted" in refused(*out, *depth_2)  # 10 + 4 × 10 × 10
    rare = ("--max-depth", "3", "--max-args", "10", "--min-length", "115")
    assert "fewer than one tree in 20,000" in refused(*out[:2], tmp_path / "rare", *out[3:], *rare)


# ---------------------------------------------------------------------------------------------------------------------
# Pathfinder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "zeros"), [(14, 0.647), (9, 0.703), (6, 0.727)])
def test_pathfinder_images_are_whole_and_inside_their_border(length, zeros):
    drawings = [pathfinder.draw(pathfinder.Parameters(length), 0, number) for number in range(60)]
    for drawing in drawings:
        assert drawing.image.shape == (32, 32) and drawing.image.dtype == np.uint8
        assert drawing.image.min() == 0 and drawing.image.max() == 255
        assert (drawing.image[drawing.targets.any(0)] > 0).all()
        border = np.ones((32, 32), dtype=bool)
        border[1:-1, 1:-1] = False
        assert (drawing.image[border] < 128).all()  # paddles stay inside; markers and the filter reach over it
    assert abs(np.mean([(drawing.image == 0).mean() for drawing in drawings]) - zeros) < 0.015
    assert 0.3 < np.mean([drawing.label for drawing in drawings]) < 0.7


@pytest.mark.parametrize(("borders", "distractors", "grey"), [("clipped", 4.67, 27.4), ("unclipped", 1.24, 20.3)])
def test_distractors_and_mean_grey_are_the_original_program_s(borders, distractors, grey):
    """Measured on the original program at length 14, with its dilation clipped at 0 and as it runs."""
    parameters = pathfinder.Parameters(borders=borders)
    drawings = [pathfinder.draw(parameters, 0, number) for number in range(400)]
    assert np.mean([drawing.distractors for drawing in drawings]) == pytest.approx(distractors, rel=0.1)
    assert np.mean([drawing.image.mean() for drawing in drawings]) == pytest.approx(grey, rel=0.03)
    assert 0.4 < np.mean([drawing.label for drawing in drawings]) < 0.6


def test_unclipped_borders_search_only_where_no_footprint_is_wholly_outside():
    """A paddle of length 2, thickness 0.5 and margin 1 that begins diagonally beside each pixel of the image."""
    steps = np.stack(np.meshgrid(range(-5, 6), range(-5, 6), indexing="ij"), axis=-1).reshape(-1, 2)
    places = np.argwhere(np.ones((32, 32)))
    kept, searched = [], []
    for angle in range(360):
        tail = 2 * np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])  # rows, columns
        nearest = 1 + np.clip((steps - 1) @ tail / 4, 0, 1)[:, None] * tail
        footprint = steps[np.linalg.norm(steps - nearest, axis=1) <= 1.25]
        covered = places[:, None] + footprint
        if ((covered >= 0) & (covered < 32)).all(2).any(1).all():
            kept.append(angle)
        if pathfinder.searchable((tail[0] / 2, tail[1] / 2)):
            searched.append(angle)
    assert searched == kept == [*range(163, 288)]


def test_clipped_images_of_a_seed_stay_what_they_are():
    """Labels, marks and distractors of 150 images: caches in use were drawn so, and the version has not changed."""
    digest = hashlib.sha256()
    for length in (14, 9, 6):
        for number in range(50):
            drawing = pathfinder.draw(pathfinder.Parameters(length), 0, number)
            digest.update(repr((drawing.label, drawing.marks, drawing.distractors)).encode())
    assert pathfinder.VERSION == 1 and digest.hexdigest().startswith("79227caf44df3ba7")


def test_marks_are_on_the_ends_of_one_contour_exactly_where_the_label_says_so():
    labels = []
    for number in range(80):
        drawing = pathfinder.draw(pathfinder.Parameters(), 1, number)
        owners = []
        for mark in drawing.marks:
            (owner,) = (snake for snake in (0, 1) if drawing.targets[snake][mark])
            steps = np.argwhere(drawing.targets[owner]) - mark
            near = steps[np.linalg.norm(steps, axis=1) <= 2]
            assert np.linalg.norm(near.mean(0)) > 0.4, f"image {number}: the contour goes on both sides of {mark}"
            assert drawing.image[mark] > 200
            owners.append(owner)
        assert drawing.marks[0] != drawing.marks[1]
        assert (owners[0] == owners[1]) == bool(drawing.label), f"image {number}"
        for contour in drawing.targets:  # dashes with gaps of two pixels, from any of which all the others are reached
            pixels = np.argwhere(contour)
            reached = np.zeros(len(pixels), dtype=bool)
            reached[0] = True
            near = np.linalg.norm(pixels[:, None] - pixels[None], axis=2) < 3.7
            while (more := near[reached].any(0)).sum() > reached.sum():
                reached = more
            assert reached.all(), f"image {number}"
            assert 14 * 2 <= len(pixels) <= 14 * 5
        labels.append(drawing.label)
    assert 0.3 < np.mean(labels) < 0.7


def test_contrast_makes_targets_as_bright_as_distractors():
    peaks = {
        contrast: np.mean(
            [
                drawing.image[drawing.targets.any(0)].mean()
                for number in range(20)
                for drawing in [pathfinder.draw(pathfinder.Parameters(target_contrast=contrast), 2, number)]
            ]
        )
        for contrast in (0.5, 1.0)
    }
    assert peaks[0.5] < 0.75 * peaks[1.0]


def test_generated_pathfinder_files_are_the_same_for_every_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH", 16)
    for name, workers in (("one", 1), ("three", 3)):
        cache = prepared("pathfinder", "--images", 100, "--workers", workers, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert [cache.manifest.splits[split].samples for split in ("train", "val", "test")] == [80, 10, 10]
    assert cache.manifest.title == "Pathfinder32, contour length 14 (regenerated, 100 images, seed 0)"
    assert cache.manifest.longest == 1024

    folder = tmp_path / "one" / "pathfinder32" / "curv_contour_length_14"
    lines = (folder / "metadata" / "6.npy").read_text().splitlines()
    assert lines[3].split() == ["imgs/6", "sample_3.png", "3", lines[3].split()[3], "1.0", "14", "4", "2", "0.5", "1",
                                "1"]  # fmt: skip
    expected = {}
    for number in range(100):
        drawing = pathfinder.draw(pathfinder.Parameters(), 0, number)
        expected[drawing.image.tobytes()] = drawing.label
        path = folder / "imgs" / str(number // 16) / f"sample_{number % 16}.png"
        with Image.open(path) as image:
            assert image.mode == "L" and image.tobytes() == drawing.image.tobytes()
    stored = [d for split in cache.splits for d in documents(cache, split)]
    labels = [label for split in cache.splits.values() for label in split.labels.tolist()]
    assert {image: label for image, label in zip(stored, labels, strict=True)} == expected and len(stored) == 100


def test_borders_are_recorded_and_never_mixed(tmp_path, refused, capsys):
    command, unclipped = ("pathfinder", "--images", 20, "--workers", 1), ("--borders", "unclipped")
    cache = prepared(*command, *unclipped, tmp_path / "new")
    title = "Pathfinder32, contour length 14 (regenerated, borders unclipped, 20 images, seed 0)"
    assert cache.manifest.title == title and cache.manifest.source["parameters"]["borders"] == "unclipped"
    assert "--borders unclipped → clipped" in refused(*command, "--out", tmp_path / "new")

    old = prepared(*command, tmp_path / "old")
    assert old.manifest.source["parameters"]["borders"] == "clipped" and "borders" not in old.manifest.title
    settings = tmp_path / "old" / ".prepare" / "settings.json"  # as a version without the option left it
    stored = json.loads(settings.read_text())
    assert stored.pop("borders") == "clipped"
    settings.write_text(json.dumps(stored))
    before = contents(tmp_path / "old")
    assert "--borders clipped → unclipped" in refused(*command, *unclipped, "--out", tmp_path / "old")
    capsys.readouterr()
    prepared(*command, tmp_path / "old")
    assert "is complete already" in capsys.readouterr().out and contents(tmp_path / "old") == before


def pathfinder_release(root: Path) -> dict[bytes, int]:
    """Batches 0, 2 and 10 of four random images, of which one file is empty; returns the others with their labels."""
    folder, generator, images = root / "pathfinder32" / "curv_contour_length_14", np.random.default_rng(0), {}
    (folder / "metadata").mkdir(parents=True)
    for batch in (0, 2, 10):
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for i in range(4):
            pixels, path = generator.integers(0, 256, (32, 32), dtype=np.uint8), folder / f"imgs/{batch}/sample_{i}.png"
            lines.append(f"imgs/{batch} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.5 1 1\n")
            if (batch, i) == (2, 1):
                path.touch()
                continue
            Image.fromarray(pixels).save(path)
            images[pixels.tobytes()] = i % 2
        (folder / "metadata" / f"{batch}.npy").write_text("".join(lines))
    return images


def test_pathfinder_files_are_read_by_number_and_empty_ones_left_out(tmp_path, capsys, refused):
    images = pathfinder_release(tmp_path / "lra_release")
    cache = prepared("pathfinder", "--source", tmp_path / "lra_release", "--workers", 2, tmp_path / "out")
    assert "empty image files left out: 1" in capsys.readouterr().out
    names = [name.removesuffix(".npy") for name in cache.manifest.source["files"]]
    assert names == [f"{folder}/{batch}" for batch in (0, 2, 10) for folder in ("metadata", "imgs")]
    order = np.random.default_rng(0).permutation(11)
    stored = [document for split in ("train", "val", "test") for document in documents(cache, split)]
    labels = [label for split in ("train", "val", "test") for label in cache.splits[split].labels.tolist()]
    assert stored == [list(images)[i] for i in order] and labels == [list(images.values())[i] for i in order]
    assert cache.manifest.title.startswith("Pathfinder32, contour length 14, incomplete: train has 9 of 160,000")
    folder = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    error = refused("pathfinder", "--source", folder, "--contour-length", 9, "--out", tmp_path / "nine")
    assert "curv_contour_length_14 holds no pathfinder32/curv_contour_length_9/metadata" in error
    assert documents(prepared("pathfinder", "--source", folder, tmp_path / "14"), "val") == documents(cache, "val")
    again = prepared("pathfinder", "--source", folder.parent, "--seed", 5, tmp_path / "other")
    assert set(documents(again, "train")) != set(documents(cache, "train"))


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval and text
# ---------------------------------------------------------------------------------------------------------------------

AAN = {
    "train": [(b"1.0", b'"a quote that is never closed', b"plain"), (b"0", b"x" * 200_000, "naïve ’text’".encode())],
    "eval": [(b"0.0", b"one, two", b"y" * 4000), (b"1", b"", b"z" * 4001)],
    "test": [(b"1", b"a\x00b", b"c")],
}


def aan_release(root: Path) -> None:
    (root / "tsv_data").mkdir(parents=True)
    for name, pairs in AAN.items():
        lines = [b"\t".join((label, b"P00-1", b"P00-2", one, two)) + b"\n" for label, one, two in pairs]
        (root / "tsv_data" / f"new_aan_pairs.{name}.tsv").write_bytes(b"".join(lines))


def test_retrieval_takes_quotes_and_long_fields_as_they_are_and_labels_as_floats(tmp_path):
    aan_release(tmp_path / "lra_release" / "lra_release")
    cache = prepared("retrieval", "--source", tmp_path / "lra_release", tmp_path / "out")
    assert (cache.manifest.documents, cache.manifest.symbols, cache.manifest.longest) == (2, 256, 4000)
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test")):
        assert documents(cache, split) == [text[:4000] for _, one, two in AAN[name] for text in (one, two)]
        assert cache.splits[split].labels.tolist() == [int(float(label)) for label, _, _ in AAN[name]]
        assert len(cache.splits[split].labels) == cache.manifest.splits[split].samples


def test_retrieval_is_streamed(tmp_path):
    """40 MB of text leave less than 8 MB behind at any time."""
    import tracemalloc

    from tools.lra.cache import publish, write_arrays
    from tools.lra.texts import read_retrieval

    folder = tmp_path / "tsv_data"
    folder.mkdir()
    line = b"1\ta\tb\t" + b"x" * 10_000 + b"\t" + b"y" * 10_000 + b"\n"
    for name, count in (("train", 2000), ("eval", 2), ("test", 2)):
        (folder / f"new_aan_pairs.{name}.tsv").write_bytes(line * count)
    (tmp_path / "state").mkdir()
    tracemalloc.start()
    publish(tmp_path, tmp_path / "state", write_arrays(tmp_path / "state", read_retrieval(tmp_path), 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(open_cache(tmp_path).splits["train"].tokens) == 16_000_000
    assert peak < 8e6


def reviews() -> dict[str, bytes]:
    """Files of aclImdb: 20 for train, 4 for test; one with a text of 5,000 bytes."""
    texts = {}
    for split, count in (("train", 10), ("test", 2)):
        for label in ("pos", "neg"):
            for i in range(count):
                text = f"{split} {label} {i}: très bon<br />".encode() * (200 if i == 1 else 1)
                texts[f"aclImdb/{split}/{label}/{i}_{8 if label == 'pos' else 2}.txt"] = text
    texts["aclImdb/train/unsup/0_0.txt"] = b"not used"
    texts["aclImdb/README"] = b"not used"
    return texts


def imdb_archive(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(reviews()[name])
            archive.addfile(member, io.BytesIO(reviews()[name]))


def test_text_is_the_same_from_the_archive_and_its_folder(tmp_path, monkeypatch):
    for name, text in reviews().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    archive = tmp_path / "aclImdb_v1.tar.gz"
    imdb_archive(archive, sorted(reviews(), reverse=True))
    monkeypatch.setitem(files.MD5, archive.name, hashlib.md5(archive.read_bytes()).hexdigest())
    cache = prepared("text", "--source", tmp_path / "aclImdb", tmp_path / "folder")
    other = prepared("text", "--source", archive, tmp_path / "archive")
    assert list(cache.splits) == ["train", "test"] and cache.manifest.held_out == 2
    for split in cache.splits:
        assert documents(cache, split) == documents(other, split)
        assert (cache.splits[split].labels == other.splits[split].labels).all()
        expected = {t[:4000]: int("/pos/" in n) for n, t in reviews().items() if f"/{split}/" in n and "unsup" not in n}
        assert dict(zip(documents(cache, split), cache.splits[split].labels.tolist(), strict=True)) == expected
    labels = cache.splits["train"].labels.tolist()
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True)  # shuffled
    assert other.manifest.source["files"].keys() == {archive.name}


# ---------------------------------------------------------------------------------------------------------------------
# Image
# ---------------------------------------------------------------------------------------------------------------------


def python_2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as CIFAR-10's files have it: protocol 2 of Python 2, written down opcode by opcode."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    data = b"T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + data + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + text(b"labels") + numbers + text(b"data") + array + b"u."


def cifar_batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (10, 3072), dtype=np.uint8), [(i * 3) % 10 for i in range(10)])
        for name in CIFAR_BATCHES
    }


def cifar_folder(root: Path, monkeypatch) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, batch in cifar_batches().items():
        (folder / name).write_bytes(python_2_pickle(*batch))
        monkeypatch.setitem(files.MD5, name, hashlib.md5((folder / name).read_bytes()).hexdigest())
    return folder


def test_cifar_becomes_grey_rows_from_its_folder_and_its_archive(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path, monkeypatch)
    archive = tmp_path / "downloads" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setitem(files.MD5, archive.name, hashlib.md5(archive.read_bytes()).hexdigest())
    cache = prepared("image", "--source", tmp_path, tmp_path / "folder")
    other = prepared("image", "--source", archive.parent, tmp_path / "archive")

    def grey(image: np.ndarray) -> bytes:
        """floor(255.5 · luminance) in float32; where that is not near an integer, float64 says the same."""
        exact = 255.5 / 255 * (LUMA.astype(float) @ image.reshape(3, 1024).astype(float))
        levels = official_grey(image.reshape(1, 3, 1024))[0]
        assert (levels == np.floor(exact)).mean() > 0.999 and (np.abs(levels + 0.5 - exact) < 0.5001).all()
        return levels.tobytes()

    assert official_grey(np.full((1, 3, 1), 255, np.uint8)).tolist() == [[255]]
    assert official_grey(np.full((1, 3, 1), 1, np.uint8)).tolist() == [[1]]  # rounding gave 1 too, of 0.9999
    assert official_grey(np.array([[[7], [3], [2]]], np.uint8)).tolist() == [[4]]  # 4.08; and of 4.6 it is 4, not 5
    assert official_grey(np.array([[[7], [4], [2]]], np.uint8)).tolist() == [[4]]

    assert LUMA.sum() == pytest.approx(1, abs=2e-4)
    batches = cifar_batches()
    train = {grey(i): label for name in CIFAR_BATCHES[:5] for i, label in zip(*batches[name], strict=True)}
    stored = {s: dict(zip(documents(cache, s), cache.splits[s].labels.tolist(), strict=True)) for s in cache.splits}
    assert stored["train"] | stored["val"] == train and len(stored["train"]) == 45 and len(stored["val"]) == 5
    assert documents(cache, "test") == [grey(image) for image in batches["test_batch"][0]]
    assert all(documents(cache, split) == documents(other, split) for split in cache.splits)
    assert cache.manifest.longest == 1024 and len(cache.manifest.classes) == 10


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, refused):
    folder = cifar_folder(tmp_path, monkeypatch)
    ran = tmp_path / "ran"
    command = f"touch {ran}".encode()
    evil = b"cposix\nsystem\nU" + bytes([len(command)]) + command + b"\x85R."
    (folder / "data_batch_3").write_bytes(evil)
    monkeypatch.setitem(files.MD5, "data_batch_3", hashlib.md5(evil).hexdigest())
    error = refused("image", "--source", folder, "--out", tmp_path / "out")
    assert "data_batch_3 is no batch of CIFAR-10" in error and "asks for posix.system" in error
    assert not ran.exists()


def test_fashion_mnist_says_that_it_stands_in(tmp_path):
    for split, count in (("train", 40), ("val", 20)):
        for name, array in zip(FASHION_MNIST_FILES[split], pictures(count, count), strict=True):
            (tmp_path / name).write_bytes(idx(array))
    cache = prepared("fashion-mnist", "--source", tmp_path, tmp_path / "out")
    assert cache.manifest.title.startswith("Fashion-MNIST, a stand-in for CIFAR-10, incomplete: train has 36 of 54,000")
    assert (cache.manifest.task, cache.manifest.longest) == ("image", 784)
    images, labels = pictures(20, 20)
    assert documents(cache, "test") == [image.astype(np.uint8).tobytes() for image in images]
    assert cache.splits["test"].labels.tolist() == labels.tolist()
    images, _ = pictures(40, 40)
    kept = documents(cache, "train") + documents(cache, "val")
    assert len(documents(cache, "val")) == 4
    assert sorted(kept) == sorted(image.astype(np.uint8).tobytes() for image in images)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def replace_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = text
    path.write_text("".join(lines))


def test_damaged_listops_name_file_and_line(tmp_path, refused):
    for case, (split, number, text, message) in enumerate(
        [
            ("train", 31, "( ( ( [MIN 3 ) 4", "has 1 columns, expected 2; is the file truncated?"),
            ("train", 5, "( ( ( [MIN 3 ) 4 ) ] )\t10\n", "the label is '10', expected 0 to 9"),
            ("train", 6, "( ( ( [AVG 3 ) 4 ) ] )\t3\n", "'[AVG' is no ListOps symbol"),
            ("train", 6, "( ( ( [MIN 3 ) 44 ) ] )\t3\n", "'44' is no ListOps symbol"),
            ("train", 7, "( ( [MIN 3 ) 4 )\t3\n", "1 operators, 0 of them closed"),
            ("val", 3, "( ( ( [MIN 3 ) 4 ) ] )\t4\n", "Target is 4, and the value of Source 3"),
            ("test", 3, "( ( [MIN 3 ) 4 )\t4\n", "1 operators are not closed"),
        ]
    ):
        root = tmp_path / str(case)
        listops_release(root)
        table = root / "listops-1000" / f"basic_{split}.tsv"
        replace_line(table, number, text)
        error = refused("listops", "--source", root, "--out", root / "out")
        assert f"{table} line {number}" in error and message in error, error
        assert not (root / "out" / "manifest.json").exists()
    replace_line(table, 1, "( 3 )\t3\n")
    assert "does not begin with the header" in refused("listops", "--source", root, "--out", root / "out")


def test_damaged_retrieval_and_pathfinder_name_file_and_line(tmp_path, refused):
    aan_release(tmp_path)
    table = tmp_path / "tsv_data" / "new_aan_pairs.eval.tsv"
    for line, message in (
        (b"1\ta\tb\tonly one text", "has 4 columns, expected 5; is the file truncated?"),
        (b"2.0\ta\tb\tone\ttwo\n", "the label is '2.0', expected 0 to 1"),
        (b"0.5\ta\tb\tone\ttwo\n", "the label is '0.5', expected 0 to 1"),
        (b"nan\ta\tb\tone\ttwo\n", "the label is 'nan', expected 0 to 1"),
    ):
        table.write_bytes(b"1\ta\tb\tone\ttwo\n" + line)
        error = refused("retrieval", "--source", tmp_path, "--out", tmp_path / "aan")
        assert f"{table} line 2" in error and message in error

    pathfinder_release(tmp_path)
    metadata = tmp_path / "pathfinder32" / "curv_contour_length_14" / "metadata" / "2.npy"
    whole = metadata.read_text()
    command = ("pathfinder", "--source", tmp_path, "--out", tmp_path / "pathfinder")
    for line, message in (
        ("imgs/2 sample_2.png 2 2 1.0 14 4 2 0.5 1 1\n", "line 3: the label is '2', expected 0 to 1"),
        ("imgs/2 sample_9.png 2 1 1.0 14 4 2 0.5 1 1\n", "line 3 names"),
        ("imgs/2 sample_2.png 2\n", "line 3 has 3 columns, expected 11"),
        ("imgs/2 ../../../../x.png 2 1 1.0 14 4 2 0.5 1 1\n", "x.png, which lies outside of"),
        ("/etc passwd 2 1 1.0 14 4 2 0.5 1 1\n", "line 3 names /etc/passwd, which lies outside of"),
    ):
        replace_line(metadata, 3, line)
        error = refused(*command)
        assert str(metadata) in error and message in error
        metadata.write_text(whole)
    image = metadata.parents[1] / "imgs" / "2" / "sample_2.png"
    data = image.read_bytes()
    image.write_bytes(data[:-60])
    assert f"{image} is no complete image" in refused(*command)
    Image.new("RGB", (32, 32)).save(image)
    assert f"{image} is RGB (32, 32), expected 8-bit grey, 32×32" in refused(*command)
    image.write_bytes(data)
    with metadata.open("wb") as file:
        np.save(file, np.arange(300))
    assert f"{metadata} is no text" in refused(*command)
    metadata.rename(metadata.with_name("two.npy"))
    assert "two.npy: expected a number as the file's name" in refused(*command)


def test_a_table_that_ends_without_a_newline_is_warned_of(tmp_path, capsys):
    aan_release(tmp_path)
    table = tmp_path / "tsv_data" / "new_aan_pairs.eval.tsv"
    prepared("retrieval", "--source", tmp_path, tmp_path / "whole")
    assert "newline" not in capsys.readouterr().err
    table.write_bytes(table.read_bytes()[:-100])  # inside the second text of the last line
    cache = prepared("retrieval", "--source", tmp_path, tmp_path / "cut")
    error = capsys.readouterr().err
    assert error.count(f"warning: {table} line 2 ends without a newline; is the file truncated?\n") == 1
    assert cache.splits["val"].labels.tolist() == [0, 1]


def test_wrong_archives_name_both_digests(tmp_path, monkeypatch, refused):
    archive = tmp_path / "aclImdb_v1.tar.gz"
    imdb_archive(archive, list(reviews()))
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    error = refused("text", "--source", archive, "--out", tmp_path / "out")
    assert f"{archive} has the MD5 {digest}, expected 7c2ac02c03563afcf9b574c7e56c153a" in error
    folder = cifar_folder(tmp_path, monkeypatch)
    monkeypatch.undo()
    error = refused("image", "--source", folder, "--out", tmp_path / "out-image")
    assert "data_batch_1 has the MD5" in error and "expected c99cafc152244af753f735de768cd75f" in error


def test_absent_data_is_told_where_to_get(tmp_path, monkeypatch, refused):
    empty = tmp_path / "empty"
    empty.mkdir()
    for task, advice in {
        "text": "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        "retrieval": "lra_release.gz",
        "image": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "listops": "lra_release.gz",
        "pathfinder": "lra_release.gz",
    }.items():
        out = ("--out", tmp_path / task)
        assert advice in (error := refused(task, "--source", empty, *out)) and f"{empty} is empty" in error
        assert advice in (error := refused(task, "--source", tmp_path / "absent", *out)) and "does not exist" in error
        assert advice in (error := refused(task, "--source", tmp_path, *out)) and f"{tmp_path} holds no " in error
        if task not in ("listops", "pathfinder"):
            assert f"{task} needs --source" in (error := refused(task, *out)) and advice in error
    assert "apt install dataset-fashion-mnist" in refused("fashion-mnist", "--source", empty, "--out", tmp_path / "f")
    (tmp_path / "aclImdb" / "train" / "pos").mkdir(parents=True)
    (tmp_path / "aclImdb" / "train" / "pos" / "0_9.txt").write_text("good")
    assert "holds no reviews in train/neg" in refused("text", "--source", tmp_path, "--out", tmp_path / "text")
    os.mkfifo(tmp_path / "aclImdb" / "train" / "pos" / "1_9.txt")  # which nobody writes into
    assert "1_9.txt: is no regular file" in refused("text", "--source", tmp_path, "--out", tmp_path / "text")


def test_an_output_folder_is_never_mixed(tmp_path, refused, capsys):
    trees = tmp_path / "trees"
    listops_release(trees)
    listops_release(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    command = ("listops", "--source", trees, "--out", out)
    assert main([*map(str, command)]) == 0
    before = contents(out)
    aan_release(tmp_path)
    for arguments, message in (
        (("retrieval", "--source", tmp_path), "out holds a cache of the task listops, expected retrieval"),
        (("listops", "--source", tmp_path / "other"), f"--source {trees.resolve()} → {(tmp_path / 'other').resolve()}"),
        (("listops", *SMALL), "was begun with other settings"),
        (
            ("listops", *SMALL, "--source", trees),
            "--min-length, --max-length, --max-depth, --max-args is for generated",
        ),
        (("pathfinder", "--source", trees, "--target-contrast", "1"), "--target-contrast is for generated data"),
        (("pathfinder", "--source", trees, "--borders", "clipped"), "--borders is for generated data"),
    ):
        assert message in refused(*arguments, "--out", out)
    assert contents(out) == before
    assert main([*map(str, command)]) == 0 and "is complete already" in capsys.readouterr().out

    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"codec": "listops-0"}))
    assert "codec listops-0" in refused(*command)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / ".prepare" / "settings.json").unlink()
    assert "was prepared elsewhere" in refused(*command)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    assert "thesis holds other files" in refused("listops", "--source", trees, "--out", tmp_path / "thesis")
    (tmp_path / "file").touch()
    assert "file holds other files" in refused("listops", "--source", trees, "--out", tmp_path / "file")


def test_a_damaged_cache_is_made_anew_by_the_same_command(tmp_path, capsys):
    listops_release(tmp_path)
    out = tmp_path / "out"
    command = ["listops", "--source", str(tmp_path), "--out", str(out)]
    assert main(command) == 0
    before = contents(out)
    tokens = out / "train.tokens.npy"
    data = tokens.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        tokens.write_bytes(damaged)
        assert main(command) == 0
        assert "made anew: " in capsys.readouterr().err
        assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "is of format 2, expected 1"),
        ({"codec": "listops-9"}, "codec listops-9"),
        ({"task": "speech"}, "the task 'speech', expected one of listops, text"),
        ({"classes": ["0", "1"]}, "the files of train do not fit each other or manifest.json"),
        ({"longest": 3}, "the files of train do not fit each other or manifest.json"),
        ({"extra": 1}, "is no manifest of a token cache"),
    ],
)
def test_a_cache_is_checked_when_it_is_opened(tmp_path, change, message):
    listops_release(tmp_path)
    prepared("listops", "--source", tmp_path, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | change))
    with pytest.raises(DataError, match=message) as caught:
        open_cache(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_cache_that_is_not_whole_does_not_open(tmp_path):
    listops_release(tmp_path)
    out = tmp_path / "out"
    prepared("listops", "--source", tmp_path, out)
    labels = out / "val.labels.npy"
    data = labels.read_bytes()
    labels.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"val.labels.npy has 137 bytes, expected 138"):
        open_cache(out)
    labels.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"val.labels.npy is damaged: SHA-256"):
        open_cache(out).verify()
    labels.unlink()
    with pytest.raises(DataError, match=r"val.labels.npy has 0 bytes"):
        open_cache(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        open_cache(out)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"is not finished \(manifest.json is missing\)"):
        open_cache(out)
    with pytest.raises(DataError, match="holds no token cache"):
        open_cache(tmp_path / "absent")


def test_a_token_beyond_the_symbols_is_found_when_a_cache_is_opened(tmp_path):
    """In training its row of the embedding would not be there."""
    root = write_cache(tmp_path / "out", "listops")
    tokens = np.load(root / "val.tokens.npy", mmap_mode="r+")
    tokens[70] = 14
    tokens.flush()
    open_cache(root)
    tokens[[40, 70]] = 15, 200
    tokens.flush()
    with pytest.raises(DataError, match=r"val.tokens.npy holds 200 at position 70, expected symbols from 0 to 14"):
        open_cache(root)
    root = write_cache(tmp_path / "bytes", "text")
    assert open_cache(root).splits["train"].tokens.max() > 200


# ---------------------------------------------------------------------------------------------------------------------
# Interruption, and the command line
# ---------------------------------------------------------------------------------------------------------------------


def started(function: Callable[[], object]) -> int:
    """Call `function` in a process that leads a group of its own; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            function()
        finally:
            os._exit(1)
    return process


def killed_after(command: list[str], out: Path, pattern: str, count: int) -> set[Path]:
    """Kill a preparation and its workers when so many files match; returns those that do then."""
    process = started(lambda: main(command))
    deadline = time.monotonic() + PATIENCE
    while len(list(out.glob(pattern))) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="is not finished"):
        open_cache(out)
    return set(out.glob(pattern))


def test_killed_listops_continue_to_the_same_files(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(listops, "CHUNK", 100)
    monkeypatch.setattr(listops, "ROOTS", 1600)
    options = ["--samples", "3600", "200", "200", "--min-length", "300", "--workers", "2"]
    out, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    kept = killed_after(["listops", *options, "--out", str(out)], out, ".prepare/chunks/0*.npz", 3)
    assert 3 <= len(kept) < 40 and not list(out.glob("listops-1000/*.tsv"))
    error = refused("listops", *options[:-4], "--min-length", "400", "--out", out)
    assert "--min-length 300 → 400" in error and "name another output folder, or delete this one" in error

    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    drawn, real = [], listops.draw_chunk
    monkeypatch.setattr(listops, "draw_chunk", lambda *arguments: drawn.append(arguments[2]) or real(*arguments))
    assert main(["listops", *options[:-1], "1", "--out", str(out)]) == 0
    assert set(drawn) == set(range(40)) - {int(path.stem) for path in kept - {damaged}}
    assert main(["listops", *options, "--out", str(unbroken)]) == 0
    assert contents(out) == contents(unbroken)


def test_killed_pathfinder_continues_to_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH", 10)
    options = ["--images", "300", "--contour-length", "6", "--workers", "2"]
    out, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    metadata = "pathfinder32/curv_baseline/metadata/*.npy"
    kept = killed_after(["pathfinder", *options, "--out", str(out)], out, metadata, 4)
    assert 4 <= len(kept) < 30
    damages = (lambda data: b"", lambda data: data[:200], lambda data: data[:-1], lambda data: bytes(len(data)))
    damaged = sorted(kept)[:4]
    for metadata_file, damage in zip(damaged, damages, strict=True):  # as a crash of the machine may leave an image
        image = metadata_file.parents[1] / "imgs" / metadata_file.stem / "sample_3.png"
        image.write_bytes(damage(image.read_bytes()))
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["pathfinder", *options, "--out", str(out)]) == 0
    assert {path for path, written in times.items() if path.stat().st_mtime_ns != written} == set(damaged)
    assert main(["pathfinder", *options, "--out", str(unbroken)]) == 0
    assert contents(out) == contents(unbroken)


def test_generated_files_that_lost_lines_are_made_again(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(generate, "BATCH", 10)
    listops_table = "listops-1000/basic_val.tsv"
    metadata = "pathfinder32/curv_contour_length_14/metadata/1.npy"
    for task, options, name in (
        ("listops", (*SMALL, "--samples", "40", "20", "20"), listops_table),
        ("pathfinder", ("--images", "30"), metadata),
    ):
        out = tmp_path / task
        command = [task, *options, "--workers", "1", "--out", str(out)]
        assert main(command) == 0
        before = contents(out)
        lines = (out / name).read_bytes().splitlines(keepends=True)
        for damaged in (lines[:-3], lines[:-1] + [lines[-1][:-1]]):
            (out / name).write_bytes(b"".join(damaged))
            (out / "manifest.json").unlink()
            assert main(command) == 0
            assert contents(out) == before
    (out / "manifest.json").unlink()
    strange = (out / metadata).with_name("3.npy")
    strange.write_bytes((out / metadata).read_bytes())
    assert f"{strange} is not of the 30 images that are generated here; remove it" in refused(*command)


def test_a_disk_that_fills_up_at_the_end_leaves_no_cache(tmp_path, monkeypatch, capsys):
    listops_release(tmp_path)
    command = ("listops", "--source", tmp_path, "--out", tmp_path / "out")
    real = os.replace

    def full(*arguments):
        if "test.offsets.npy" in str(arguments[1]):
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, "replace", full)
    assert main([*map(str, command)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert (tmp_path / "out" / "train.tokens.npy").exists() and not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    assert main([*map(str, command)]) == 0
    prepared("listops", "--source", tmp_path, tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_two_runs_do_not_share_a_folder(tmp_path, refused, monkeypatch):
    from tools.prepared_folder import owned

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    listops_release(tmp_path)
    with owned(tmp_path / "out" / ".prepare"):
        assert "another run is preparing" in refused("listops", "--source", tmp_path, "--out", tmp_path / "out")


def test_it_runs_by_path_and_as_a_module(tmp_path):
    """By path, in an interpreter that knows nothing of the repository."""
    module = subprocess.run(
        [PYTHON, "-m", "tools.prepare_lra", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python tools/prepare_lra.py text --source aclImdb_v1.tar.gz --out data/imdb" in module.stdout
    script = run_tool("tools/prepare_lra.py", "text", "--out", tmp_path)
    assert script.returncode == 2 and not script.stdout
    assert script.stderr.startswith("error: text needs --source: download http") and script.stderr.count("\n") == 1


@pytest.mark.slow  # the same lines as prepare_lra's, and an interpreter that imports torch
def test_prepare_imagenet_runs_by_path():
    script = run_tool("tools/prepare_imagenet.py", "--help")
    assert script.returncode == 0 and script.stdout.startswith("usage:")


def test_ctrl_c_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.prepare_lra.prepare", interrupted)
    assert main(["listops", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues from here\n"
