"""PolaFormer++: what the released models compute and begin with, their files, and the recipe.

pytest tests/test_pola_pp.py
"""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from conftest import (
    PPP,
    ROOT,
    config_file,
    folder_of,
    read_json,
    recipe_input,
    run,
)
from golden import assert_attention, assert_entries, assert_golden
from run_files import epoch_file
from test_documentation import blocks
from timm.utils import ModelEmaV3
from torch import nn

from config import config_from_tree, load_config, make_plan
from main import check
from models import build_model
from models.attention import PolaMapAttention
from models.files import CheckpointError, load_checkpoint, weights_of
from models.layers import RotaryAngles
from models.loading import create_model, load, load_weights
from models.ops.rotary import frequencies, rotary_table
from models.options import AttentionOptions
from models.pola_pp import PolaPP
from optimizer import build_optimizer, load_optimizer_state, parameter_groups

NAMES = [f"b{i}" for i in range(6)]
every_variant = pytest.mark.parametrize("name", NAMES)
slow_b3 = pytest.param("b3", marks=pytest.mark.slow)
CHECKPOINT = PPP / "checkpoint_ppp_tiny.pth"
LAYER_SCALES = {  # at the start, by stage
    **{name: [1, 1, 1, 1] for name in NAMES[:4]},
    "b4": [1, 1, 1e-6, 1e-6],
    "b5": [1e-6] * 4,
}


def arguments_of(described: dict) -> dict:
    """The constructor's arguments of the fixture's `arch`."""
    return {key: value for key, value in described["arch"].items() if key != "layerscales"}


def tiny_model() -> PolaPP:
    """The model of the checkpoint fixture, freshly initialised."""
    return PolaPP(**arguments_of(read_json("checkpoint_ppp_tiny.json", PPP)), img_size=64).eval()


# ---------------------------------------------------------------------------------------------------------------------
# What the released models compute
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES[:4], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[4:])])
def test_recipe_is_used_as_the_fixtures_used_it(name):
    entries = read_json(f"state_dicts/{name}.json", PPP)["entries"]
    shapes = {key: np.empty(shape) for key, shape, *_ in entries}
    assert recipe.digest(recipe.fill(shapes)) == read_json("summary.json", PPP)[name]["digest"]


@every_variant
def test_entries_are_those_of_the_released_files(name):
    """Names, order, shapes, dtypes, and which are parameters."""
    with torch.device("meta"):
        model = build_model(load_config(config_file(f"pola_pp_{name}")))
    assert_entries(model, PPP / "state_dicts" / f"{name}.json")
    assert len(model.state_dict()) == read_json("summary.json", PPP)[name]["entries"]


@pytest.mark.parametrize("name", ["b0", slow_b3])
def test_logits_stages_and_gradients(name):
    assert_golden(build_model(load_config(config_file(f"pola_pp_{name}"))), PPP, name, float32=5e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_attention_module_output_and_every_gradient(backend):
    module = PolaMapAttention(32, 1, AttentionOptions("polarity_pp", backend=backend))
    assert_attention(module, PPP / "attention" / "attention_32h1_7x7.npz", (7, 7))


def test_rotary_angles_sines_and_cosines_are_the_released_ones_bit_for_bit():
    fixture = np.load(PPP / "attention" / "attention_32h1_7x7.npz")
    assert np.array_equal(RotaryAngles(64).angle.numpy(), fixture["rope_angle_f32"])
    table = rotary_table((7, 7), 64, torch.float64, torch.device("cpu"))
    for key, values in (("cos_f64", table.cos), ("sin_f64", table.sin)):
        assert np.array_equal(values.repeat_interleave(2, dim=-1).numpy(), fixture[key])


def test_released_checkpoint_gives_its_logits_by_both_sets_of_weights():
    expected = np.load(PPP / "checkpoint_ppp_tiny.npz")
    weights = weights_of(load_checkpoint(CHECKPOINT), "auto", "checkpoint_ppp_tiny.pth")
    assert list(weights) == ["model", "ema"]
    model, images = tiny_model(), recipe_input(64)
    for kind, state in weights.items():
        load_weights(model.float(), state, "checkpoint_ppp_tiny.pth")
        scale = expected[f"logits_{kind}_f64"].std()
        with torch.no_grad():
            assert np.abs(model(images).numpy() - expected[f"logits_{kind}_f32"]).max() < 5e-5 * scale
            exact = model.double()(images.double()).numpy()
        assert np.abs(exact - expected[f"logits_{kind}_f64"]).max() < 1e-10 * scale


# ---------------------------------------------------------------------------------------------------------------------
# Rotary angles in files
# ---------------------------------------------------------------------------------------------------------------------


def angles_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if key.endswith("angle")}


def assert_exact_angles(model: nn.Module) -> None:
    found = angles_of(model)
    assert len(found) == 8
    for key, angle in found.items():
        exact = frequencies(2 * len(angle)).repeat_interleave(2)
        assert torch.equal(angle, exact.to(angle.dtype)), key


def from_drifted_average() -> nn.Module:
    drifted = {k: v * 1.01 if k.endswith("angle") else v for k, v in load_checkpoint(CHECKPOINT)["model_ema"].items()}
    model = tiny_model()
    load_weights(model, drifted, "drifted")
    return model


def from_meta(**how: bool) -> nn.Module:
    with torch.device("meta"):
        model = tiny_model()
    if not how:
        model = model.to_empty(device="cpu")
    model.load_state_dict(from_drifted_average().state_dict(), **how)
    return model


def averaged() -> nn.Module:
    model = tiny_model()
    average = ModelEmaV3(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        average.update(model)
    return average.module


@pytest.mark.parametrize(
    "make",
    {
        "new": tiny_model,
        "drifted average": from_drifted_average,
        "to_empty": from_meta,
        "assigned": lambda: from_meta(assign=True),
        "half and back": lambda: tiny_model().half().float(),
        "bfloat16": lambda: tiny_model().bfloat16(),
        "bfloat16 and to double": lambda: tiny_model().bfloat16().double(),
        "averaged": averaged,
        "copied": lambda: copy.deepcopy(tiny_model()),
        "pickled": lambda: pickle.loads(pickle.dumps(tiny_model())),
    }.items(),
    ids=lambda pair: pair[0].replace(" ", "-"),
)
def test_angles_are_exact_whatever_happened_to_the_model(make):
    model = make[1]()
    assert_exact_angles(model)
    model.float()
    own = build_model_of_same_weights(model)
    with torch.no_grad():  # and what is computed does not depend on them
        assert torch.equal(model.eval()(recipe_input(64)), own(recipe_input(64)))


def build_model_of_same_weights(model: nn.Module) -> nn.Module:
    own = tiny_model()
    own.load_state_dict(model.state_dict())
    return own


# ---------------------------------------------------------------------------------------------------------------------
# What a model begins with
# ---------------------------------------------------------------------------------------------------------------------


@every_variant
def test_layer_scales_and_drop_path_begin_as_published(name):
    """By timm's name and by the configuration's file, at a width that takes no time."""
    rate = dict(zip(NAMES, (0.1, 0.1, 0.1, 0.15, 0.4, 0.55), strict=True))[name]
    narrow = "MODEL.PPP.EMBED_DIMS [4,4,4,4] MODEL.PPP.NUM_HEADS [1,1,1,1] MODEL.PPP.PROJECTION 8"
    configured = build_model(load_config(config_file(f"pola_pp_{name}"), narrow.split()))
    registered = create_model(f"pola_pp_{name}", embed_dims=[4] * 4, num_heads=[1] * 4, projection=8)
    for model in (configured, registered):
        for stage, value in zip(model.layers, LAYER_SCALES[name], strict=True):
            for block in stage.blocks:
                for gamma in (block.gamma_1, block.gamma_2):
                    assert torch.equal(gamma, torch.full_like(gamma, value))
        dropped = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
        assert np.allclose(dropped, np.linspace(0, rate, len(dropped)), rtol=1e-12)
    other = create_model(f"pola_pp_{name}", embed_dims=[4] * 4, num_heads=[1] * 4, drop_path_rate=0.3)
    assert other.layers[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)


def test_initial_values():
    torch.manual_seed(0)
    model = create_model("pola_pp_b0")
    model.reset_classifier(500)
    convolutions, linear = [], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert (module.bias == 0).all(), name
            convolutions.append(module.weight.flatten())
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        elif isinstance(module, nn.Linear):  # PyTorch's: uniform up to the inverse root of the inputs, bias included
            bound = module.in_features**-0.5
            for values in (module.weight, module.bias):
                assert bound * 0.9 < values.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            linear += 1
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert module.eps == (1e-6 if isinstance(module, nn.LayerNorm) else 1e-5)
            if isinstance(module, nn.BatchNorm2d):
                assert module.momentum == 0.1
    assert linear == 8 * 4 and len(model.head.weight) == 500
    assert torch.cat(convolutions).std().item() == pytest.approx(0.02, rel=0.01)
    rates = [value for name, value in model.named_parameters() if name.endswith((".s1", ".s2"))]
    assert len(rates) == 8 and not any(rate.any() for rate in rates)


def test_decay_reaches_what_has_several_dimensions():
    """Also s1, s2 and the layer scales, which the official code decays; in the order of its optimizer's groups."""
    decay, no_decay = parameter_groups(tiny_model())
    assert [len(group["params"]) for group in load_checkpoint(CHECKPOINT)["optimizer"]["param_groups"]] == [
        len(decay),
        len(no_decay),
    ]
    leaves = {name.rsplit(".", 1)[1] for name in decay}
    assert leaves == {"weight", "s1", "s2", "gamma_1", "gamma_2"}
    assert {name.rsplit(".", 1)[1] for name in no_decay} == {"weight", "bias"}


# ---------------------------------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------------------------------

#  batch on each of 8 GPUs, BASE_LR, WARMUP_LR, epochs of warm-up, MIN_LR, WEIGHT_DECAY, CLIP_GRAD, COOLDOWN_EPOCHS
RECIPES = {
    **dict.fromkeys(("b0", "b1", "b2"), (256, 5e-4, 5e-7, 20, 1e-7, 0.05, 5.0, 0)),
    "b3": (128, 5e-4, 5e-7, 20, 1e-7, 0.05, 5.0, 0),
    "b4": (128, 5e-4, 1e-7, 5, 1e-5, 0.05, 1.0, 10),
    "b5": (64, 5e-4, 1e-7, 5, 1e-5, 0.05, 1.0, 10),  # b4's, since the published one does not begin from scratch
}


@every_variant
def test_recipe_of_the_configurations(name):
    config = load_config(config_file(f"pola_pp_{name}"))
    train, plan = config.TRAIN, make_plan(config, 8)
    rates = train.BASE_LR, train.WARMUP_LR, train.WARMUP_EPOCHS, train.MIN_LR
    found = config.DATA.BATCH_SIZE, *rates, train.WEIGHT_DECAY, train.CLIP_GRAD, train.COOLDOWN_EPOCHS
    assert found == RECIPES[name]
    assert config.DATA.IMG_SIZE == 224 and train.EPOCHS == 300 and plan.last_epoch == 300 + train.COOLDOWN_EPOCHS
    assert plan.global_batch == plan.recipe_batch == (2048 if name in NAMES[:3] else 1024)
    assert config.EMA.ENABLE and config.EMA.DECAY == 0.99982 and not config.EMA.WARMUP
    assert (train.OPTIMIZER.NAME, train.OPTIMIZER.BETAS, train.OPTIMIZER.EPS) == ("adamw", (0.9, 0.999), 1e-8)
    assert train.LR_SCHEDULER.NAME == "cosine" and config.MODEL.LABEL_SMOOTHING == 0.1
    check(load_config(config_file(f"pola_pp_{name}"), ["DATA.DATASET", "digits"]))  # what pretrain.sh asks first
    augmentation = {"AUTO_AUGMENT": "rand-m9-mstd0.5-inc1", "MIXUP": 0.8, "CUTMIX": 1.0, "REPROB": 0.25}
    assert augmentation.items() <= dict(config.AUG).items()
    assert config.AUG.REMODE == "pixel" and config.AUG.COLOR_JITTER == 0.4 and config.DATA.INTERPOLATION == "bicubic"
    assert config.TEST.CROP and config.TEST.RESIZE == "squash"


def test_the_recipe_of_b5_is_that_of_b4():
    b4, b5 = (load_config(config_file(f"pola_pp_{name}")) for name in ("b4", "b5"))
    for section in ("TRAIN", "AUG", "EMA", "TEST"):
        assert b4[section] == b5[section]
    with open(config_file("pola_pp_b5")) as file:
        assert "does not train from scratch" in file.read()


# ---------------------------------------------------------------------------------------------------------------------
# Released files in runs
# ---------------------------------------------------------------------------------------------------------------------


def evaluate_file(tiny_ppp: Path, file: Path, options: str = "") -> dict[str, str]:
    """Top-1 by the name of the result's file."""
    run(tiny_ppp, f"EVAL_MODE True MODEL.RESUME {file} TAG {file.stem} {options}")
    folder = tiny_ppp.parent / "out" / "tiny" / file.stem
    return {path.stem: json.loads(path.read_text())["result"]["top1"] for path in folder.glob("eval_val*.json")}


def test_a_released_file_is_evaluated_by_model_and_average(tiny_ppp, log):
    both = evaluate_file(tiny_ppp, CHECKPOINT)
    assert f"evaluated {CHECKPOINT} (sha256 " in log.text and f"evaluated EMA weights of {CHECKPOINT} (" in log.text
    assert both.keys() == {"eval_val", "eval_val_ema"} and both["eval_val"] != both["eval_val_ema"]
    for word, name in (("ema", "eval_val_ema"), ("model", "eval_val")):
        named = tiny_ppp.parent / f"{word}.pth"
        named.write_bytes(CHECKPOINT.read_bytes())
        assert evaluate_file(tiny_ppp, named, f"MODEL.WEIGHTS {word}") == {name: both[name]}
    weights = dict(load_checkpoint(CHECKPOINT)["model"])
    for content in (weights, {"state_dict": weights}):
        torch.save(content, tiny_ppp.parent / f"bare{len(content)}.pth")
        assert evaluate_file(tiny_ppp, tiny_ppp.parent / f"bare{len(content)}.pth") == {"eval_val": both["eval_val"]}
    for lacking in ("layers.0.RoPE.angle", "layers.3.RoPE_linear.angle", "norm.num_batches_tracked"):
        torch.save({key: value for key, value in weights.items() if key != lacking}, tiny_ppp.parent / "bare.pth")
        with pytest.raises(CheckpointError, match=rf"missing \(1\): {lacking}"):
            evaluate_file(tiny_ppp, tiny_ppp.parent / "bare.pth")


def test_a_run_continues_from_a_released_file(tiny_ppp, log):
    run(tiny_ppp, f"MODEL.RESUME {CHECKPOINT}")
    assert "2 epochs finished, best top-1 12.500 %, of the average 25.000 %" in log.text
    assert "epoch 2 [" in log.text and "epoch 1 [" not in log.text
    before, after = load_checkpoint(CHECKPOINT), load_checkpoint(epoch_file(folder_of(tiny_ppp), 3))
    steps = after["step"] // 3
    assert {entry["step"].item() for entry in after["optimizer"]["state"].values()} == {8 + steps}
    for kind in ("model", "model_ema"):  # the counter of the average is the model's
        assert after[kind]["norm.num_batches_tracked"] == 8 + steps
        assert not torch.equal(after[kind]["norm.running_mean"], before[kind]["norm.running_mean"])
    lr = 4e-3 / 8  # of a global batch of 64
    (rate,) = {group["lr"] for group in after["optimizer"]["param_groups"]}
    assert rate == pytest.approx(5e-6 / 8 + 0.5 * (lr - 5e-6 / 8) * (1 + np.cos(np.pi * (3 * steps - 1) / (3 * steps))))


def test_moments_of_a_released_optimizer_reach_their_parameters():
    """By position in the released groups, which follow the order of the file's parameters."""
    model, stored = tiny_model(), load_checkpoint(CHECKPOINT)["optimizer"]
    config = load_config(config_file("pola_pp_b0"))
    optimizer = build_optimizer(config, model)
    load_optimizer_state(optimizer, model, stored, "checkpoint_ppp_tiny.pth")
    parameters = dict(model.named_parameters())
    order = [name for group in parameter_groups(model) for name in group]
    for position, name in enumerate(order):
        entry = optimizer.state[parameters[name]]
        assert torch.equal(entry["exp_avg"], stored["state"][position]["exp_avg"]), name
    assert len(order) == len(optimizer.state) == 140


@every_variant
def test_official_types_mean_the_variants(name):
    """In a configuration that names nothing else, and in one that changes something."""
    official = {"MODEL": {"TYPE": f"pola{name}", "DROP_PATH_RATE": 0.2}}
    complete, _ = config_from_tree(official, "released file")
    entries = [(key, shape) for key, shape, *_ in read_json(f"state_dicts/{name}.json", PPP)["entries"]]
    for config in (official, complete):
        with torch.device("meta"):
            model = build_model(config)
        assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == entries
        assert model.layers[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    with torch.device("meta"):
        changed = build_model({"MODEL": {**official["MODEL"], "PPP": {"PROJECTION": 64, "NUM_HEADS": [1, 1, 1, 1]}}})
    assert changed.proj.out_channels == 64 and changed.layers[3].blocks[0].attn.num_heads == 1
    assert len(changed.layers[2].blocks) == len(model.layers[2].blocks)


def test_its_attention_is_announced_and_what_other_kernels_read_has_no_effect(tiny_ppp, log):
    """Whatever MODEL.LA.ATTENTION says by default."""
    options = "MODEL.LA.ATTENTION polarity MODEL.LA.ALPHA 3 TRAIN.EPOCHS 1"
    run(tiny_ppp, options)
    assert "polarity_pp attention" in log.text
    file = epoch_file(folder_of(tiny_ppp), 1)
    assert evaluate_file(tiny_ppp, file).keys() == {"eval_val", "eval_val_ema"}
    arguments = arguments_of(read_json("checkpoint_ppp_tiny.json", PPP))
    registered = create_model("pola_pp_b0", checkpoint=file, img_size=32, **arguments)
    assert torch.equal(registered.head.weight, load_checkpoint(file)["model"]["head.weight"])


def test_a_file_is_evaluated_and_continued_at_any_size(tiny_ppp):
    """32×32 and 16×64 make as many tokens, which would confuse position tables, and here there are none."""
    run(tiny_ppp, "TRAIN.EPOCHS 1 DATA.IMG_SIZE [16,64]")
    file = epoch_file(folder_of(tiny_ppp), 1)
    assert evaluate_file(tiny_ppp, file).keys() == {"eval_val", "eval_val_ema"}
    assert evaluate_file(tiny_ppp, file, "DATA.IMG_SIZE [16,64] TEST.IMG_SIZE 50").keys() == {
        "eval_val",
        "eval_val_ema",
    }
    run(tiny_ppp, "TRAIN.EPOCHS 2")
    assert load_checkpoint(epoch_file(folder_of(tiny_ppp), 2))["epoch"] == 2


def test_a_file_of_an_official_type_loads_without_another_word(tmp_path):
    """Its configuration is the official one: keys without effect, and rates that are already scaled."""
    weights = create_model("pola_pp_b0").state_dict()
    stored = load_checkpoint(CHECKPOINT)["config"]
    assert stored["MODEL"]["TYPE"] == "polab0" and "KA" in stored["MODEL"]["SWIN"]
    torch.save({"model": weights, "config": stored, "epoch": 300}, tmp_path / "b0.pth")
    model = load(tmp_path / "b0.pth")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    by_timm = create_model("pola_pp_b0", checkpoint=tmp_path / "b0.pth")
    by_hub = torch.hub.load(str(ROOT), "pola_pp_b0", source="local", checkpoint=str(tmp_path / "b0.pth"))
    for other in (by_timm, by_hub):
        assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())
    with pytest.raises(CheckpointError, match="does not fit PolaPP of this configuration"):
        load(CHECKPOINT)  # a smaller model than its configuration says


# ---------------------------------------------------------------------------------------------------------------------
# Detectors
# ---------------------------------------------------------------------------------------------------------------------


def test_the_documented_retinanet_trains_and_detects():
    """The block of docs/models.md as it stands, of a smaller model and image."""
    (text,) = [block for block in blocks(ROOT / "docs" / "models.md", "python") if "RetinaNet" in block]
    names: dict = {}
    exec(text.replace("pola_pp_b2", "pola_pp_b0"), names)
    small = names["Pyramid"]("pola_pp_b0", embed_dims=[8, 16, 16, 24], num_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    detector = names["RetinaNet"](small, num_classes=3, min_size=64, max_size=96)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 40)]
    box = {"boxes": torch.tensor([[5.0, 6.0, 30.0, 38.0]]), "labels": torch.tensor([1])}
    losses = detector(images, [box, box])
    sum(losses.values()).backward()
    used = [parameter for name, parameter in detector.named_parameters() if "body" in name]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in used)
    found = detector.eval()(images)
    assert len(found) == 2 and all(result["boxes"].isfinite().all() for result in found)
    assert names["detector"].backbone.body.feature_info.channels() == [64, 128, 384]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "MODEL.LA.KERNEL_SIZE is 4, expected an odd number"),
        ({"kernel_size": 0}, "MODEL.LA.KERNEL_SIZE is 0, expected an odd number"),
        ({"depths": 2}, r"MODEL.PPP.DEPTHS \(depths\) is 2, expected a number of blocks for each stage"),
        ({"num_heads": (1, 2, 4, True)}, r"MODEL.PPP.NUM_HEADS \(num_heads\), a stage is True"),
        ({"num_heads": (1, 2, 4, 12.0)}, r"MODEL.PPP.NUM_HEADS \(num_heads\), a stage is 12.0"),
        ({"num_heads": (1, 2, 4)}, r"MODEL.PPP.NUM_HEADS .* expected one value for each of the 4 stages"),
        ({"embed_dims": (30, 64, 128, 384)}, "make heads of 30 channels, expected a multiple of 4"),
        ({"mlp_ratios": (0, 1, 1, 1)}, r"MODEL.PPP.MLP_RATIOS \(mlp_ratios\), a stage is 0"),
        ({"stage_types": "LLSM"}, "MODEL.PPP.STAGE_TYPES 'LLSM' has the letter M, expected one of L, S per stage"),
        ({"attention": "relu"}, "PolaFormer[+][+] has gated polarity_pp attention"),
        ({"gate_bias": 1.0, "gate": False}, "MODEL.LA.GATE_BIAS .* needs the gate"),
    ],
)
def test_arguments_that_make_no_model_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model("pola_pp_b0", **arguments)


def test_official_types_have_the_stochastic_depth_of_the_table_unless_the_key_is_changed():
    for options, rate in (
        (("MODEL.TYPE", "polab4"), 0.4),
        (("MODEL.TYPE", "polab4", "MODEL.DROP_PATH_RATE", "0.2"), 0.2),
    ):
        with torch.device("meta"):
            model = build_model(load_config(config_file("pola_pp_b0"), ["MODEL.DROP_PATH_RATE", "0.1", *options]))
        assert model.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(rate)


def test_where_weights_are_is_said_of_the_family():
    with pytest.raises(ValueError, match=r"pola_pp_b0 .*official repository of PolaFormer\+\+.*pretrained_cfg_overlay"):
        create_model("pola_pp_b0", pretrained=True)
    with pytest.raises(ValueError, match="nalaformer_xt can be downloaded through timm: none are released; add"):
        create_model("nalaformer_xt", pretrained=True)
