"""The real quickstart, as a new user runs it (in this environment: PYTHON= installs nothing).

pytest tests/test_quickstart.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, cpu_seconds

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


def test_make_quickstart_reaches_97_percent_in_100_seconds_of_two_cores(tmp_path):
    before = cpu_seconds()
    result = make("quickstart", OUTPUT=str(tmp_path))
    seconds = cpu_seconds() - before
    assert result.returncode == 0, result.stdout + result.stderr
    folder = re.search(r"run folder: (\S+)", result.stdout)[1]
    assert re.fullmatch(re.escape(f"{tmp_path}/quickstart/") + r"\d{8}-\d{6}", folder)  # a new run each time
    best = float(re.search(r"best top-1: ([\d.]+) %", result.stdout)[1])
    print(f"quickstart: {best:.2f} % in {seconds:.0f} CPU seconds")
    assert best >= 97.0
    assert seconds < 2 * 100
    assert torch.cuda.is_available() or "2 × CPU" in result.stdout
    accuracies = [record["top1"] for record in read_metrics(Path(folder) / "metrics.jsonl") if record["kind"] == "val"]
    assert len(accuracies) == 22 and f"{max(accuracies):.3f}" == f"{best:.3f}"
    assert (Path(folder) / "curves.png").stat().st_size > 10_000


def test_an_existing_environment_gets_nothing_installed():
    for target in ("quickstart", "test", "test-slow", "lint"):
        commands = make("-n", target).stdout
        assert (
            sys.executable in commands and "pip" not in commands and "venv" not in commands.replace(sys.executable, "")
        )


def test_pretrain_passes_settings_and_arguments_through(tiny, tmp_path):
    environment = {"PYTHON": sys.executable, "OUTPUT": str(tmp_path), "TAG": "mine", "NPROC": "1"}
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
