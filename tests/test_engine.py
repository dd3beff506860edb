"""The loops: what one step does, what a non-finite step does not do, and evaluation that counts exactly.

pytest tests/test_engine.py
"""

import json
import math
import re

import pytest
import torch
from conftest import TINY, TINY_NALA, TINY_PPP
from torch import nn
from torch.utils.data import DataLoader

import engine.epoch
from config import load_config, make_plan
from data.datasets import Sample
from data.loaders import Batches, _collate, build_loaders
from data.transforms import Normalise
from engine.epoch import train_one_epoch
from engine.evaluation import evaluate
from engine.non_finite import FiniteGuard, NonFiniteError
from engine.throughput import throughput
from engine.training import Interval, build_training, wrap
from logger import MetricsWriter, get_logger, read_metrics
from models import build_model
from models.loading import load_weights
from utils.metrics import AccuracyCounter
from utils.precision import autocast_dtype, exact_float32
from utils.randomness import generator_states, restore_generators, seed_everything

CPU = torch.device("cpu")


@pytest.fixture
def start(tmp_path):
    """Build (config, training, loaders) of a tiny configuration with overrides, from a fixed seed."""
    path = tmp_path / "tiny.yaml"

    def build(options: str = "", text: str = TINY):
        path.write_text(text)
        config = load_config(str(path), options.split())
        seed_everything(config.SEED)
        loaders = build_loaders(config, make_plan(config))
        model = build_model(config, loaders.num_classes)
        return config, build_training(config, make_plan(config), model, loaders, CPU), loaders

    return build


def _weights(training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.bare_model.parameters()]


def _equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


PLAIN = "AUG.MIXUP 0 AUG.CUTMIX 0 AUG.REPROB 0 AUG.AUTO_AUGMENT none AUG.HFLIP 0 MODEL.DROP_PATH_RATE 0"


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "",
        "AMP True",
        "AMP True AMP_DTYPE float16",
        "EMA.ENABLE True EMA.DECAY 0.9",
        "TRAIN.ACCUMULATION_STEPS 2",
        "TRAIN.USE_CHECKPOINT True",
        "TRAIN.OPTIMIZER.NAME sgd",
        "TRAIN.CLIP_GRAD None",
        "AUG.MIXUP 0 AUG.CUTMIX 0",
    ],
)
def test_an_epoch_trains_and_logs(start, tmp_path, options):
    config, training, loaders = start(f"DATA.TRAIN_FRACTION 0.5 {options}")
    before = _weights(training)
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(tmp_path))
    assert not _equal(before, _weights(training))
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = len(loaders.train) // config.TRAIN.ACCUMULATION_STEPS
    assert [record["step"] for record in records] == [*range(5, steps, 5), steps]
    for record in records:
        assert set(record) == {"kind", "epoch", "step", "loss", "lr", "grad_norm"} | {
            "data_time",
            "communication_time",
            "step_time",
            "images_per_s",
            "memory_mb",
        }
        assert record["kind"] == "train" and all(math.isfinite(v) for k, v in record.items() if k != "kind")
    assert 1.5 < records[0]["loss"] < 4


def test_logged_rate_and_loss_are_those_used(start, tmp_path):
    config, training, loaders = start(f"{PLAIN} PRINT_FREQ 1")
    rates, losses = [], []
    training.optimizer.register_step_pre_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
    training.criterion.register_forward_hook(lambda m, a, loss: losses.append(loss.item()))
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(tmp_path))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["lr"] for record in records] == rates
    assert rates[0] == rates[1] < rates[2]  # iterations 0 and 1 both use WARMUP_LR
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-6)


def test_accumulated_steps_equal_one_large_batch(start, tmp_path):
    whole_config, whole, loaders = start(f"{PLAIN} DATA.BATCH_SIZE 64")
    half_config, halves, half_loaders = start(f"{PLAIN} DATA.BATCH_SIZE 32 TRAIN.ACCUMULATION_STEPS 2")
    halves.bare_model.load_state_dict(whole.bare_model.state_dict())
    assert whole.steps_per_epoch == halves.steps_per_epoch
    assert whole.optimizer.param_groups[0]["lr"] == halves.optimizer.param_groups[0]["lr"]
    for training in (whole, halves):
        training.bare_model.double()
        training.prepare.normalise = Normalise(CPU, torch.float64)
    none = MetricsWriter(None)
    train_one_epoch(whole_config, whole, loaders.train, 0, none)
    train_one_epoch(half_config, halves, half_loaders.train, 0, none)
    for a, b in zip(_weights(whole), _weights(halves), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_gradients_are_clipped_to_the_total_norm(start):
    config, training, loaders = start("TRAIN.CLIP_GRAD 0.01")
    norms = []

    def note(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    training.optimizer.register_step_pre_hook(note)
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_average_follows_the_weights(start):
    config, training, loaders = start("EMA.ENABLE True EMA.DECAY 0.5 DATA.BATCH_SIZE 256")
    expected = _weights(training)

    def average(optimizer, args, kwargs):
        for mean, weight in zip(expected, training.bare_model.parameters(), strict=True):
            mean.lerp_(weight.detach(), 0.5)

    training.optimizer.register_step_post_hook(average)
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    for mean, own in zip(expected, training.ema.module.parameters(), strict=True):
        assert torch.allclose(mean, own, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Non-finite steps
# ---------------------------------------------------------------------------------------------------------------------


class Poison(nn.Module):
    """A criterion that returns a non-finite loss at one call only."""

    def __init__(self, at: int, value: float = math.nan) -> None:
        super().__init__()
        self.at, self.value, self.calls = at, value, 0

    def forward(self, logits, targets):
        loss = nn.functional.cross_entropy(logits, targets)
        self.calls += 1
        return loss * self.value if self.calls - 1 == self.at else loss


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize(
    ("amp", "value"), [("", math.nan), ("AMP True", math.inf), ("AMP True AMP_DTYPE float16", math.nan)]
)
def test_a_non_finite_step_stops_with_the_weights_of_before(start, optimizer, amp, value):
    config, training, loaders = start(f"{amp} TRAIN.OPTIMIZER.NAME {optimizer} PRINT_FREQ 10 EMA.ENABLE True")
    snapshots = []  # the weights at each forward pass

    class Watching(Poison):
        def forward(self, logits, targets):
            snapshots.append(_weights(training))
            return super().forward(logits, targets)

    training.criterion = Watching(at=7, value=value)
    rates = [training.scheduler._get_lr(max(step - 1, 0))[0] for step in range(10)]
    assert rates[7] < rates[9]
    rate = re.escape(f"learning rate {rates[7]:.3e} ")
    with pytest.raises(NonFiniteError, match=rf"step 7: non-finite .* {rate}\(loss not finite on rank 0\)"):
        train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    assert len(snapshots) == 10 + 1  # noticed at the log line, two clean losses later, and computed once more to report
    assert not _equal(snapshots[6], snapshots[7])
    assert _equal(snapshots[7], snapshots[9]) and _equal(snapshots[7], _weights(training))
    assert all(weight.isfinite().all() for weight in _weights(training))


def test_a_non_finite_gradient_of_a_finite_loss_is_noticed(start):
    config, training, loaders = start("PRINT_FREQ 10")
    calls = []

    def poison(grad):
        calls.append(None)
        return grad * math.inf if len(calls) == 4 else grad

    training.bare_model.head.weight.register_hook(poison)
    with pytest.raises(NonFiniteError, match=r"step 3: .*every loss was finite, the gradient not"):
        train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))


@pytest.mark.parametrize("amp", ["", "AMP True AMP_DTYPE float16"])
def test_a_skipped_step_leaves_running_statistics_and_their_average_as_they_were(start, amp):
    """Images that are not finite reach the running statistics of BatchNorm before the loss says so."""
    options = f"{PLAIN} {amp} TRAIN.NON_FINITE skip PRINT_FREQ 4 TRAIN.ACCUMULATION_STEPS 2 DATA.BATCH_SIZE 32"
    config, training, loaders = start(options, TINY_PPP)
    prepare, passes, seen = training.prepare, [], []

    def poisoned(images, labels):
        passes.append(None)
        images, targets = prepare(images, labels)
        return images * math.nan if len(passes) == 6 else images, targets  # the second pass of step 2

    def states():
        return [[v.clone() for v in m.state_dict().values()] for m in (training.bare_model, training.ema.module)]

    average = training.ema.update

    def noting(*arguments):
        average(*arguments)
        seen.append(states())

    training.prepare, training.ema.update = poisoned, noting
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    (_, before), (model, after), (later, _) = seen[1:4]
    assert training.skipped == 1 and _equal(seen[1][0], model) and not _equal(model, later)
    assert [len(training.running_statistics())] == [3 * 8] and "norm.running_mean" in training.bare_model.state_dict()
    for mean, own, old in zip(after, model, before, strict=True):  # the average follows the model, which stood still
        assert torch.equal(mean, old.lerp(own, 1 - 0.9) if mean.is_floating_point() else own)
    assert all(value.isfinite().all() for state in seen for entries in state for value in entries)


@pytest.mark.parametrize("text", [TINY_PPP, TINY_NALA], ids=["PolaFormer++", "NaLaFormer"])
def test_synchronised_batch_norm_keeps_names_and_is_left_out_on_a_cpu(start, log, text):
    config, training, loaders = start("TRAIN.SYNC_BN True TRAIN.EPOCHS 1", text)
    log.set_level("INFO", get_logger().name)
    wrap(config, training)
    assert log.text.count("TRAIN.SYNC_BN is left out: PyTorch's SyncBatchNorm trains on GPUs alone") == 1
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    model = training.bare_model
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(build_model(config, loaders.num_classes))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 8
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [name for name, _ in converted.named_parameters()] == [name for name, _ in model.named_parameters()]
    load_weights(converted, model.state_dict(), "not synchronised")
    other = build_model(config, loaders.num_classes)
    load_weights(other, converted.state_dict(), "synchronised")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_a_model_without_running_statistics_hears_nothing_of_synchronising_them(start, log):
    config, training, _ = start("TRAIN.SYNC_BN True")
    log.set_level("INFO", get_logger().name)
    wrap(config, training)
    assert not training.running_statistics() and not log.text.count("SYNC_BN")


def test_overflow_in_float16_is_skipped_not_fatal(start):
    config, training, loaders = start("AMP True AMP_DTYPE float16 PRINT_FREQ 10")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = _weights(training)
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    assert training.scaler.get_scale() < 2.0**24
    assert not _equal(before, _weights(training))


def test_an_overflow_in_the_first_step_leaves_momentum_defined(start):
    """Left to itself, fused SGD starts from uninitialised memory when its first step is suppressed."""
    config, training, loaders = start("AMP True AMP_DTYPE float16 TRAIN.OPTIMIZER.NAME sgd")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = [entry["momentum_buffer"].clone() for entry in training.optimizer.state.values()]
    assert len(before) == len(_weights(training))
    assert all((buffer == 0).all() for buffer in before)
    train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
    assert all(entry["momentum_buffer"].isfinite().all() for entry in training.optimizer.state.values())
    assert all(weight.abs().max() < 10 for weight in _weights(training))


def test_a_collapsed_float16_scale_stops(start):
    config, training, loaders = start("AMP True AMP_DTYPE float16 PRINT_FREQ 3")
    training.bare_model.head.weight.register_hook(lambda grad: grad * math.inf)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(NonFiniteError, match="gradient scale fell to 0.5"):
        train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))


def test_an_average_with_warm_up_is_that_of_timm_and_moves_in_a_short_run(start):
    """EMA.WARMUP: at update n the share min(DECAY, 1 − n^(−2/3)) is kept; without it DECAY, from the first update."""
    values, averages = [], []
    for options in ("", "EMA.WARMUP True"):
        config, training, loaders = start(f"{PLAIN} EMA.ENABLE True EMA.DECAY 0.6 DATA.BATCH_SIZE 256 {options}")
        average, expected = training.ema, training.bare_model.head.weight.detach().clone()
        real, count = average.update, 0

        def update(model, step=None, real=real, expected=expected, warm=bool(options)):
            nonlocal count
            count += 1
            share = min(0.6, 1 - count ** (-2 / 3)) if warm else 0.6
            expected.lerp_(model.head.weight.detach(), 1 - share)
            real(model, step)

        average.update = update
        train_one_epoch(config, training, loaders.train, 0, MetricsWriter(None))
        assert count == 5
        assert torch.allclose(average.module.head.weight, expected, atol=1e-7)
        values.append(training.bare_model.head.weight.detach().clone())
        averages.append(average.module.head.weight.detach().clone())
    assert torch.equal(*values) and not torch.equal(*averages)


@pytest.mark.parametrize(
    ("options", "warned"),
    [("", True), ("EMA.WARMUP True", False), ("EMA.DECAY 0.9", False), ("TRAIN.EPOCHS 500", False)],
)
def test_an_average_over_more_steps_than_the_run_has_is_said(start, log, options, warned):
    """22 steps an epoch, two epochs; 0.9999 averages over 10,000 steps."""
    start(f"EMA.ENABLE True {options}")
    line = "EMA.DECAY 0.9999 averages over about 10000 steps, and the run has 44: the average stays near the first"
    assert (line in log.text) == warned


def test_a_decay_for_512_images_is_said_and_advised_as_it_is_written(start, log):
    start("EMA.ENABLE True EMA.DECAY 0.9999 EMA.DECAY_PER_512 True")
    said = re.search(r"EMA.DECAY 0.9999 averages over about 79996 steps.* a decay of at most (\S+), lets", log.text)
    log.clear()
    start(f"EMA.ENABLE True EMA.DECAY {said[1]} EMA.DECAY_PER_512 True")
    assert "averages over" not in log.text and float(said[1]) ** (64 / 512) == pytest.approx(1 - 10 / 44, rel=1e-3)


def test_the_guard_reads_nothing_back_per_step(start, monkeypatch):
    """Between log lines no value leaves the device: .item(), .tolist(), bool() and float() are forbidden."""
    _, training, loaders = start(f"{PLAIN} PRINT_FREQ 1000 EMA.ENABLE True")
    batches = list(loaders.train)[:3]

    def forbidden(self, *arguments):
        raise AssertionError("a tensor was read by the host during a step")

    stream, guard, interval = iter(batches), FiniteGuard(training), Interval(CPU)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    # what torch itself does to CPU scalars inside the fused optimizer is not ours to see: only the step around it
    monkeypatch.setattr(training.optimizer, "step", lambda: None)
    for step in range(3):
        engine.epoch.optimizer_step(training, stream, guard, interval, step)
    assert interval.timed_steps == 3


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def _count(logits, labels):
    counter = AccuracyCounter(CPU)
    counter.update(logits, labels)
    return counter.result(len(labels))


def test_accuracy_equals_sorting():
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 20), torch.randint(0, 20, (500,))
    result = _count(logits, labels)
    order = logits.argsort(dim=1, descending=True)
    assert result.correct1 == (order[:, 0] == labels).sum()
    assert result.correct5 == (order[:, :5] == labels[:, None]).sum()
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.top1 == 100 * result.correct1 / 500


def test_ties_and_non_finite_logits_are_not_right_by_accident():
    labels = torch.tensor([0, 3, 7])
    constant = _count(torch.zeros(3, 10), labels)
    assert (constant.correct1, constant.correct5) == (1, 2)  # class 0 alone comes first, classes 0 to 4 in the first 5
    broken = _count(torch.full((3, 10), torch.nan), labels)
    assert (broken.correct1, broken.correct5, broken.non_finite) == (0, 0, 3)
    assert "3 images with non-finite logits" in str(broken)
    infinite = torch.zeros(1, 10)
    infinite[0, 2] = torch.inf
    assert _count(infinite, torch.tensor([2])).correct1 == 0


def test_fewer_than_five_classes():
    result = _count(torch.randn(8, 3), torch.randint(0, 3, (8,)))
    assert result.correct5 == 8


def test_a_lost_image_is_an_error():
    counter = AccuracyCounter(CPU)
    counter.update(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="counted 4 images, the data set has 5"):
        counter.result(5)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 400])
def test_every_batch_size_gives_the_same_counts(start, batch_size):
    _, training, loaders = start("DATA.BATCH_SIZE 50")
    expected = evaluate(training.bare_model, loaders.val, CPU)
    assert expected.images == 355
    _, _, other = start(f"DATA.BATCH_SIZE {batch_size} TRAIN.ACCUMULATION_STEPS 1")
    result = evaluate(training.bare_model, other.val, CPU)
    assert (result.images, result.correct1, result.correct5) == (expected.images, expected.correct1, expected.correct5)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)


def test_evaluation_equals_a_plain_loop(start):
    _, training, loaders = start()
    model = training.bare_model.eval()
    with torch.no_grad():
        pairs = [(model(Normalise(CPU)(images)).argmax(1), labels) for images, labels in loaders.val]
    correct = sum((predicted == labels).sum().item() for predicted, labels in pairs)
    assert evaluate(model, loaders.val, CPU).correct1 == correct


def test_evaluation_switches_tf32_off_and_back():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
            assert images.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and not self.training
            return images.mean((2, 3)) * self.weight

    samples = [Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), label=0)] * 2
    val = Batches(DataLoader(samples, batch_size=2, collate_fn=_collate))

    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        evaluate(Probe(), val, CPU)
        assert torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(KeyError), exact_float32():
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


# ---------------------------------------------------------------------------------------------------------------------
# Throughput, precision, randomness, log
# ---------------------------------------------------------------------------------------------------------------------


def test_throughput_honours_batch_size_image_size_and_precision(start):
    config, training, _ = start("DATA.BATCH_SIZE 3")
    seen = []
    training.bare_model.register_forward_hook(lambda m, args, out: seen.append((args[0].shape, out.dtype)))
    result = throughput(config.DATA.BATCH_SIZE, training.bare_model, CPU, torch.bfloat16, warmup=1, batches=4)
    assert seen == [((3, 3, 32, 32), torch.bfloat16)] * 5
    assert result.batches == 4 and 0 < result.low <= result.median <= result.high


def test_amp_dtype(start):
    config, _, _ = start()
    assert autocast_dtype(config.AMP_DTYPE, CPU) == torch.bfloat16
    config, _, _ = start("AMP_DTYPE float16")
    assert autocast_dtype(config.AMP_DTYPE, CPU) == torch.float16


def test_generator_states_survive_a_checkpoint(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    seed_everything(3, 1)
    draw()
    torch.save(generator_states(), tmp_path / "states.pth")
    expected = draw()
    seed_everything(9)
    restore_generators(torch.load(tmp_path / "states.pth", weights_only=True))
    assert draw() == expected
    seed_everything(3, 1)
    first = draw()
    seed_everything(3, 2)
    assert draw() != first


def test_records_that_will_be_written_again_are_forgotten(tmp_path):
    writer = MetricsWriter(tmp_path)
    for epoch in (0, 1, 2):
        writer.write("train", epoch, 5 * (epoch + 1), loss=1.0, grad_norm=math.inf)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ep')  # what a crash leaves
    MetricsWriter(tmp_path, epoch=2, step=10)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10]
    assert records[0]["grad_norm"] is None  # strict JSON has no Infinity
    MetricsWriter(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_receives_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write("val", 0, 5, top1=12.5)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/top1")] == [(5, 12.5)]


def test_the_average_s_decay_may_be_given_for_512_images_a_step(start):
    for options, decay in (("", 0.9), ("EMA.DECAY_PER_512 True", 0.9 ** (32 / 512))):
        _, training, _ = start(f"EMA.ENABLE True EMA.DECAY 0.9 DATA.BATCH_SIZE 32 {options}")
        assert training.ema.decay == pytest.approx(decay)
