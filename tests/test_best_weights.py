"""The best weights, by the model and by the average: written, tried again, counted, and claimed at the end.

pytest tests/test_best_weights.py
"""

import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import folder_of, run
from faulty_disk import READ_ONLY, FaultyDisk
from run_files import epoch_file

import main
from logger import read_metrics
from models.files import load_checkpoint
from utils.checkpoints import writing
from utils.faults.preemption import Preempted

QUICK = "TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 100"
VALIDATE = main.validate_epoch


def scripted(monkeypatch, model, ema=None, at_epoch=None):
    """Validations of the tiny data set with these numbers of right answers in turn; `at_epoch` acts after each."""
    count = 0

    def validate(*arguments):
        nonlocal count
        accuracies = VALIDATE(*arguments)
        for kind, numbers in (("model", model), ("ema", ema)):
            if numbers:
                object.__setattr__(accuracies[kind], "correct1", numbers[count])
        count += 1
        if at_epoch:
            at_epoch(count)
        return accuracies

    monkeypatch.setattr(main, "validate_epoch", validate)


def percent(correct):
    return 100 * correct / 355


def claimed(folder: Path, name: str) -> tuple[int, float, float]:
    checkpoint = load_checkpoint(folder / name)
    return checkpoint["epoch"], checkpoint["max_accuracy"], checkpoint["max_accuracy_e"]


def test_best_weights_that_the_disk_refused_are_written_later_and_only_then_claimed(tiny, monkeypatch, log):
    """Read-only in the second and third of four epochs, of which the second is the best."""
    disk = FaultyDisk(folder_of(tiny), READ_ONLY)
    during = []

    def at_epoch(count):
        if count == 2:
            disk.__enter__()
        if count == 4:
            disk.__exit__()
            during.append(claimed(folder_of(tiny), "max_acc.pth"))

    scripted(monkeypatch, [101, 140, 90, 120], at_epoch=at_epoch)
    run(tiny, f"TRAIN.EPOCHS 4 SAVE_FREQ 100 {QUICK}")
    folder = folder_of(tiny)
    assert during == [(1, percent(101), 0.0)]
    assert claimed(folder, "max_acc.pth") == (2, percent(140), 0.0)
    assert claimed(folder, "ckpt_epoch_4.pth") == (4, percent(140), 0.0)
    assert f"best top-1: {percent(140):.3f} % (the model after 2 epochs)" in log.text
    assert f"evaluate it with: {evaluation(log)}" in log.text and evaluation(log).endswith(f"{folder}/max_acc.pth")
    with np.load(folder / "predictions.npz") as predictions:
        assert predictions["epoch"] == 2
    top1 = [record["top1"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "val"]
    assert len(top1) == 4  # no record is lost either


def evaluation(log) -> str:
    return re.findall("evaluate it with: (.*)", log.text)[-1]


def refuse_a_second_best(monkeypatch):
    """The disk has no room to replace the best file; returns what writes checkpoints."""
    real = writing.save_checkpoint

    def refusing(state, path):
        if path.name == "max_acc.pth" and path.exists():
            raise OSError(28, "No space left on device", str(path))
        real(state, path)

    monkeypatch.setattr(writing, "save_checkpoint", refusing)
    return real


def test_a_best_that_was_never_written_is_not_claimed(tiny, monkeypatch, log):
    scripted(monkeypatch, [101, 140])
    real = refuse_a_second_best(monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device: '.*max_acc\.pth'"):
        run(tiny, f"TRAIN.EPOCHS 2 {QUICK}")
    assert claimed(folder_of(tiny), "ckpt_epoch_2.pth")[1] == percent(101)
    monkeypatch.setattr(writing, "save_checkpoint", real)
    scripted(monkeypatch, [140])
    run(tiny, f"TRAIN.EPOCHS 2 {QUICK}")  # its last epoch is there, and is what was refused
    assert claimed(folder_of(tiny), "max_acc.pth")[:2] == (2, percent(140))
    assert f"best top-1: {percent(140):.3f} % (the model after 2 epochs)" in log.text


def test_told_to_stop_a_best_file_that_is_refused_does_not_keep_the_run_from_saving(tiny, monkeypatch, log):
    refuse_a_second_best(monkeypatch)
    stop = {2: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    scripted(monkeypatch, [101, 140], at_epoch=lambda count: stop.get(count, lambda: None)())
    with pytest.raises(Preempted, match="saved after 2 epochs and 1 of 11 steps"):
        run(tiny, f"TRAIN.EPOCHS 3 {QUICK}")
    assert claimed(folder_of(tiny), "ckpt_epoch_2_step_1.pth") == (2, percent(101), 0.0)
    assert "max_acc.pth" in log.text and (folder_of(tiny) / "PREEMPTED").exists()


def test_the_best_average_has_a_file_of_its_own_and_the_better_of_both_is_claimed(tiny, monkeypatch, log):
    """The average is best after the first epoch, which retention deletes, the model after the third."""
    scripted(monkeypatch, [100, 90, 143, 120], [172, 160, 150, 130])
    options = f"EMA.ENABLE True CHECKPOINT.KEEP 1 {QUICK}"
    run(tiny, f"TRAIN.EPOCHS 2 {options}")
    folder = folder_of(tiny)
    run(tiny, f"TRAIN.EPOCHS 4 {options}")  # continued: it knows both
    assert f"best top-1 {percent(100):.3f} %, of the average {percent(172):.3f} %" in log.text
    assert claimed(folder, "max_acc.pth") == (3, percent(143), percent(172))
    assert claimed(folder, "max_ema_acc.pth") == (1, percent(100), percent(172))
    assert claimed(folder, "ckpt_epoch_4.pth") == (4, percent(143), percent(172))
    assert not epoch_file(folder, 1).exists()
    average, model = f"{percent(172):.3f} % (the average of the weights (EMA) after 1 epoch)", f"{percent(143):.3f} %"
    assert f"best top-1: {average}; {model} (the model after 3 epochs)" in log.text
    words = shlex.split(evaluation(log))
    assert words[-4:] == [str(folder / "max_ema_acc.pth"), "--opts", "MODEL.WEIGHTS", "ema"]
    held = load_checkpoint(folder / "max_ema_acc.pth")
    assert held["model"].keys() == held["model_ema"].keys() and held["validated"]["ema"] == percent(172)


def test_where_the_model_is_better_its_file_is_claimed(tiny, monkeypatch, log):
    scripted(monkeypatch, [150, 90], [140, 149])
    run(tiny, f"EMA.ENABLE True TRAIN.EPOCHS 2 {QUICK}")
    assert f"best top-1: {percent(150):.3f} % (the model after 1 epoch); {percent(149):.3f} % (the average" in log.text
    assert evaluation(log).endswith("max_acc.pth")


@pytest.mark.parametrize("last", ["max_acc.pth", "max_ema_acc.pth"])
def test_killed_between_two_files_of_an_epoch_a_start_completes_the_best_ones(tiny, monkeypatch, last):
    scripted(monkeypatch, [100, 143], [90, 172])
    options = f"EMA.ENABLE True TRAIN.EPOCHS 2 {QUICK}"
    run(tiny, f"{options} TAG whole")
    whole, parts = (folder_of(tiny).parent / tag for tag in ("whole", "parts"))
    shutil.copytree(whole, parts)
    for name in {"max_acc.pth": ["max_ema_acc.pth", "ckpt_epoch_2.pth"], "max_ema_acc.pth": ["ckpt_epoch_2.pth"]}[last]:
        for path in (parts / name, parts / f"{name}.json"):
            path.unlink()
    scripted(monkeypatch, [143], [172])
    run(tiny, f"{options} TAG parts")
    for name in ("max_acc.pth", "max_ema_acc.pth"):
        assert claimed(parts, name) == claimed(whole, name)


def test_a_best_file_that_somebody_deleted_is_not_claimed(tiny, monkeypatch, log):
    scripted(monkeypatch, [140, 100, 110])
    run(tiny, f"TRAIN.EPOCHS 2 {QUICK}")
    (folder_of(tiny) / "max_acc.pth").unlink()
    run(tiny, f"TRAIN.EPOCHS 3 {QUICK}")
    assert claimed(folder_of(tiny), "max_acc.pth") == (3, percent(110), 0.0)
    assert f"best top-1: {percent(110):.3f} % (the model after 3 epochs)" in log.text


@pytest.mark.parametrize("value", [math.nan, "high", None])
def test_a_best_file_that_says_nothing_of_its_accuracy_is_exceeded_by_the_next(tiny, monkeypatch, value):
    scripted(monkeypatch, [140, 100])
    run(tiny, f"TRAIN.EPOCHS 1 {QUICK}")
    for path in (folder_of(tiny) / "max_acc.pth", epoch_file(folder_of(tiny), 1)):
        torch.save(load_checkpoint(path) | {"max_accuracy": value, "validated": [value]}, path)
        path.with_name(f"{path.name}.json").unlink()
    run(tiny, f"TRAIN.EPOCHS 2 {QUICK}")
    assert claimed(folder_of(tiny), "max_acc.pth") == (2, percent(100), 0.0)


def test_resumed_from_a_file_elsewhere_the_run_folder_holds_what_is_claimed(tiny, monkeypatch, log):
    scripted(monkeypatch, [140, 100])
    run(tiny, f"TRAIN.EPOCHS 1 TAG first {QUICK}")
    elsewhere = folder_of(tiny).parent / "first" / "max_acc.pth"
    run(tiny, f"TRAIN.EPOCHS 2 MODEL.RESUME {elsewhere} {QUICK}")
    assert claimed(folder_of(tiny), "max_acc.pth") == (1, percent(140), 0.0)
    assert evaluation(log).endswith(str(folder_of(tiny) / "max_acc.pth"))
