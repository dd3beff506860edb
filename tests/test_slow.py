"""What takes minutes: whole-model compilation. (The largest official model is in test_variants.py.)

make test-slow
"""

import pytest

import main
from config import load_config
from logger import read_metrics

pytestmark = pytest.mark.slow


def test_a_compiled_run_trains_like_an_eager_one(tiny):
    options = "TRAIN.EPOCHS 1 EMA.ENABLE True PRINT_FREQ 1 DATA.BATCH_SIZE 200 DATA.TRAIN_FRACTION 1.0"
    for compiled in ("False", "True"):
        main.main(load_config(str(tiny), f"{options} COMPILE {compiled} TAG {compiled}".split()))
    root = tiny.parent / "out" / "tiny"
    eager, compiled = (read_metrics(root / tag / "metrics.jsonl") for tag in ("False", "True"))
    assert len(eager) == len(compiled) == 9
    for expected, record in zip(eager, compiled, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
