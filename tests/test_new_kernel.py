"""docs/new_kernel.md, followed to the letter in a copy of the repository: a kernel that the tools have never seen.

pytest tests/test_new_kernel.py
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

PAGE = (ROOT / "docs" / "new_kernel.md").read_text()


def block(language: str, after: str) -> str:
    return re.search(rf"{re.escape(after)}.*?```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def follow(root: Path) -> dict[str, subprocess.CompletedProcess]:
    """Make a copy in `root`, the page's files in it, and run its commands; returns what each command printed."""
    for name in ("main.py", "config.py", "flags.py", "logger.py", "lr_scheduler.py", "optimizer.py", "CITATION.cff"):
        shutil.copy(ROOT / name, root)
    for name in ("models", "data", "engine", "utils", "tools", "experiments", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "models" / "kernels" / "softplus.py").write_text(block("python", "Write `models/kernels/softplus.py`"))
    (root / "configs" / "experiments" / "softplus.yaml").write_text(block("yaml", "Write `configs/experiments/soft"))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "image.png")
    printed = {}
    for line in block("bash", "## 3. Train it").splitlines():
        command = [sys.executable, *shlex.split(line)[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed[line] = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return printed


def test_the_page_followed_to_the_letter(tmp_path):
    """One test: the commands take half a minute."""
    printed = follow(tmp_path)
    assert len(printed) == 5
    for line, result in printed.items():
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"

    # trained, announced, listed, exported
    training, listing, *_, exported = (result.stdout for result in printed.values())
    assert "softplus attention" in training and "best top-1" in training
    assert re.search(r"layers.0.blocks.0 +softplus +heads 0 to \d", listing)
    assert exported.count("logits") == 2 and "WRONG" not in exported
    state = torch.load(tmp_path / "output" / "softplus" / "default" / "max_acc.pth", weights_only=True)["model"]
    assert state["layers.0.blocks.0.attn.beta"].abs().sum() > 0  # it started at 0

    # maps and measures
    page = (tmp_path / "maps" / "index.html").read_text()
    assert "softplus, mean of heads" in page and (tmp_path / "maps" / "image.png").stat().st_size > 10_000
    with (tmp_path / "numbers" / "analysis.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == row["map"] == "softplus"]
    assert {row["metric"] for row in rows} == {"entropy", "rank", "effective rank"}
    assert all(0 < float(row["value"]) <= float(row["limit"]) * (1 + 1e-6) for row in rows)
    assert (tmp_path / "numbers" / "entropy.png").is_file()

    # and compared under its own name
    code = "from experiments.ablation import NAMED, VARIANTS; print(VARIANTS['softplus'].options, 'softplus' in NAMED)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "('MODEL.LA.ATTENTION', 'softplus') False"
