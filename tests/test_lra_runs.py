"""Long Range Arena from the official files to the table: preparation, training, sweep, page.

pytest tests/test_lra_runs.py
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, cpu_seconds, run, run_main
from lra_caches import write_cache
from run_files import epoch_file
from test_lra import PLAIN, SHORT, SMALL, TASKS, lra
from test_prepare_lra import aan_release, cifar_folder, listops_release, pathfinder_release, reviews

from config import load_config
from data.sources.token_cache import open_cache
from experiments.lra import runs, table
from models.kernels import KERNELS
from tools import prepare_lra


def official_files(task: str, root: Path, monkeypatch) -> Path:
    """A few samples in the task's official format; returns what --source names."""
    if task == "listops":
        listops_release(root)
    elif task == "pathfinder":
        pathfinder_release(root)
    elif task == "retrieval":
        aan_release(root)
    elif task == "image":
        cifar_folder(root, monkeypatch)
    else:
        for name, text in reviews().items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(text)
    return root


@pytest.mark.parametrize("task", TASKS)
def test_official_files_are_prepared_trained_on_and_evaluated(tmp_path, task, monkeypatch):
    """At the protocol's lengths, with a small model; then the row of the table."""
    source = official_files(task, tmp_path / "source", monkeypatch)
    prepare_lra.main([task, "--source", str(source), "--out", str(tmp_path / "data")])
    narrow = "MODEL.LRA.DIM 8 MODEL.LRA.MLP_DIM 8 DATA.BATCH_SIZE 2 TRAIN.GLOBAL_BATCH 2 TRAIN.STEPS 4"
    options = f"DATA.DATA_PATH {tmp_path}/data OUTPUT {tmp_path}/out {narrow} TRAIN.EVAL_STEPS 2 TRAIN.WARMUP_STEPS 2"
    run(lra(task), f"{options} TAG polarity-4-seed0")
    folder = tmp_path / "out" / f"lra_{task}" / "polarity-4-seed0"
    assert runs.read_run(folder) is None  # not evaluated yet
    run(lra(task), f"{options} TAG polarity-4-seed0 EVAL_MODE True MODEL.RESUME {folder / 'max_acc.pth'}")
    found = runs.read_run(folder)
    expected = len(open_cache(tmp_path / "data").splits["test"].labels)
    assert (found.task, found.preset, found.steps, found.seed) == (task, "skyformer", 4, 0)
    assert found.attention == "polarity, α = 4, gate, scale" and 0 <= found.accuracy <= 100
    assert (found.accuracy * expected / 100) == pytest.approx(round(found.accuracy * expected / 100))
    assert "MODEL.LRA.DIM 8" in found.changed and not any("SEED" in key for key in found.changed)
    assert bool(found.reference) == (task == "listops")


def test_what_makes_another_model_or_protocol_makes_another_row():
    plain = [*PLAIN, "MODEL.LA.ATTENTION", "softmax"]
    names = {
        "polarity, α = 4, gate, scale": [],
        "polarity, α = 4, gate from 1, scale": ["MODEL.LA.GATE_BIAS", "1.0"],
        "polarity, α = 3, gate, scale, depthwise 5": ["MODEL.LA.ALPHA", "3.0", "MODEL.LRA.KERNEL_SIZE", "5"],
        "polarity, α = 4, plain": PLAIN,
        "softmax, plain": plain,
        "polarity_pp, gate": ["MODEL.LA.ATTENTION", "polarity_pp"],  # it has no scale
        "norm_aware, gate": ["MODEL.LA.ATTENTION", "norm_aware"],
        "norm_aware, gate from 1": ["MODEL.LA.ATTENTION", "norm_aware", "MODEL.LA.GATE_BIAS", "1.0"],
        "nala_cosine, plain": [*PLAIN, "MODEL.LA.ATTENTION", "nala_cosine"],
        "softmax, gate": [*plain, "MODEL.LA.GATE", "True"],
    }
    for name, options in names.items():
        assert runs.attention_of(load_config(lra("listops"), options)) == name
    for task in TASKS:
        assert runs.preset_of(load_config(lra(task)))[0] == "skyformer"
        preset, base = runs.preset_of(load_config(lra(f"{task}_clean"), ["TRAIN.CLIP_VALUE", "2.0"]))
        assert preset == "clean" and f"lra_{task}_clean" == base.MODEL.NAME
    assert runs.preset_of(load_config(lra("smoke")))[0] == "clean"


def test_how_far_a_run_is_and_that_it_is_the_one_asked_for(tmp_path, capsys):
    root = write_cache(tmp_path / "data", "listops", classes=10)
    options = f"{SHORT} TRAIN.BASE_LR 5.0e-3"

    def state(more: str = "") -> str:
        arguments = ["--cfg", lra("listops"), "--data-path", root, "--output", tmp_path / "out", "--opts"]
        runs.main([*map(str, arguments), *options.split(), *more.split()])
        return capsys.readouterr().out.splitlines()[-1]

    def train(more: str = "") -> None:
        run(lra("listops"), f"DATA.DATA_PATH {root} OUTPUT {tmp_path}/out {options} {more}")

    folder = tmp_path / "out" / "lra_listops" / "default"
    assert state() == "untrained"
    train()
    assert state() == "trained" and state("PRINT_FREQ 7") == "trained" and runs.read_run(folder) is None
    best = runs.best_validation(folder, load_config(lra("listops"), options.split()))
    (folder / "max_acc.pth").rename(folder / "kept.pth")
    (folder / "max_acc.pth.json").unlink()
    epoch_file(folder, 3 - best // 10).rename(folder / "max_acc.pth")
    for another in ("kept.pth", "max_acc.pth"):  # the best weights of another name; other weights of the right name
        train(f"EVAL_MODE True MODEL.RESUME {folder / another}")
        assert (folder / "eval_test.json").is_file() and state() == "trained"
    (folder / "kept.pth").rename(folder / "max_acc.pth")
    train(f"EVAL_MODE True MODEL.RESUME {folder / 'max_acc.pth'}")
    assert state() == "finished" and runs.read_run(folder) is not None
    for more in ("SEED 1", "TRAIN.STEPS 40", "AMP True"):
        with pytest.raises(SystemExit) as refusal:
            state(more)
        assert refusal.value.code == 2
        assert f"{folder} holds a run with {more.split()[0]}" in capsys.readouterr().err
    records = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in records if '"step": 20' not in line) + "\n")
    assert state() == "untrained" and runs.read_run(folder) is None  # as if it had been stopped before


def finished(accuracy: float, **changed) -> runs.FinishedRun:
    run = runs.FinishedRun(
        task="listops",
        preset="skyformer",
        attention="polarity, α = 3",
        data="ListOps (regenerated)",
        seed=0,
        steps=1000,
        changed=(),
        precision="float32",
        device="1 × CPU",
        accuracy=accuracy,
        best_step=500,
        reference={"majority class": 17.0},
    )
    return replace(run, **changed)


def test_the_table_averages_seeds_and_never_mixes_what_differs(tmp_path, capsys):
    all_runs = [
        finished(36.0),
        finished(38.0, seed=1),
        finished(50.0, steps=2000),
        finished(60.0, preset="clean"),
        finished(70.0, device="1 × GPU"),
        finished(80.0, data="ListOps (official)", reference={}),
        finished(90.0, precision="float16"),
        finished(20.0, task="image", data="Fashion-MNIST, a stand-in for CIFAR-10", reference={}),
    ]
    page = table.page(all_runs)
    published, clean = page.split("preset clean\n")
    own = published.split("preset skyformer\n")[1]
    rows = [line for line in own.splitlines() if line.startswith("| ListOps | polarity")]
    assert len(rows) == 5
    assert sum("37.00 ± 1.41 (2)" in row and "1,000 of 50,000" in row and "| 0, 1 |" in row for row in rows) == 1
    assert all(any(f"{accuracy}.00 (1)" in row for row in rows) for accuracy in (50, 70, 80, 90)) and "60.00" not in own
    assert "60.00 (1)" in clean and "| ListOps | ListOps (regenerated) | majority class | 17.0 |" in own
    assert "Not run yet: Pathfinder. Not run: Text, Retrieval, Image." in own and "<!--" not in page
    for row, average in (("PolaFormer α = 3", "60.72"), ("PolaFormer α = 7", "60.57"), ("Skyformer", "59.39")):
        assert any(line.startswith(f"| {row} |") and line.endswith(f" {average} |") for line in page.splitlines())
    table.main(["--runs", str(tmp_path), "--docs", str(tmp_path / "lra.md")])
    assert capsys.readouterr().out.startswith("0 runs in")
    assert (tmp_path / "lra.md").read_text().count("No run yet.") == 2


def test_the_page_has_the_text_that_it_is_written_from():
    """docs/lra.md is written from page.md: a paragraph that was changed in one of them alone would be lost."""
    written = (ROOT / "docs" / "lra.md").read_text(encoding="utf-8")
    for paragraph in (ROOT / "experiments" / "lra" / "page.md").read_text(encoding="utf-8").split("\n\n"):
        assert paragraph.startswith("<!--") or paragraph.strip() in written, paragraph[:80]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [300, 600])
def test_short_listops_are_learned(tmp_path, steps):
    """The smoke test: 600 steps, and 300 on a schedule of their own, reach twice a constant per root operator."""
    before = cpu_seconds()
    data = tmp_path / "data"
    shape = "--samples 20000 2000 2000 --min-length 0 --max-length 65 --max-depth 3 --max-args 5"
    prepare_lra.main(["listops", "--out", str(data), *shape.split()])
    root_constant = open_cache(data).manifest.baselines["val"]["best constant per root operator"]
    schedule = f"TRAIN.STEPS {steps} TRAIN.EVAL_STEPS {steps // 3} TRAIN.WARMUP_STEPS {steps // 10}".split()
    result = run_main("--cfg", lra("smoke"), "--data-path", data, "--output", tmp_path / "out", "--opts", *schedule)
    seconds = cpu_seconds() - before
    best = float(re.search(r"best top-1: ([\d.]+) %", result.stdout)[1])
    print(
        f"short ListOps: {best:.1f} % in {seconds:.0f} CPU s, a constant per root operator {100 * root_constant:.1f} %"
    )
    assert best >= 45.0 and 20 < 100 * root_constant < 28
    assert seconds < 2 * 120  # two minutes of two cores


def test_run_sh_says_what_it_runs_and_knows_every_paper_s_kernel():
    script = (ROOT / "experiments" / "lra" / "run.sh").read_text()
    defaults = dict(re.findall(r'^(\w+)="\$\{\1:?-(.*)\}"$', script, re.MULTILINE))
    for name, default in defaults.items():
        said = re.search(rf"^#   {name} .*$", script, re.MULTILINE)[0]
        assert name == "PYTHON" or " " + (default or "(empty)") in said
    assert {"polarity_pp", "norm_aware", "nala_cosine"} < set(defaults["OTHERS"].split()) < set(KERNELS)


class Sweep:
    """run.sh on a small cache of ListOps, on one thread."""

    def __init__(self, tmp_path: Path) -> None:
        write_cache(tmp_path / "data" / "listops", "listops", classes=10)
        self.folder = tmp_path
        self.environment = {
            "DATA": tmp_path / "data",
            "OUTPUT": tmp_path / "out",
            "DOCS": tmp_path / "lra.md",
            "TASKS": "listops text",
            "ALPHAS": "3",
            "OTHERS": "relu",
            "FORMS": "gated",
            "SEEDS": "0",
            "STEPS": "20",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }
        self.command = ["bash", "experiments/lra/run.sh", "--opts", *SMALL.split()]
        self.command += "TRAIN.EVAL_STEPS 10 TRAIN.WARMUP_STEPS 5 PRINT_FREQ 1".split()

    def start(self, **changed: str) -> subprocess.Popen:
        environment = {**os.environ, **{name: str(value) for name, value in {**self.environment, **changed}.items()}}
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def finish(self, job: subprocess.Popen) -> tuple[int, str, str]:
        output, errors = job.communicate(timeout=PATIENCE)
        return job.returncode, output, errors

    def page(self) -> str:
        return (self.folder / "lra.md").read_text()


@pytest.mark.slow
def test_run_sh_trains_continues_and_writes_the_page(tmp_path):
    sweep = Sweep(tmp_path)
    code, output, errors = sweep.finish(sweep.start())
    assert code == 0, output + errors
    assert "text: " in errors and "holds no prepared data" in errors
    page = sweep.page()
    assert (
        "| ListOps | polarity, α = 3, gate, scale |" in page
        and "| ListOps | relu, gate, scale |" in page
        and "20 of 50,000" in page
    )
    code, output, _ = sweep.finish(sweep.start())
    assert code == 0 and output.count(": finished") == 2 and "epoch" not in output and sweep.page() == page
    # EVAL_STEPS does not divide it: three runs that fail, and the page all the same
    code, output, errors = sweep.finish(sweep.start(STEPS="15", ALPHAS="3 5"))
    assert code == 1 and errors.count("== failed: listops ") == 3
    assert "2 runs in" in output and sweep.page() == page
    code, _, errors = sweep.finish(sweep.start(TASKS="text image"))
    assert code == 2 and "nothing to run, and" in errors and sweep.page() == page
    code, output, errors = sweep.finish(sweep.start(ALPHAS="", FORMS="open plain"))
    assert code == 0, output + errors
    assert "| ListOps | relu, gate from 1, scale |" in sweep.page() and "| ListOps | relu, plain |" in sweep.page()
    for name, wrong, right in (("TASKS", "listop", "listops, "), ("FORMS", "bare", "gated, open, plain")):
        code, _, errors = sweep.finish(sweep.start(**{name: wrong}))
        assert code == 2 and f"{name} names '{wrong}', expected some of {right}" in errors


@pytest.mark.slow
def test_run_sh_told_to_stop_evaluates_nothing_and_continues(tmp_path):
    sweep = Sweep(tmp_path)
    changed = {"STEPS": "300", "OTHERS": "", "TASKS": "listops"}
    folder = tmp_path / "out" / "lra_listops" / "polarity-3-gated-seed0-steps300"
    job = sweep.start(**changed)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "max_acc.pth").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.2)
    (training,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(training), signal.SIGTERM)
    code, output, errors = sweep.finish(job)
    assert code == 75, output + errors
    assert (folder / "PREEMPTED").exists() and not (folder / "eval_test.json").exists()
    code, output, errors = sweep.finish(sweep.start(**changed))
    assert code == 0, output + errors
    assert "continues from" in output and (folder / "eval_test.json").exists() and "300 of 50,000" in sweep.page()
