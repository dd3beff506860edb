"""Running main.py as a user does: the terminal, mistakes, interruptions, failures of one process.

pytest tests/test_command_line.py
"""

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import (
    PATIENCE,
    PYTHON,
    RELEASED,
    ROOT,
    TINY,
    config_file,
    folder_of,
    run,
    run_main,
)

from config import ConfigError, load_config
from data.loaders import DataError
from logger import read_metrics
from main import stored_configuration
from models.files import load_checkpoint
from utils import distributed
from utils.faults.folder_lock import RunFolderError


def test_a_terminal_gets_colours_and_a_progress_bar_with_the_remaining_time(tiny):
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [PYTHON, "main.py", "--cfg", str(tiny), "--opts", "TRAIN.EPOCHS", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the terminal's last user is gone
        while block := os.read(controller, 1 << 16):
            output += block
    os.close(controller)
    assert process.wait(timeout=PATIENCE) == 0
    text = output.decode()
    assert re.search(r"epoch 0: +\d+%\|.*\| \d+/11 \[\d\d:\d\d<\d\d:\d\d", text)  # share, count, elapsed < remaining
    assert "evaluation:" in text and "\x1b[32m[" in text
    plain = (folder_of(tiny) / "log.txt").read_text()
    assert "\x1b" not in plain and "%|" not in plain and "best top-1" in plain


def test_a_mistake_ends_in_one_line_and_exit_code_2(tiny, tmp_path):
    (tmp_path / "evil.pth").write_bytes(b"garbage")
    cases = {
        ("--data-path", "/absent", "--opts", "DATA.DATASET", "imagenet"): "--data-path /absent: no such folder",
        ("--eval", "--resume", str(tmp_path / "evil.pth")): "evil.pth is damaged",
        ("--output", "/dev/null/sub"): "run folder /dev/null/sub/tiny/default cannot be written",
    }
    for arguments, message in cases.items():
        result = run_main("--cfg", tiny, *arguments, check=False)
        assert result.returncode == 2
        said = result.stdout + result.stderr
        assert message in said and "Traceback" not in said


def test_an_unwritable_output_folder_is_explained(tiny):
    (tiny.parent / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"the run folder .*file/tiny/default cannot be written .*--output"):
        run(tiny, f"OUTPUT {tiny.parent / 'file'}")


def test_a_training_set_smaller_than_a_step_is_explained(tiny):
    with pytest.raises(DataError, match="less than one step"):
        run(tiny, "DATA.BATCH_SIZE 2000")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_cleanly_with_the_last_checkpoint_intact(tiny, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    command = [sys.executable, *launcher, "main.py", "--cfg", str(tiny), "--opts", "TRAIN.EPOCHS", "500"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(folder_of(tiny).glob("ckpt_epoch_2.pth")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to every process of the group
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert "interrupted; the last complete checkpoint is intact" in stdout
    if processes == 1:  # torchrun adds a report of its own
        assert process.returncode == 130 and "Traceback" not in stderr
    newest = max(folder_of(tiny).glob("ckpt_epoch_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
    assert load_checkpoint(newest)["epoch"] >= 2
    assert not list(folder_of(tiny).glob(".*.tmp"))


def test_nan_on_one_rank_stops_all_and_names_step_rate_and_rank(tiny):
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/driven_main.py", "nan-on-rank-1", "--cfg", str(tiny), "--opts", "PRINT_FREQ", "10"]
    command += ["DATA.BATCH_SIZE", "32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    message = r"stopped: step 7: non-finite gradient or loss at learning rate \S+ \(loss not finite on rank 1\)"
    assert re.search(f"rank 0 {message}", result.stdout) or re.search(f"rank 1 {message}", result.stdout)
    assert not list(folder_of(tiny).glob("*.pth"))  # nothing was saved from a stopped epoch


def test_tasks_of_srun_without_torchrun_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert distributed.init().type in ("cpu", "cuda")  # inside salloc, where no task was started
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(distributed.LaunchError, match=r"4 tasks .* train alone .*task 1.*pretrain.sh"):
        distributed.init()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --ntasks 1 inside that job
    assert distributed.init().type in ("cpu", "cuda")


def test_more_processes_than_gpus_is_explained(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
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
        "module = types.ModuleType('engine.throughput')\n"
        "def run_throughput(config, device):\n"
        "    import torch\n"
        "    torch.set_num_threads(2)\n"
        "    left = (torch.full((4_000_000,), 2e-38) * 1e-2).count_nonzero()\n"
        "    print('denormals left:', int(left), flush=True)\n"
        "    sys.exit(0)\n"
        "module.run_throughput = run_throughput\n"
        "sys.modules['engine.throughput'] = module\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "main.py", "--cfg", config_file("quickstart"), "--throughput"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "denormals left: 0" in result.stdout
    plain = "import torch; torch.set_num_threads(2); print((torch.full((4,), 2e-38) * 1e-2).count_nonzero().item())"
    without = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert without.stdout.strip() == "4"  # what the test would see if nothing flushed them


def test_a_dry_run_says_what_the_run_will_take_and_leaves_nothing(tiny, log):
    """Seconds are this machine's; steps, rates and sizes are those of the run that follows."""
    options = "TRAIN.EPOCHS 3 EMA.ENABLE True EMA.WARMUP True CHECKPOINT.KEEP 2"
    run(tiny, f"{options} DRY_RUN_MODE True")
    assert not (tiny.parent / "out").exists()
    said = log.text
    assert re.search(r"2 steps on synthetic input: [\d.]+ s, then [\d.]+ s \(\d+ images/s\); memory \d{3,} MiB", said)
    assert re.search(r"the run: 3 epochs of 11 steps, [\d.]+ (s|min) without validation and waiting for data", said)
    rates = dict(re.findall(r"([\d.e+-]+) at (step \d+)", said.partition("learning rates: ")[2]))
    size, files, total = re.search(r"a checkpoint has ([\d.]+) GB; up to (\d) of them, .*: ([\d.]+) GB", said).groups()
    run(tiny, options)
    steps = {f"step {r['step']}": r["lr"] for r in read_metrics(folder_of(tiny) / "metrics.jsonl") if "lr" in r}
    seen = {step: float(rate) for rate, step in rates.items() if step in steps}
    assert seen and all(rate == pytest.approx(steps[step], rel=1e-3) for step, rate in seen.items())
    written = (folder_of(tiny) / "ckpt_epoch_3.pth").stat().st_size
    assert float(size) == pytest.approx(written / 1e9, abs=1e-3) and files == "4"
    assert float(total) == pytest.approx(4 * written / 1e9, abs=1e-2)


def test_evaluation_without_a_configuration_takes_the_checkpoints_own(tiny):
    run(tiny, "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DEVICE cpu")
    tiny.unlink()
    best = folder_of(tiny) / "max_acc.pth"
    assert stored_configuration(str(best)).DEVICE == "auto"  # that of the machine that evaluates
    result = run_main("--eval", "--resume", best, "--opts", "DATA.BATCH_SIZE=50")
    assert f"evaluated {best}" in result.stdout
    top1 = max(r["top1"] for r in read_metrics(folder_of(tiny) / "metrics.jsonl") if r["kind"] == "val")
    assert f"{top1:.3f} %" in result.stdout and (folder_of(tiny) / "eval_val.json").is_file()


def test_the_configuration_in_a_released_file_is_taken_without_the_places_of_its_machine(tmp_path):
    config = stored_configuration(str(RELEASED))
    assert config.MODEL.TYPE.startswith("pola") and (config.OUTPUT, config.TAG) == ("", "default")
    assert not config.DATA.DATA_PATH and not config.MODEL.RESUME and not config.MODEL.PRETRAINED
    torch.save({"model": {"head.weight": torch.zeros(2, 2)}}, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"bare.pth stores no configuration: --cfg names the YAML file"):
        stored_configuration(str(tmp_path / "bare.pth"))
    (tmp_path / "bad.pth").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=r"bad.pth is damaged"):
        stored_configuration(str(tmp_path / "bad.pth"))


def test_tiny_configuration_of_the_tests_is_valid(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    assert load_config(str(path)).MODEL.NAME == "tiny"
