"""NaLaFormer: what the published models compute, their files, and the recipe.

pytest tests/test_nalaformer.py
"""

import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, config_file, folder_of, read_json, recipe_input, run
from golden import assert_attention, assert_entries, assert_golden
from literal_nala import nalaformer_logits
from run_files import epoch_file
from test_pola_pp import evaluate_file

from config import load_config, make_plan
from data.loaders import build_loaders
from engine.epoch import train_one_epoch
from engine.training import build_training
from logger import MetricsWriter
from models import build_model
from models.files import CheckpointError, load_checkpoint, weights_of
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
            exact = model.double()(images.double())
            literal = nalaformer_logits(
                model.state_dict(), images.double(), depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2]
            )
        for logits in (exact, literal):
            assert np.abs(logits.numpy() - expected[f"logits_{kind}_f64"]).max() < 1e-10 * scale


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


# ---------------------------------------------------------------------------------------------------------------------
# Files of the published script in runs
# ---------------------------------------------------------------------------------------------------------------------


def test_its_file_is_evaluated_by_model_and_average(tiny_nala, log):
    both = evaluate_file(tiny_nala, CHECKPOINT)
    assert f"evaluated {CHECKPOINT} (sha256 " in log.text and f"evaluated EMA weights of {CHECKPOINT} (" in log.text
    assert both.keys() == {"eval_val", "eval_val_ema"} and both["eval_val"] != both["eval_val_ema"]
    content = load_checkpoint(CHECKPOINT)
    weights = dict(content["model"])
    file = tiny_nala.parent / "other.pth"
    for bare in (weights, {"model": weights}, {"module." + name: value for name, value in weights.items()}):
        torch.save(bare, file)
        assert evaluate_file(tiny_nala, file) == {"eval_val": both["eval_val"]}
    for word, name in (("ema", "eval_val_ema"), ("model", "eval_val")):
        named = tiny_nala.parent / f"{word}.pth"
        named.write_bytes(CHECKPOINT.read_bytes())
        assert evaluate_file(tiny_nala, named, f"MODEL.WEIGHTS {word}") == {name: both[name]}


@pytest.mark.parametrize("kind", ["model", "model_ema"])
def test_a_missing_or_strange_entry_of_its_file_is_named(tiny_nala, kind):
    """Also of a family that differs in few names, and in either set of weights."""
    content, file = load_checkpoint(CHECKPOINT), tiny_nala.parent / "spoilt.pth"
    weights = content[kind]
    for name in ("layers.0.RoPE.angle", "norm.num_batches_tracked", "layers.1.blocks.0.attn.ln.bias"):
        torch.save({**content, kind: {key: value for key, value in weights.items() if key != name}}, file)
        with pytest.raises(CheckpointError, match=rf"spoilt.pth does not fit NaLaFormer.*(.|\n)*missing \(1\): {name}"):
            evaluate_file(tiny_nala, file)
    torch.save({**content, kind: {**weights, "layers.0.RoPE_linear.angle": torch.zeros(8)}}, file)
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): layers.0.RoPE_linear.angle"):
        evaluate_file(tiny_nala, file)
    torch.save({**content, kind: {**weights, "proj.weight": weights["proj.weight"][..., None, None]}}, file)
    with pytest.raises(CheckpointError, match=r"proj.weight"):  # a convolution, as PolaFormer++ has
        evaluate_file(tiny_nala, file)


def test_a_run_continues_from_its_file(tiny_nala, log):
    run(tiny_nala, f"MODEL.RESUME {CHECKPOINT}")
    assert "2 epochs finished, best top-1 25.000 %\n" in log.text  # of both: the file does not say whose
    assert "epoch 2 [" in log.text and "epoch 1 [" not in log.text
    before, after = load_checkpoint(CHECKPOINT), load_checkpoint(epoch_file(folder_of(tiny_nala), 3))
    steps = after["step"] // 3
    (taken,) = {entry["step"].item() for entry in before["optimizer"]["state"].values()}
    assert {entry["step"].item() for entry in after["optimizer"]["state"].values()} == {taken + steps}
    for kind in ("model", "model_ema"):
        assert after[kind]["norm.num_batches_tracked"] == before["model"]["norm.num_batches_tracked"] + steps
        assert not torch.equal(after[kind]["norm.running_mean"], before[kind]["norm.running_mean"])
    (rate,) = {group["lr"] for group in after["optimizer"]["param_groups"]}  # the schedule's at epoch 2, for the next
    assert rate == pytest.approx(5e-6 + (4e-3 / 8 - 5e-6) * 0.5 * (1 + np.cos(np.pi * 2 / 3)))


def test_a_run_starts_from_the_weights_of_its_file(tiny_nala, log):
    weights = load_checkpoint(CHECKPOINT)
    for word, kind in (("auto", "model"), ("ema", "model_ema")):
        start = f"MODEL.PRETRAINED {CHECKPOINT} MODEL.WEIGHTS {word} TAG {word}"
        run(tiny_nala, f"{start} TRAIN.EPOCHS 1 TRAIN.BASE_LR 0 TRAIN.WARMUP_LR 0 TRAIN.MIN_LR 0")
        assert f"starts from the weights of {CHECKPOINT}" in log.text
        tuned = load_checkpoint(epoch_file(folder_of(tiny_nala).parent / word, 1))
        for part in ("model", "model_ema"):
            assert torch.equal(tuned[part]["head.weight"], weights[kind]["head.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Training, step by step
# ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "T": "MODEL.PPP.MLP_RATIOS [4.0,4.0,4.0,4.0] MODEL.PPP.LAYER_INIT_VALUES [1.0,1.0,1.0,1.0]",
    "B": "MODEL.PPP.NUM_HEADS [1,1,2,2] MODEL.PPP.LAYER_INIT_VALUES [1.0,1.0,1.0e-6,1.0e-6]",
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_run_in_float64_is_that_of_the_literal_model(tiny_nala, options):
    """Losses, weights, running statistics and average of the whole recipe but stochastic depth, over four epochs of two
    steps: the images that the run mixed, AdamW of PyTorch, and the schedule as the specification has it."""
    options += (
        " DATA.TRAIN_FRACTION 0.1 DATA.BATCH_SIZE 60 TRAIN.EPOCHS 4 MODEL.DROP_PATH_RATE 0 TRAIN.WARMUP_LR 1.0e-5"
    )
    config = load_config(str(tiny_nala), options.split())
    plan = make_plan(config)
    loaders = build_loaders(config, plan)
    model = build_model(config, 10).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    average = {name: value.clone() for name, value in state.items()}
    training = build_training(config, plan, model, loaders, torch.device("cpu"))
    prepare, criterion, batches, losses = training.prepare, training.criterion, [], []

    def kept(images, labels):
        batches.append(prepare(images, labels))
        return batches[-1]

    def seen(logits, targets):
        losses.append(criterion(logits, targets))
        return losses[-1]

    training.prepare, training.criterion = kept, seen
    for epoch in range(4):
        train_one_epoch(config, training, loaders.train, epoch, MetricsWriter(None))
    assert len(batches) == 8 and training.ema.module.head.weight.dtype == torch.float64

    names = {name for name, _ in model.named_parameters()}
    groups = ([], [])
    for name in names:
        state[name].requires_grad_()
        groups[state[name].ndim == 1 or name.endswith(".bias")].append(state[name])
    decayed, plain = (
        {"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.05, 0.0), strict=True)
    )
    optimizer = torch.optim.AdamW([plain, decayed])
    base, low, first, decay = 4e-3 * 60 / 512, 5e-6, 1e-5, 0.9 ** (60 / 512)
    schedule = [first, *(low + 0.5 * (base - low) * (1 + np.cos(np.pi * t / 4)) for t in (1, 2, 3))]
    sizes = {"depths": config.MODEL.PPP.DEPTHS, "num_heads": config.MODEL.PPP.NUM_HEADS}
    for step, (images, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule[max(0, step // 2 - 1)]
        logits = nalaformer_logits(state, images, training=True, **sizes)
        loss = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        assert losses[step].item() == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in state.items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value.detach()
    for found, expected in ((model, state), (training.ema.module, average)):
        for name, value in found.state_dict().items():
            if expected[name].is_floating_point():
                assert (value - expected[name]).abs().max() < 1e-9, name
    assert (model.head.weight - average["head.weight"]).abs().max() > 1e-4
    with torch.no_grad():
        logits = model.eval()(images)
        assert torch.allclose(logits, nalaformer_logits(state, images, **sizes), rtol=0, atol=1e-9)
