"""Per-image predictions: what is recorded, that every image is in it once, and that a run folder holds the best's.

pytest tests/test_predictions.py
"""

import errno
import os
import time

import numpy as np
import pytest
import torch
from conftest import folder_of, run
from sklearn.datasets import load_digits
from torch.nn import functional as F

import engine.state
import main
import utils.predictions
from config import load_config, make_plan
from data.loaders import build_loaders
from data.transforms import Normalise
from logger import read_metrics
from tools.checkpoints import load_model
from utils import distributed
from utils.metrics import AccuracyCounter
from utils.predictions import NOTHING, PredictionRecorder

CPU = torch.device("cpu")


def recorded(logits, labels, positions=None):
    recorder = PredictionRecorder()
    positions = list(range(len(labels))) if positions is None else positions
    recorder.update(logits, labels, positions, [f"image {i}" for i in positions])
    return recorder


def test_ranks_probabilities_and_losses_are_those_of_the_logits():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 7), torch.randint(7, (9,))
    found = recorded(logits, labels).gather(9)
    assert np.array_equal(found.top5, logits.sort(dim=1, descending=True).indices[:, :5])
    assert np.allclose(found.probability, logits.softmax(1).sort(dim=1, descending=True).values[:, :5])
    assert np.allclose(found.loss, F.cross_entropy(logits, labels, reduction="none"))
    types = [getattr(found, name).dtype for name in ("index", "label", "top5", "probability", "loss")]
    assert types == [np.int64, np.int64, np.int64, np.float32, np.float32]


def test_it_agrees_with_the_counts_on_ties_and_on_what_is_not_finite():
    logits = torch.zeros(8, 6)  # all alike: classes by index
    logits[4, 3], logits[5, 2], logits[6] = torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([0, 1, 4, 5, 3, 2, 0, 0])
    counter = AccuracyCounter(CPU)
    counter.update(logits, labels)
    accuracy, found = counter.result(8), recorded(logits, labels).gather(8)
    assert (found.correct(1).sum(), found.correct(5).sum()) == (accuracy.correct1, accuracy.correct5) == (2, 4)
    assert found.top5[0].tolist() == [0, 1, 2, 3, 4] and (found.top5[4:7] == NOTHING).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_five_best_are_those_of_a_stable_sort_whatever_is_equal(dtype):
    torch.manual_seed(1)
    for levels in (1, 2, 7, 100):  # few levels: ties within the five, at their edge, and of hundreds of classes
        logits = torch.randint(levels, (64, 300)).to(dtype) - 3
        found = recorded(logits, torch.zeros(64, dtype=torch.long)).gather(64)
        expected = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        assert np.array_equal(found.top5, expected)
        assert np.allclose(found.probability, logits.float().softmax(1).gather(1, expected))


def test_recording_does_not_sort_all_classes():
    """CPU time of recording against that of the five largest, which leave the order of ties open."""
    logits, labels = torch.randn(64, 21_841), torch.zeros(64, dtype=torch.long)

    def seconds(function) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    sort, record = seconds(lambda: logits.argsort(dim=1, descending=True)), seconds(lambda: recorded(logits, labels))
    assert record < sort / 3


def test_fewer_than_five_classes_have_as_many_columns():
    assert recorded(torch.randn(3, 2), torch.zeros(3, dtype=torch.long)).gather(3).top5.shape == (3, 2)


def test_the_parts_of_all_processes_are_put_in_order(monkeypatch):
    logits, labels = torch.randn(7, 6), torch.randint(6, (7,))
    whole = recorded(logits, labels).gather(7)
    parts = [recorded(logits[rank::3], labels[rank::3], list(range(rank, 7, 3))) for rank in range(3)]
    sent = []
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: sent.append(mine) or [mine])
    for part in parts:
        with pytest.raises(RuntimeError, match=r"[23] predictions of [23] images, the data set has 7"):
            part.gather(7)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [*sent, ([], [], [])])  # one had no image
    together = parts[0].gather(7)
    for name in ("index", "label", "top5", "probability", "loss", "file"):
        assert np.array_equal(getattr(together, name), getattr(whole, name))
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [*sent, sent[0]])
    with pytest.raises(RuntimeError, match="10 predictions of 7 images"):
        parts[0].gather(7)


def test_training_keeps_the_predictions_of_its_best_model(tiny, monkeypatch):
    monkeypatch.setattr(main, "train_one_epoch", lambda *arguments, **named: None)
    run(tiny, "TRAIN.EPOCHS 1")
    folder = folder_of(tiny)
    with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
        best = dict(stored)
    (record,) = (record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "val")
    assert 100 * (best["top5"][:, 0] == best["label"]).mean() == pytest.approx(record["top1"])
    assert best["loss"].mean() == pytest.approx(record["loss"], rel=1e-5) and best["epoch"] == 1
    assert best["index"].tolist() == list(range(355)) and best["classes"].tolist() == [str(i) for i in range(10)]
    target = load_digits().target
    assert [int(target[int(name.removeprefix("digits/"))]) for name in best["file"]] == best["label"].tolist()
    # the file it names says the same
    loaded = load_model(folder / str(best["checkpoint"]))
    config = load_config(str(tiny))
    images, _ = next(iter(build_loaders(config, make_plan(config), train=False).val))
    with torch.no_grad():
        probabilities = loaded.model(Normalise(CPU)(images)).softmax(1)
    values, classes = probabilities.sort(dim=1, descending=True, stable=True)
    assert np.array_equal(best["top5"][:64], classes[:, :5])
    assert np.allclose(best["probability"][:64], values[:, :5], atol=1e-6)


def scripted(monkeypatch, top1s):
    """No training, and validations with these numbers of right answers in turn."""
    monkeypatch.setattr(main, "train_one_epoch", lambda *arguments, **named: None)
    real = main.validate_epoch
    results = iter(top1s)

    def validate(*arguments):
        accuracies = real(*arguments)
        object.__setattr__(accuracies["model"], "correct1", next(results))
        return accuracies

    monkeypatch.setattr(main, "validate_epoch", validate)


def test_only_a_new_best_replaces_them_and_a_continued_run_knows_the_best(tiny, monkeypatch):
    scripted(monkeypatch, [100, 50, 80, 120])
    monkeypatch.setattr(engine.state, "load_optimizer_state", lambda *arguments: None)  # there is none
    path = folder_of(tiny) / "predictions.npz"

    def epoch_after(options):
        run(tiny, options + " TRAIN.WARMUP_EPOCHS 0")
        with np.load(path) as stored:
            return int(stored["epoch"])

    assert epoch_after("TRAIN.EPOCHS 2") == 1
    assert epoch_after("TRAIN.EPOCHS 3") == 1  # continued: 80 is better than 50, not than 100
    assert epoch_after("TRAIN.EPOCHS 4") == 4


def test_a_disk_that_refuses_them_does_not_end_the_run(tiny, monkeypatch, log):
    scripted(monkeypatch, [100])

    def refuse(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(utils.predictions, "write_atomically", refuse)
    run(tiny, "TRAIN.EPOCHS 1")
    assert "predictions.npz could not be written (No space left on device); the run goes on, and tries" in log.text
    assert not (folder_of(tiny) / "predictions.npz").exists() and (folder_of(tiny) / "max_acc.pth").exists()
