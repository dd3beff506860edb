"""The test sets that ImageNet models are published with, on stand-in folders: mapping, arithmetic, files.

pytest tests/test_published_benchmarks.py
"""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import folder_of, run, run_main
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import engine.published
import main
from config import ConfigError, image_size, load_config
from data.sources.base import DataError
from data.test_sets import ALEXNET_ERRORS, EXTRA_CORRUPTIONS, PUBLISHED_IMAGES, imagenet_ids, read_real_labels
from data.transforms import evaluation_transform
from engine.evaluation import EvaluatedModel
from engine.published import corruption_score
from logger import get_logger
from models import build_model
from utils.checkpoints.writing import save_checkpoint
from utils.metrics import Accuracy

IDS = imagenet_ids()
PARTS = [f"{corruption}/{severity}" for corruption in ALEXNET_ERRORS for severity in range(1, 6)]


class Oracle(nn.Module):
    """Reads a class index from an image's colour (red + 256·green); a class's logit falls with its distance from it."""

    derived_entries, unused_released_parameters = (), ()

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, num_classes)

    def forward(self, x):
        mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
        red, green, _ = ((x[:, :, 0, 0] * std + mean) * 255).round().T
        return -(torch.arange(float(self.head.out_features)) - (red + 256 * green)[:, None]).abs()


@pytest.fixture
def evaluate(tiny, monkeypatch):
    """Evaluate the oracle through main.py's `--eval`; returns what its JSON file says."""
    monkeypatch.setattr(engine.published, "build_model", lambda config, num_classes=None: Oracle(num_classes))

    def run_it(benchmark: str, root: Path, *, classes: list[str] | None = None, options: str = "") -> dict:
        path = tiny.parent / "weights.pth"
        save_checkpoint({"model": Oracle(len(classes or IDS)).state_dict(), "classes": classes}, path)
        run(
            tiny,
            f"DATA.DATASET imagenet DATA.DATA_PATH {root} EVAL_MODE True MODEL.RESUME {path} TEST.BENCHMARK {benchmark}"
            f" DATA.BATCH_SIZE 64 {options}",
        )
        return json.loads((folder_of(tiny) / f"eval_{benchmark}.json").read_text())

    return run_it


def draw(path: Path, code: int) -> None:
    """An image that makes the oracle say class `code`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (code % 256, code // 256, 0)).save(path)


def csv_rows(tiny: Path, benchmark: str) -> list[dict[str, str]]:
    with (folder_of(tiny) / f"eval_{benchmark}_per_class.csv").open() as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# Mapping
# ---------------------------------------------------------------------------------------------------------------------


def test_the_folders_of_v2_are_numbers_and_not_in_alphabetical_order(evaluate, tiny, tmp_path):
    for label in (0, 1, 2, 9, 10, 100, 999):  # alphabetically 0, 1, 10, 100, 2, …
        draw(tmp_path / f"v2/{label}/a.png", label)
    draw(tmp_path / "v2/10/b.png", 13)  # wrong at 1, right at 7
    draw(tmp_path / "v2/10/c.png", 12)  # wrong at 1, among the best five
    result = evaluate("v2", tmp_path / "v2")
    assert [result["result"][key] for key in ("images", "correct1", "correct5")] == [9, 7, 8]
    assert result["classes"] == 1000 and not result["restricted"] and not result["as_published"]
    assert any("9 images instead of the published 10000" in remark for remark in result["remarks"])
    assert any(f"993 of 1000 classes have no image ({IDS[3]}, " in remark for remark in result["remarks"])
    row = csv_rows(tiny, "v2")[10]
    assert list(row.values()) == [
        "10",
        IDS[10],
        "brambling, Fringilla montifringilla",
        "3",
        "1",
        "2",
        "33.333",
        "50.000",
    ]


def test_a_whole_benchmark_has_no_remarks(evaluate, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED_IMAGES, "v2", 1000)
    for label in range(1000):
        draw(tmp_path / f"v2/{label}/a.png", label)
    result = evaluate("v2", tmp_path / "v2")
    assert result["result"]["correct1"] == 1000 and result["as_published"] and not result["remarks"]


@pytest.mark.parametrize("benchmark", ["a", "r"])
def test_a_and_r_let_only_their_own_200_classes_answer(evaluate, tiny, tmp_path, benchmark):
    listed = Path(timm.__file__).parent / f"data/_info/imagenet_{benchmark}_indices.txt"
    own = [int(line) for line in listed.read_text().split()]
    assert len(own) == 200
    foreign = next(code for code in range(own[3] + 1, 1000) if code not in own)
    assert foreign - 1 in own  # the nearest class of the benchmark's
    for code in own[:8]:
        draw(tmp_path / f"set/{IDS[code]}/a.png", code)
    draw(tmp_path / f"set/{IDS[foreign - 1]}/foreign.png", foreign)  # right only because class `foreign` may not answer
    draw(tmp_path / f"set/{IDS[own[0]]}/wrong.png", own[-1])
    result = evaluate(benchmark, tmp_path / "set")
    assert result["restricted"] and result["classes"] == 200
    assert result["result"]["images"] == 10 and result["result"]["correct1"] == 9
    rows = csv_rows(tiny, benchmark)
    assert [row["class"] for row in rows] == [IDS[code] for code in own]
    assert [rows[0][key] for key in ("n", "correct_top1", "accuracy")] == ["2", "1", "50.000"]
    assert rows[-1]["accuracy"] == ""  # no image
    with np.load(folder_of(tiny) / f"eval_{benchmark}_predictions.npz") as stored:
        assert stored["classes"].tolist() == [IDS[code] for code in own] and stored["top5"].max() < 200


def test_sketch_maps_ids_to_a_model_with_its_own_order_of_classes(evaluate, tmp_path):
    classes = [IDS[7], IDS[2], IDS[400], IDS[999], IDS[0]]
    for output, name in enumerate(classes):
        draw(tmp_path / f"sketch/{name}/a.png", output)
    draw(tmp_path / f"sketch/{IDS[2]}/b.png", 4)
    result = evaluate("sketch", tmp_path / "sketch", classes=classes)["result"]
    assert (result["images"], result["correct1"], result["top1"]) == (6, 5, 100 * 5 / 6)


def test_what_does_not_map_is_named(evaluate, tmp_path):
    draw(tmp_path / "good" / IDS[0] / "a.png", 0)
    for name in ("train", "val"):
        draw(tmp_path / "tree" / name / "a.png", 0)
    with pytest.raises(DataError, match=r"tree: 2 of 2 folders are no class of ImageNet-R .*\(train, val\); expected"):
        evaluate("r", tmp_path / "tree")
    with pytest.raises(DataError, match=rf"1 of 1 folders .*\({IDS[0]}\); expected a class index from 0 to 999"):
        evaluate("v2", tmp_path / "good")
    with pytest.raises(DataError, match=r"1 of its 2 classes are none of ImageNet's .*\(cat\).*--benchmark val"):
        evaluate("sketch", tmp_path / "good", classes=[IDS[0], "cat"])
    with pytest.raises(DataError, match=r"lacks 199 of the 200 classes of ImageNet-R"):
        evaluate("r", tmp_path / "good", classes=[IDS[0], IDS[1]])
    with pytest.raises(DataError, match=r"ImageNet-A: the folder '.*nowhere' does not exist; --data-path names"):
        evaluate("a", tmp_path / "nowhere")


def test_settings_that_contradict_a_benchmark_are_refused(tiny):
    for options, message in {
        "TEST.BENCHMARK imagenet": "'imagenet'.*expected one of val, real, v2, a, r, sketch, c",
        "TEST.BENCHMARK r": "add --eval",
        "TEST.BENCHMARK r EVAL_MODE True MODEL.RESUME x": "expected DATA.DATASET imagenet, received digits",
        "TEST.IMG_SIZE 50": "TEST.IMG_SIZE 50: image size 50×50 does not fit",
    }.items():
        with pytest.raises(ConfigError, match=message):
            main.check(load_config(str(tiny), options.split()))


# ---------------------------------------------------------------------------------------------------------------------
# ReaL
# ---------------------------------------------------------------------------------------------------------------------


def test_real_labels_are_sets_and_images_without_labels_do_not_count(evaluate, tiny, tmp_path):
    classes = list(IDS[:8])
    shown = [(0, 0), (1, 7), (1, 0), (0, 0), *((label, label) for label in range(2, 8))]
    for number, (label, code) in enumerate(shown, start=1):
        draw(tmp_path / f"imagenet/val/{IDS[label]}/ILSVRC2012_val_{number:08d}.png", code)
    labels = tmp_path / "real.json"  # right, right by the second label, wrong, and seven that are not counted
    labels.write_text(json.dumps([[0], [1, 7], [2], *[[]] * 7]))
    result = evaluate("real", tmp_path / "imagenet", classes=classes, options=f"TEST.REAL_LABELS {labels}")
    assert result["result"] == {"images": 3, "correct1": 2, "top1": 100 * 2 / 3, "unlabelled": 7}
    original = result["original_labels"]
    assert (original["images"], original["correct1"]) == (10, 8)
    rows = [list(row.values())[3:] for row in csv_rows(tiny, "real")[:3]]
    assert rows == [["1", "1", "", "100.000", ""], ["2", "1", "", "50.000", ""], ["0", "0", "", "", ""]]


def test_a_label_that_the_model_does_not_know_is_wrong_and_not_uncounted(tmp_path):
    path = tmp_path / "real.json"
    path.write_text("[[5], [0, 5], []]")
    sets = read_real_labels(str(path), [IDS[3], IDS[0]])
    assert sets == (frozenset({-1}), frozenset({1, -1}), frozenset())


def test_the_labels_that_come_with_timm_are_the_published_ones():
    sets = read_real_labels("", IDS)
    assert len(sets) == 50_000 and sum(map(bool, sets)) == 46_837


def test_labels_or_names_of_another_kind_are_refused(evaluate, tmp_path):
    draw(tmp_path / "own" / "val" / IDS[0] / "cat.png", 0)
    path = tmp_path / "real.json"
    for content, message in {"[[0, 1000]]": "from 0 to 999", "{": "expected a JSON list", "[1]": "expected"}.items():
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            evaluate("real", tmp_path / "own", classes=[IDS[0]], options=f"TEST.REAL_LABELS {path}")
    path.write_text("[[0]]")
    with pytest.raises(DataError, match=r"cat\.png: ReaL labels belong to file names such as ILSVRC2012_val"):
        evaluate("real", tmp_path / "own", classes=[IDS[0]], options=f"TEST.REAL_LABELS {path}")
    (tmp_path / "own/val" / IDS[0] / "cat.png").rename(tmp_path / "own/val" / IDS[0] / "ILSVRC2012_val_00000002.png")
    with pytest.raises(DataError, match="validation image 2 has no entry among the 1 ReaL labels"):
        evaluate("real", tmp_path / "own", classes=[IDS[0]], options=f"TEST.REAL_LABELS {path}")
    with pytest.raises(DataError, match="No such file"):
        evaluate("real", tmp_path / "own", classes=[IDS[0]], options="TEST.REAL_LABELS nowhere.json")


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions
# ---------------------------------------------------------------------------------------------------------------------


def corrupted(root: Path, errors: dict[str, int]) -> None:
    """Ten images of two classes for every part, of which the given number is wrong."""
    for part, wrong in errors.items():
        for i in range(10):
            label = i % 2
            draw(root / part / IDS[label] / f"{i}.png", label if i >= wrong else 1 - label)


def test_mce_is_the_mean_ratio_to_alexnets_published_errors(evaluate, tmp_path):
    errors = {part: i % 9 for i, part in enumerate(PARTS)}
    extra = {f"extra/{EXTRA_CORRUPTIONS[0]}/{severity}": 10 for severity in range(1, 6)}
    grouped = {f"noise/{part}" if "noise" in part else part: wrong for part, wrong in errors.items()}
    corrupted(tmp_path / "c", grouped | extra)
    result = evaluate("c", tmp_path / "c", classes=list(IDS[:2]))
    ratios, means = [], []
    for corruption, alexnet in ALEXNET_ERRORS.items():
        percent = [10 * errors[f"{corruption}/{severity}"] for severity in range(1, 6)]
        ratios.append(sum(percent) / 5 / alexnet)
        means.append(sum(percent) / 5)
        assert result["corruptions"][corruption]["error"] == pytest.approx(means[-1])
    assert result["result"]["mce"] == pytest.approx(100 * sum(ratios) / 15)
    assert result["result"]["mean_error"] == pytest.approx(sum(means) / 15)
    assert result["result"]["images"] == 750 and result["result"]["correct1"] == 750 - sum(errors.values())
    assert (
        result["corruptions"]["speckle_noise"]["error"] == 100 and not result["corruptions"]["speckle_noise"]["in_mce"]
    )
    assert result["corruptions"]["fog"]["severities"]["3"]["correct1"] == 10 - errors["fog/3"]


def test_alexnet_itself_has_an_mce_of_100():
    parts = {
        f"{corruption}/{severity}": Accuracy(1000, round(10 * (100 - error)), 0, 0, 0.0)
        for corruption, error in ALEXNET_ERRORS.items()
        for severity in range(1, 6)
    }
    assert corruption_score(parts).mce == pytest.approx(100)
    assert corruption_score(parts).mean_error == pytest.approx(sum(ALEXNET_ERRORS.values()) / 15)


def test_a_missing_part_is_named_and_there_is_no_mce(evaluate, tmp_path, log):
    corrupted(tmp_path / "c", dict.fromkeys([part for part in PARTS if part != "frost/4"], 5))
    result = evaluate("c", tmp_path / "c", classes=list(IDS[:2]))
    assert result["result"]["mce"] is None and result["result"]["mean_error"] is None
    assert result["corruptions"]["frost"]["error"] is None and result["corruptions"]["fog"]["error"] == 50
    assert not result["as_published"] and "1 of the 75 parts are missing (frost/4): there is no mCE" in log.text
    assert "no mCE; 740 images, top-1 50.000 %" in log.text


def test_a_folder_without_corruptions_says_what_it_holds(evaluate, tmp_path):
    draw(tmp_path / "c" / "gausian_noise" / "1" / IDS[0] / "a.png", 0)
    with pytest.raises(DataError, match=r"no corruption of ImageNet-C; expected .*it holds gausian_noise"):
        evaluate("c", tmp_path / "c", classes=[IDS[0]])


def test_corrupted_images_of_the_models_size_are_taken_as_they_are(tiny):
    config = load_config(str(tiny), ["DATA.IMG_SIZE", "224"])
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(
        evaluation_transform(config, image_size(config), cropped=True)(image).permute(1, 2, 0), pixels
    )
    assert not np.array_equal(evaluation_transform(config, image_size(config))(image).permute(1, 2, 0), pixels)
    assert evaluation_transform(config, image_size(config), cropped=True)(image.resize((256, 256))).shape == (
        3,
        224,
        224,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Mirror images, other crops and sizes
# ---------------------------------------------------------------------------------------------------------------------


class LeftColumn(nn.Module):
    """Logits: the left column's first three channels, times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images[:, :, 0, 0] * self.weight


def test_flip_is_the_mean_of_the_probabilities_of_both_images():
    images = torch.randn(4, 3, 5, 6)
    expected = (images[:, :, 0, 0].softmax(1) + images[:, :, 0, -1].softmax(1)) / 2
    assert torch.allclose(EvaluatedModel(LeftColumn(), flip=True)(images).softmax(1), expected, atol=1e-6)
    # of the kept outputs alone: the others take no part in the softmax
    kept = images[:, [2, 0]]
    expected = (kept[:, :, 0, 0].softmax(1) + kept[:, :, 0, -1].softmax(1)) / 2
    assert torch.allclose(EvaluatedModel(LeftColumn(), [2, 0], flip=True)(images).softmax(1), expected, atol=1e-6)


def test_flip_through_the_command_changes_what_is_said(evaluate, tmp_path):
    path = tmp_path / f"sketch/{IDS[1]}/a.png"
    draw(path, 1)
    image = Image.open(path).copy()
    image.paste((6, 0, 0), (16, 0, 32, 32))  # the oracle looks at the left: 1 as it is, 6 mirrored
    image.save(path)
    classes = list(IDS[:8])
    assert evaluate("sketch", tmp_path / "sketch", classes=classes)["result"]["loss"] < 1
    result = evaluate("sketch", tmp_path / "sketch", classes=classes, options="TEST.FLIP True")
    code = torch.arange(8.0)
    mean = ((-(code - 1).abs()).softmax(0) + (-(code - 6).abs()).softmax(0)) / 2
    assert result["flip"] and result["result"]["loss"] == pytest.approx(-mean[1].log().item(), rel=1e-5)


def test_the_crop_ratio_decides_what_is_cropped(tiny):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    config = load_config(str(tiny), "DATA.IMG_SIZE 64 TEST.CROP_RATIO 0.8".split())
    expected = np.asarray(image.resize((80, 80), Image.Resampling.BICUBIC))[8:72, 8:72]
    assert np.array_equal(evaluation_transform(config, image_size(config))(image).permute(1, 2, 0), expected)
    whole = load_config(str(tiny), "DATA.IMG_SIZE 64 TEST.CROP_RATIO 1".split())
    uncropped = load_config(str(tiny), "DATA.IMG_SIZE 64 TEST.CROP False".split())
    assert torch.equal(
        evaluation_transform(whole, image_size(whole))(image),
        evaluation_transform(uncropped, image_size(uncropped))(image),
    )


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny"])
def test_another_size_resizes_the_position_tables_and_says_so(tiny, log, type_name):
    model = f"MODEL.TYPE {type_name} MODEL.DROP_PATH_RATE 0"
    config = load_config(str(tiny), model.split())
    path = tiny.parent / "weights.pth"
    save_checkpoint({"model": build_model(config, 10).state_dict()}, path)
    command = f"{model} DATA.BATCH_SIZE 256 EVAL_MODE True MODEL.RESUME {path}"
    if type_name == "pola_pvt_tiny":
        command += " TEST.IMG_SIZE [64,32]"
        expected = "block1.0.attn.positional_encoding: 8×8 resized to 16×8"
    else:
        command += " TEST.IMG_SIZE 64"
        expected = "layers.0.blocks.0.attn.positional_encoding: 8×8 resized to 16×16"
    run(tiny, command)
    assert expected in log.text and "355 images, top-1" in log.text
    result = json.loads((folder_of(tiny) / "eval_val.json").read_text())
    assert result["image_size"] == ([64, 32] if type_name == "pola_pvt_tiny" else [64, 64])


# ---------------------------------------------------------------------------------------------------------------------
# Processes and formats
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawings(tmp_path):
    """37 images of four classes as class folders and as a zip file, and a tiny model of these classes."""
    classes = [IDS[2], IDS[9], IDS[10], IDS[100]]
    generator = np.random.default_rng(0)
    for i in range(37):
        path = tmp_path / "folder" / classes[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "zip").mkdir()
    lines = []
    with zipfile.ZipFile(tmp_path / "zip/val.zip", "w") as archive:
        for path in sorted((tmp_path / "folder").rglob("*.png")):
            name = f"{path.parent.name}/{path.name}"
            archive.write(path, name)
            lines.append(f"{name}\t{3 - classes.index(path.parent.name)}\n")  # labels of its own
    (tmp_path / "zip/val_map.txt").write_text("".join(lines))
    return classes


@pytest.fixture
def sketch_files(tiny, tmp_path, drawings):
    """Evaluate the tiny model as -Sketch from a format, with a batch size and a number of processes (0: in this one);
    returns its JSON file, its table, and its predictions."""
    torch.manual_seed(0)
    model = build_model(load_config(str(tiny)), 4)
    nn.init.normal_(model.head.weight)  # so that it does not say the same about every image
    path = tmp_path / "weights.pth"
    save_checkpoint({"model": model.state_dict(), "classes": drawings, "epoch": 7}, path)

    def evaluate(kind: str, batch: int, processes: int = 0) -> tuple[dict, str, dict]:
        out = tmp_path / f"out-{kind}-{processes}"
        words = f"--cfg {tiny} --eval --benchmark sketch --data-path {tmp_path / kind} --resume {path} --output {out}"
        words += f" --batch-size {batch}" + (" --zip" if kind == "zip" else "") + " --opts DATA.DATASET imagenet"
        if processes:
            run_main(*words.split(), processes=processes)
        else:
            main.main(main.parse_command_line(words.split()))
            get_logger().handlers.clear()
        folder = out / "tiny/default"
        with np.load(folder / "eval_sketch_predictions.npz") as stored:
            arrays = dict(stored)
        result = json.loads((folder / "eval_sketch.json").read_text())
        return result, (folder / "eval_sketch_per_class.csv").read_text(), arrays

    return evaluate


def require_equal(found: tuple[dict, str, dict], expected: tuple[dict, str, dict]) -> None:
    (result, table, arrays), (expected_result, expected_table, expected_arrays) = found, expected
    for key in ("images", "correct1", "correct5", "non_finite", "top1", "top5"):
        assert result["result"][key] == expected_result["result"][key], key
    assert result["result"]["loss"] == pytest.approx(expected_result["result"]["loss"], rel=1e-6)
    assert result["subject"] == expected_result["subject"] and table == expected_table
    for name in ("index", "label", "top5", "classes", "epoch", "checkpoint"):
        assert np.array_equal(arrays[name], expected_arrays[name]), name
    assert np.allclose(arrays["probability"], expected_arrays["probability"], atol=1e-6)
    names = [name.removeprefix("val.zip:") for name in arrays["file"]]
    assert names == [name.removeprefix("val.zip:") for name in expected_arrays["file"]]


def test_batch_sizes_and_formats_give_the_same_files(sketch_files):
    one = result, _, arrays = sketch_files("folder", 37)
    assert 0 < result["result"]["correct1"] < 37 and result["result"]["images"] == 37 and arrays["epoch"] == 7
    assert arrays["file"][0] == f"{IDS[2]}/0.png"
    require_equal(sketch_files("zip", 8), one)


@pytest.mark.slow
def test_every_number_of_processes_gives_the_same_files(sketch_files):
    """tests/test_evaluation.py compares them for the data set's own images in every run of the suite."""
    one = sketch_files("folder", 37)
    require_equal(sketch_files("zip", 8, processes=2), one)
    require_equal(sketch_files("folder", 5, processes=3), one)


def test_both_sets_of_weights_get_files_and_the_console_line_is_in_the_json(tiny, log, monkeypatch):
    monkeypatch.setattr(main, "train_one_epoch", lambda *arguments, **named: None)
    run(tiny, "EMA.ENABLE True EMA.DECAY 0.9 TRAIN.EPOCHS 1")
    log.clear()
    checkpoint = folder_of(tiny) / "ckpt_epoch_1.pth"
    run(tiny, f"EVAL_MODE True MODEL.RESUME {checkpoint}")
    for suffix, weights, title in (("", "model", ""), ("_ema", "ema", "EMA weights of ")):
        stored = json.loads((folder_of(tiny) / f"eval_val{suffix}.json").read_text())
        subject, result = stored["subject"], stored["result"]
        assert (subject["weights"], subject["epoch"], subject["checkpoint"]) == (weights, 1, str(checkpoint))
        line = (
            f"evaluated {title}{checkpoint} (sha256 {subject['sha256']}), {subject['precision']}: 355 images, top-1"
            f" {result['top1']:.3f} %, top-5 {result['top5']:.3f} %, loss {result['loss']:.4f}"
        )
        assert line in log.text
        assert stored["versions"].keys() >= {"python", "torch", "timm"} and stored["config"]["TEST.CROP_RATIO"] == 0.875
        assert (folder_of(tiny) / f"eval_val{suffix}_predictions.npz").exists()
        assert (folder_of(tiny) / f"eval_val{suffix}_per_class.csv").exists()
