"""TRAIN.LAYER_DECAY: learning rates that fall from the head to the stem, and runs that resume with or without it.

pytest tests/test_layer_decay.py
"""

import shutil

import pytest
import torch
from conftest import config_file, folder_of, run
from run_files import epoch_file
from test_resume import assert_same_run
from timm.optim import param_groups_layer_decay

from config import load_config, make_plan
from lr_scheduler import build_scheduler
from models import build_model
from models.files import CheckpointError, load_checkpoint
from optimizer import build_optimizer, load_optimizer_state, parameter_groups

SMALL = (
    "DATA.IMG_SIZE 32 MODEL.NUM_CLASSES 3 MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [2,1,1,1]"
    " MODEL.SWIN.NUM_HEADS [1,2,2,2] TRAIN.EPOCHS 10 TRAIN.WARMUP_EPOCHS 2"
)
NAMES = ["pola_swin_t", "pola_pvt_t", "pola_pp_b0", "nalaformer_xt"]


def _config(name: str, options: str = ""):
    return load_config(config_file(name), f"{SMALL} {options}".split())


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", NAMES)
def test_without_it_there_are_the_two_groups_of_always(name):
    config = _config(name)
    model = build_model(config)
    optimizer = build_optimizer(config, model)
    assert _names(model, optimizer) == list(parameter_groups(model))
    assert all("lr_scale" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_of_timm(name):
    config = _config(name, "TRAIN.LAYER_DECAY 0.7")
    model = build_model(config)
    optimizer = build_optimizer(config, model)

    name_of = {parameter: key for key, parameter in model.named_parameters()}
    theirs = param_groups_layer_decay(
        model, config.TRAIN.WEIGHT_DECAY, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.7
    )
    expected = {
        name_of[parameter]: pytest.approx((group["lr_scale"], group["weight_decay"]))
        for group in theirs
        for parameter in group["params"]
    }
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["lr_scale"], group["weight_decay"]) == expected[name_of[parameter]], name_of[parameter]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_schedule_multiplies_its_rate_by_the_factor_of_each_layer(schedule):
    options = f"TRAIN.LR_SCHEDULER.NAME {schedule} TRAIN.LR_SCHEDULER.DECAY_EPOCHS 3 TRAIN.MIN_LR 1e-6"
    rates = {}
    for decay in (1.0, 0.5):
        config = _config("pola_swin_t", f"{options} TRAIN.LAYER_DECAY {decay}")
        model = build_model(config)
        optimizer = build_optimizer(config, model, lr_scale=2.0)
        scheduler = build_scheduler(config, make_plan(config), optimizer, 5, lr_scale=2.0)
        names = _names(model, optimizer)
        seen = []
        for step in range(45):
            rate_of = {n: group["lr"] for g, group in enumerate(optimizer.param_groups) for n in names[g]}
            assert optimizer.param_groups[0]["lr"] == rate_of["head.weight"]  # the rate that is logged
            seen.append(
                [rate_of[n] for n in ("head.weight", "layers.3.blocks.0.mlp.fc1.weight", "patch_embed.proj.bias")]
            )
            scheduler.step_update(step)
        rates[decay] = torch.tensor(seen, dtype=torch.float64)
    assert (rates[1.0].max(dim=1).values == rates[1.0].min(dim=1).values).all()
    factors = torch.tensor([1.0, 0.5, 0.5**6], dtype=torch.float64)  # head, last of five blocks (with norm), stem
    assert torch.allclose(rates[0.5], rates[1.0] * factors, rtol=1e-12)


def test_resumed_run_equals_the_unbroken_one_and_the_key_may_change(tiny):
    options = "TRAIN.LAYER_DECAY 0.6 TRAIN.EPOCHS 2 DATA.BATCH_SIZE 256 PRINT_FREQ 1 AUG.AUTO_AUGMENT none AUG.REPROB 0"
    run(tiny, f"{options} TAG whole")
    root = folder_of(tiny).parent
    for tag in ("parts", "plain"):  # as they were after the first epoch
        shutil.copytree(root / "whole", root / tag)
        for path in [*(root / tag).glob("max_acc.pth*"), *(root / tag).glob(f"{epoch_file(root, 2).name}*")]:
            path.unlink()
    run(tiny, f"{options} TAG parts")
    assert_same_run(root / "whole", root / "parts", 2)
    run(tiny, f"{options} TRAIN.LAYER_DECAY 1.0 TAG plain")
    layered, plain = (load_checkpoint(epoch_file(root / tag, 2)) for tag in ("whole", "plain"))
    assert len(layered["optimizer"]["param_groups"]) > len(plain["optimizer"]["param_groups"]) == 2
    assert not torch.equal(layered["model"]["patch_embed.proj.weight"], plain["model"]["patch_embed.proj.weight"])


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.5), (0.5, 1.0), (0.5, 0.8)])
def test_moments_stay_with_their_parameters(before, after):
    config = _config("pola_pvt_t", f"TRAIN.LAYER_DECAY {before}")
    model = build_model(config)
    optimizer = build_optimizer(config, model)
    for value, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, value + 1.0)
    optimizer.step()
    config = _config("pola_pvt_t", f"TRAIN.LAYER_DECAY {after}")
    other = build_optimizer(config, model)
    load_optimizer_state(other, model, optimizer.state_dict(), "file.pth")
    for value, parameter in enumerate(model.parameters()):
        assert other.state[parameter]["exp_avg"].flatten()[0] == pytest.approx(0.1 * (value + 1))
        assert torch.equal(other.state[parameter]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def test_state_of_another_model_is_refused():
    config = _config("pola_pvt_t", "TRAIN.LAYER_DECAY 0.5")
    model = build_model(config)
    deeper = build_model(_config("pola_pvt_s"))
    state = build_optimizer(config, deeper).state_dict()
    with pytest.raises(
        CheckpointError, match=r"file.pth: its optimizer has groups of \[.*\] parameters, this model \["
    ):
        load_optimizer_state(build_optimizer(config, model), model, state, "file.pth")
