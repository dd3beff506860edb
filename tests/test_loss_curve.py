"""The first 30 training losses of a small Pola-Swin, in float64: a refactoring that changes numbers is noticed.

The configuration lies beside the curve, so that the quickstart's may change. Weights are the recipe's, because torch's
truncated normal draws other numbers in other versions.

pytest tests/test_loss_curve.py
python tests/test_loss_curve.py      writes the curve anew, after a change that is meant to change it
"""

import json
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import fill_with_recipe

from config import load_config, make_plan
from data.loaders import build_loaders
from engine.epoch import train_one_epoch
from engine.training import build_training
from logger import MetricsWriter, read_metrics
from models import build_model
from utils.randomness import seed_everything

ROOT = Path(__file__).resolve().parents[1]
CURVE = ROOT / "tests" / "fixtures" / "loss_curve.json"
CONFIG = CURVE.with_suffix(".yaml")
STEPS = 30


def loss_curve(folder: Path) -> list[float]:
    """Losses of the first steps of one process, weights and arithmetic in float64."""
    config = load_config(str(CONFIG), ["PRINT_FREQ", "1"])
    loaders = build_loaders(config, make_plan(config))
    model = fill_with_recipe(build_model(config, loaders.num_classes)).double()
    seed_everything(config.SEED)
    training = build_training(config, make_plan(config), model, loaders, torch.device("cpu"))
    training.steps_per_epoch = STEPS
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(folder))
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_losses_are_those_committed(tmp_path):
    committed = json.loads(CURVE.read_text())
    assert len(committed) == STEPS and committed[-1] < committed[0] - 0.1
    assert loss_curve(tmp_path) == pytest.approx(committed, rel=1e-6)


if __name__ == "__main__":
    import tempfile

    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as temporary:
        CURVE.write_text(json.dumps(loss_curve(Path(temporary)), indent=1) + "\n")
