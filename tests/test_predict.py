"""Predictions by tools/predict.py: the same numbers as --eval, under names that people read.

pytest tests/test_predict.py
"""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import RELEASED, config_file, fill_with_recipe, run_tool
from PIL import Image
from timm.data import ImageNetInfo

from config import load_config, make_plan
from engine.published import run_evaluation
from models import build_model
from tools.predict import main
from utils.checkpoints.writing import save_checkpoint

SMALL = (
    "MODEL.TYPE pola_swin DATA.IMG_SIZE 32 MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,1] MODEL.SWIN.NUM_HEADS [1,2]"
    " MODEL.LA.ATTN_TYPE LS DATA.NUM_WORKERS 0 DATA.BATCH_SIZE 5"
)
SMALL_PP = (
    "MODEL.TYPE pola_pp MODEL.PPP.EMBED_DIMS [8,16] MODEL.PPP.DEPTHS [1,1] MODEL.PPP.NUM_HEADS [1,2]"
    " MODEL.PPP.STAGE_TYPES LS MODEL.PPP.PROJECTION 24 MODEL.PPP.MLP_RATIOS [2,2] MODEL.PPP.LAYER_INIT_VALUES [1,1]"
)
SMALL_NALA = f"{SMALL_PP.replace('pola_pp', 'nalaformer')} TEST.RESIZE shorter"
ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox")


def write_checkpoint(path, classes, *, num_classes=None, options="", **more):
    """A checkpoint with the recipe's weights and these classes."""
    config = load_config(config_file("pola_swin_t"), (SMALL + " " + options).split())
    model = fill_with_recipe(build_model(config, num_classes or len(classes)))
    save_checkpoint({"model": model.state_dict(), "classes": classes, "config": config.dump(), **more}, path)
    return path


def write_image(path, seed, size=(50, 40)):
    """A smooth random image that is not square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """An image folder with a val/ of six classes."""
    root = tmp_path_factory.mktemp("animals")
    for label, name in enumerate(ANIMALS):
        for i in range(3):
            write_image(root / "val" / name / f"{i}.png", 10 * label + i, size=(50 + 7 * i, 40 + label))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "max_acc.pth", list(ANIMALS))


def predictions(capsys, *arguments, code=0):
    """The parsed JSON of a run that exits with `code`."""
    assert main([*map(str, arguments), "--format", "json", "--device", "cpu"]) == code
    return json.loads(capsys.readouterr().out)


# -- numbers


@pytest.mark.parametrize(
    "options", ["", "TEST.RESIZE shorter", "TEST.CROP False TEST.IMG_SIZE 64", SMALL_PP, SMALL_NALA]
)
def test_predictions_are_those_of_the_evaluation(animals, capsys, tmp_path, options):
    path = write_checkpoint(tmp_path / "model.pth", list(ANIMALS), options=options)
    result = predictions(capsys, "--checkpoint", path, animals / "val", "--topk", "6", "--batch-size", "4")
    rows = result["predictions"]
    truth = [row["file"].split("/")[-2] for row in rows]
    ranked = [[entry["class"] for entry in row["classes"]] for row in rows]
    probability = [
        next(entry["probability"] for entry in row["classes"] if entry["class"] == name)
        for row, name in zip(rows, truth, strict=True)
    ]
    evaluation = f"{SMALL} {options} EVAL_MODE True MODEL.RESUME {path} DATA.DATA_PATH {animals}"
    evaluation += f" OUTPUT {tmp_path}"
    config = load_config(config_file("pola_swin_t"), evaluation.split())
    expected = run_evaluation(config, make_plan(config), torch.device("cpu"))
    assert len(rows) == expected.images == 18
    hits = [sum(name in names[:k] for name, names in zip(truth, ranked, strict=True)) for k in (1, 5)]
    assert [100 * count / 18 for count in hits] == pytest.approx([expected.top1, expected.top5])
    assert -sum(map(math.log, probability)) / 18 == pytest.approx(expected.loss, rel=1e-5)


def test_averaged_weights_by_option_and_any_batch_size(animals, capsys, tmp_path):
    config = load_config(config_file("pola_swin_t"), SMALL.split())
    average = {name: value / 2 for name, value in fill_with_recipe(build_model(config, 6)).state_dict().items()}
    path = write_checkpoint(tmp_path / "model.pth", list(ANIMALS), model_ema=average)
    other = write_checkpoint(tmp_path / "other.pth", list(ANIMALS))
    save_checkpoint({"model": average, "classes": list(ANIMALS), "config": config.dump()}, other)
    averaged = predictions(capsys, "--checkpoint", path, "--ema", animals, "--batch-size", "7")
    alone = predictions(capsys, "--checkpoint", other, animals, "--batch-size", "1")
    last = predictions(capsys, "--checkpoint", path, animals)
    first, second, third = (
        torch.tensor([[entry["probability"] for entry in row["classes"]] for row in result["predictions"]])
        for result in (averaged, alone, last)
    )
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, third, atol=1e-3)
    assert averaged["weights"] == "model_ema" and last["weights"] == "model"


def test_probabilities_are_sorted_and_of_all_classes_sum_to_one(checkpoint, animals, capsys):
    rows = predictions(capsys, "--checkpoint", checkpoint, animals, "--topk", "100")["predictions"]
    for row in rows:
        values = [entry["probability"] for entry in row["classes"]]
        assert len(values) == len(ANIMALS) and values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


# -- names


def test_wordnet_ids_are_shown_in_imagenets_words(capsys, tmp_path):
    path = write_checkpoint(tmp_path / "model.pth", ["n01440764", "n02099601", "n99999999"])
    image = write_image(tmp_path / "image.png", 1)
    (row,) = predictions(capsys, "--checkpoint", path, image)["predictions"]
    words = {entry["label"]: entry["class"] for entry in row["classes"]}
    assert words == {0: "tench, Tinca tinca", 1: "golden retriever", 2: "n99999999"}


def test_a_thousand_classes_without_names_are_imagenets(capsys, tmp_path):
    path = write_checkpoint(tmp_path / "model.pth", None, num_classes=1000)
    (row,) = predictions(capsys, "--checkpoint", path, write_image(tmp_path / "a.png", 1), "--topk", "1000")[
        "predictions"
    ]
    words = {entry["label"]: entry["class"] for entry in row["classes"]}
    assert [words[i] for i in range(1000)] == ImageNetInfo().label_descriptions()


def test_other_classes_without_names_are_numbered(capsys, tmp_path):
    (row,) = predictions(capsys, "--checkpoint", RELEASED, write_image(tmp_path / "a.png", 1))["predictions"]
    assert all(entry["class"] == f"class {entry['label']}" for entry in row["classes"])


# -- output


def test_a_folder_is_searched_and_hidden_files_are_left_out(checkpoint, capsys, tmp_path):
    for name in ("b/deep/2.png", "a/1.PNG", "a/.hidden/3.png", "a/notes.png.txt"):
        write_image(tmp_path / "in" / name, 1) if name.lower().endswith("png") else (tmp_path / "in" / name).write_text(
            "no image"
        )
    rows = predictions(capsys, "--checkpoint", checkpoint, tmp_path / "in")["predictions"]
    assert [row["file"] for row in rows] == [str(tmp_path / "in" / name) for name in ("a/1.PNG", "b/deep/2.png")]


def test_table_and_csv_say_the_same_as_json(checkpoint, animals, capsys, tmp_path):
    arguments = ["--checkpoint", checkpoint, animals / "val" / "bee", "--topk", "2"]
    expected = predictions(capsys, *arguments)["predictions"]
    assert main([*map(str, arguments), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["file"], int(row["rank"]), int(row["label"]), row["class"]) for row in rows] == [
        (row["file"], rank, entry["label"], entry["class"])
        for row in expected
        for rank, entry in enumerate(row["classes"], start=1)
    ]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        [entry["probability"] for row in expected for entry in row["classes"]], rel=1e-5
    )
    assert main([*map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = expected[0]["classes"][0]
    assert lines[0] == expected[0]["file"] and len(lines) == 3 * len(expected)
    assert lines[1].split("%")[1].strip() == best["class"]
    assert float(lines[1].split("%")[0]) == pytest.approx(100 * best["probability"], abs=0.005)


def test_the_ending_of_the_output_chooses_the_format(checkpoint, animals, capsys, tmp_path):
    for name, start in (("out.csv", "file,rank,label"), ("out.json", "{"), ("out.txt", str(animals))):
        assert main(["--checkpoint", str(checkpoint), str(animals), "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text().startswith(start)
    assert capsys.readouterr().out == ""


# -- mistakes


def test_unreadable_images_are_named_and_the_rest_goes_on(checkpoint, capsys, tmp_path):
    good = [write_image(tmp_path / f"{i}.png", i) for i in range(3)]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:-40])
    files = [good[0], tmp_path / "text.png", good[1], tmp_path / "cut.png", tmp_path / "absent.png", good[2]]
    arguments = ["--checkpoint", checkpoint, *files, "--format", "json", "--batch-size", "2"]
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [row["file"] for row in result["predictions"]] == [str(path) for path in good]
    assert [entry["file"] for entry in result["unreadable"]] == [str(files[i]) for i in (1, 3, 4)]
    lines = captured.err.splitlines()
    assert (
        lines[0] == f"unreadable: {files[1]}: not an image in any format that is read (JPEG, PNG, PPM, BMP, TIFF, WEBP)"
    )
    assert lines[2] == f"unreadable: {files[4]}: No such file or directory"
    assert lines[3] == "3 of 6 files are no complete images"
    whole = predictions(capsys, "--checkpoint", checkpoint, *good)["predictions"]
    for row, expected in zip(result["predictions"], whole, strict=True):  # the gaps moved no result to another file
        assert [entry["probability"] for entry in row["classes"]] == pytest.approx(
            [entry["probability"] for entry in expected["classes"]], abs=1e-6
        )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["--topk", "0"], "'0' is not a whole number from 1 on"),
        (["--device", "tpu"], "'tpu' cannot be used here: expected cpu"),
        (["--cfg", "nowhere.yaml"], "nowhere.yaml"),
        (["--opts", "TEST.CROP", "False"], "--opts belongs to --cfg"),
        (["--ema"], "holds no averaged weights"),
        (["--cfg", config_file("pola_pvt_t")], "does not fit PolaPVT of this configuration"),
        (["--output", "/nowhere/at/all.csv"], "/nowhere/at/all.csv"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(capsys, animals, checkpoint, arguments, expected):
    try:
        code = main(["--checkpoint", str(checkpoint), str(animals), *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and expected in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_a_folder_without_images_is_named(capsys, checkpoint, tmp_path):
    assert main(["--checkpoint", str(checkpoint), str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no images (.jpg, .jpeg," in capsys.readouterr().err


@pytest.mark.slow  # an interpreter of its own, for what the tests above call
def test_it_runs_as_a_script(checkpoint, animals, capsys):
    arguments = ["--checkpoint", str(checkpoint), str(animals / "val" / "ant"), "--batch-size", "1"]
    result = run_tool("tools/predict.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert main(arguments) == 0
    assert result.stdout == capsys.readouterr().out and result.stdout.count("%") == 15


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example: python tools/predict.py --checkpoint" in capsys.readouterr().out
