"""Runs that evaluate, fine-tune on own data, or measure throughput.

pytest tests/test_evaluation.py
"""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PPP,
    RELEASED,
    RELEASED_OPTIONS,
    TINY,
    TINY_NALA,
    TINY_PPP,
    config_file,
    folder_of,
    read_json,
    run,
    run_main,
    write_tiny,
)
from PIL import Image
from run_files import epoch_file
from sklearn.metrics import f1_score

import main
from config import load_config, make_plan
from engine.published import run_evaluation
from logger import read_metrics
from models import build_model
from models.files import CheckpointError, load_checkpoint
from utils.checkpoints.writing import save_checkpoint
from utils.predictions import f1_by_class

RESULT = re.compile(r"(\d+) images, top-1 ([\d.]+) %, top-5 ([\d.]+) %, loss ([\d.]+)")
LAUNCHERS = {
    "one process": {},
    "torchrun": {"processes": 2},
    "torchrun, three": {"processes": 3},
    "legacy launcher": {"launcher": ["-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node=2"]},
}


@pytest.fixture(scope="module")
def released_result(tmp_path_factory):
    """(images, top-1, top-5, loss, run folder) of the released file on the digits, in this process."""
    folder = str(tmp_path_factory.mktemp("out"))
    options = [*RELEASED_OPTIONS, "OUTPUT", folder, "EVAL_MODE", "True", "MODEL.RESUME", str(RELEASED)]
    config = load_config(config_file("pola_swin_t"), options)
    result = run_evaluation(config, make_plan(config), torch.device("cpu"))
    return result.images, f"{result.top1:.3f}", f"{result.top5:.3f}", f"{result.loss:.4f}", make_plan(config).folder


@pytest.mark.parametrize("launch", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_every_launcher_evaluates_the_named_file_to_the_same_result(launch, released_result, tmp_path):
    batch = {0: "33", 2: "64", 3: "16"}[launch.get("processes", 0)]
    arguments = ["--cfg", config_file("pola_swin_t"), "--output", tmp_path, "--batch-size", batch]
    options = [word for word in RELEASED_OPTIONS if word not in ("DATA.BATCH_SIZE",)]
    position = RELEASED_OPTIONS.index("DATA.BATCH_SIZE")
    options = RELEASED_OPTIONS[:position] + RELEASED_OPTIONS[position + 2 :]
    result = run_main(*arguments, "--eval", "--resume", RELEASED, "--opts", *options, **launch)
    images, top1, top5, loss = RESULT.search(result.stdout).groups()
    assert (int(images), top1, top5) == released_result[:3] and images == "355"
    assert float(loss) == pytest.approx(float(released_result[3]), abs=2e-4)
    digest = read_json("checkpoint_official_tiny.json")["sha256"]
    assert f"evaluated {RELEASED} (sha256 {digest}), float32:" in result.stdout
    assert len(RESULT.findall(result.stdout)) == 1
    require_same_files(next(tmp_path.glob("*/*")), released_result[4])


def require_same_files(folder: Path, expected: Path, name: str = "eval_val") -> None:
    """The results of one process and of several are the same, apart from the rounding of losses and probabilities."""
    one, other = (json.loads((path / f"{name}.json").read_text()) for path in (expected, folder))
    assert one["subject"] == other["subject"] and other["result"].pop("loss") == pytest.approx(
        one["result"].pop("loss")
    )
    assert other["result"] == one["result"]
    table = f"{name}_per_class.csv"
    assert (folder / table).read_bytes() == (expected / table).read_bytes()
    with np.load(expected / f"{name}_predictions.npz") as ours, np.load(folder / f"{name}_predictions.npz") as theirs:
        for key in ("index", "label", "top5", "file", "classes", "epoch", "checkpoint"):
            assert np.array_equal(ours[key], theirs[key]), key
        assert np.allclose(ours["probability"], theirs["probability"], atol=1e-5)
        assert ours["index"].tolist() == list(range(355))


def test_a_model_with_batch_norm_is_evaluated_alike_by_any_number_of_processes(tiny_ppp):
    """The released file's running statistics count, however few images a process sees at a time."""
    file = PPP / "checkpoint_ppp_tiny.pth"
    run(tiny_ppp, f"EVAL_MODE True MODEL.RESUME {file}")
    for processes in (2, 3):
        options = ["TAG", str(processes), "DATA.BATCH_SIZE", "7"]
        run_main("--cfg", tiny_ppp, "--eval", "--resume", file, "--opts", *options, processes=processes)
        for name in ("eval_val", "eval_val_ema"):
            require_same_files(folder_of(tiny_ppp).parent / str(processes), folder_of(tiny_ppp), name)


def test_evaluation_ignores_the_run_folder_and_adds_its_results_alone(tiny, log):
    run(tiny)
    folder = folder_of(tiny)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}
    log.clear()
    run(tiny, f"EVAL_MODE True MODEL.RESUME {epoch_file(folder, 1)}")
    assert f"evaluated {epoch_file(folder, 1)} (sha256" in log.text
    first = next(r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "val")
    assert f"top-1 {first['top1']:.3f} %" in log.text
    results = {"eval_val.json", "eval_val_per_class.csv", "eval_val_predictions.npz"}
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}
    assert {name: content for name, content in after.items() if name not in results} == before
    assert results <= after.keys()


def test_macro_f1_stands_beside_top_1_and_is_scikit_learn_s(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    run(tiny, f"EVAL_MODE True MODEL.RESUME {epoch_file(folder_of(tiny), 1)}")
    with np.load(folder_of(tiny) / "eval_val_predictions.npz") as predictions:
        label, guess = predictions["label"], predictions["top5"][:, 0]
    expected = 100 * f1_score(label, guess, average="macro")
    assert f"macro-F1 {expected:.3f} %" in log.text
    result = json.loads((folder_of(tiny) / "eval_val.json").read_text())["result"]
    assert result["macro_f1"] == pytest.approx(expected) and 0 < expected != pytest.approx(result["top1"])
    with (folder_of(tiny) / "eval_val_per_class.csv").open() as file:
        rows = [float(row["f1"]) for row in csv.DictReader(file)]
    assert rows == pytest.approx(100 * f1_score(label, guess, average=None), abs=1e-3)


def test_a_class_without_images_counts_where_it_was_an_answer():
    label, guess = [0, 0, 1, 1], [0, 2, 1, 1]
    scores = f1_by_class(*(np.bincount(values, minlength=4) for values in (label, [0, 1, 1], guess)))
    assert np.isnan(scores[3]) and np.nanmean(scores) == pytest.approx(f1_score(label, guess, average="macro"))


def test_averaged_weights_get_a_line_of_their_own(tiny, log):
    run(tiny, "EMA.ENABLE True EMA.DECAY 0.9")
    log.clear()
    run(tiny, f"EVAL_MODE True MODEL.RESUME {epoch_file(folder_of(tiny), 2)}")
    lines = RESULT.findall(log.text)
    assert len(lines) == 2 and "evaluated EMA weights of" in log.text
    records = read_metrics(folder_of(tiny) / "metrics.jsonl")
    expected = [f"{[r for r in records if r['kind'] == kind][-1]['top1']:.3f}" for kind in ("val", "ema")]
    assert [line[1] for line in lines] == expected
    for word, top1 in zip(("model", "ema"), expected, strict=True):
        log.clear()
        run(tiny, f"EVAL_MODE True MODEL.WEIGHTS {word} MODEL.RESUME {epoch_file(folder_of(tiny), 2)}")
        assert [line[1] for line in RESULT.findall(log.text)] == [top1]


def test_a_file_that_was_validated_on_other_crops_says_so(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    file = epoch_file(folder_of(tiny), 1)
    log.clear()
    run(tiny, f"EVAL_MODE True MODEL.RESUME {file}")
    assert "in another way" not in log.text
    run(tiny, f"EVAL_MODE True MODEL.RESUME {file} TEST.CROP False TEST.RESIZE shorter")
    assert (
        "validated on images made in another way: TEST.CROP True, here False; TEST.RESIZE squash, here sho" in log.text
    )


def test_evaluation_at_another_size_names_the_key_for_it(tmp_path):
    small = (
        "MODEL.TYPE pola_pvt_tiny MODEL.LA.ATTN_TYPE LLLL MODEL.NUM_CLASSES 10 DATA.DATASET digits DATA.NUM_WORKERS 0"
    )
    config = load_config(config_file("pola_pvt_t"), [*small.split(), "DATA.IMG_SIZE", "32", "OUTPUT", str(tmp_path)])
    torch.save({"model": build_model(config).state_dict(), "config": config.dump()}, tmp_path / "file.pth")
    options = [*small.split(), "OUTPUT", str(tmp_path), "EVAL_MODE", "True", "MODEL.RESUME", str(tmp_path / "file.pth")]
    with pytest.raises(
        CheckpointError, match="at 32 pixels: --opts DATA.IMG_SIZE 32 TEST.IMG_SIZE 64 evaluates it at 64"
    ):
        main.main(load_config(config_file("pola_pvt_t"), [*options, "DATA.IMG_SIZE", "64"]))
    main.main(load_config(config_file("pola_pvt_t"), [*options, "DATA.IMG_SIZE", "32", "TEST.IMG_SIZE", "64"]))


def test_test_amp_evaluates_under_autocast_and_says_so(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    run(tiny, f"EVAL_MODE True TEST.AMP True MODEL.RESUME {epoch_file(folder_of(tiny), 1)}")
    assert "bfloat16: 355 images" in log.text


def test_evaluating_another_architecture_lists_what_does_not_fit(tiny):
    with pytest.raises(CheckpointError, match=r"does not fit PolaSwin(.|\n)*unexpected \((.|\n)*other shape \("):
        run(tiny, f"EVAL_MODE True MODEL.RESUME {RELEASED}")


@pytest.fixture
def animals(tmp_path):
    """Build an image folder with the given classes; each class has a colour of its own."""

    def build(*names: str, root: str = "animals") -> Path:
        for split, count in (("train", 16), ("val", 4)):
            for label, name in enumerate(names):
                (tmp_path / root / split / name).mkdir(parents=True)
                for i in range(count):
                    noise = np.random.default_rng(100 * label + i).integers(0, 60, (40, 50, 3), dtype=np.uint8)
                    noise[..., label % 3] += 150
                    buffer = io.BytesIO()
                    Image.fromarray(noise).save(buffer, "JPEG")
                    (tmp_path / root / split / name / f"{i}.jpg").write_bytes(buffer.getvalue())
        return tmp_path / root

    return build


OWN = "DATA.DATASET imagenet DATA.BATCH_SIZE 8 TRAIN.EPOCHS 1 "


def test_the_head_follows_the_folder_and_the_names_go_into_the_checkpoint(tiny, animals, log):
    root = animals("ant", "bee", "cat")
    run(tiny, f"{OWN} DATA.DATA_PATH {root}")
    checkpoint = load_checkpoint(epoch_file(folder_of(tiny), 1))
    assert checkpoint["classes"] == ["ant", "bee", "cat"] and checkpoint["model"]["head.weight"].shape[0] == 3
    evaluate = f"{OWN} EVAL_MODE True MODEL.RESUME {epoch_file(folder_of(tiny), 1)}"
    run(tiny, f"{evaluate} DATA.DATA_PATH {root}")
    assert "12 images, top-1" in log.text
    with pytest.raises(CheckpointError, match="missing in the data set: cat; unknown to the checkpoint: dog"):
        run(tiny, f"{evaluate} DATA.DATA_PATH {animals('ant', 'bee', 'dog', root='other')}")
    log.clear()
    run(tiny, f"{evaluate} DATA.DATA_PATH {animals('bee', 'cat', root='fewer')}")
    assert "1 of 3 classes have no image (ant)" in log.text and "8 images, top-1" in log.text
    with np.load(folder_of(tiny) / "eval_val_predictions.npz") as stored:
        assert stored["classes"].tolist() == ["ant", "bee", "cat"] and stored["label"].tolist() == [1] * 4 + [2] * 4
    with pytest.raises(CheckpointError, match="names differ"):  # continuing a run on other data
        run(tiny, f"{OWN} DATA.DATA_PATH {tiny.parent / 'other'}")


@pytest.mark.parametrize("classes", [["ant", "bee", "cat"], ["ant"], "ab", 5, {"ant": 0, "bee": 1}])
def test_stored_names_that_do_not_fit_the_head_are_refused(tiny, animals, classes):
    path = tiny.parent / "weights.pth"
    save_checkpoint({"model": build_model(load_config(str(tiny)), 2).state_dict(), "classes": classes}, path)
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth(: its `classes` are no list of names| names \d `classes`, and its head.bias has)",
    ):
        run(tiny, f"{OWN} EVAL_MODE True MODEL.RESUME {path} DATA.DATA_PATH {animals('ant', 'bee')}")


def test_without_stored_names_the_counts_must_be_equal(tiny, animals):
    config = load_config(str(tiny), OWN.split())
    path = tiny.parent / "weights.pth"
    save_checkpoint({"model": build_model(config, 3).state_dict()}, path)
    run(tiny, f"{OWN} EVAL_MODE True MODEL.RESUME {path} DATA.DATA_PATH {animals('ant', 'bee', 'dog')}")
    with pytest.raises(CheckpointError, match=r"weights\.pth has 3 classes, the data set 2"):
        run(tiny, f"{OWN} EVAL_MODE True MODEL.RESUME {path} DATA.DATA_PATH {animals('a', 'b', root='two')}")


ROTARY = {"pola_pp": TINY_PPP, "nalaformer": TINY_NALA}  # without tables of positions


@pytest.mark.parametrize(
    "type_name, name",
    [
        ("pola_swin", "layers.0.blocks.0.attn.qkvg.weight"),
        ("pola_pvt_tiny", "block1.0.attn.qg.weight"),
        ("pola_pp", "layers.0.blocks.0.attn.qkvg.weight"),
        ("nalaformer", "layers.0.blocks.0.attn.qkvg.weight"),
    ],
)
def test_fine_tuning_into_other_classes_and_size(tmp_path, animals, log, type_name, name):
    tiny = write_tiny(tmp_path, ROTARY.get(type_name, TINY))
    model = f"MODEL.TYPE {type_name} MODEL.DROP_PATH_RATE 0"
    config = load_config(str(tiny), model.split())
    source = build_model(config, 10)
    path = tiny.parent / "weights.pth"
    save_checkpoint({"model": source.state_dict()}, path)
    root = animals("ant", "bee")
    options = f"{OWN} {model} DATA.DATA_PATH {root} DATA.IMG_SIZE 64 MODEL.PRETRAINED {path} TRAIN.BASE_LR 0"
    options += " TRAIN.WARMUP_LR 0 TRAIN.MIN_LR 0 EMA.ENABLE True"
    run(tiny, options)
    assert "head: 10 classes in the file, 2 here; starts anew" in log.text
    assert ("resized to" in log.text) == (type_name not in ROTARY) and f"starts from the weights of {path}" in log.text
    tuned = load_checkpoint(epoch_file(folder_of(tiny), 1))
    assert torch.equal(tuned["model"][name], source.state_dict()[name])  # rate 0: the file's weights, unchanged
    assert torch.equal(tuned["model_ema"][name], source.state_dict()[name])
    log.clear()
    with pytest.raises(KeyboardInterrupt):  # the run folder's checkpoint goes before --pretrained
        _stop_after_resume(tiny, options)
    assert "1 epochs finished" in log.text and "starts from the weights" not in log.text


def _stop_after_resume(tiny: Path, options: str) -> None:
    real, main.wrap = main.wrap, _interrupt
    try:
        run(tiny, options)
    finally:
        main.wrap = real


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_throughput_needs_no_data_and_no_folder(tmp_path):
    options = "MODEL.SWIN.EMBED_DIM 12 MODEL.SWIN.NUM_HEADS [1,2,2,4] DATA.IMG_SIZE 64".split()
    arguments = [
        "--cfg",
        config_file("pola_swin_t"),
        "--throughput",
        "--batch-size",
        "4",
        "--amp",
        "--output",
        tmp_path,
    ]
    result = run_main(*arguments, "--opts", *options)
    assert re.search(
        r"throughput of pola_swin_tiny_patch4_224, batch 4, bfloat16, size 64: median [\d.]+ images/s "
        r"\(lowest [\d.]+, highest [\d.]+, 30 batches\)",
        result.stdout,
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cfg, name", [("pola_pp_b0", "pola_b0_patch4_224"), ("nalaformer_xt", "nalaformer_xt")])
def test_throughput_of_a_rotary_pyramid_at_any_size(cfg, name, log):
    small = "MODEL.PPP.EMBED_DIMS [8,8,16,16] MODEL.PPP.NUM_HEADS [1,1,2,2] MODEL.PPP.PROJECTION 32 DATA.BATCH_SIZE 2"
    run(config_file(cfg), f"THROUGHPUT_MODE True DATA.IMG_SIZE 47 {small}")
    assert f"throughput of {name}, batch 2, float32, size 47: median " in log.text
