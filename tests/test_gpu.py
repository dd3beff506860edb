"""The same promises on a CUDA device; skipped without one.

pytest tests/test_gpu.py
"""

import math
import os
import signal

import pytest
import torch
from attention_accuracy import make_inputs, run
from conftest import TINY, TINY_NALA, TINY_PPP, config_file, fill_with_recipe, recipe_input, run_main, write_tiny
from test_resume import EVERYTHING, assert_same_run

import engine.epoch
import main
from config import load_config, make_plan
from data.loaders import build_loaders
from engine.epoch import train_one_epoch
from engine.evaluation import evaluate
from engine.non_finite import FiniteGuard, NonFiniteError
from engine.training import Interval, build_training, place
from logger import MetricsWriter, read_metrics
from models import build_model
from models.files import load_checkpoint
from models.ops.polarity_attention import choose_backend
from utils.faults.preemption import Preempted
from utils.precision import exact_float32
from utils.randomness import seed_everything

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


every_body = pytest.mark.parametrize(
    "text", [TINY, TINY_PPP, TINY_NALA], ids=["PolaFormer", "PolaFormer++", "NaLaFormer"]
)


def _training(tiny, options: str = ""):
    config = load_config(str(tiny), options.split())
    seed_everything(config.SEED)
    loaders = build_loaders(config, make_plan(config))
    device = torch.device("cuda", 0)
    model = place(build_model(config, loaders.num_classes), device)
    return config, build_training(config, make_plan(config), model, loaders, device), loaders


@pytest.mark.parametrize(("name", "bound"), [("pola_pp_b0", 5e-5), ("nalaformer_xt", 2e-5)])
def test_float32_logits_of_rotary_pyramids_equal_those_of_the_cpu(name, bound):
    """Relative to the logits' spread: the recipe's weights make them large."""
    model = fill_with_recipe(build_model(load_config(config_file(name)))).eval()
    images = recipe_input(224)
    with torch.inference_mode(), exact_float32():
        expected = model.double()(images.double())
        logits = model.float().cuda()(images.cuda())
    assert (logits.cpu() - expected).abs().max() < bound * expected.std()


@pytest.mark.parametrize("name", ["pola_swin_t", "pola_pvt_t"])
def test_float32_logits_equal_those_of_the_cpu(name):
    model = fill_with_recipe(build_model(load_config(config_file(name)))).eval()
    images = recipe_input(224)
    with torch.inference_mode(), exact_float32():
        expected = model.double()(images.double())
        logits = model.float().cuda()(images.cuda())
    assert (logits.cpu() - expected).abs().max() < 5e-5


@pytest.mark.parametrize("options", ["", "AMP True", "AMP True AMP_DTYPE float16", "TRAIN.OPTIMIZER.NAME sgd"])
@every_body
def test_a_step_never_waits_for_the_device(tmp_path, text, options):
    """CUDA itself raises on any synchronisation between log lines."""
    tiny = write_tiny(tmp_path, text)
    _, training, loaders = _training(tiny, f"{options} EMA.ENABLE True DATA.PIN_MEMORY True")
    stream, guard, interval = iter(loaders.train), FiniteGuard(training), Interval(training.device)
    engine.epoch.optimizer_step(training, stream, guard, interval, 0)  # lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            engine.epoch.optimizer_step(training, stream, guard, interval, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", ["", "AMP True", "AMP True AMP_DTYPE float16", "TRAIN.OPTIMIZER.NAME sgd"])
def test_a_non_finite_step_stops_with_the_weights_of_before(tiny, options):
    config, training, loaders = _training(tiny, f"{options} PRINT_FREQ 10")
    criterion, snapshots = training.criterion, []

    def poisoned(logits, targets):
        snapshots.append([p.detach().clone() for p in training.bare_model.parameters()])
        loss = criterion(logits, targets)
        return loss * math.nan if len(snapshots) == 8 else loss

    training.criterion = poisoned
    with pytest.raises(NonFiniteError, match="step 7"):
        train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    assert all(torch.equal(a, b) for a, b in zip(snapshots[7], training.bare_model.parameters(), strict=True))


def test_the_attention_op_takes_more_sequences_than_a_grid_axis_of_16_bits():
    inputs = make_inputs(7, 5, 8, torch.float32, B=35_000, h=2, device="cuda")
    assert choose_backend("auto", inputs[0].device, torch.float32, 8) == "triton"
    cotangent = torch.randn_like(inputs[0])
    for value, expected in zip(
        run("triton", inputs, None, cotangent), run("eager", inputs, None, cotangent), strict=True
    ):
        assert (value - expected).norm() <= 2e-6 * expected.norm()


def test_the_attention_op_compiles_into_the_model_around_it():
    model = build_model(load_config(config_file("quickstart")), 10).cuda()
    images = torch.rand(4, 3, *model.img_size, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = model.eval()(images)
        logits = torch.compile(model, fullgraph=True)(images)
    assert (logits - expected).norm() <= 0.02 * expected.norm()


def test_training_and_evaluation_on_the_device(tiny):
    main.main(load_config(str(tiny), ["AMP", "True", "EMA.ENABLE", "True"]))
    records = read_metrics(tiny.parent / "out" / "tiny" / "default" / "metrics.jsonl")
    assert all(math.isfinite(record["loss"]) for record in records)
    assert max(record["top1"] for record in records if record["kind"] == "val") > 20
    _, training, loaders = _training(tiny)
    on_gpu = evaluate(training.bare_model, loaders.val, training.device)
    on_cpu = evaluate(training.bare_model.cpu(), loaders.val, torch.device("cpu"))
    assert (on_gpu.correct1, on_gpu.correct5) == (on_cpu.correct1, on_cpu.correct5)


@every_body
def test_a_run_stopped_inside_an_epoch_equals_the_unbroken_one(tmp_path, text, monkeypatch):
    tiny = write_tiny(tmp_path, text)
    options = f"{EVERYTHING} AMP True DETERMINISTIC True TRAIN.EPOCHS 2".split()
    main.main(load_config(str(tiny), [*options, "TAG", "whole"]))
    step, count = engine.epoch.optimizer_step, 0

    def stopping(*arguments):
        nonlocal count
        result, count = step(*arguments), count + 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(engine.epoch, "optimizer_step", stopping)
    with pytest.raises(Preempted):
        main.main(load_config(str(tiny), [*options, "TAG", "parts"]))
    main.main(load_config(str(tiny), [*options, "TAG", "parts"]))
    root = tiny.parent / "out" / "tiny"
    assert_same_run(root / "whole", root / "parts", 2)


@pytest.mark.parametrize("name", ["pola_pp_b0", "nalaformer_xt"])
def test_a_trained_step_in_bfloat16_is_close_to_that_in_float32(name):
    """Loss and every gradient of a rotary pyramid in training, as AMP computes it, on the same weights and images."""
    torch.manual_seed(0)
    model = build_model(load_config(config_file(name), ["MODEL.DROP_PATH_RATE", "0"]), 10).cuda().train()
    images, labels = torch.randn(16, 3, 224, 224, device="cuda"), torch.arange(16, device="cuda") % 10
    losses, gradients = [], []
    for enabled in (False, True):
        with exact_float32(), torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double())
        model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and gradients[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("text", [TINY_PPP, TINY_NALA], ids=["PolaFormer++", "NaLaFormer"])
def test_synchronised_batch_norm_trains_and_its_weights_are_those_of_the_rest(tmp_path, text):
    """In a process group, where it exchanges; of one process, where it equals BatchNorm."""
    tiny = write_tiny(tmp_path, text)
    for tag in ("True", "False"):
        options = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        arguments = ["--cfg", tiny, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.SYNC_BN", tag, "TAG", tag]
        result = run_main(*arguments, launcher=options)
        assert "SYNC_BN" not in result.stdout
    root = tiny.parent / "out" / "tiny"
    states = [load_checkpoint(root / tag / "ckpt_epoch_1.pth")["model"] for tag in ("True", "False")]
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.allclose(value.float(), states[1][name].float(), rtol=1e-2, atol=1e-3), name
