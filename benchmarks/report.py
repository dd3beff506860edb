"""How long tools/report.py takes for a run of ImageNet's length, and how large its page is: python -m benchmarks.report

The run is synthetic: 300 epochs of log lines and validations, 50,000 predictions over 1,000 classes, an image folder of
50,000 names (links to one JPEG), and a Pola-Swin-T checkpoint with fresh weights for the attention overlays. The tool
runs as a user starts it, imports included.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from benchmarks.common import CPU, ROOT, Bar, Outcome, Spread, WrongResultError
from models import build_model
from utils.predictions import Predictions
from utils.predictions import write_predictions as store_predictions

SECONDS_BAR = 10.0
SIZE_BAR_MB = 8.0
EPOCHS, IMAGES, CLASSES = 300, 50_000, 1000
STEPS, PRINT_FREQ = 1251, 100  # optimizer steps of an ImageNet epoch at 1024 images, and between log lines


def write_metrics(
    folder: Path, epochs: int = EPOCHS, steps: int = STEPS, print_freq: int = PRINT_FREQ, seed: int = 0
) -> None:
    """A metrics.jsonl as a run of that length writes it, with a learning curve's shape."""
    draw = np.random.default_rng(seed)
    lines = []
    for epoch in range(epochs):
        progress = (epoch + 1) / epochs
        for done in sorted({*range(print_freq, steps + 1, print_freq), steps}):
            record = {
                "kind": "train",
                "epoch": epoch,
                "step": epoch * steps + done,
                "loss": 2.8 + 4.1 * np.exp(-6 * progress) + 0.03 * draw.normal(),
                "lr": 5e-6 + 1e-3 * min(1.0, 15 * progress) * (1 + np.cos(np.pi * progress)) / 2,
                "grad_norm": float(np.exp(0.4 + 0.25 * draw.normal())),
                "data_time": 0.002 + 0.001 * draw.random(),
                "communication_time": 0.004,
                "step_time": 0.42 + 0.01 * draw.normal(),
                "images_per_s": 2400 + 30 * draw.normal(),
                "memory_mb": 31_000.0,
            }
            lines.append(json.dumps(record))
        for kind, gain in (("val", 0.0), ("ema", 0.4)):
            top1 = 82.0 * (1 - np.exp(-5 * progress)) + gain + 0.15 * draw.normal()
            values = {"loss": 4.6 - 0.046 * top1, "top1": top1, "top5": 55 + 0.5 * top1}
            lines.append(json.dumps({"kind": kind, "epoch": epoch, "step": (epoch + 1) * steps, **values}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_predictions(
    folder: Path, images: int = IMAGES, classes: int = CLASSES, accuracy: float = 0.8, seed: int = 0
) -> None:
    """A predictions.npz in which classes differ in difficulty and errors fall mostly on neighbouring classes."""
    draw = np.random.default_rng(seed)
    label = np.sort(np.arange(images) % classes)
    chance = np.clip(accuracy + 0.12 * draw.normal(size=classes), 0.05, 0.99)[label]
    shift = np.rint(draw.laplace(scale=4, size=images)).astype(int)
    neighbour = (label + np.where(shift == 0, 1, shift)) % classes
    right = draw.random(images) < chance
    k = min(5, classes)
    guesses = (np.where(right, label, neighbour)[:, None] + np.arange(k)) % classes
    probability = np.sort(draw.dirichlet(np.ones(k + 1), images)[:, :k], axis=1)[:, ::-1].astype(np.float32)
    names = tuple(f"n{number:08d}" for number in range(classes))
    predictions = Predictions(
        index=np.arange(images),
        label=label,
        top5=guesses,
        probability=probability,
        loss=np.where(right, 0.3, 3.0).astype(np.float32) * draw.gamma(2, 0.5, images).astype(np.float32),
        file=np.array([f"val/{names[c]}/ILSVRC2012_val_{i:08d}.JPEG" for i, c in enumerate(label.tolist())]),
    )
    written = folder / "predictions.npz"
    store_predictions(written, predictions, root="", classes=names, epoch=EPOCHS, checkpoint="max_acc.pth")


def write_run(folder: Path, root: Path) -> None:
    """A whole run folder, and at `root` the image folder that it was validated on."""
    write_metrics(folder)
    write_predictions(folder)
    config = common.configuration("pola_swin_t", DATA__DATA_PATH=root)
    (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
    torch.save({"model": build_model(config).state_dict(), "config": config.dump()}, folder / "max_acc.pth")
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    root.mkdir()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(root / "image.jpg")
    with np.load(folder / "predictions.npz") as predictions:
        files = predictions["file"].tolist()
    for parent in {(root / file).parent for file in files}:
        parent.mkdir(parents=True)
    for file in files:
        os.link(root / "image.jpg", root / file)


def make_report(folder: Path) -> tuple[float, float]:
    """Seconds from the command to its end, and seconds of CPU in all its threads.

    Raises WrongResultError where the page in `folder` lacks a part.
    """
    before, command = os.times(), [sys.executable, "-m", "tools.report", str(folder)]
    seconds, result = common.timed(
        CPU, lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    page = folder / "report.html"
    if result.returncode or not page.exists():
        raise WrongResultError(f"the report failed: {result.stdout}{result.stderr}")
    text = page.read_text(encoding="utf-8")
    parts = {"curves": r'class="chart"', "matrix": r'class="matrix"', "pictures and overlays": r"data:image/jpeg"}
    counts = {name: len(re.findall(pattern, text)) for name, pattern in parts.items()}
    if counts != {"curves": 8, "matrix": 1, "pictures and overlays": 16}:
        raise WrongResultError(f"the page holds {counts}, expected 8 curves, a matrix, 8 pictures and 8 overlays")
    return seconds, cpu


def measure(options: Namespace) -> Outcome:
    """Reports of one synthetic run."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        write_run(run, Path(scratch) / "images")
        made = [make_report(run) for _ in range(options.repeats)]
        size = (run / "report.html").stat().st_size / 1e6
    seconds, cpu = Spread.of(wall for wall, _ in made), Spread.of(cpu for _, cpu in made)
    rows = [("seconds", seconds.text()), ("seconds of CPU", cpu.text()), ("MB", f"{size:.2f}")]
    common.print_table(f"{EPOCHS} epochs, {IMAGES:,} predictions: {common.SPREAD}", ("", "report"), rows)
    bars = [
        Bar("seconds of a report", seconds.median, SECONDS_BAR, "at most"),
        Bar("MB of its page", size, SIZE_BAR_MB, "at most"),
    ]
    return Outcome({"seconds": seconds, "cpu_seconds": cpu, "mb": size}, bars)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("report", __doc__, repeats=3)
    common.run(parser.parse_args(arguments), measure, recorded="repeats")


if __name__ == "__main__":
    main()
