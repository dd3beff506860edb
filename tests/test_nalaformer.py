"""NaLaFormer: what the published models compute, their files, and the recipe.

pytest tests/test_nalaformer.py
"""

import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, config_file, read_json, recipe_input
from golden import assert_attention, assert_entries, assert_golden

from config import load_config, make_plan
from models import build_model
from models.files import load_checkpoint, weights_of
from models.loading import load_weights
from models.nalaformer import NaLaFormer, NalaMapAttention, NalaSoftmaxAttention
from models.options import AttentionOptions
from optimizer import build_optimizer, load_optimizer_state, parameter_groups

NALA = ROOT / "tests" / "fixtures" / "nala"
SIZES = ("xt", "t", "s", "b", "l")
IMAGENET = 1_281_167  # training images
CHECKPOINT = NALA / "checkpoint_nala_tiny.pth"


def tiny_model() -> NaLaFormer:
    described = read_json("checkpoint_nala_tiny.json", NALA)["arch"]
    return NaLaFormer(**{key: value for key, value in described.items() if key != "layerscales"}, img_size=64).eval()


@pytest.mark.parametrize("size", SIZES)
def test_entries_are_those_of_the_published_code(size):
    name = f"nalaformer_{size}"
    with torch.device("meta"):
        assert_entries(build_model(load_config(config_file(name))), NALA / "state_dicts" / f"{name}.json")
    entries = read_json(f"state_dicts/{name}.json", NALA)["entries"]
    if size in ("xt", "t"):
        filled = recipe.fill({key: np.empty(shape) for key, shape, *_ in entries})
        assert recipe.digest(filled) == read_json("summary.json", NALA)[name]["digest"]


@pytest.mark.parametrize("size", ["xt", pytest.param("s", marks=pytest.mark.slow)])
def test_logits_stages_and_gradients(size):
    name = f"nalaformer_{size}"
    assert_golden(build_model(load_config(config_file(name))), NALA, name, float32=2e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_attention_modules(backend):
    linear = NalaMapAttention(32, 1, AttentionOptions("norm_aware", backend=backend))
    assert_attention(linear, NALA / "attention" / "attention_nala_32h1_7x7.npz", (7, 7))
    assert_attention(NalaSoftmaxAttention(32, 2), NALA / "attention" / "attention_nala_softmax_32h2_4x5.npz", (4, 5))


def test_a_checkpoint_of_the_published_script_gives_its_logits(caplog):
    """Its `args` are an object, and its epoch is an index."""
    caplog.set_level("INFO", logger="polaformer")
    content = load_checkpoint(CHECKPOINT)
    assert "args" not in content and content["epoch"] == read_json("checkpoint_nala_tiny.json", NALA)["epoch"] + 1
    assert "epoch 1 is taken for the index of the last finished one" in caplog.text
    weights = weights_of(content, "auto", "nala")
    assert list(weights) == ["model", "ema"]
    expected, images = np.load(NALA / "checkpoint_nala_tiny.npz"), recipe_input(64)
    for kind, state in weights.items():
        model = tiny_model()
        load_weights(model, state, "nala")
        scale = expected[f"logits_{kind}_f64"].std()
        with torch.no_grad():
            exact = model.double()(images.double()).numpy()
        assert np.abs(exact - expected[f"logits_{kind}_f64"]).max() < 1e-10 * scale


@pytest.mark.parametrize("undecayed_first", [False, True])
def test_moments_find_their_parameters_in_either_order_of_the_groups(undecayed_first):
    """The published script has the undecayed group first, the fixture last."""
    model, stored = tiny_model(), load_checkpoint(CHECKPOINT)["optimizer"]
    decay, no_decay = parameter_groups(model)
    names = [*decay, *no_decay]
    moments = {name: stored["state"][position]["exp_avg"] for position, name in enumerate(names)}
    if undecayed_first:
        names = [*no_decay, *decay]
        first, second = stored["param_groups"]
        sizes = len(second["params"]), len(first["params"])
        groups = [second | {"params": list(range(sizes[0]))}, first | {"params": list(range(sizes[0], sum(sizes)))}]
        order = [*second["params"], *first["params"]]
        stored = {"param_groups": groups, "state": {new: stored["state"][old] for new, old in enumerate(order)}}
    optimizer = build_optimizer(load_config(config_file("nalaformer_xt")), model)
    load_optimizer_state(optimizer, model, stored, "nala")
    parameters = dict(model.named_parameters())
    for name in names:
        assert torch.equal(optimizer.state[parameters[name]]["exp_avg"], moments[name]), name


@pytest.mark.parametrize("size", ["xt", "xt_8m", "t", "s", "b", "l"])
def test_the_recipe(size):
    config = load_config(config_file(f"nalaformer_{size}"))
    batch = {"t": 2048}.get(size, 1024)
    plan = make_plan(config, 8)
    assert plan.global_batch == batch
    # as many steps as the published sampler's ⌊images/256⌋·256/8 samples make, on all of ImageNet
    assert IMAGENET // 8 // plan.per_process == IMAGENET // 256 * 256 // 8 // plan.per_process
    train = config.TRAIN
    assert (train.BASE_LR, train.WARMUP_LR, train.MIN_LR, train.SCALE_WARMUP_MIN_LR) == (5e-4, 1e-6, 1e-5, False)
    assert (train.WARMUP_EPOCHS, train.EPOCHS, train.COOLDOWN_EPOCHS, train.WEIGHT_DECAY) == (5, 300, 0, 0.05)
    assert train.CLIP_GRAD is None and train.SYNC_BN and train.LR_SCHEDULER.PER_EPOCH and config.AUG.REPEATS == 3
    assert config.EMA.ENABLE and config.EMA.DECAY_PER_512 and config.EMA.DECAY == 0.99996
    assert config.TEST.RESIZE == "shorter" and config.TEST.CROP and config.MODEL.PPP.PROJECTION == 1024
    rates = {"xt": 0.1, "xt_8m": 0.1, "t": 0.1, "s": 0.15, "b": 0.4, "l": 0.55}
    assert rates[size] == config.MODEL.DROP_PATH_RATE


def test_what_is_published_of_xt_and_t_is_not_what_was_reported():
    """Sizes that fit the reports: b1's widths for XT, a ratio of 3.5 for T."""
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in build_model(load_config(config_file(name), options.split())).parameters())
            for name, options in {
                "nalaformer_xt": "",
                "nalaformer_xt_8m": "",
                "nalaformer_t": "MODEL.PPP.MLP_RATIOS [3.5,3.5,3.5,3.5]",
            }.items()
        }
    assert [round(size / 1e6, 2) for size in sizes.values()] == [6.14, 7.83, 14.93]
