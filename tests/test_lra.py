"""The model of sequences, its data, and its training through main.py.

pytest tests/test_lra.py
"""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, ROOT, run, run_main
from lra_caches import write_cache
from run_files import epoch_file
from test_resume import assert_same_run
from torch.nn import functional as F

import engine.epoch
from config import ConfigError, load_config, make_plan
from data.loaders import build_loaders
from data.samplers import TrainSampler
from data.sources.base import DataError
from data.sources.token_cache import open_cache
from experiments.lra.runs import read_run
from logger import read_metrics
from lr_scheduler import build_scheduler
from main import check
from models import build_model, load
from models.attention import PolaSequenceAttention
from models.diagnostics import inspect_step
from models.files import CheckpointError, load_checkpoint
from models.kernels import KERNELS
from models.options import AttentionOptions
from tools.checkpoints import load_model
from utils.faults.preemption import Preempted

TASKS = ("listops", "text", "retrieval", "pathfinder", "image")
ATTENTIONS = tuple(KERNELS)
PLAIN = ["MODEL.LA.GATE", "False", "MODEL.LRA.LEARN_SCALE", "False"]
FORMS: dict[str, dict[str, bool | float]] = {"gated": {}, "open": {"gate_bias": 1.0}, "plain": {"gate": False}}
SCALELESS = ("polarity_pp", "norm_aware", "nala_cosine")
SMALL = "MODEL.LRA.DIM 16 MODEL.LRA.MLP_DIM 32 MODEL.LRA.LENGTH 32 DATA.BATCH_SIZE 16 TRAIN.GLOBAL_BATCH 16"
SHORT = f"{SMALL} TRAIN.STEPS 20 TRAIN.EVAL_STEPS 10 TRAIN.WARMUP_STEPS 5 PRINT_FREQ 1 SAVE_FREQ 1 CHECKPOINT.KEEP 9"


def lra(task: str) -> Path:
    return ROOT / "configs" / "lra" / f"{task}.yaml"


def attention(**options) -> PolaSequenceAttention:
    """With parameters that are not those of a fresh start, in float64."""
    torch.manual_seed(0)
    module = (
        PolaSequenceAttention(16, 2, AttentionOptions(**{"alpha": 3.0, "kernel_size": 0, **options})).double().eval()
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def tokens(B: int = 2, N: int = 12) -> torch.Tensor:
    return torch.randn(B, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "classes", "softmax", "polarity"),
    [
        ("listops", 10, 209_802, 218_378),
        ("text", 2, 370_562, 379_138),
        ("retrieval", 2, 395_138, 403_714),
        ("pathfinder", 2, 173_954, 182_530),
        ("image", 10, 158_602, 167_178),
    ],
)
def test_the_models_have_the_protocol_s_number_of_parameters(task, classes, softmax, polarity):
    for options, expected in ((["MODEL.LA.ATTENTION", "softmax", *PLAIN], softmax), ([], polarity)):
        model = build_model(load_config(str(lra(task)), options), classes)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("kernel", [0, 5])
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("pool", ["mean_valid", "cls"])
def test_how_much_padding_follows_does_not_matter(pool, kind, kernel):
    options = f"MODEL.LRA.POOL {pool} MODEL.LA.ATTENTION {kind} MODEL.LRA.KERNEL_SIZE {kernel} {SMALL}".split()
    torch.manual_seed(0)
    model = build_model(load_config(str(lra("listops")), options), 10).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(1, 16, (3, 9), generator=torch.Generator().manual_seed(0))
    short = model(ids)
    for length in (10, 21, 32):
        padded = F.pad(ids, (0, length - 9))
        assert torch.allclose(model(padded), short, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(F.pad(ids, (0, 1), value=3)), short, rtol=1e-3)  # a token more does


def test_the_published_mean_divides_by_the_padded_length():
    options = f"MODEL.LRA.POOL mean_padded {SMALL}".split()
    model = build_model(load_config(str(lra("listops")), options), 10).double().eval()
    ids = torch.randint(1, 16, (3, 8), generator=torch.Generator().manual_seed(0))
    whole, padded = model.forward_features(ids), model.forward_features(F.pad(ids, (0, 8)))
    assert torch.allclose(padded, whole / 2, rtol=1e-10)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_without_convolution_follows_a_permutation_of_its_tokens(kind):
    module, x = attention(attention=kind), tokens()
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.7
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(module(x[:, order], mask[:, order]), module(x, mask)[:, order], rtol=1e-10, atol=1e-12)
    convolved = attention(attention=kind, kernel_size=5)
    assert not torch.allclose(convolved(x[:, order], mask[:, order]), convolved(x, mask)[:, order], rtol=1e-3)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_polarity_attention_equals_its_explicit_matrix(gate, learn_scale):
    """N×N weights from the paper's four products, written out."""
    module, x = attention(gate=gate, learn_scale=learn_scale, kernel_size=3), tokens()
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.7
    q, k, v, *g = module.qkvg(x).chunk(4 if gate else 3, dim=-1)
    scale = F.softplus(module.scale[0, 0]) if learn_scale else torch.ones(16, dtype=torch.float64)
    p = (1 + 3.0 * torch.sigmoid(module.power[0, :, 0])).flatten()
    q, k = q / scale, k / scale
    qp, qn, kp, kn = ((s * t).clamp(min=0) ** p for t in (q, k) for s in (1, -1))
    qp, qn, kp, kn, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (qp, qn, kp, kn, v))
    real = mask[:, None, None, :].double()
    streams = []
    for same in (True, False):
        weights = qp @ (kp if same else kn).mT + qn @ (kn if same else kp).mT
        weights = weights * real / real.sum(dim=-1, keepdim=True)
        rows = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        streams.append(rows @ (v[..., :4] if same else v[..., 4:]))
    out = torch.cat(streams, dim=-1).transpose(1, 2).flatten(2)
    values = v.transpose(1, 2).flatten(2) * mask[:, :, None]
    padded = F.pad(values, (0, 0, 1, 1))
    kernel = module.dwc.weight[:, 0]  # (C, 3)
    out = out + sum(padded[:, i : i + 12] * kernel[:, i] for i in range(3)) + module.dwc.bias
    expected = module.proj(out * g[0] if gate else out)
    assert torch.allclose(module(x, mask), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SCALELESS)
@pytest.mark.parametrize("form", FORMS)
def test_the_scale_has_no_effect_on_kernels_without_one(kind, form):
    results = []
    for learn_scale in (True, False):
        module = attention(attention=kind, learn_scale=learn_scale, **FORMS[form])
        assert not [name for name, _ in module.named_parameters() if name.endswith("scale")]
        results.append(module(tokens(), torch.ones(2, 12, dtype=torch.bool)))
    assert torch.equal(*results)


def _under_float16_autocast(module):
    """Sequences with tokens of zeros and with masked ones, and what a layer makes of them."""
    x = torch.randn(2, 40, 32, device=DEVICE)
    x[0, :3] = 0.0
    x.requires_grad_()
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    mask[1, 20:] = False
    with torch.autocast(DEVICE, torch.float16):
        out = module(x, mask)
    return x, out


@pytest.mark.parametrize("kind", ["norm_aware", "nala_cosine"])
def test_norms_beyond_float16_are_trained_under_its_autocast(kind):
    torch.manual_seed(0)
    module = PolaSequenceAttention(32, 2, AttentionOptions(kind, kernel_size=0)).to(DEVICE)
    with torch.no_grad():
        module.qkvg.weight.mul_(60.0)
    x, out = _under_float16_autocast(module)
    assert module.qkvg(x)[..., 32:64].abs().max() ** 3 > 65_504  # float16 could not hold the features of keys
    out.float().square().mean().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert out.isfinite().all() and all(grad.isfinite().all() and grad.any() for grad in gradients)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradients_are_finite_for_exponents_up_to_8_under_float16_autocast(backend):
    torch.manual_seed(0)
    module = PolaSequenceAttention(32, 2, AttentionOptions(kernel_size=0, alpha=7.0, backend=backend)).to(DEVICE)
    with torch.no_grad():
        module.power.fill_(8.0)  # p = 7.998
        module.qkvg.weight.mul_(6.0)
    x, out = _under_float16_autocast(module)
    assert (
        7.99 < module.exponent().max() <= 8.0 and module.qkvg(x).abs().max() ** 8 > 65_504
    )  # float16 could not hold it
    (64.0 * out.float().square().mean()).backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in gradients)
    assert all(grad.any() for grad in gradients)


def test_a_document_of_nothing_but_padding_gives_numbers():
    for pool in ("mean_padded", "mean_valid", "cls"):
        for kind in ATTENTIONS:
            options = f"MODEL.LRA.POOL {pool} MODEL.LA.ATTENTION {kind} {SMALL}".split()
            model = build_model(load_config(str(lra("listops")), options), 10)
            ids = torch.zeros(2, 32, dtype=torch.int32)
            ids[1, :4] = 5
            logits = model(ids)
            logits.sum().backward()
            assert logits.isfinite().all()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_every_head_learns_eight_samples_by_heart_and_reaches_every_parameter(task):
    torch.manual_seed(0)
    config = load_config(str(lra(task)), f"{SMALL} MODEL.DROP_RATE 0.0 MODEL.LRA.KERNEL_SIZE 3".split())
    model = build_model(config, 2)
    shape = (8, 2, 32) if task == "retrieval" else (8, 32)
    ids = torch.randint(1, config.MODEL.LRA.VOCABULARY, shape)
    labels = torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.05


def test_ids_of_another_shape_are_refused():
    model = build_model(load_config(str(lra("listops")), SMALL.split()), 10)
    with pytest.raises(ValueError, match=r"received ids of shape \(2, 33\), expected \(batch, 1 to 32 tokens\)"):
        model(torch.ones(2, 33, dtype=torch.long))
    pairs = build_model(load_config(str(lra("retrieval")), SMALL.split()), 2)
    with pytest.raises(ValueError, match=r"expected \(batch, 2 documents, tokens\)"):
        pairs(torch.ones(2, 32, dtype=torch.long))


def test_a_step_that_is_not_finite_can_be_inspected():
    """The report's look into the attention knows masks and missing scales."""
    model = build_model(load_config(str(lra("listops")), [*SMALL.split(), "MODEL.LRA.LEARN_SCALE", "False"]), 10)
    ids = torch.randint(1, 16, (2, 20))
    ids[:, 15:] = 0
    seen = inspect_step(model, lambda: model(ids).sum().backward())
    records = [record for name, record in seen["attention"].items() if name.endswith("attn")]
    assert len(records) == 2 and all(record["exponent"] == [3.0, 3.0] for record in records)
    assert all(record["normaliser_same"][1] > 0 for record in records)
    assert not any("mix" in vars(module) for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and order
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (200, 3), (1000, 312)])
def test_one_cycle_is_torch_s(total, warmup):
    """Rate and first decay rate of every step."""
    options = f"TRAIN.STEPS {total} TRAIN.EVAL_STEPS {total // 5} TRAIN.WARMUP_STEPS {warmup}".split()
    config = load_config(str(lra("listops")), options)
    parameter = torch.nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.AdamW([parameter], lr=1e-3) for _ in range(2))
    schedule = build_scheduler(config, make_plan(config), ours, total // 5)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs, 1e-3, total_steps=total, pct_start=warmup / total, anneal_strategy="linear"
    )
    for step in range(total):
        for optimizer in (ours, theirs):
            parameter.grad = torch.ones(1)
            optimizer.step()
        (a,), (b,) = ours.param_groups, theirs.param_groups
        assert a["lr"] == pytest.approx(b["lr"], rel=1e-9, abs=1e-15)
        assert a["betas"] == pytest.approx(b["betas"], rel=1e-9)
        schedule.step_update(step)
        if step + 1 < total:
            reference.step()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_epochs_of_so_many_steps_are_one_sequence_of_whole_passes(world_size):
    """The same for every number of processes, which 21 samples do not divide by."""
    size, batch, epochs = 21, 10, 9
    streams = []
    for rank in range(world_size):
        samples = batch // world_size
        sampler = TrainSampler(size, rank=rank, world_size=world_size, seed=3, samples=samples)
        stream = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            drawn = list(sampler)
            assert len(drawn) == len(sampler) == samples
            sampler.set_epoch(epoch, 1)
            assert list(sampler) == drawn[1:]
            stream += drawn
        streams.append(stream)
    together = [draw for draws in zip(*streams, strict=True) for draw in draws]
    assert len(together) == batch * epochs
    whole = TrainSampler(size, rank=0, world_size=1, seed=3)
    for number in range(len(together) // size):
        whole.set_epoch(number)
        assert together[number * size : (number + 1) * size] == list(whole)
        assert sorted(draw.position for draw in whole) == list(range(size))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def loaders_of(task: str, root: Path, options: str = "", **arguments):
    config = load_config(str(lra(task)), [*SMALL.split(), "DATA.DATA_PATH", str(root), *options.split()])
    return build_loaders(config, make_plan(config), **arguments)


@pytest.mark.parametrize("kept", [True, False])
def test_ids_are_symbols_shifted_and_filled_up(tmp_path, kept):
    """The published protocol's reader of ListOps drops the closing bracket, whose symbol is the last of 15."""
    root = write_cache(tmp_path, "listops")
    batches = loaders_of("listops", root, f"DATA.LRA.CLOSING_BRACKETS {kept}").val
    split, seen = open_cache(root).splits["val"], 0
    assert load_config(str(lra("listops"))).DATA.LRA.CLOSING_BRACKETS is False
    assert load_config(str(lra("listops_clean"))).DATA.LRA.CLOSING_BRACKETS is True
    for batch in batches.whole():
        assert batch.images.dtype == torch.int16 and batch.images.shape[1:] == (32,)
        for ids, label, position, name in zip(batch.images, batch.labels, batch.positions, batch.names, strict=True):
            document = split.document(position)
            document = document if kept else document[document != 14]
            assert ids[: len(document)].tolist() == [symbol + 1 for symbol in document.tolist()]
            assert not ids[len(document) :].any()
            assert label == split.labels[position] and name == f"{root}/val/{position}"
            seen += 1
    assert seen == 96


@pytest.mark.parametrize(("black", "shift"), [("True", 0), ("False", 1)])
def test_black_is_padding_or_not(tmp_path, black, shift):
    root = write_cache(tmp_path, "image", classes=10)
    options = f"DATA.LRA.BLACK_IS_PADDING {black} MODEL.LRA.VOCABULARY 257"
    batch = next(iter(loaders_of("image", root, options).val.whole()))
    document = open_cache(root).splits["val"].document(batch.positions[0])
    assert batch.images[0, : len(document)].tolist() == (document.astype(int) + shift).tolist()


def test_pairs_of_documents_stay_pairs(tmp_path):
    root = write_cache(tmp_path, "retrieval", classes=2)
    batch = next(iter(loaders_of("retrieval", root).val.whole()))
    assert batch.images.shape == (16, 2, 32)
    split = open_cache(root).splits["val"]
    for ids, position in zip(batch.images, batch.positions, strict=True):
        for row, document in zip(ids, (split.document(2 * position), split.document(2 * position + 1)), strict=True):
            assert row[: len(document)].tolist() == (document.astype(int) + 1).tolist()


def test_text_is_validated_on_the_test_set_with_a_warning_or_on_what_is_held_out(tmp_path, log):
    root = write_cache(tmp_path, "text", classes=2, splits=("train", "test"), held_out=10)
    published = loaders_of("text", root)
    assert (published.train.num_images, published.val.num_images) == (96, 96)
    clean = loaders_of("text", root, "DATA.LRA.HELD_OUT True")
    assert (clean.train.num_images, clean.val.num_images) == (86, 10)
    names = {name for batch in clean.val.whole() for name in batch.names}
    assert names == {f"{root}/train/{i}" for i in range(86, 96)}
    test = loaders_of("text", root, "DATA.LRA.HELD_OUT True", train=False)
    assert test.train is None and test.val.num_images == 96


def test_eval_is_on_the_test_split_and_reports_the_reference_answers(tmp_path, log):
    root = write_cache(tmp_path / "data", "listops", classes=10)
    options = f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT} TRAIN.STEPS 10"
    run(lra("listops"), options)
    assert "evaluated on listops (for a test), val split; for comparison: majority class 25.0 %" in log.text
    best = tmp_path / "out" / "lra_listops" / "default" / "max_acc.pth"
    log.clear()
    run(lra("listops"), f"{options} EVAL_MODE True MODEL.RESUME {best}")
    assert "evaluated on listops (for a test), test split; for comparison: majority class 50.0 %" in log.text
    assert f"evaluated {best}" in log.text and "96 images, top-1" in log.text
    stored = json.loads(best.with_name("eval_test.json").read_text())
    assert stored["title"] == "listops (for a test), test split" and stored["reference"] == {"majority class": 50.0}
    predictions = np.load(best.with_name("eval_test_predictions.npz"))
    assert all(str(name).startswith("test/") for name in predictions["file"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("DATA.LRA.TASK text", "holds the task listops, DATA.LRA.TASK is text"),
        ("MODEL.LRA.LENGTH 8", r"the longest document has \d+ tokens, MODEL.LRA.LENGTH is 8"),
        ("MODEL.LRA.VOCABULARY 15", "15 symbols need ids up to 15, MODEL.LRA.VOCABULARY is 15; expected at least 16"),
        ("MODEL.LRA.DOCUMENTS 2", r"has 1 document\(s\) a sample, MODEL.LRA.DOCUMENTS is 2"),
    ],
)
def test_a_cache_that_does_not_fit_the_configuration_is_refused(tmp_path, options, message):
    root = write_cache(tmp_path, "listops")
    with pytest.raises(DataError, match=message):
        loaders_of("listops", root, options)


def test_without_a_data_path_the_error_says_how_to_make_one():
    config = load_config(str(lra("listops")))
    with pytest.raises(DataError, match=r"`python tools/prepare_lra.py listops --out DIR` wrote"):
        build_loaders(config, make_plan(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("DATA.DATASET digits", "MODEL.TYPE lra reads tokens, and DATA.DATASET digits has images"),
        ("TRAIN.STEPS 1100 TRAIN.EVAL_STEPS 500", "TRAIN.EVAL_STEPS 500 does not divide TRAIN.STEPS 1100; 1000 steps"),
        ("MODEL.LRA.NUM_HEADS 3", "MODEL.LRA.DIM 64 does not divide by MODEL.LRA.NUM_HEADS 3"),
        ("MODEL.LRA.KERNEL_SIZE 4", "expected 0 or an odd number"),
        ("MODEL.LRA.DOCUMENTS 3", "expected 1 or 2"),
        ("AUG.MIXUP 0.8", "AUG.MIXUP is for images"),
        ("MODEL.LRA.POOL max", "mean_padded"),
        ("MODEL.LA.ATTENTION performer", "polarity"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config(str(lra("listops")), options.split()))


def test_tools_for_images_refuse_a_model_of_sequences(tmp_path):
    root = write_cache(tmp_path / "data", "listops", classes=10)
    run(lra("listops"), f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT} TRAIN.STEPS 10")
    with pytest.raises(CheckpointError, match="holds a model of sequences"):
        load_model(tmp_path / "out" / "lra_listops" / "default" / "max_acc.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Training through main.py
# ---------------------------------------------------------------------------------------------------------------------


def test_throughput_is_that_of_full_sequences(tmp_path, log):
    run(lra("retrieval"), f"{SMALL} DATA.BATCH_SIZE 3 THROUGHPUT_MODE True OUTPUT {tmp_path}")
    assert re.search(r"of lra_retrieval, batch 3, float32, 32 tokens: median [\d.]+ samples/s \(lowest", log.text)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", ["", "_clean"])
def test_every_task_trains_and_evaluates(tmp_path, task, preset, log):
    splits = ("train", "test") if task == "text" else ("train", "val", "test")
    held_out = 16 if task == "text" else 0
    root = write_cache(tmp_path / "data", task, classes=2, splits=splits, held_out=held_out)
    cfg = lra(f"{task}{preset}")
    options = f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT} TRAIN.BASE_LR 5.0e-3 AMP True AMP_DTYPE bfloat16"
    run(cfg, options)
    folder = tmp_path / "out" / f"lra_{task}{preset}" / "default"
    records = read_metrics(folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert [record["step"] for record in records if record["kind"] == "val"] == [10, 20]
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01
    run(cfg, f"{options} EVAL_MODE True MODEL.RESUME {folder / 'max_acc.pth'}")
    assert f"evaluated on {task} (for a test), test split" in log.text
    result = json.loads((folder / "eval_test.json").read_text())
    assert result["benchmark"] == "test" and result["result"]["images"] == 96


@pytest.mark.parametrize("kind", SCALELESS)
def test_kernels_of_the_family_train_evaluate_and_are_rebuilt_in_every_form(tmp_path, kind, log):
    root = write_cache(tmp_path / "data", "listops", classes=2)
    options = f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT} MODEL.LA.ATTENTION {kind} TRAIN.BASE_LR 5.0e-3"
    for form, given in {"gate": "", "gate from 1": "MODEL.LA.GATE_BIAS 1.0", "plain": " ".join(PLAIN)}.items():
        for preset in ("", "_clean"):
            own = f"{options} {given} TAG {form.replace(' ', '-')}"
            run(lra(f"listops{preset}"), own)
            folder = tmp_path / "out" / f"lra_listops{preset}" / form.replace(" ", "-")
            losses = [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
            assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01
            run(lra(f"listops{preset}"), f"{own} EVAL_MODE True MODEL.RESUME {folder / 'max_acc.pth'}")
            assert read_run(folder).attention == f"{kind}, {form}"
            model = load(folder / "max_acc.pth")
            attention = [module for module in model.modules() if isinstance(module, PolaSequenceAttention)]
            assert [(module.name, module.options.gate, module.scale) for module in attention] == [
                (kind, form != "plain", None)
            ] * 2
    assert f"{kind} attention" in log.text


def test_two_processes_train_and_validate_as_one(tmp_path):
    """On pairs of documents, with a number of samples that neither the batch nor the processes divide."""
    root = write_cache(tmp_path / "data", "retrieval", classes=2, samples=99)
    exact = "MODEL.DROP_RATE 0.0 MODEL.LRA.ATTENTION_DROP 0.0 DATA.BATCH_SIZE 8 TRAIN.BASE_LR 5.0e-3"
    options = f"DATA.DATA_PATH {root} {SHORT} {exact}"
    run(lra("retrieval"), f"{options} OUTPUT {tmp_path}/one")
    run_main("--cfg", lra("retrieval"), "--opts", *options.split(), "OUTPUT", tmp_path / "two", processes=2)
    one, two = (
        [r for r in read_metrics(tmp_path / name / "lra_retrieval" / "default" / "metrics.jsonl")]
        for name in ("one", "two")
    )
    assert [r["kind"] for r in one] == [r["kind"] for r in two] and [r["kind"] for r in one].count("val") == 2
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs.get("top1") == ours.get("top1")


@pytest.mark.parametrize("kind", ["polarity", "norm_aware", "nala_cosine"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, kind):
    """Inside a stretch of EVAL_STEPS, which ends inside a pass through the data; with dropout and float16."""
    root = write_cache(tmp_path / "data", "listops", classes=10, samples=130)
    options = (
        f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT} MODEL.LA.ATTENTION {kind} AMP True TRAIN.BASE_LR 1.0e-3"
    )
    run(lra("listops"), f"{options} TAG whole")
    step = engine.epoch.optimizer_step
    for moment in (4, 9):
        count = 0

        def counted(*arguments, moment=moment):
            nonlocal count
            result = step(*arguments)
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        with monkeypatch.context() as patched:
            patched.setattr(engine.epoch, "optimizer_step", counted)
            with pytest.raises(Preempted):
                run(lra("listops"), f"{options} TAG parts")
    run(lra("listops"), f"{options} TAG parts")
    root = tmp_path / "out" / "lra_listops"
    assert_same_run(root / "whole", root / "parts", 2)
    with pytest.raises(CheckpointError, match="counts epochs of 10 steps, this configuration of 5 steps"):
        run(lra("listops"), f"{options} TAG parts TRAIN.EVAL_STEPS 5")


def test_gradients_are_clipped_by_value(tmp_path, monkeypatch):
    root = write_cache(tmp_path / "data", "listops", classes=10)
    largest = []

    def seen(parameters, limit):
        torch.nn.utils.clip_grad_value_(parameters, limit)
        largest.append(max(parameter.grad.abs().max().item() for parameter in parameters))

    monkeypatch.setattr(engine.epoch, "clip_grad_value_", seen)
    options = f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT} TRAIN.STEPS 10 TRAIN.CLIP_VALUE 0.001"
    run(lra("listops"), options)
    assert len(largest) == 10 and max(largest) == pytest.approx(0.001)


def test_learning_rates_are_taken_as_given(tmp_path):
    root = write_cache(tmp_path / "data", "listops", classes=10)
    run(lra("listops"), f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {SHORT}")
    folder = tmp_path / "out" / "lra_listops" / "default"
    rates = [record["lr"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert max(rates) == pytest.approx(1e-4) and rates[0] == pytest.approx(1e-4 / 25)
    assert load_checkpoint(epoch_file(folder, 2))["step"] == 20
