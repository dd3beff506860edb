"""Training runs: what they leave, and that interrupted and resumed ones equal unbroken ones bit for bit.

pytest tests/test_resume.py
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PYTHON,
    RELEASED,
    RELEASED_OPTIONS,
    ROOT,
    TINY,
    TINY_NALA,
    TINY_PPP,
    config_file,
    folder_of,
    run,
    run_main,
    write_tiny,
)
from PIL import Image
from run_files import epoch_file, read_position

import engine.epoch
import engine.evaluation
import main
from config import load_config, parse_command_line
from logger import read_metrics
from models.files import CheckpointError, load_checkpoint
from utils.checkpoints.finding import newest_checkpoint
from utils.checkpoints.writing import save_checkpoint
from utils.faults.preemption import Preempted

# Everything random and everything stateful at once.
EVERYTHING = "EMA.ENABLE True EMA.DECAY 0.9 TRAIN.ACCUMULATION_STEPS 2 DATA.BATCH_SIZE 32 MODEL.DROP_RATE 0.1"
AUGMENTED = f"{EVERYTHING} AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1"


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
    for key in (
        "model",
        "optimizer",
        "lr_scheduler",
        "model_ema",
        "scaler",
        "epoch",
        "step",
        "max_accuracy",
        "max_accuracy_e",
        "rng",
        "continuation",
    ):
        assert _same(a[key], b[key]), key
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (first, second)]
    timings = {"data_time", "communication_time", "step_time", "images_per_s", "memory_mb"}
    values = [[{k: v for k, v in record.items() if k not in timings} for record in records] for records in logs]
    assert values[0] == values[1] and len(values[0]) > 3


def assert_same_predictions(first: Path, second: Path) -> None:
    with np.load(first / "predictions.npz") as ours, np.load(second / "predictions.npz") as theirs:
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(AUGMENTED, marks=pytest.mark.slow),  # these are in the test below
        "AMP True TRAIN.OPTIMIZER.NAME sgd DATA.NUM_WORKERS 2",
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tiny, options, monkeypatch):
    run(tiny, f"{options} TAG whole")
    real = main.train_one_epoch

    def stopping(config, training, batches, epoch, metrics, **where):
        real(config, training, batches, epoch, metrics, **where)
        if epoch == 1:  # an epoch that is lost, its log lines with it
            raise KeyboardInterrupt

    monkeypatch.setattr(main, "train_one_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, f"{options} TAG parts")
    monkeypatch.undo()
    run(tiny, f"{options} TAG parts")
    root = folder_of(tiny).parent
    assert_same_run(root / "whole", root / "parts", 2)


@pytest.mark.parametrize(
    "text, options",
    [
        (TINY, f"{AUGMENTED} DATA.NUM_WORKERS 2"),
        # slow: loader processes are in the first, mixed precision in the last
        pytest.param(TINY, "AMP True DATA.NUM_WORKERS 4 AUG.REPROB 0.5", marks=pytest.mark.slow),
        (TINY, "AMP True AMP_DTYPE float16 PRINT_FREQ 7"),
        pytest.param(TINY_PPP, EVERYTHING, marks=pytest.mark.slow),  # its BatchNorm and average are in the last
        (TINY_NALA, f"{AUGMENTED} AUG.REPROB 0.5"),
    ],
    ids=["everything", "bfloat16", "float16", "PolaFormer++", "NaLaFormer"],
)
def test_stopped_anywhere_any_number_of_times_equals_uninterrupted(tmp_path, text, options, monkeypatch):
    """SIGTERM inside an epoch, at the last step, in the validation; every part continues from what it saved.

    With NaLaFormer's recipe each part has another number of loader processes.
    """
    tiny = write_tiny(tmp_path, text)
    options += " TRAIN.EPOCHS 2 DATA.TRAIN_FRACTION 0.5"
    run(tiny, f"{options} TAG whole")
    step, forward, count = engine.epoch.optimizer_step, engine.evaluation.AccuracyCounter.update, 0

    def signalled_after(moment, function):
        def counted(*arguments):
            nonlocal count
            result = function(*arguments)
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        return counted

    # optimizer steps: 3 into the epoch, 1 further, to its last one; then the validation's second batch; then epoch 1
    steps = len(read_metrics_steps(folder_of(tiny).parent / "whole"))
    positions = []
    moments = (("step", 3), ("step", 1), ("step", steps - 4), ("batch", 2), ("step", 5), ("step", 4))
    for part, (name, moment) in enumerate(moments):
        count = 0
        workers = f"DATA.NUM_WORKERS {(0, 1, 3)[part % 3]}" if text == TINY_NALA else ""
        with monkeypatch.context() as patched:
            if name == "step":
                patched.setattr(engine.epoch, "optimizer_step", signalled_after(moment, step))
            else:
                patched.setattr(engine.evaluation.AccuracyCounter, "update", signalled_after(moment, forward))
            with pytest.raises(Preempted, match="told to stop by SIGTERM: saved"):
                run(tiny, f"{options} {workers} TAG parts")
        positions.append(newest_checkpoint(folder_of(tiny).parent / "parts", read_position).path.name)
    assert positions == [
        f"ckpt_epoch_{epoch}_step_{done}.pth"
        for epoch, done in ((0, 3), (0, 4), (0, steps), (0, steps), (1, 5), (1, 9))
    ]
    assert (folder_of(tiny).parent / "parts" / "PREEMPTED").exists()
    run(tiny, f"{options} TAG parts")
    assert not (folder_of(tiny).parent / "parts" / "PREEMPTED").exists()
    root = folder_of(tiny).parent
    assert_same_run(root / "whole", root / "parts", 2)
    assert_same_predictions(root / "whole", root / "parts")


def read_metrics_steps(folder: Path) -> range:
    """The optimizer steps of an epoch."""
    return range(max(r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["epoch"] == 0))


def driven(mode: str, *arguments: str | Path) -> str:
    """The output of two processes of tests/driven_main.py, which exit with 0."""
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/driven_main.py", mode, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("text", [TINY_PPP, TINY_NALA], ids=["PolaFormer++", "NaLaFormer"])
def test_two_processes_interrupted_and_resumed_equal_uninterrupted(tmp_path, text):
    """Of a model with BatchNorm, whose running statistics each rank has of its own, and validates by rank 0's."""
    tiny = write_tiny(tmp_path, text)
    options = f"{AUGMENTED} TRAIN.EPOCHS 2 DATA.NUM_WORKERS 2 CHECKPOINT.EVERY_STEPS 3 CHECKPOINT.KEEP 9"
    arguments = ["--cfg", tiny, "--opts", *options.split()]
    told = driven("tell-statistics", *arguments, "--tag", "whole")
    digests = {rank: re.findall(rf"statistics of rank {rank}: (\w+) (\w+)", told) for rank in (0, 1)}
    for first, second in zip(digests[0], digests[1], strict=True):
        assert first[0] == first[1] == second[1] != second[0]
    assert len(digests[0]) == 2
    driven("stop-at-epoch-1", *arguments, "--tag", "parts")
    root = folder_of(tiny).parent
    assert epoch_file(root / "parts", 1).exists() and not epoch_file(root / "parts", 2).exists()
    resumed = run_main(*arguments, "--tag", "parts", processes=2)
    assert "1 epochs finished" in resumed.stdout
    assert_same_run(root / "whole", root / "parts", 2)
    assert_same_predictions(root / "whole", root / "parts")
    assert len(load_checkpoint(epoch_file(root / "whole", 2))["rng"]) == 2
    (root / "inside").mkdir()  # as if both had been killed in the middle of the second epoch
    for name in ("metrics.jsonl", "ckpt_epoch_1_step_3.pth", "ckpt_epoch_1_step_3.pth.json"):
        (root / "inside" / name).write_bytes((root / "whole" / name).read_bytes())
    resumed = run_main(*arguments, "--tag", "inside", processes=2)
    assert "1 epochs and 3 of 5 steps finished" in resumed.stdout
    assert_same_run(root / "whole", root / "inside", 2)


def test_a_finished_run_says_so_evaluates_and_exits_0(tiny):
    run_main("--cfg", tiny, "--opts", "TRAIN.EPOCHS", "1")
    files = {path.name for path in folder_of(tiny).iterdir()}
    checkpoints = {"ckpt_epoch_1.pth", "ckpt_epoch_1.pth.json", "max_acc.pth", "max_acc.pth.json"}
    records = {"config.yaml", "curves.png", "environment.json", "log.txt", "metrics.jsonl", "predictions.npz"}
    assert files == checkpoints | records | {".lock"}
    weights = epoch_file(folder_of(tiny), 1).read_bytes()
    again = run_main("--cfg", tiny, "--opts", "TRAIN.EPOCHS", "1")
    assert "this run is finished: all 1 epochs are done" in again.stdout
    assert re.search(r"validation: 355 images, top-1 \d", again.stdout)
    assert epoch_file(folder_of(tiny), 1).read_bytes() == weights


def test_the_closing_lines_name_folder_accuracy_curves_and_commands_that_work(tiny, tmp_path):
    """Run in a folder of its own, the paths are short; every command is run there as it stands."""
    text = tiny.read_text().replace(f"OUTPUT: {tiny.parent / 'out'}", "OUTPUT: out\nEMA: {ENABLE: True, WARMUP: True}")
    tiny.write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def started(*words: str) -> str:
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
        return result.stdout

    first = started(PYTHON, str(ROOT / "main.py"), "--cfg", "tiny.yaml")
    assert re.findall("best so far: .*", first)[0].endswith(" after 1 epoch)")
    assert "memory" in first and re.search(r"epoch 1 \[11/11\] .* left\n", first) and "drawing the curves\n" in first
    assert "run folder: out/tiny/default\n" in first and "curves: out/tiny/default/curves.png\n" in first
    best = re.search(r"best top-1: ([\d.]+) %", first)[1]
    assert re.findall("best so far: ([\\d.]+) %", first)[-1] == best
    with Image.open(tmp_path / "out/tiny/default/curves.png") as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    said = {}
    for what in ("evaluate it with", "report", "predict", "attention maps"):
        interpreter, script, *words = shlex.split(re.search(rf"{what}: (.*)", first)[1])
        assert Path(tmp_path, shutil.which(interpreter) or interpreter).samefile(sys.executable)
        assert not [word for word in words if word.startswith(str(tmp_path))]  # all are below this folder
        said[what] = started(PYTHON, script, *words)
    assert f"top-1 {best} %" in said["evaluate it with"] and "355 images" in said["evaluate it with"]
    assert (tmp_path / "out/tiny/default/report.html").is_file() and "polaformer.png" in said["predict"]
    assert (tmp_path / "attention/index.html").is_file()


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
    assert len(read_metrics(aside / "metrics.jsonl")) == records and (aside / "config.yaml").exists()
    assert len(read_metrics(folder_of(tiny) / "metrics.jsonl")) == records


def test_the_file_that_resume_names_is_not_set_aside(tiny):
    run(tiny)
    named = epoch_file(folder_of(tiny), 2)
    run(tiny, f"TRAIN.AUTO_RESUME False MODEL.RESUME {named}")  # finished: evaluates and says how to do it again
    assert named.exists()
    (aside,) = folder_of(tiny).glob("earlier-*")
    assert epoch_file(aside, 1).exists()


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
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024,) * 2)"
    command = [PYTHON, "-c", f"{limited}; sys.argv[0] = 'main.py'; runpy.run_path('main.py', run_name='__main__')"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--cfg", str(tiny)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
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


def test_another_backend_is_named_and_goes_on(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    run(tiny, "TRAIN.EPOCHS 2 MODEL.LA.BACKEND reference")
    backends = [f"polarity attention backend: {name}" for name in ("eager", "reference")]
    assert "was computed with {}, and goes on with {}: to rounding".format(*backends) in log.text
    run(tiny, "TRAIN.EPOCHS 3 MODEL.LA.BACKEND reference")
    assert log.text.count("and goes on with") == 1


def test_another_optimizer_or_function_is_refused_on_resume(tiny):
    run(tiny, "TRAIN.EPOCHS 1")
    with pytest.raises(CheckpointError, match="TRAIN.OPTIMIZER.NAME adamw, this configuration has sgd"):
        run(tiny, "TRAIN.OPTIMIZER.NAME sgd")
    with pytest.raises(CheckpointError, match=r"trained with MODEL.LA.ALPHA 4.0, this configuration has 2.0"):
        run(tiny, "MODEL.LA.ALPHA 2")
    with pytest.raises(CheckpointError, match="does not fit PolaSwin of this configuration"):
        run(tiny, "MODEL.SWIN.EMBED_DIM 16")


def test_training_continues_from_a_released_checkpoint(tiny, log):
    options = [*RELEASED_OPTIONS, "MODEL.RESUME", str(RELEASED), "OUTPUT", str(tiny.parent / "out")]
    main.main(load_config(config_file("pola_swin_t"), [*options, "TRAIN.GLOBAL_BATCH", "null"]))
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
    names = {path.name for path in folder_of(tiny).glob("*.pth*")}
    kept = {"ckpt_epoch_3.pth", "ckpt_epoch_4.pth", "max_acc.pth", "max_ema_acc.pth"}
    assert names == kept | {name + ".json" for name in kept}
    checkpoint = torch.load(epoch_file(folder_of(tiny), 4), weights_only=True)
    keys = "model optimizer lr_scheduler scaler model_ema epoch step continuation max_accuracy rng classes".split()
    keys += ["max_accuracy_e", "validated", "config", "version"]
    assert set(checkpoint) == set(keys)
    assert checkpoint["classes"] == [str(digit) for digit in range(10)]
    records = read_metrics(folder_of(tiny) / "metrics.jsonl")
    best = max(record["top1"] for record in records if record["kind"] == "val")
    assert load_checkpoint(folder_of(tiny) / "max_acc.pth")["max_accuracy"] == best == checkpoint["max_accuracy"]
    assert {record["kind"] for record in records} == {"train", "val", "ema"}
    assert any((folder_of(tiny) / "tensorboard").iterdir())


def test_save_frequency_always_saves_the_last_epoch(tiny):
    run(tiny, "TRAIN.EPOCHS 3 SAVE_FREQ 2")
    assert {path.name for path in folder_of(tiny).glob("ckpt*.pth")} == {"ckpt_epoch_2.pth", "ckpt_epoch_3.pth"}


def test_the_stored_configuration_reproduces_the_run(tiny):
    run(tiny, "TRAIN.EPOCHS 1 MODEL.LA.ALPHA 2.5")
    stored = folder_of(tiny) / "config.yaml"
    run(stored, "TAG again")
    assert_values = [
        load_checkpoint(epoch_file(folder_of(tiny).parent / tag, 1))["model"] for tag in ("default", "again")
    ]
    assert _same(*assert_values)


# ---------------------------------------------------------------------------------------------------------------------
# What was named and is not used
# ---------------------------------------------------------------------------------------------------------------------


def test_a_named_file_that_is_not_used_is_said_and_a_requeued_job_is_quiet(tiny, log):
    run(tiny, "TRAIN.EPOCHS 1")
    weights = tiny.parent / "weights.pth"
    weights.write_bytes(epoch_file(folder_of(tiny), 1).read_bytes())
    log.clear()
    run(tiny, f"TRAIN.EPOCHS 2 MODEL.PRETRAINED {weights}")
    (line,) = [record.getMessage() for record in log.records if "is not used" in record.getMessage()]
    assert line.startswith(f"--pretrained {weights} is not used: the run folder holds ckpt_epoch_1.pth")
    assert "--tag" in line and "TRAIN.AUTO_RESUME False" in line
    assert "MODEL.PRETRAINED" not in log.text  # not as a key whose new value applies
    log.clear()
    run(tiny, f"TRAIN.EPOCHS 3 MODEL.PRETRAINED {weights}")  # the same flags again
    assert "is not used" not in log.text
    weights.unlink()
    log.clear()
    run(tiny, f"TRAIN.EPOCHS 3 MODEL.PRETRAINED {weights} MODEL.RESUME {weights}")
    assert log.text.count("is not there, and not needed") == 2


def test_a_missing_file_is_noticed_before_anything_heavy_unless_the_run_continues(tiny, capsys):
    absent = ["--cfg", str(tiny), "--pretrained", str(tiny.parent / "absent.pth")]
    for arguments, message in (
        (absent, "--pretrained .*absent.pth: no such file"),
        ([*absent[:2], "--pretrained", str(tiny.parent)], "not a file"),
        ([*absent[:2], "--resume", str(tiny.parent / "absent.pth")], "--resume .*absent.pth: no such file"),
        ([*absent[:2], "--data-path", str(tiny.parent / "absent")], "--data-path .*absent: no such folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_command_line(arguments)
        assert re.search(message, capsys.readouterr().err)
    run(tiny, "TRAIN.EPOCHS 1")
    assert parse_command_line(absent).MODEL.PRETRAINED.endswith("absent.pth")
    epoch_file(folder_of(tiny), 1).unlink()  # the best by the average alone is something to continue from too
    (folder_of(tiny) / "max_acc.pth").rename(folder_of(tiny) / "max_ema_acc.pth")
    assert parse_command_line(absent).MODEL.PRETRAINED.endswith("absent.pth")
    with pytest.raises(SystemExit, match="2"):
        parse_command_line([*absent, "--opts", "TRAIN.AUTO_RESUME", "False"])


def test_a_run_folder_of_another_data_set_names_what_helps(tiny):
    run(tiny, "TRAIN.EPOCHS 1")
    path = epoch_file(folder_of(tiny), 1)
    checkpoint = load_checkpoint(path)
    checkpoint["classes"] = [f"class {i}" for i in range(10)]
    save_checkpoint(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"was trained on 10 classes.*Another --tag .*--pretrained"):
        run(tiny, "TRAIN.EPOCHS 2")


DAMAGED = [
    {"continuation": [1]},
    {"continuation": {"done": "three"}},
    {"continuation": {"done": -3}},
    {"rng": [5]},
    {"rng": [{"torch": torch.zeros(3)}]},
    {"epoch": "last"},
    {"epoch": -5},
    {"optimizer": {"state": 3, "param_groups": []}},
    {"optimizer": {"state": {0: 3}, "param_groups": [3]}},
    {"model_ema": {"head.bias": torch.zeros(3)}},
]


def test_a_damaged_entry_of_a_checkpoint_is_one_line(tiny):
    run(tiny, "TRAIN.EPOCHS 1 EMA.ENABLE True")
    whole = load_checkpoint(epoch_file(folder_of(tiny), 1))
    path = tiny.parent / "damaged.pth"
    for damage in DAMAGED:
        save_checkpoint({**whole, **damage}, path)
        with pytest.raises(CheckpointError, match=r"damaged\.pth"):
            run(tiny, f"TRAIN.EPOCHS 2 EMA.ENABLE True TAG other MODEL.RESUME {path}")


def test_a_start_that_fails_leaves_nothing_behind(tiny, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"garbage")
    pretrained, elsewhere = f"MODEL.PRETRAINED {tmp_path / 'weights.pth'}", tmp_path / "other"
    with pytest.raises(CheckpointError, match="weights.pth"):
        run(tiny, f"OUTPUT {elsewhere} {pretrained}")
    with pytest.raises(CheckpointError, match="weights.pth"):
        run(tiny, f"OUTPUT {elsewhere} EVAL_MODE True MODEL.RESUME {tmp_path / 'weights.pth'}")
    assert not elsewhere.exists()
    run(tiny, "TRAIN.EPOCHS 1")
    before = sorted(path.name for path in folder_of(tiny).iterdir())
    with pytest.raises(CheckpointError, match=r"finish the epoch|trained with"):
        run(tiny, "TRAIN.EPOCHS 2 MODEL.LA.ALPHA 3")
    assert sorted(path.name for path in folder_of(tiny).iterdir()) == before
