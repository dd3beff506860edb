"""The run report: what is read from a run folder, what is counted, and the page as a browser shows it.

pytest tests/test_report.py
"""

import json
import os
import re
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import TINY, TINY_NALA, TINY_PPP, folder_of, jpeg, run, run_tool, write_tiny
from lra_caches import write_cache
from test_lra import SHORT, lra

from benchmarks.report import write_metrics, write_predictions
from config import load_config
from data.sources.bundled import DigitsSource
from models import build_model
from tools import report
from tools.run_report.charts import chart
from tools.run_report.classes import by_class
from tools.run_report.examples import hardest
from tools.run_report.page import _profile, render
from tools.run_report.runs import find_runs, names_of, read_run
from utils.curves import METRICS, Line, Panel, series, training_panels
from utils.predictions import Predictions, read_predictions


def predictions(
    label: list[int], guesses: list[list[int]], classes: list[str], loss: list[float] | None = None
) -> Predictions:
    N = len(label)
    return Predictions(
        index=np.arange(N),
        label=np.array(label),
        top5=np.array(guesses),
        probability=np.full((N, len(guesses[0])), 0.5, dtype=np.float32),
        loss=np.array(loss or [1.0] * N, dtype=np.float32),
        file=np.array([f"val/{i}.png" for i in range(N)]),
        classes=tuple(classes),
        epoch=1,
        checkpoint="max_acc.pth",
    )


def store_arrays(path: Path, arrays: dict) -> None:
    """Write an .npz, whose arrays may also be called `file`, as an argument of numpy.savez is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array))


def digits_run(folder: Path, options: str = "", *, names: list[str] | None = None) -> Path:
    """A run folder over the digits, with a checkpoint of fresh weights and predictions as if it had made them."""
    folder.mkdir(parents=True)
    cfg = folder.parent / "tiny.yaml"
    cfg.write_text(TINY)
    config = load_config(str(cfg), options.split())
    write_metrics(folder, epochs=4, steps=22, print_freq=10)
    source = DigitsSource("val", (32, 32))
    write_predictions(folder, images=len(source.labels), classes=10)
    arrays = dict(np.load(folder / "predictions.npz"))
    label = np.array(source.labels)
    arrays["top5"] = (arrays["top5"] - arrays["label"][:, None] + label[:, None]) % 10
    arrays |= {"label": label, "file": np.array([source.name(i) for i in range(len(label))])}
    arrays["classes"] = np.array(names or list("0123456789"))
    store_arrays(folder / "predictions.npz", arrays)
    (folder / "config.yaml").write_text(config.dump())
    torch.save({"model": build_model(config, 10).state_dict(), "config": config.dump()}, folder / "max_acc.pth")
    start = {"started": "2026-01-02T03:04:05+00:00", "torch": "2.11.0", "device": "CPU, threads per process: 1"}
    (folder / "environment.json").write_text(json.dumps([start, start]))
    return folder


def run_of(folder: Path):
    return read_run(folder, folder.name)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_the_better_of_the_model_and_its_average_is_the_best(tmp_path):
    records = [("val", 40.25), ("ema", 48.625), ("val", 39.5), ("ema", 47.0)]
    lines = [{"kind": kind, "epoch": i // 2, "step": 10, "top1": top1} for i, (kind, top1) in enumerate(records)]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = render([read_run(folder, "run")])
    facts = dict(re.findall(r"<div><dt>(.*?)</dt>\s*<dd[^>]*>(.*?)</dd>", page, re.DOTALL))
    assert facts["best top-1"].startswith("48.62 %<small>average of the weights (EMA), validation after epoch 1<")
    assert facts["best top-1, the model"].startswith("40.25 %<small>after epoch 1<")
    assert facts["best top-1, EMA"].startswith("48.62 %<small>after epoch 1<")


def test_classes_are_counted_with_their_confusions_most_frequent_first():
    seen = predictions(
        [0, 0, 0, 1, 1, 1, 1], [[0, 1], [1, 0], [2, 1], [1, 0], [2, 0], [2, 1], [-1, -1]], ["a", "b", "c"]
    )
    result = by_class(seen)
    assert result.images.tolist() == [3, 4, 0] and result.correct.tolist() == [1, 1, 0]
    assert result.among_best.tolist() == [2, 2, 0]
    assert result.accuracy[:2].tolist() == pytest.approx([100 / 3, 25]) and np.isnan(result.accuracy[2])
    assert result.confusions == [(1, 2, 2), (0, 1, 1), (0, 2, 1)] and result.nothing == 1  # which is in no pair
    assert result.mostly_taken_for() == {1: (2, 2), 0: (1, 1)}
    assert result.f1.tolist() == pytest.approx([200 / 4, 200 / 6, 0])  # nothing finite is no answer


def test_blocks_of_a_large_matrix_hold_every_error():
    draw = np.random.default_rng(0)
    label, guess = draw.integers(0, 70, 3000), draw.integers(0, 70, 3000)
    result = by_class(predictions(label.tolist(), guess[:, None].tolist(), [str(i) for i in range(70)]))
    errors, size = result.error_blocks(8)
    assert errors.shape == (8, 8) and size == 9
    block = np.arange(70) // size
    expected = np.zeros((8, 8))
    for i, j in zip(label, guess, strict=True):
        if i != j:
            expected[block[i], block[j]] += 1
    images = np.bincount(block[label], minlength=8)
    assert np.allclose(errors, 100 * expected / images[:, None])


def test_the_hardest_images_are_the_wrong_ones_with_the_highest_loss():
    seen = predictions([0] * 5, [[1], [0], [1], [1], [0]], ["a", "b"], [2.0, 9.0, 3.0, float("nan"), 0.1])
    assert hardest(seen, 4) == [3, 2, 0, 1]


def test_short_training_lines_join_the_line_before_by_their_steps(tmp_path):
    lines = [(100, 2.0), (200, 1.0), (210, 6.0), (310, 4.0)]
    records = [{"kind": "train", "epoch": 0, "step": step, "loss": loss} for step, loss in lines]
    records.append({"kind": "val", "epoch": 0, "step": 310, "top1": 50.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    epochs, values = series(run_of(tmp_path).records, "train", "loss")
    assert (epochs * 310).tolist() == pytest.approx([100, 210, 310])
    assert values.tolist() == pytest.approx([2.0, (1.0 * 100 + 6.0 * 10) / 110, 4.0])


def test_training_time_and_waiting_are_sums_over_all_log_lines(tmp_path):
    write_metrics(tmp_path, epochs=3, steps=25, print_freq=10)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train":
            record |= {"step_time": 0.5, "data_time": 0.1, "images_per_s": 200.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    timing = run_of(tmp_path).timing
    assert timing == pytest.approx({"seconds": 75 * 0.5, "data_share": 0.2, "images_per_s": 200.0})


def test_a_line_breaks_where_values_are_not_finite_and_a_lone_value_is_a_dot():
    y = np.array([1.0, 2.0, np.nan, 3.0, np.nan, 5.0, 6.0])
    text = chart(Panel("Loss", "", [Line("run", np.arange(7.0), y)]))
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke: var\(--c0\)', text)
    assert path.count("M") == 3 and path.count("L") == 2
    assert len(re.findall(r"<use [^>]*fill: var\(--c0\)", text)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is damaged, absent or unknown
# ---------------------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    write_metrics(tmp_path / "run", epochs=1, steps=10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, text in (("silent", ""), ("garbage", "no json\n[1]\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    run = str(tmp_path / "run")
    cases = {
        (
            str(tmp_path / "empty"),
        ): "holds no run: no metrics.jsonl in it or below; main.py writes one into OUTPUT/NAME/TAG",
        (str(tmp_path / "absent"),): "does not exist; expected a run folder",
        (str(tmp_path / "file"),): "is no folder",
        (str(tmp_path / "silent"),): "is empty; the run has logged nothing",
        (str(tmp_path / "garbage"),): "none of its 2 lines can be read",
        (run, "--curves", "loss", "accuracy"): "unknown metric accuracy; expected some of " + ", ".join(METRICS),
        (run, "--output", str(tmp_path / "file" / "page.html")): "page.html cannot be written (",
    }
    for arguments, message in cases.items():
        assert report.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error
    with pytest.raises(SystemExit, match="2"):
        report.main([run, "--images", "-1"])
    assert "--images -1: expected 0 or more" in capsys.readouterr().err


def test_more_runs_than_colours_are_refused(tmp_path, capsys):
    for i in range(9):
        write_metrics(tmp_path / str(i), epochs=1, steps=10)
    assert report.main([str(tmp_path)]) == 2
    assert "9 runs are too many for one page, at most 8" in capsys.readouterr().err


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    write_metrics(tmp_path, epochs=2, steps=10, print_freq=5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1:1] = [b'{"kind": "train", "epoch": 0', b"\xff\xfe\x00", b'{"kind": "train", "loss": 1.0}']
    path.write_bytes(b"\n".join(lines) + b'\n{"kind": "val", "epo')
    run = run_of(tmp_path)
    assert len(run.records) == 8
    assert any("4 damaged lines are left out of metrics.jsonl (number 2, 3, 4, 12)" in note for note in run.notes)
    assert "4 damaged lines" in render([run])


def test_a_run_without_predictions_says_how_to_get_them_and_shows_the_rest(tmp_path):
    write_metrics(tmp_path, epochs=2, steps=10)
    page = render([run_of(tmp_path)])
    assert "there is no predictions.npz" in page and "main.py --eval" in page
    assert 'id="curves"' in page and 'id="classes"' not in page and 'id="hardest-images"' not in page


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "predictions.npz", "metrics.jsonl"])
def test_files_that_nest_or_claim_without_end_are_noted(tmp_path, name):
    folder = digits_run(tmp_path / "run")
    deep = "[" * 100_000 + "]" * 100_000
    if name == "predictions.npz":
        with zipfile.ZipFile(folder / name, "w") as archive, archive.open("loss.npy", "w") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
            np.lib.format.write_array_header_1_0(file, header)
    else:
        (folder / name).write_text(f"{(folder / name).read_text()}\n{deep}\n" if name == "metrics.jsonl" else deep)
    run = run_of(folder)
    assert any(name in note for note in run.notes) and "Results" in render([run], images=0)


def test_an_evaluation_stands_in_for_predictions_that_are_missing(tmp_path):
    folder = digits_run(tmp_path / "run")
    whole = render([run_of(folder)], images=2)
    (folder / "predictions.npz").rename(folder / "eval_val_predictions.npz")
    page = render([run_of(folder)], images=2)
    assert page == whole and page.count("<img") == 4 and "Hardest images" in page


def test_the_predictions_of_a_later_evaluation_take_the_place_of_earlier_ones(tmp_path):
    folder = digits_run(tmp_path / "run")
    stored = dict(np.load(folder / "predictions.npz"))
    for age, name in enumerate(("predictions.npz", "eval_val_predictions.npz", "eval_val_ema_predictions.npz")):
        store_arrays(folder / name, {**stored, "checkpoint": np.array(f"from {name}")})
        os.utime(folder / name, (age + 1, age + 1))
        assert run_of(folder).predictions.checkpoint == f"from {name}"
    os.utime(folder / "predictions.npz", (9, 9))  # training went on, to a new best
    assert "from from predictions.npz: " in render([run_of(folder)], images=0)


def test_the_page_names_the_folder_of_the_data_and_the_number_of_classes(tmp_path):
    folder = digits_run(tmp_path / "run", f"DATA.DATASET imagenet DATA.DATA_PATH {tmp_path}/PHOTOS")
    assert f"pola_swin · imagenet in {tmp_path}/PHOTOS, 10 classes · 4 of 2 epochs" in render(
        [run_of(folder)], images=0
    )
    (folder / "predictions.npz").unlink()
    assert f"imagenet in {tmp_path}/PHOTOS · 4 of" in render([run_of(folder)], images=0)
    assert "pola_swin · digits, 10 classes · " in render([run_of(digits_run(tmp_path / "bundled" / "run"))], images=0)


def ticks(drawing: str) -> list[float]:
    """The numbers on the horizontal axis of a chart, which come first in it."""
    horizontal = drawing.split("epoch<" if "epoch<" in drawing else "classes, worst first<")[0]
    return [float(each) for each in re.findall(r">([\d.]+)</text>", horizontal)]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 300])
def test_axes_of_runs_of_any_length_count_whole_epochs_from_0(tmp_path, epochs):
    write_metrics(tmp_path, epochs=epochs, steps=8, print_freq=2)
    for panel in training_panels([("run", run_of(tmp_path).records)], ("loss", "top1", "lr")):
        seen = ticks(chart(panel))
        assert seen[0] == 0 and seen == [int(each) for each in seen] and len(seen) <= 8
        assert seen[-1] == epochs or epochs > 3  # up to three, each has its tick
        assert len(seen) == epochs + 1 or epochs > 3


@pytest.mark.parametrize("classes", [2, 10, 30, 31, 1000])
def test_the_chart_of_classes_fits_few_and_many(tmp_path, classes):
    write_metrics(tmp_path, epochs=2, steps=8)
    write_predictions(tmp_path, images=4 * classes, classes=classes)
    drawing = chart(_profile([run_of(tmp_path)]))
    seen = ticks(drawing)
    assert seen == [int(each) for each in seen] and 1 < len(seen) <= 8 and max(seen) <= classes
    assert drawing.count("<use ") - len(seen) >= classes or classes > 30  # a mark for each of a few classes
    assert all(f">{percent}<" in drawing for percent in (0, 25, 50, 75, 100))


@pytest.mark.parametrize("text", [TINY_PPP, TINY_NALA], ids=["PolaFormer++", "NaLaFormer"])
def test_a_run_of_a_rotary_pyramid_shows_where_its_deepest_linear_layer_looks(tmp_path, text):
    tiny = write_tiny(tmp_path, text)
    run(tiny, "TRAIN.EPOCHS 1")
    page = render([run_of(folder_of(tiny))], images=2)
    assert "where layers.1.blocks.1 looks" in page and page.count("<img") == 4


def test_a_report_on_a_thousand_classes_shows_the_hardest_images(tmp_path):
    """From the folder of class folders to the pictures."""
    for split in ("train", "val"):
        for label in range(1000):
            (tmp_path / "set" / split / f"n{label:08d}").mkdir(parents=True)
            (tmp_path / "set" / split / f"n{label:08d}" / "a.jpg").write_bytes(jpeg(label % 50, (8, 8)))
    options = f"DATA.DATASET imagenet DATA.DATA_PATH {tmp_path / 'set'} TRAIN.EPOCHS 1 TRAIN.STEPS 1 TRAIN.EVAL_STEPS 1"
    run(write_tiny(tmp_path), options)
    page = render([run_of(tmp_path / "out" / "tiny" / "default")], images=3)
    assert page.count('<figure class="card">') == 3 and page.count("<img") == 6 and "Without" not in page


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda arrays: arrays.pop("loss"), "lacks the arrays loss; expected index, label, top5"),
        (lambda arrays: arrays.update(loss=arrays["loss"][:-1]), "loss (39,) instead of (40,)"),
        (lambda arrays: arrays.update(label=arrays["label"] + 90), "class 99 or a negative one, expected 0 to 9"),
        (lambda arrays: arrays.update(classes=np.array(["a"], dtype=object)), "cannot be read"),
        (
            lambda arrays: arrays.update(label=arrays["label"].astype(float)),
            "other types than a validation writes: label",
        ),
    ],
)
def test_predictions_that_do_not_fit_together_are_refused_and_noted(tmp_path, change, message):
    write_metrics(tmp_path, epochs=1, steps=10)
    write_predictions(tmp_path, images=40, classes=10)
    arrays = dict(np.load(tmp_path / "predictions.npz"))
    change(arrays)
    store_arrays(tmp_path / "predictions.npz", arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_predictions(tmp_path / "predictions.npz")
    run = run_of(tmp_path)
    assert run.predictions is None and any(message in note for note in run.notes)


def test_a_truncated_predictions_file_is_noted(tmp_path):
    write_metrics(tmp_path, epochs=1, steps=10)
    write_predictions(tmp_path, images=40, classes=10)
    path = tmp_path / "predictions.npz"
    path.write_bytes(path.read_bytes()[:1000])
    assert any("predictions.npz cannot be read" in note for note in run_of(tmp_path).notes)


def test_data_that_is_not_reachable_or_another_is_said_on_the_page(tmp_path):
    folder = digits_run(tmp_path / "run")
    (folder / "max_acc.pth").unlink()
    assert "Without attention: there is no checkpoint max_acc.pth" in render([run_of(folder)], images=2)
    arrays = dict(np.load(folder / "predictions.npz"))
    arrays["file"] = np.array([f"val/{i}.png" for i in range(len(arrays["label"]))])
    store_arrays(folder / "predictions.npz", arrays)
    page = render([run_of(folder)], images=2)
    assert "Without pictures: the data set is not the one evaluated" in page
    (folder / "config.yaml").write_text("DATA: {DATASET: imagenet, DATA_PATH: /absent}\n")
    page = render([run_of(folder)], images=2)
    assert "Without pictures: data set folder /absent" in page and "data:image/jpeg" not in page


# ---------------------------------------------------------------------------------------------------------------------
# Sequences, and runs measured in steps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> Path:
    """The folder of a run on Long Range Arena: 20 steps, validated after 10 and 20."""
    root = tmp_path_factory.mktemp("lra")
    data = write_cache(root / "data", "listops", classes=10)
    run(lra("listops"), f"DATA.DATA_PATH {data} OUTPUT {root}/out {SHORT}")
    return root / "out" / "lra_listops" / "default"


def test_a_run_on_sequences_has_its_curves_and_no_pictures(sequences, tmp_path):
    assert report.main([str(sequences), "--images", "3", "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert 'id="curves"' in page and page.count('class="chart"') == 8
    assert "Without pictures: the samples are sequences." in page and "data:image/jpeg" not in page
    assert page.count('<figure class="card">') == 3
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert "96 samples of 10 classes" in text and "samples/s, all processes" in text and "lra · listops" in text
    assert not re.search(r"\bimages?\b", text)


def test_a_run_measured_in_steps_is_told_in_steps(sequences):
    page = render([run_of(sequences)], images=0)
    assert "20 of 20 steps, 10 an epoch</p>" in page and "of 300 epochs" not in page
    assert re.search(r"validation after step [12]0<", page)


# ---------------------------------------------------------------------------------------------------------------------
# What the page says
# ---------------------------------------------------------------------------------------------------------------------


def test_one_run_is_compared_with_the_defaults_and_several_with_each_other(tmp_path):
    folders = [digits_run(tmp_path / name / "run", f"TRAIN.BASE_LR {lr}") for name, lr in (("a", 0.001), ("b", 0.002))]
    alone = rows_of(render([run_of(folders[0])], images=0), "configuration")
    assert alone["TRAIN.BASE_LR"] == ["0.001", "0.0005"] and alone["TRAIN.EPOCHS"] == ["2", "300"]
    assert "TRAIN.WEIGHT_DECAY" not in alone
    names = names_of(folders)
    assert names == ["a/run", "b/run"]
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    assert rows_of(render(runs, images=0), "configuration") == {"TRAIN.BASE_LR": ["0.001", "0.002", "0.0005"]}


def rows_of(page: str, section: str) -> dict[str, list[str]]:
    """The first table of a section, by the text of each row's head."""
    body = re.search(rf'<section id="{section}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    rows = [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in body.split("</tr>")
    ]
    return {row[0]: row[1:] for row in rows if row}


def test_the_worst_classes_and_the_most_frequent_confusions_come_first(tmp_path):
    write_metrics(tmp_path, epochs=1, steps=10)
    write_predictions(tmp_path, images=400, classes=10)
    run = run_of(tmp_path)
    label = np.repeat(np.arange(10), 40)
    guess = label.copy()
    guess[40 * 3 : 40 * 3 + 30] = 7  # 3 is worst
    guess[40 * 5 : 40 * 5 + 10] = 6
    run.predictions = predictions(label.tolist(), guess[:, None].tolist(), [f"class {i}" for i in range(10)])
    page = render([run], images=0)
    classes = rows_of(page, "classes")
    assert list(classes)[:2] == ["class 3", "class 5"]
    assert classes["class 3"] == ["25.0", "40.0", "25.0", "40", "class 7 (30)"] and classes["class 0"][-1] == "–"
    assert "Most frequent confusions" in page
    pairs = re.findall(r'<th scope="row">(class \d)</th><td>(class \d)</td><td>(\d+)</td><td>([\d.]+) %', page)
    assert pairs == [("class 3", "class 7", "30", "75.0"), ("class 5", "class 6", "10", "25.0")]


class Elements(HTMLParser):
    """The elements of a page in order, and the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def test_every_value_of_a_hostile_run_is_text(tmp_path):
    """Whatever a value says, the page has the same elements."""
    evil = """</style></script></svg><script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"""
    pages = {}
    for value in (evil, "harmless"):
        folder = digits_run(tmp_path / value.replace("/", "|") / "run", names=[value, *"123456789"])
        arrays = dict(np.load(folder / "predictions.npz"))
        arrays |= {"file": np.array([f"{i}{value}" for i in range(len(arrays["label"]))]), "checkpoint": np.str_(value)}
        store_arrays(folder / "predictions.npz", arrays)
        (folder / "environment.json").write_text(json.dumps([{value: value, "device": value, "cpu": [value]}] * 2))
        (folder / "STOPPED").write_text(value)
        config = (folder / "config.yaml").read_text() + f"# {value}\n"
        (folder / "config.yaml").write_text(config.replace("DATA_PATH: ''", f"DATA_PATH: {json.dumps(value)}"))
        with (folder / "metrics.jsonl").open("a") as metrics:
            for kind in ("val", value):
                record = {"kind": kind, "epoch": 4, "step": 110, "loss": value, "top1": value, value: value}
                metrics.write(json.dumps(record) + "\n")
        alone, other = read_run(folder, *names_of([folder])), read_run(folder, f"$x_1$ & _{value}")
        alone.notes.append(value)
        pages[value] = [render([alone], images=2), render([alone, other], images=2)]
    for page, harmless in zip(pages[evil], pages["harmless"], strict=True):
        assert Elements(page).found == Elements(harmless).found
        assert evil not in page and page.count("&lt;script&gt;alert(1)") == harmless.count("harmless") > 15
        assert "{{ 7 * 7 }}" in page and "DATA_PATH: &#34;&lt;/style&gt;" in page
    assert "$x_1$ &amp; _&lt;/style&gt;" in pages[evil][1]


def test_the_table_by_epoch_holds_every_metric(tmp_path):
    write_metrics(tmp_path, epochs=3, steps=20, print_freq=5)
    page = render([run_of(tmp_path)])
    body = re.search(r"<summary>Values by epoch</summary>(.*?)</details>", page, re.DOTALL)[1]
    head = re.findall(r'<th scope="col">(.*?)</th>', body)
    assert head[:4] == ["epoch"] + [
        f"Loss, {kind} (cross-entropy)" for kind in ("training", "validation", "validation, EMA")
    ]
    assert len(head) == 1 + 3 + 2 + 2 + 7  # loss, top-1, top-5, what only training has
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-3:]
    row = re.findall(r"<td>(.*?)</td>", body.split("</tr>")[-2])
    assert row[:4] == [f"{record['loss']:.4g}" for record in last] + [f"{last[1]['top1']:.4g}"]


def test_charts_are_the_same_at_each_drawing(tmp_path):
    write_metrics(tmp_path, epochs=2, steps=20)
    (panel,) = training_panels([("run", run_of(tmp_path).records)], ["loss"])
    assert [line.label for line in panel.lines] == ["training", "validation", "validation, EMA"]
    assert chart(panel) == chart(panel)


def test_neither_torch_nor_pictures_keep_a_reader_waiting(tmp_path):
    write_metrics(tmp_path, epochs=2, steps=20)
    write_predictions(tmp_path, images=40, classes=10)
    arrays = dict(np.load(tmp_path / "predictions.npz")) | {"classes": np.array([])}
    store_arrays(tmp_path / "predictions.npz", arrays | {"classes": np.array([], dtype=np.str_)})
    code = """if True:
        import sys
        from tools import report
        assert "matplotlib" not in sys.modules
        assert report.main([sys.argv[1], "--images", "0"]) == 0
        assert "matplotlib" in sys.modules and "torch" not in sys.modules"""
    result = run_tool("-c", code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Top-1 of every class" in (tmp_path / "report.html").read_text()


def test_a_folder_of_runs_is_a_comparison(tmp_path, capsys):
    for name in ("x/one", "x/two"):
        write_metrics(tmp_path / name, epochs=1, steps=10)
    assert [path.name for path in find_runs([tmp_path / "x", tmp_path / "x/one"])] == ["one", "two"]
    assert report.main([str(tmp_path / "x")]) == 0
    assert (tmp_path / "x" / "report.html").is_file() and "report.html (0." in capsys.readouterr().out


def test_the_report_of_a_run_of_imagenets_length_takes_seconds_and_little_space(tmp_path):
    """300 epochs, 50,000 predictions; benchmarks/report.py measures it from the command line, with images."""
    write_metrics(tmp_path)
    write_predictions(tmp_path)
    start = time.process_time()
    assert report.main([str(tmp_path), "--images", "0"]) == 0
    assert time.process_time() - start < 10
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2e6 and page.count('class="chart"') == 8 and "blocks of 10 neighbouring classes" in page


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """One run and two compared, as the command writes them."""
    root = tmp_path_factory.mktemp("runs")
    folders = [digits_run(root / name, options) for name, options in (("a", ""), ("b", "TRAIN.EPOCHS 4"))]
    assert report.main([str(folders[0]), "--images", "3"]) == 0
    assert report.main([*map(str, folders), "--images", "2"]) == 0
    return {"one": folders[0] / "report.html", "several": root / "report.html"}


LINES = """.plot path[style*="stroke: var(--c"]"""  # of runs, among the paths of a chart
FIGURES = f"""(() => {{
  const seen = (element) => {{
    const box = element.getBoundingClientRect();
    return box.width > 20 && box.height > 20;
  }};
  const lines = [...document.querySelectorAll('figure.chart')].map((figure) =>
    [...figure.querySelectorAll('{LINES}')].filter((path) => path.getTotalLength() > 20).length);
  const ids = [...document.querySelectorAll('[id]')].map((element) => element.id);
  return {{
    charts: [...document.querySelectorAll('figure.chart .plot svg[role=img][aria-label][viewBox]')].filter(seen).length,
    lines: lines,
    matrices: [...document.querySelectorAll('figure.matrix')].filter(seen).length,
    images: [...document.images].filter((image) => image.complete && image.naturalWidth > 20 && seen(image)).length,
    sections: [...document.querySelectorAll('main h2')].map((heading) => heading.textContent),
    width: document.documentElement.scrollWidth,
    repeated: ids.filter((id, i) => ids.indexOf(id) !== i),
    scripts: document.scripts.length,
  }};
}})()"""
SECTIONS = ["Results", "Curves", "Configuration", "Classes", "Confusions", "Hardest images", "Environment"]


@pytest.mark.parametrize("name, charts, lines, images", [("one", 8, (1, 2, 3), 6), ("several", 12, (2,), 8)])
@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_the_page_renders_without_errors_requests_or_sideways_scrolling(
    browser, pages, name, charts, lines, images, width, dark
):
    browser.open(pages[name], width=width, dark=dark)
    seen = browser.evaluate(FIGURES)
    assert seen["charts"] == len(seen["lines"]) == charts and set(seen["lines"]) <= set(lines), seen
    assert seen["sections"] == SECTIONS and seen["images"] == images
    assert seen["matrices"] == (1 if name == "one" else 2)
    assert seen["width"] <= width and seen["repeated"] == [] and seen["scripts"] == 0
    assert browser.problems() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]


def test_light_and_dark_are_the_readers_choice_and_lines_stand_out(browser, pages):
    def colours() -> list[list[int]]:
        script = f"""(() => {{ const rgb = (value) => value.match(/\\d+/g).slice(0, 3).map(Number);
            const line = document.querySelector('{LINES}'), text = document.querySelector('.plot text');
            return [getComputedStyle(document.body).backgroundColor, getComputedStyle(line).stroke,
                    getComputedStyle(text).fill].map(rgb); }})()"""
        return browser.evaluate(script)

    found = {}
    for dark in (False, True):
        browser.open(pages["one"], dark=dark)
        page, line, text = found[dark] = colours()
        assert abs(luminance(page) - luminance(line)) > 0.2 and abs(luminance(page) - luminance(text)) > 0.2
    assert luminance(found[False][0]) > 0.9 and luminance(found[True][0]) < 0.05


def luminance(rgb: list[int]) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_a_run_has_the_same_colour_in_every_chart(browser, pages):
    browser.open(pages["several"])
    strokes = browser.evaluate(
        "[...document.querySelectorAll('figure.chart')].map((figure) =>"
        f" [...figure.querySelectorAll('{LINES}')].map((path) => getComputedStyle(path).stroke))"
    )
    assert len({tuple(each) for each in strokes}) == 1 and len(set(strokes[0])) == 2
    for place in ("header", "figure.chart .legend"):
        keys = browser.evaluate(
            f"[...document.querySelector('{place}').querySelectorAll('.swatch')]"
            ".map((swatch) => getComputedStyle(swatch).borderTopColor)"
        )
        assert keys == strokes[0]
