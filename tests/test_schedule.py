"""Learning rates and parameter groups.

pytest tests/test_schedule.py
"""

import itertools
import math

import pytest
import torch
from conftest import config_file, read_json, run

from config import load_config, make_plan
from lr_scheduler import build_scheduler
from models import build_model
from optimizer import build_optimizer, parameter_groups

REFERENCE = read_json("schedule.json")["configs"]


@pytest.fixture(scope="module", params=REFERENCE)
def official(request):
    reference = REFERENCE[request.param]
    config = load_config(config_file(request.param))
    with torch.device("meta"):
        model = build_model(config)
    lr_scale = config.DATA.BATCH_SIZE * reference["world_size"] / 512
    return reference, config, model, lr_scale


def test_parameter_groups(official):
    reference, _, model, _ = official
    released = [
        [n for n in group["names"] if n not in model.unused_released_parameters] for group in reference["param_groups"]
    ]
    assert list(parameter_groups(model)) == released


def test_optimizer_hyperparameters(official):
    reference, config, model, lr_scale = official
    optimizer = build_optimizer(config, model, lr_scale)
    assert type(optimizer).__name__ == reference["optimizer"]["class"]
    for name, value in reference["optimizer"]["defaults"].items():
        assert optimizer.defaults[name] == (tuple(value) if isinstance(value, list) else value)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_cosine_rates(official):
    reference, config, model, lr_scale = official
    optimizer = build_optimizer(config, model, lr_scale)
    scheduler = build_scheduler(config, make_plan(config), optimizer, reference["n_iter_per_epoch"], lr_scale)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(reference["lr_before_any_step_update"], rel=1e-12)
    assert len(reference["lr_after_step_update"]) > 60
    for step, rate in reference["lr_after_step_update"]:
        scheduler.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate, rel=1e-12), step


def _rates(steps, **options):
    pairs = [word for key, value in options.items() for word in (f"TRAIN.{key.replace('__', '.')}", str(value))]
    config = load_config(config_file("pola_swin_t"), ["TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "2", *pairs])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.TRAIN.BASE_LR * 2)
    scheduler = build_scheduler(config, make_plan(config), optimizer, 5, lr_scale=2.0)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates  # rates[k] is that of iteration k


def test_linear_runs_from_base_to_its_floor_and_stays():
    rates = _rates(60, LR_SCHEDULER__NAME="linear", BASE_LR=1e-3, WARMUP_LR=1e-5, MIN_LR=1e-6)
    assert rates[0] == rates[1] == 2e-5
    assert rates[11] == pytest.approx(2e-3)  # the end of the warm-up: BASE_LR
    assert rates[31] == pytest.approx(2e-3 + 0.5 * (2e-5 - 2e-3))
    assert rates[51:] == pytest.approx([0.01 * 2e-3] * len(rates[51:]))
    assert _rates(60, LR_SCHEDULER__NAME="linear", BASE_LR=1e-3, MIN_LR=1e-4)[-1] == pytest.approx(2e-4)


def test_step_counts_from_iteration_0_and_never_falls_below_min_lr():
    rates = _rates(
        60, LR_SCHEDULER__NAME="step", LR_SCHEDULER__DECAY_EPOCHS=3, BASE_LR=1e-3, WARMUP_LR=1e-5, MIN_LR=5e-5
    )
    assert rates[6] == pytest.approx(2e-5 + 0.5 * (2e-3 - 2e-5))  # half-way through the warm-up of 10 steps
    assert rates[15] == pytest.approx(2e-3)
    assert rates[16] == pytest.approx(2e-4)  # step_update(15): three epochs of 5 steps, warm-up included
    assert rates[31:] == pytest.approx([1e-4] * len(rates[31:]))


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_after_warm_up_nothing_is_below_min_lr(name):
    rates = _rates(80, LR_SCHEDULER__NAME=name, LR_SCHEDULER__DECAY_EPOCHS=1, MIN_LR=1e-4, WARMUP_LR=1e-6)
    assert min(rates[:11]) < 2e-4
    assert min(rates[11:]) >= 2e-4 * (1 - 1e-12)


def test_no_warm_up_starts_at_base_lr():
    for name in ("cosine", "linear", "step"):
        assert _rates(0, LR_SCHEDULER__NAME=name, WARMUP_EPOCHS=0, BASE_LR=1e-3) == [2e-3]


def test_sgd_takes_its_momentum():
    options = "TRAIN.OPTIMIZER.NAME sgd TRAIN.OPTIMIZER.MOMENTUM 0.8 MODEL.SWIN.EMBED_DIM 24".split()
    config = load_config(config_file("pola_swin_t"), options)
    optimizer = build_optimizer(config, build_model(config))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.8 and optimizer.defaults["nesterov"]


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_the_curve_may_begin_after_the_warm_up(name):
    """By default the curve began with the run, so that the rate falls when the warm-up ends (the released recipe)."""
    options = {"LR_SCHEDULER__NAME": name, "WARMUP_EPOCHS": 5, "LR_SCHEDULER__DECAY_EPOCHS": 3}
    plain, prefixed = (_rates(50, **options, LR_SCHEDULER__WARMUP_PREFIX=prefix) for prefix in (False, True))
    peak = max(prefixed)
    assert prefixed.index(peak) == 26 and plain[:26] == prefixed[:26]  # 25 of 50 steps warm up
    assert prefixed[27] > 0.99 * peak and plain[26] < 0.8 * peak
    assert prefixed[50] < (0.02 if name == "cosine" else 0.11) * peak
    assert all(a >= b for a, b in itertools.pairwise(prefixed[26:]))


def test_one_rate_for_an_epoch_is_the_schedule_s_at_the_epoch_before():
    """Warm-up rate and minimum not scaled; epochs 0 and 1 at the warm-up rate; the cosine counted with the warm-up."""
    options = {"LR_SCHEDULER__PER_EPOCH": True, "SCALE_WARMUP_MIN_LR": False, "WARMUP_EPOCHS": 3}
    rates = _rates(59, **options, BASE_LR=1e-3, WARMUP_LR=1e-6, MIN_LR=1e-5)

    def scheduled(epoch: int) -> float:
        if epoch < 3:
            return 1e-6 + epoch * (2e-3 - 1e-6) / 3
        return 1e-5 if epoch >= 10 else 1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 10))

    assert rates == pytest.approx([scheduled(max(0, step // 5 - 1)) for step in range(60)], rel=1e-12)
    assert rates[0] == rates[9] == 1e-6 < rates[10] == rates[14]


@pytest.mark.parametrize("per_epoch", [False, True])
@pytest.mark.parametrize("warmup", [10, 12])
def test_a_warm_up_as_long_as_the_run_leaves_no_curve(per_epoch, warmup):
    options = {"LR_SCHEDULER__PER_EPOCH": per_epoch, "LR_SCHEDULER__WARMUP_PREFIX": True, "WARMUP_EPOCHS": warmup}
    rates = _rates(45, **options)
    assert all(a <= b for a, b in itertools.pairwise(rates)) and rates[0] < rates[45]


def test_a_batch_that_leaves_the_recipe_says_what_that_makes_of_the_rates(tiny, log, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"BASE: [{tiny}]\nTRAIN: {{GLOBAL_BATCH: 64, EPOCHS: 1}}\n")
    run(path)
    assert "global batch 64 = 1 processes × 1 passes × 64 samples" in log.text and "the recipe has" not in log.text
    run(path, "TRAIN.ACCUMULATION_STEPS 2 DATA.BATCH_SIZE 16 TAG accumulated")
    assert "TRAIN.ACCUMULATION_STEPS 2 replaces TRAIN.GLOBAL_BATCH 64 of the file" in log.text
    assert (
        "the recipe has 64 images a step (TRAIN.GLOBAL_BATCH), this run 32: all its learning rates are 0.5 times"
        in log.text
    )
    run(path, "TRAIN.GLOBAL_BATCH 48 TRAIN.SCALE_LR False TAG given")
    assert "this run 48: its learning rates stay those of the configuration" in log.text
