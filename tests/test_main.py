"""Runs from the command line: train, resume, evaluate, fine-tune, and what goes wrong on the way.

pytest tests/test_main.py
"""

import fcntl
import io
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE, ROOT, TINY, config_file, read_json, run_main
from PIL import Image

import main
from config import ConfigError, load_config
from data import DataError
from logger import get_logger, read_metrics
from models import build_model
from utils import distributed
from utils.checkpoint import CheckpointError, epoch_file, load_checkpoint, save_checkpoint

RELEASED = REFERENCE / "checkpoint_official_tiny.pth"
RELEASED_OPTIONS = [
    *read_json("checkpoint_official_tiny.json")["opts"],
    "DATA.DATASET",
    "digits",
    "DATA.NUM_WORKERS",
    "0",
]
# Everything random and everything stateful at once.
EVERYTHING = "EMA.ENABLE True EMA.DECAY 0.9 TRAIN.ACCUMULATION_STEPS 2 DATA.BATCH_SIZE 32 MODEL.DROP_RATE 0.1"


@pytest.fixture
def log(caplog):
    """The run's log as text, although its logger writes to the console itself."""
    logger = get_logger()
    previous, logger.propagate = logger.propagate, True

    handler = caplog.handler
    real_setup = main.setup_logger

    def setup(*arguments):
        real_setup(*arguments)
        logger.addHandler(handler)

    main.setup_logger = setup
    yield caplog
    main.setup_logger = real_setup
    logger.propagate = previous
    logger.handlers.clear()


def run(cfg: Path, options: str = "") -> main.Progress | None:
    """main.main in this process."""
    return main.main(load_config(str(cfg), shlex.split(options)))


def folder_of(tiny: Path) -> Path:
    return tiny.parent / "out" / "tiny" / "default"


def _same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def assert_same_run(first: Path, second: Path, epoch: int) -> None:
    """Weights, optimizer, average, generators, best accuracy and every logged loss are equal bit for bit."""
    a, b = (load_checkpoint(epoch_file(folder, epoch)) for folder in (first, second))
    for key in ("model", "optimizer", "lr_scheduler", "model_ema", "scaler", "epoch", "step", "max_accuracy", "rng"):
        assert _same(a[key], b[key]), key
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (first, second)]
    timings = {"data_time", "step_time", "images_per_s", "memory_mb"}
    values = [[{k: v for k, v in record.items() if k not in timings} for record in records] for records in logs]
    assert values[0] == values[1] and len(values[0]) > 3


# ---------------------------------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        f"{EVERYTHING} DATA.NUM_WORKERS 2",
        "AMP True",
        "AMP True AMP_DTYPE float16",
        "TRAIN.OPTIMIZER.NAME sgd",
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tiny, options, monkeypatch):
    options += " TRAIN.EPOCHS 3"
    run(tiny, f"{options} TAG whole")
    real = main.train_one_epoch

    def stopping(config, training, batches, epoch, metrics):
        if epoch == 1:
            real(config, training, batches, epoch, metrics)  # an epoch that is lost, its log lines with it
            raise KeyboardInterrupt
        real(config, training, batches, epoch, metrics)

    monkeypatch.setattr(main, "train_one_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, f"{options} TAG parts")
    monkeypatch.undo()
    run(tiny, f"{options} TAG parts")
    root = folder_of(tiny).parent
    assert_same_run(root / "whole", root / "parts", 3)


def test_two_processes_interrupted_and_resumed_equal_uninterrupted(tiny):
    arguments = ["--cfg", tiny, "--opts", *EVERYTHING.split(), "TRAIN.EPOCHS", "2"]
    run_main(*arguments, "--tag", "whole", processes=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/driven_main.py", "stop-at-epoch-1", *map(str, arguments), "--tag", "parts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    stopped = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    root = folder_of(tiny).parent
    assert epoch_file(root / "parts", 1).exists() and not epoch_file(root / "parts", 2).exists(), stopped.stderr
    resumed = run_main(*arguments, "--tag", "parts", processes=2)
    assert "1 epochs finished" in resumed.stdout
    assert_same_run(root / "whole", root / "parts", 2)
    assert len(load_checkpoint(epoch_file(root / "whole", 2))["rng"]) == 2


def test_a_finished_run_says_so_evaluates_and_exits_0(tiny):
    run_main("--cfg", tiny, "--opts", "TRAIN.EPOCHS", "1")
    files = sorted(path.name for path in folder_of(tiny).iterdir())
    assert files == ["ckpt_epoch_1.pth", "config.yaml", "curves.png", "log.txt", "max_acc.pth", "metrics.jsonl"]
    weights = epoch_file(folder_of(tiny), 1).read_bytes()
    again = run_main("--cfg", tiny, "--opts", "TRAIN.EPOCHS", "1")
    assert "this run is finished: all 1 epochs are done" in again.stdout
    assert re.search(r"validation: 355 images, top-1 \d", again.stdout)
    assert epoch_file(folder_of(tiny), 1).read_bytes() == weights


def test_the_closing_lines_name_folder_accuracy_curves_and_a_command_that_works(tiny):
    first = run_main("--cfg", tiny)
    assert f"run folder: {folder_of(tiny)}" in first.stdout
    best = re.search(r"best top-1: ([\d.]+) %", first.stdout)[1]
    with Image.open(re.search(r"curves: (\S+)", first.stdout)[1]) as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    command = re.search(r"evaluate it with: (.*)", first.stdout)[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"top-1 {best} %" in result.stdout
    assert "355 images" in result.stdout and "sha256" in result.stdout and "float32" in result.stdout


def test_an_unreadable_newest_checkpoint_is_skipped(tiny, log):
    run(tiny)
    newest = epoch_file(folder_of(tiny), 2)
    os.truncate(newest, 1000)
    (folder_of(tiny) / "max_acc.pth").unlink()
    run(tiny)
    assert "skipped: checkpoint" in log.text and "ckpt_epoch_1.pth: 1 epochs finished" in log.text
    assert load_checkpoint(newest)["epoch"] == 2


def test_without_auto_resume_a_run_starts_anew(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    before = epoch_file(folder_of(tiny), 1).read_bytes()
    records = len(read_metrics(folder_of(tiny) / "metrics.jsonl"))
    log.clear()
    run(tiny, "TRAIN.EPOCHS 1 TRAIN.AUTO_RESUME False")
    assert "finished" not in log.text and "epoch 0 [" in log.text
    (aside,) = folder_of(tiny).glob("earlier-*")
    assert "held checkpoints of an earlier run; they are now in" in log.text
    assert epoch_file(aside, 1).read_bytes() == before and (aside / "max_acc.pth").exists()
    assert len(read_metrics(folder_of(tiny) / "metrics.jsonl")) == records


def test_a_later_start_epoch_uses_the_rates_of_that_epoch(tiny):
    run(tiny, "TRAIN.EPOCHS 2 TAG whole PRINT_FREQ 1")
    run(tiny, "TRAIN.EPOCHS 2 TAG late PRINT_FREQ 1 TRAIN.START_EPOCH 1")
    rates = [
        [r["lr"] for r in read_metrics(folder_of(tiny).parent / tag / "metrics.jsonl") if r["kind"] == "train"]
        for tag in ("whole", "late")
    ]
    assert len(rates[1]) > 10 and rates[0][len(rates[0]) // 2 :] == rates[1]


def test_pretrained_that_does_not_exist_is_explained_and_a_run_continues_without_it(tiny):
    with pytest.raises(CheckpointError, match=r"absent\.pth does not exist"):
        run(tiny, "MODEL.PRETRAINED absent.pth")
    run(tiny, "TRAIN.EPOCHS 1")
    run(tiny, "TRAIN.EPOCHS 1 MODEL.PRETRAINED absent.pth")


def test_a_disk_that_refuses_ends_in_one_line(tiny):
    command = f"ulimit -f 40; exec {sys.executable} main.py --cfg {tiny}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "could not be written" in result.stdout and "Traceback" not in result.stderr
    assert not list(folder_of(tiny).glob("*.pth")) and not list(folder_of(tiny).glob(".*tmp"))


def test_schedule_keys_changed_since_are_honoured_and_named(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    run(tiny, "TRAIN.EPOCHS 2 TRAIN.BASE_LR 2.0e-3 TRAIN.WEIGHT_DECAY 0.1 TRAIN.WARMUP_EPOCHS 0")
    assert "TRAIN.EPOCHS 1 → 2" in log.text and "TRAIN.BASE_LR 0.008 → 0.002" in log.text
    records = [r for r in read_metrics(folder_of(tiny) / "metrics.jsonl") if r["kind"] == "train" and r["epoch"] == 1]
    steps = records[-1]["step"] // 2
    base, low = 2e-3 * 64 / 512, 5e-6 * 64 / 512
    for record in records:
        k = record["step"] - 2  # the rate of iteration k + 1 was set by step_update(k)
        expected = low + 0.5 * (base - low) * (1 + np.cos(np.pi * k / (2 * steps)))
        assert record["lr"] == pytest.approx(expected, rel=1e-9)
    optimizer = load_checkpoint(epoch_file(folder_of(tiny), 2))["optimizer"]
    assert optimizer["param_groups"][0]["weight_decay"] == 0.1


def test_another_optimizer_or_function_is_refused_on_resume(tiny):
    run(tiny, "TRAIN.EPOCHS 1")
    with pytest.raises(CheckpointError, match="is not that of SGD"):
        run(tiny, "TRAIN.OPTIMIZER.NAME sgd")
    with pytest.raises(CheckpointError, match=r"trained with MODEL.LA.ALPHA 4.0, this configuration has 2.0"):
        run(tiny, "MODEL.LA.ALPHA 2")
    with pytest.raises(CheckpointError, match="does not fit PolaSwin of this configuration"):
        run(tiny, "MODEL.SWIN.EMBED_DIM 16")


def test_training_continues_from_a_released_checkpoint(tiny, log):
    options = shlex.join([*RELEASED_OPTIONS, "MODEL.RESUME", str(RELEASED), "OUTPUT", str(tiny.parent / "out")])
    main.main(load_config(config_file("pola_swin_t"), shlex.split(options)))
    assert "2 epochs finished, best top-1 12.500 %" in log.text
    assert "schedule and optimizer follow the configuration" in log.text
    assert "epoch 2 [" in log.text and "epoch 1 [" not in log.text
    folder = tiny.parent / "out" / "pola_swin_tiny_patch4_224" / "default"
    step = load_checkpoint(epoch_file(folder, 3))["optimizer"]["state"][0]["step"]
    assert step == 8 + 1442 // 16  # the file's 8 steps and an epoch of ours
    command = re.search(r"evaluate it with: (.*)", log.text)[1]
    assert Path(shlex.split(command)[-1]).exists()


def test_checkpoints_are_rotated_and_hold_only_plain_values(tiny):
    run(tiny, "TRAIN.EPOCHS 4 CHECKPOINT.KEEP 2 SAVE_FREQ 1 EMA.ENABLE True TENSORBOARD True")
    names = {path.name for path in folder_of(tiny).glob("*.pth")}
    assert names == {"ckpt_epoch_3.pth", "ckpt_epoch_4.pth", "max_acc.pth"}
    checkpoint = torch.load(epoch_file(folder_of(tiny), 4), weights_only=True)
    keys = "model optimizer lr_scheduler scaler model_ema epoch step max_accuracy rng classes config version".split()
    assert set(checkpoint) == set(keys)
    assert checkpoint["classes"] == [str(digit) for digit in range(10)]
    records = read_metrics(folder_of(tiny) / "metrics.jsonl")
    best = max(record["top1"] for record in records if record["kind"] == "val")
    assert load_checkpoint(folder_of(tiny) / "max_acc.pth")["max_accuracy"] == best == checkpoint["max_accuracy"]
    assert {record["kind"] for record in records} == {"train", "val", "ema"}
    assert any((folder_of(tiny) / "tensorboard").iterdir())


def test_save_frequency_always_saves_the_last_epoch(tiny):
    run(tiny, "TRAIN.EPOCHS 3 SAVE_FREQ 2")
    assert {path.name for path in folder_of(tiny).glob("ckpt*")} == {"ckpt_epoch_2.pth", "ckpt_epoch_3.pth"}


def test_the_stored_configuration_reproduces_the_run(tiny):
    run(tiny, "TRAIN.EPOCHS 1 MODEL.LA.ALPHA 2.5")
    stored = folder_of(tiny) / "config.yaml"
    run(stored, "TAG again")
    assert_values = [
        load_checkpoint(epoch_file(folder_of(tiny).parent / tag, 1))["model"] for tag in ("default", "again")
    ]
    assert _same(*assert_values)


def test_a_terminal_gets_colours_and_a_progress_bar_with_the_remaining_time(tiny):
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "main.py", "--cfg", str(tiny), "--opts", "TRAIN.EPOCHS", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    try:
        while block := os.read(controller, 1 << 16):
            output += block
    except OSError:  # the terminal's last user is gone
        pass
    finally:
        os.close(controller)
    assert process.wait(timeout=60) == 0
    text = output.decode()
    assert re.search(r"epoch 0: +\d+%\|.*\| \d+/22 \[\d\d:\d\d<\d\d:\d\d", text)  # share, count, elapsed < remaining
    assert "evaluation:" in text and "\x1b[32m[" in text
    plain = (folder_of(tiny) / "log.txt").read_text()
    assert "\x1b" not in plain and "%|" not in plain and "best top-1" in plain


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

RESULT = re.compile(r"(\d+) images, top-1 ([\d.]+) %, top-5 ([\d.]+) %, loss ([\d.]+)")
LAUNCHERS = {
    "one process": {},
    "torchrun": {"processes": 2},
    "torchrun, three": {"processes": 3},
    "legacy launcher": {"launcher": ["-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node=2"]},
}


@pytest.fixture(scope="module")
def released_result(tmp_path_factory):
    """(images, top-1, top-5, loss) of the released file on the digits, in this process."""
    folder = str(tmp_path_factory.mktemp("out"))
    options = [*RELEASED_OPTIONS, "OUTPUT", folder, "EVAL_MODE", "True", "MODEL.RESUME", str(RELEASED)]
    config = load_config(config_file("pola_swin_t"), options)
    result = main.run_evaluation(config, torch.device("cpu"))
    return result.images, f"{result.top1:.3f}", f"{result.top5:.3f}", f"{result.loss:.4f}"


@pytest.mark.parametrize("launch", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_every_launcher_evaluates_the_named_file_to_the_same_result(launch, released_result, tmp_path):
    batch = {0: "33", 2: "64", 3: "16"}[launch.get("processes", 0)]
    arguments = ["--cfg", config_file("pola_swin_t"), "--output", tmp_path, "--batch-size", batch]
    options = [word for word in RELEASED_OPTIONS if word not in ("DATA.BATCH_SIZE",)]
    position = RELEASED_OPTIONS.index("DATA.BATCH_SIZE")
    options = RELEASED_OPTIONS[:position] + RELEASED_OPTIONS[position + 2 :]
    result = run_main(*arguments, "--eval", "--resume", RELEASED, "--opts", *options, **launch)
    images, top1, top5, loss = RESULT.search(result.stdout).groups()
    assert (int(images), top1, top5) == released_result[:3] and images == "355"
    assert float(loss) == pytest.approx(float(released_result[3]), abs=2e-4)
    digest = read_json("checkpoint_official_tiny.json")["sha256"]
    assert f"evaluated {RELEASED} (sha256 {digest}), float32:" in result.stdout
    assert len(RESULT.findall(result.stdout)) == 1


def test_evaluation_ignores_the_run_folder_and_writes_no_configuration(tiny, log):
    run(tiny)
    folder = folder_of(tiny)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}
    log.clear()
    run(tiny, f"EVAL_MODE True MODEL.RESUME {epoch_file(folder, 1)}")
    assert f"evaluated {epoch_file(folder, 1)} (sha256" in log.text
    first = next(r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "val")
    assert f"top-1 {first['top1']:.3f} %" in log.text
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"} == before


def test_averaged_weights_get_a_line_of_their_own(tiny, log):
    run(tiny, "EMA.ENABLE True EMA.DECAY 0.9")
    log.clear()
    run(tiny, f"EVAL_MODE True MODEL.RESUME {epoch_file(folder_of(tiny), 2)}")
    lines = RESULT.findall(log.text)
    assert len(lines) == 2 and "evaluated EMA weights of" in log.text
    records = read_metrics(folder_of(tiny) / "metrics.jsonl")
    expected = [f"{[r for r in records if r['kind'] == kind][-1]['top1']:.3f}" for kind in ("val", "ema")]
    assert [line[1] for line in lines] == expected


def test_test_amp_evaluates_under_autocast_and_says_so(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    run(tiny, f"EVAL_MODE True TEST.AMP True MODEL.RESUME {epoch_file(folder_of(tiny), 1)}")
    assert "bfloat16: 355 images" in log.text


def test_evaluating_another_architecture_lists_what_does_not_fit(tiny):
    with pytest.raises(CheckpointError, match=r"does not fit PolaSwin(.|\n)*unexpected \((.|\n)*other shape \("):
        run(tiny, f"EVAL_MODE True MODEL.RESUME {RELEASED}")


# ---------------------------------------------------------------------------------------------------------------------
# Own data: classes, fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path):
    """Build an image folder with the given classes; each class has a colour of its own."""

    def build(*names: str, root: str = "animals") -> Path:
        for split, count in (("train", 16), ("val", 4)):
            for label, name in enumerate(names):
                (tmp_path / root / split / name).mkdir(parents=True)
                for i in range(count):
                    noise = np.random.default_rng(100 * label + i).integers(0, 60, (40, 50, 3), dtype=np.uint8)
                    noise[..., label % 3] += 150
                    buffer = io.BytesIO()
                    Image.fromarray(noise).save(buffer, "JPEG")
                    (tmp_path / root / split / name / f"{i}.jpg").write_bytes(buffer.getvalue())
        return tmp_path / root

    return build


OWN = "DATA.DATASET imagenet DATA.BATCH_SIZE 8 TRAIN.EPOCHS 1 "


def test_the_head_follows_the_folder_and_the_names_go_into_the_checkpoint(tiny, animals, log):
    root = animals("ant", "bee", "cat")
    run(tiny, f"{OWN} DATA.DATA_PATH {root}")
    checkpoint = load_checkpoint(epoch_file(folder_of(tiny), 1))
    assert checkpoint["classes"] == ["ant", "bee", "cat"] and checkpoint["model"]["head.weight"].shape[0] == 3
    evaluate = f"{OWN} EVAL_MODE True MODEL.RESUME {epoch_file(folder_of(tiny), 1)}"
    run(tiny, f"{evaluate} DATA.DATA_PATH {root}")
    assert "12 images, top-1" in log.text
    with pytest.raises(CheckpointError, match="missing in the data set: cat; unknown to the checkpoint: dog"):
        run(tiny, f"{evaluate} DATA.DATA_PATH {animals('ant', 'bee', 'dog', root='other')}")
    with pytest.raises(CheckpointError, match="trained on 3 classes, the data set has 2"):
        run(tiny, f"{evaluate} DATA.DATA_PATH {animals('ant', 'bee', root='fewer')}")
    with pytest.raises(CheckpointError, match="names differ"):  # continuing a run on other data
        run(tiny, f"{OWN} DATA.DATA_PATH {tiny.parent / 'other'}")


def test_without_stored_names_the_counts_must_be_equal(tiny, animals):
    config = load_config(str(tiny), OWN.split())
    path = tiny.parent / "weights.pth"
    save_checkpoint({"model": build_model(config, 3).state_dict()}, path)
    run(tiny, f"{OWN} EVAL_MODE True MODEL.RESUME {path} DATA.DATA_PATH {animals('ant', 'bee', 'dog')}")
    with pytest.raises(CheckpointError, match=r"weights\.pth has 3 classes, the data set 2"):
        run(tiny, f"{OWN} EVAL_MODE True MODEL.RESUME {path} DATA.DATA_PATH {animals('a', 'b', root='two')}")


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny"])
def test_fine_tuning_into_other_classes_and_size(tiny, animals, log, type_name):
    model = f"MODEL.TYPE {type_name} MODEL.DROP_PATH_RATE 0"
    config = load_config(str(tiny), model.split())
    source = build_model(config, 10)
    path = tiny.parent / "weights.pth"
    save_checkpoint({"model": source.state_dict()}, path)
    root = animals("ant", "bee")
    options = f"{OWN} {model} DATA.DATA_PATH {root} DATA.IMG_SIZE 64 MODEL.PRETRAINED {path} TRAIN.BASE_LR 0"
    options += " TRAIN.WARMUP_LR 0 TRAIN.MIN_LR 0 EMA.ENABLE True"
    run(tiny, options)
    assert "head: 10 classes in the file, 2 here; starts anew" in log.text
    assert "resized to" in log.text and f"starts from the weights of {path}" in log.text
    tuned = load_checkpoint(epoch_file(folder_of(tiny), 1))
    name = "layers.0.blocks.0.attn.qkvg.weight" if type_name == "pola_swin" else "block1.0.attn.qg.weight"
    assert torch.equal(tuned["model"][name], source.state_dict()[name])  # rate 0: the file's weights, unchanged
    assert torch.equal(tuned["model_ema"][name], source.state_dict()[name])
    log.clear()
    with pytest.raises(KeyboardInterrupt):  # the run folder's checkpoint goes before --pretrained
        _stop_after_resume(tiny, options)
    assert "1 epochs finished" in log.text and "starts from the weights" not in log.text


def _stop_after_resume(tiny: Path, options: str) -> None:
    real, main.wrap = main.wrap, _interrupt
    try:
        run(tiny, options)
    finally:
        main.wrap = real


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# Throughput
# ---------------------------------------------------------------------------------------------------------------------


def test_throughput_needs_no_data_and_no_folder(tmp_path):
    options = "MODEL.SWIN.EMBED_DIM 12 MODEL.SWIN.NUM_HEADS [1,2,2,4] DATA.IMG_SIZE 64".split()
    arguments = [
        "--cfg",
        config_file("pola_swin_t"),
        "--throughput",
        "--batch-size",
        "4",
        "--amp",
        "--output",
        tmp_path,
    ]
    result = run_main(*arguments, "--opts", *options)
    assert re.search(
        r"throughput of pola_swin_tiny_patch4_224, batch 4, bfloat16, size 64: median [\d.]+ images/s "
        r"\(lowest [\d.]+, highest [\d.]+, 30 batches\)",
        result.stdout,
    )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mistake_ends_in_one_line_and_exit_code_2(tiny, tmp_path):
    (tmp_path / "evil.pth").write_bytes(b"garbage")
    cases = {
        ("--data-path", "/absent", "--opts", "DATA.DATASET", "imagenet"): "data set folder /absent does not exist",
        ("--eval", "--resume", str(tmp_path / "evil.pth")): "evil.pth is damaged",
        ("--output", "/dev/null/sub"): "run folder /dev/null/sub/tiny/default cannot be written",
    }
    for arguments, message in cases.items():
        result = run_main("--cfg", tiny, *arguments, check=False)
        assert result.returncode == 2
        assert message in result.stdout and "Traceback" not in result.stdout + result.stderr


def test_an_unwritable_output_folder_is_explained(tiny):
    (tiny.parent / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the run folder .*file/tiny/default cannot be written .*--output"):
        run(tiny, f"OUTPUT {tiny.parent / 'file'}")


def test_a_training_set_smaller_than_a_step_is_explained(tiny):
    with pytest.raises(DataError, match="less than one step"):
        run(tiny, "DATA.BATCH_SIZE 2000")


def test_ctrl_c_ends_cleanly_with_the_last_checkpoint_intact(tiny):
    command = [sys.executable, "main.py", "--cfg", str(tiny), "--opts", "TRAIN.EPOCHS", "500"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(folder_of(tiny).glob("ckpt_epoch_2.pth")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; the last complete checkpoint is intact" in stdout and "Traceback" not in stderr
    newest = max(folder_of(tiny).glob("ckpt_epoch_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
    assert load_checkpoint(newest)["epoch"] >= 2
    assert not list(folder_of(tiny).glob(".*.tmp"))


def test_nan_on_one_rank_stops_all_and_names_step_rate_and_rank(tiny):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/driven_main.py", "nan-on-rank-1", "--cfg", str(tiny), "--opts", "PRINT_FREQ", "10"]
    command += ["DATA.BATCH_SIZE", "32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode != 0
    message = r"stopped: step 7: non-finite gradient or loss at learning rate \S+ \(loss not finite on rank 1\)"
    assert re.search(f"rank 0 {message}", result.stdout) or re.search(f"rank 1 {message}", result.stdout)
    assert not list(folder_of(tiny).glob("*.pth"))  # nothing was saved from a stopped epoch


def test_more_processes_than_gpus_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": 7, "WORLD_SIZE": 8, "LOCAL_RANK": 7, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(distributed.LaunchError, match="8 processes need 8 GPUs, and this node has 4: lower --nproc"):
        distributed.init()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    with pytest.raises(distributed.LaunchError, match="6 GPUs, and this node has 4"):
        distributed.init(single_process_gpu=5)


def test_denormals_are_flushed_in_every_thread(tmp_path):
    """main.py is run with a main() that looks at a result below the smallest normal number, on two threads."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "engine = types.ModuleType('engine')\n"
        "class NonFiniteError(Exception): pass\n"
        "engine.NonFiniteError, engine.Training = NonFiniteError, object\n"
        "engine.evaluate = engine.train_one_epoch = None\n"
        "def throughput(config, model, device, amp_dtype):\n"
        "    import torch\n"
        "    torch.set_num_threads(2)\n"
        "    left = (torch.full((4_000_000,), 2e-38) * 1e-2).count_nonzero()\n"
        "    print('denormals left:', int(left), flush=True)\n"
        "    sys.exit(0)\n"
        "engine.throughput = throughput\n"
        "sys.modules['engine'] = engine\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "main.py", "--cfg", config_file("quickstart"), "--throughput"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "denormals left: 0" in result.stdout
    plain = "import torch; torch.set_num_threads(2); print((torch.full((4,), 2e-38) * 1e-2).count_nonzero().item())"
    without = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert without.stdout.strip() == "4"  # what the test would see if nothing flushed them


def test_tiny_configuration_of_the_tests_is_valid(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    assert load_config(str(path)).MODEL.NAME == "tiny"
