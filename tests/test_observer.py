"""What a run shows beside its numbers: curves.png as it goes, TensorBoard, environment.json.

pytest tests/test_observer.py
"""

import io
import json
import os
import platform
import re
import time

import numpy as np
import pytest
import torch
from conftest import PATIENCE, TINY, folder_of, run
from matplotlib.axes import Axes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.report import write_metrics
from config import load_config
from data.sources.bundled import DigitsSource
from engine.monitoring import exponents
from logger import get_logger, read_metrics
from models import build_model
from tools import report
from utils.curves import POINTS, CurvesInBackground, draw_curves, thin
from utils.environment import environment_with


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of three epochs with TensorBoard and without augmentation, stopped once after the second."""
    root = tmp_path_factory.mktemp("observed")
    cfg = root / "tiny.yaml"
    text = TINY.replace("COLOR_JITTER: 0.0", "COLOR_JITTER: 0.0, HFLIP: 0.0, REPROB: 0.0, MIXUP: 0.0, CUTMIX: 0.0")
    text = text.replace("BATCH_SIZE: 64", "BATCH_SIZE: 480")
    cfg.write_text(text + f"OUTPUT: {root / 'out'}\nTENSORBOARD: True\n")
    run(cfg, "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0")
    run(cfg, "TRAIN.EPOCHS 3 TRAIN.WARMUP_EPOCHS 0")
    return folder_of(cfg)


@pytest.fixture(scope="module")
def events(trained):
    return EventAccumulator(
        str(trained / "tensorboard"), size_guidance={"images": 0, "histograms": 0, "scalars": 0}
    ).Reload()


def test_tensorboard_holds_every_scalar_of_the_metrics_file(trained, events):
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(trained / "metrics.jsonl"):
        for name in set(record) - {"kind", "epoch", "step"}:
            expected.setdefault(f"{record['kind']}/{name}", []).append((record["step"], record[name]))
    assert set(events.Tags()["scalars"]) == set(expected) and len(expected) == 11
    for name, values in expected.items():
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in seen] == [step for step, _ in values]
        assert [value for _, value in seen] == pytest.approx([value for _, value in values], rel=1e-6)


def test_tensorboard_shows_inputs_as_the_model_gets_them_once_a_start(events):
    shown = events.Images("inputs")
    assert [event.step for event in shown] == [3, 9]
    pixels = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)).convert("RGB"))
    assert pixels.shape == (32, 8 * 32, 3)
    tile = pixels[:, :32]
    source = DigitsSource("train", (32, 32))
    for i in range(len(source.labels)):
        padded = np.pad(np.asarray(source.load(i))[..., 0].astype(np.int16), 4)
        crops = np.lib.stride_tricks.sliding_window_view(padded, (32, 32))
        if np.abs(crops - tile[..., 0]).max(axis=(2, 3)).min() <= 1:
            return  # one of the digits, padded and cropped, to a grey level
    pytest.fail("the first input is no crop of a digit")


def test_tensorboard_has_the_exponents_of_every_polarity_layer_by_epoch(trained, events):
    names = events.Tags()["histograms"]
    assert names == ["exponent/layers.0.blocks.0", "exponent/layers.1.blocks.0"]  # LLSS: the other two are softmax
    checkpoint = torch.load(trained / "ckpt_epoch_3.pth", weights_only=True)["model"]
    for name in names:
        found = events.Histograms(name)
        assert [event.step for event in found] == [3, 6, 9]
        power = checkpoint[f"{name.removeprefix('exponent/')}.attn.power"]
        exponent = 1 + 4 * torch.sigmoid(power)
        last = found[-1].histogram_value
        assert last.num == exponent.numel()
        assert last.min == pytest.approx(exponent.min().item(), rel=1e-5)
        assert last.max == pytest.approx(exponent.max().item(), rel=1e-5)
        assert last.sum == pytest.approx(exponent.sum().item(), rel=1e-5)


def test_exponents_that_are_not_learned_have_no_histogram(tiny):
    model = build_model(load_config(str(tiny), ["MODEL.LA.LEARN_EXPONENT", "False"]), 10)
    assert exponents(model) == {}


def test_the_environment_of_every_start_is_stored_without_names(trained):
    text = (trained / "environment.json").read_text()
    starts = json.loads(text)
    assert len(starts) == 2
    start = starts[-1]
    assert (
        start["torch"] == torch.__version__ and start["processes"] == 1 and start["python"] == platform.python_version()
    )
    assert len(start["commit"].rstrip("+")) == 40 and start["command"].startswith("python ")
    assert len(text) < 4000 and platform.node() not in text
    assert not [
        value for name, value in os.environ.items() if "TOKEN" in name or "KEY" in name if value and value in text
    ]


def test_a_damaged_environment_file_does_not_stop_a_run(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    (start,) = json.loads(environment_with(tmp_path, torch.device("cpu"), 2))
    assert start["processes"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_curves_are_drawn_beside_the_run_and_one_at_a_time(tmp_path):
    write_metrics(tmp_path, epochs=2, steps=20, print_freq=5)
    curves = CurvesInBackground(tmp_path, pause=0)
    start = time.process_time()
    curves.epoch_ended()
    first = curves.drawing
    curves.epoch_ended()
    assert curves.drawing is first and first is not None
    assert time.process_time() - start < 0.1  # what the run itself pays
    wait_for(lambda: first.poll() is not None)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1560, 456) and len(np.unique(np.asarray(picture.convert("L")))) > 20
    curves.epoch_ended()
    assert curves.drawing is not first
    curves.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_short_epochs_are_not_drawn_one_by_one(tmp_path):
    write_metrics(tmp_path, epochs=1, steps=20)
    curves = CurvesInBackground(tmp_path, pause=3600)
    curves.epoch_ended()
    assert curves.drawing is None
    assert curves.draw() == tmp_path / "curves.png" and (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_drawing_that_fails_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(get_logger(), "warning", lambda text, *values: messages.append(text % values))
    write_metrics(tmp_path, epochs=1, steps=20)
    (tmp_path / "curves.png").mkdir()  # nothing can be renamed to it
    curves = CurvesInBackground(tmp_path, pause=0)
    curves.epoch_ended()
    wait_for(lambda: curves.drawing.poll() is not None)
    curves.pause = 3600
    curves.epoch_ended()
    assert curves.drawing is None
    assert curves.draw() is None
    (message,) = messages
    assert message.startswith("curves.png could not be drawn, the run goes on: IsADirectoryError")


def test_a_long_runs_picture_has_no_more_points_than_a_short_ones(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, *rest, **named: drawn.append(len(x)) or plot(self, x, *rest, **named)
    )
    write_metrics(tmp_path)  # 300 epochs, 3,900 training lines
    draw_curves(tmp_path)
    assert max(drawn) == POINTS and len(drawn) == 8


def test_thinning_keeps_means_ends_and_gaps():
    x = np.arange(1000.0)
    y = np.sin(x / 100)
    y[200:300] = np.nan
    across, values = thin(x, y, 100)
    assert len(across) == 100 and across[0] == 4.5 and across[-1] == 994.5
    assert np.isnan(values[20:30]).all() and np.isfinite(np.delete(values, range(20, 30))).all()
    assert values[0] == pytest.approx(y[:10].mean()) and values[-1] == pytest.approx(y[990:].mean())
    assert thin(x[:50], y[:50], 100)[1] is not None and len(thin(x[:50], y[:50], 100)[0]) == 50


def test_the_report_shows_all_that_a_run_writes(trained, tmp_path):
    page = tmp_path / "page.html"
    assert report.main([str(trained), "--images", "2", "--output", str(page)]) == 0
    text = page.read_text()
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["Results", "Curves", "Configuration", "Classes", "Confusions", "Hardest images", "Environment"]
    assert text.count("data:image/jpeg") == 4 and "<aside>" not in text  # pictures and attention, nothing missing
    best = max(record["top1"] for record in read_metrics(trained / "metrics.jsonl") if record["kind"] == "val")
    assert f"{best:.2f} %" in text and f": {best:.2f} % right" in text and "It was started 2 times" in text
