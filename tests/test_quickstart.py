"""The real quickstart, as a new user runs it (in this environment: PYTHON= installs nothing).

pytest tests/test_quickstart.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, ROOT, cpu_seconds

from logger import read_metrics


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments, f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def results_of(run: subprocess.CompletedProcess, epochs: int) -> tuple[str, float]:
    """Run folder and best accuracy of a quickstart that left all that a run leaves."""
    assert run.returncode == 0, run.stdout + run.stderr
    folder = re.search(r"run folder: (\S+)", run.stdout)[1]
    best = float(re.search(r"best top-1: ([\d.]+) %", run.stdout)[1])
    assert torch.cuda.is_available() or "2 × CPU" in run.stdout
    accuracies = [record["top1"] for record in read_metrics(Path(folder) / "metrics.jsonl") if record["kind"] == "val"]
    assert len(accuracies) == epochs and f"{max(accuracies):.3f}" == f"{best:.3f}"
    assert (Path(folder) / "curves.png").stat().st_size > 10_000
    return folder, best


def test_a_third_of_the_quickstart_reaches_90_percent(tmp_path):
    options = ["--opts", "TRAIN.EPOCHS", "7", "TRAIN.WARMUP_EPOCHS", "1"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(tmp_path)}
    command = ["bash", "pretrain.sh", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    _, best = results_of(run, epochs=7)
    print(f"a third of the quickstart: {best:.2f} %")
    assert best >= 90.0


@pytest.mark.slow  # twice the time of the test above, which starts the same processes
def test_make_quickstart_reaches_97_percent_in_100_seconds_of_two_cores(tmp_path):
    before = cpu_seconds()
    folder, best = results_of(make("quickstart", OUTPUT=str(tmp_path)), epochs=22)
    seconds = cpu_seconds() - before
    assert re.fullmatch(re.escape(f"{tmp_path}/quickstart/") + r"\d{8}-\d{6}", folder)  # a new run each time
    print(f"quickstart: {best:.2f} % in {seconds:.0f} CPU seconds")
    assert best >= 97.0
    assert seconds < 2 * 100


def test_an_existing_environment_gets_nothing_installed():
    for target in ("quickstart", "test", "test-slow", "lint"):
        commands = make("-n", target).stdout
        assert (
            sys.executable in commands and "pip" not in commands and "venv" not in commands.replace(sys.executable, "")
        )


def test_pretrain_passes_settings_and_arguments_through(tiny, tmp_path):
    environment = {"PYTHON": PYTHON, "OUTPUT": str(tmp_path), "TAG": "mine", "NPROC": "1"}
    result = subprocess.run(
        ["bash", "pretrain.sh", "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"],
        cwd=ROOT,
        env={**os.environ, **environment, "CONFIG": str(tiny)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"run folder: {tmp_path}/tiny/mine" in result.stdout and "1 × CPU" in result.stdout
    mistake = subprocess.run(
        ["bash", "pretrain.sh", "--opts", "TRAIN.EPOCS", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert mistake.returncode == 2
    assert mistake.stderr.splitlines() == [
        "main.py: error: --opts: unknown key TRAIN.EPOCS; the nearest valid key is TRAIN.EPOCHS"
    ]
