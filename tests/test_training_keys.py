"""Keys of training and of its images: what is frozen, the loss, class weights, timm's optimizers, crops and flips.

pytest tests/test_training_keys.py
"""

import random
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_PPP, fill_with_recipe, folder_of, run, write_tiny
from PIL import Image
from run_files import epoch_file
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import pil_to_tensor

from config import ConfigError, load_config, make_plan
from data.loaders import build_loaders
from data.transforms import Normalise, training_transform
from engine.epoch import train_one_epoch
from engine.training import build_training, check_training, place
from logger import MetricsWriter
from models import build_model
from models.files import CheckpointError, load_checkpoint
from optimizer import build_optimizer, load_optimizer_state

CPU = torch.device("cpu")
SHORT = TINY.replace("NUM_WORKERS: 0", "NUM_WORKERS: 0, TRAIN_FRACTION: 0.2")
HEAD = "TRAIN.FREEZE ['(?!head)']"


def started(tmp_path, options, text=SHORT):
    """Configuration, training and loaders, as main.py makes them."""
    config = load_config(str(write_tiny(tmp_path, text)), options.split())
    plan = make_plan(config)
    loaders = build_loaders(config, plan)
    model = place(build_model(config, loaders.num_classes), CPU)
    return config, build_training(config, plan, model, loaders, CPU), loaders


def continued(tmp_path, options):
    """The weights of two epochs at once, and of the second one continued from the first."""
    path = write_tiny(tmp_path, SHORT)
    run(path, options)
    whole, folder = load_checkpoint(epoch_file(folder_of(path), 2)), tmp_path / "out" / "tiny" / "again"
    folder.mkdir()
    first = epoch_file(folder_of(path), 1)
    for file in (first, first.with_name(first.name + ".json")):
        shutil.copy(file, folder)
    run(path, f"{options} TAG again")
    return whole["model"], load_checkpoint(epoch_file(folder, 2))["model"]


# -- freezing


def test_a_linear_probe_trains_the_head_alone_without_a_gradient_elsewhere(tmp_path):
    config, training, loaders = started(tmp_path, HEAD, TINY_PPP.replace("TRAIN_FRACTION: 0.5", "TRAIN_FRACTION: 0.2"))
    model = training.bare_model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimised = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    assert len(optimised) == 2 and optimised[0] is model.head.weight and optimised[1] is model.head.bias
    tracked = []
    model.head.register_forward_pre_hook(lambda module, inputs: tracked.append(inputs[0].requires_grad))
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    assert not any(tracked) and tracked  # nothing before the head is part of the graph
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}  # BatchNorm's statistics are as they were too
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith("head"))


def test_what_a_model_itself_holds_fixed_is_not_trained(tmp_path):
    config = load_config(str(write_tiny(tmp_path)))
    model = build_model(config, 10)
    model.patch_embed.proj.weight.requires_grad_(False)  # as some models of timm do with their positions
    check_training(config, model)
    optimised = [parameter for group in build_optimizer(config, model).param_groups for parameter in group["params"]]
    assert not model.patch_embed.proj.weight.requires_grad and len(optimised) == len(list(model.parameters())) - 1


def test_gradients_of_frozen_parts_are_not_sent(tmp_path):
    _, training, _ = started(tmp_path, HEAD)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sent = DistributedDataParallel(training.bare_model)._get_ddp_logging_data()
    finally:
        torch.distributed.destroy_process_group()
    head = training.bare_model.head
    assert sent["num_parameter_tensors"] == 2
    assert sent["total_parameter_size_bytes"] == 4 * (head.weight.numel() + head.bias.numel())


@pytest.mark.parametrize("pattern", ["'.*power'", "'.*scale','.*qkvg.weight'", "'layers.1','.*positional_encoding'"])
def test_what_is_not_frozen_gets_the_gradients_that_it_had(tmp_path, pattern):
    found = []
    for options in ("", f"TRAIN.FREEZE [{pattern}]"):
        _, training, _ = started(tmp_path, f"MODEL.DROP_PATH_RATE 0 {options}")
        model = fill_with_recipe(training.bare_model)
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    frozen = {name for name, gradient in found[1].items() if gradient is None}
    assert 0 < len(frozen) < len(found[1])
    for name in found[1].keys() - frozen:
        assert torch.equal(found[1][name], found[0][name]), name


def test_batch_norm_that_is_trained_gathers_statistics_beside_one_that_is_frozen(tmp_path):
    text = TINY_PPP.replace("TRAIN_FRACTION: 0.5", "TRAIN_FRACTION: 0.2")
    config, training, loaders = started(tmp_path, "TRAIN.FREEZE ['patch_embed']", text)
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    counts = {
        name: int(value) for name, value in training.bare_model.state_dict().items() if name.endswith("batches_tracked")
    }
    frozen = {name for name, count in counts.items() if count == 0}
    assert frozen == {name for name in counts if name.startswith("patch_embed")} and 0 < len(frozen) < len(counts)


def test_a_frozen_run_continues_to_the_same_bits_and_not_with_other_patterns(tmp_path):
    whole, again = continued(tmp_path, "TRAIN.FREEZE \"['patch_embed','layers.0']\" TRAIN.LAYER_DECAY 0.8")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    with pytest.raises(
        CheckpointError, match=r"TRAIN.FREEZE \['patch_embed', 'layers.0'\], this configuration has None"
    ):
        run(tmp_path / "tiny.yaml", "TRAIN.LAYER_DECAY 0.8")


# -- learning rate


def test_a_rate_far_below_the_written_one_is_said_before_training(tmp_path, log):
    started(tmp_path, "DATA.BATCH_SIZE 16 TRAIN.BASE_LR 5.0e-4")
    expected = "TRAIN.BASE_LR 0.0005 is for 512 images a step: with 16 of them the learning rate is 1.563e-05, 1/32 of"
    assert expected in log.text and "TRAIN.SCALE_LR False takes the rates as they are" in log.text
    log.clear()
    for options in ("DATA.BATCH_SIZE 32", "DATA.BATCH_SIZE 16 TRAIN.SCALE_LR False"):
        started(tmp_path, options)
    assert "is for 512 images a step" not in log.text


# -- loss


@pytest.mark.parametrize("mixed", [True, False])
def test_binary_cross_entropy_is_of_each_class_by_itself(tmp_path, mixed):
    options = "TRAIN.LOSS bce MODEL.LABEL_SMOOTHING 0.2" + ("" if mixed else " AUG.MIXUP 0 AUG.CUTMIX 0")
    _, training, _ = started(tmp_path, options)
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 2, 3, 3])
    _, targets = training.prepare(images, labels)
    logits = torch.randn(4, 10)
    soft = targets if mixed else F.one_hot(labels, 10) * 0.8 + 0.02
    expected = F.binary_cross_entropy_with_logits(logits, soft)
    assert training.criterion(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert (targets.ndim == 2) == mixed


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_class_weights_are_balanced_by_the_training_labels_or_given(tmp_path, loss):
    options = f"TRAIN.LOSS {loss} AUG.MIXUP 0 AUG.CUTMIX 0 MODEL.LABEL_SMOOTHING 0 TRAIN.CLASS_WEIGHTS "
    _, training, loaders = started(tmp_path, options + "balanced")
    labels = np.asarray(loaders.train.loader.dataset.source.labels)
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    assert np.allclose(training.criterion.weight.numpy(), expected) and len(set(expected)) > 1
    _, training, _ = started(tmp_path, options + "[1,2,3,4,5,6,7,8,9,10]")
    logits, targets = torch.randn(5, 10), torch.tensor([0, 9, 9, 4, 2])
    weights = torch.arange(1.0, 11.0)
    if loss == "ce":
        expected = F.cross_entropy(logits, targets, weight=weights)
    else:
        expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, 10).float(), weight=weights)
    assert training.criterion(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ConfigError, match="TRAIN.CLASS_WEIGHTS has 2 numbers, the data set 10 classes"):
        started(tmp_path, options + "[1,2]")


# -- optimizers


@pytest.mark.parametrize("name", ["lamb", "adan"])
def test_a_run_with_an_optimizer_of_timm_continues_to_the_same_bits(tmp_path, name):
    whole, again = continued(tmp_path, f"TRAIN.OPTIMIZER.NAME {name} TRAIN.LAYER_DECAY 0.8")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    with pytest.raises(CheckpointError, match=f"TRAIN.OPTIMIZER.NAME {name}, this configuration has adamw"):
        run(tmp_path / "tiny.yaml", "TRAIN.LAYER_DECAY 0.8")


NAMES = "lion adopt adafactor adafactorbv muon nadamw radam madgrad mars rmsproptf sgdw laprop adabelief novograd lars"


@pytest.mark.parametrize("name", NAMES.split())
def test_the_state_of_timm_s_optimizers_returns_whole(tmp_path, name):
    config = load_config(str(write_tiny(tmp_path)), ["TRAIN.OPTIMIZER.NAME", name, "TRAIN.BASE_LR", "1e-3"])
    models = [place(fill_with_recipe(build_model(config, 10)), CPU) for _ in range(2)]
    first, second = (build_optimizer(config, model) for model in models)
    generator = torch.Generator().manual_seed(1)
    steps = [[torch.randn(p.shape, generator=generator) for p in models[0].parameters()] for _ in range(4)]

    def step(model, optimizer, gradients):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    for gradients in steps[:3]:
        step(models[0], first, gradients)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_state(second, models[1], torch.load(tmp_path / "state.pth", weights_only=True), "file.pth")
    for model, optimizer in zip(models, (first, second), strict=True):
        step(model, optimizer, steps[3])
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_case_of_an_optimizer_s_name_does_not_matter(tmp_path):
    config = load_config(str(write_tiny(tmp_path)), ["TRAIN.OPTIMIZER.NAME", "AdamW"])
    assert type(build_optimizer(config, build_model(config, 10))) is torch.optim.AdamW


def test_one_cycle_needs_an_optimizer_with_two_decay_rates(tmp_path):
    with pytest.raises(ConfigError, match="TRAIN.LR_SCHEDULER.NAME onecycle .* TRAIN.OPTIMIZER.NAME sgd"):
        started(tmp_path, "TRAIN.LR_SCHEDULER.NAME onecycle TRAIN.OPTIMIZER.NAME sgd")


# -- images


def transformed(tmp_path, options, image):
    options = f"AUG.HFLIP 0 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0 DATA.IMG_SIZE 64 {options}"
    config = load_config(str(write_tiny(tmp_path)), options.split())
    torch.manual_seed(3)
    random.seed(3)
    return training_transform(config, (64, 64))(image)


PHOTOGRAPH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((96, 72), 3)


@pytest.mark.parametrize("options", ["", "DATA.DECODER simplejpeg", "AUG.BACKEND opencv AUG.AUTO_AUGMENT rand-m0-n0"])
def test_a_vertical_flip_turns_what_the_crop_gives_upside_down(tmp_path, options):
    image = pil_to_tensor(PHOTOGRAPH) if "simplejpeg" in options else PHOTOGRAPH
    plain = transformed(tmp_path, options, image)
    assert torch.equal(transformed(tmp_path, f"{options} AUG.VFLIP 1.0", image), plain.flip(1))
    assert not torch.equal(plain, plain.flip(1))


def test_the_crop_has_the_area_and_shape_asked_for(tmp_path):
    whole = transformed(tmp_path, "AUG.SCALE [1.0,1.0] AUG.RATIO [1.3333,1.3334]", PHOTOGRAPH)
    expected = pil_to_tensor(PHOTOGRAPH.resize((64, 64), Image.Resampling.BICUBIC))
    assert (whole.int() - expected.int()).abs().max() <= 2
    position = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    spans = [
        transformed(tmp_path, f"AUG.SCALE [{area},{area}] AUG.RATIO [1.0,1.0]", position)[0].float()
        for area in (0.25, 0.04)
    ]
    assert [round((span.max() - span.min()).item() / 256, 1) for span in spans] == [0.5, 0.2]


def test_mean_and_deviation_are_those_of_the_configuration(tmp_path):
    config, training, loaders = started(tmp_path, "DATA.MEAN [0.5,0.4,0.3] DATA.STD [0.2,0.3,0.5] AUG.REPROB 0")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    scaled = images.float() / 255
    expected = (scaled - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.5]).view(3, 1, 1)
    for made in (loaders.val.inputs(CPU, torch.float32), training.prepare.normalise, Normalise.of(config, CPU)):
        assert torch.allclose(made(images), expected)


def test_a_file_of_another_mean_is_not_continued_silently(tmp_path):
    path = write_tiny(tmp_path, SHORT)
    run(path, "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0")
    with pytest.raises(
        CheckpointError, match=r"trained with DATA.MEAN \[0.485, 0.456, 0.406\], this configuration has"
    ):
        run(path, "DATA.MEAN [0.5,0.5,0.5]")
