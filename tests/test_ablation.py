"""The ablation: what it would run, what it makes of the runs' logs, and one real run.

pytest tests/test_ablation.py
"""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PYTHON, ROOT
from PIL import Image

from config import make_plan
from experiments import ablation
from experiments.ablation import VARIANTS, AblationError, RunFailedError, check_folder, execute_all, plan, write_page
from experiments.settings import differences
from models import build_model
from models.kernels import KERNELS


def runs_of(folder: Path, seeds: int = 3, opts: tuple[str, ...] = ()) -> list[ablation.TrainingRun]:
    return plan(["digits", "fashion_mnist"], VARIANTS, seeds, folder, opts)


def pretend(run: ablation.TrainingRun, *top1: float, wall: float = 20.0, load: float = 1.0) -> None:
    """A run folder as training leaves it: the accuracy after each of the last epochs."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(run.config.dump())
    records = [
        {"kind": "val", "epoch": make_plan(run.config).last_epoch - len(top1) + i, "step": i, "top1": value}
        for i, value in enumerate(top1)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    times = {"wall_s": wall, "cpu_s": wall / 2, "load": load, "starts": 1}
    (run.folder / ablation.TIMES).write_text(json.dumps(times))


def rows_of(page: str, title: str) -> dict[str, list[str]]:
    """The result table below a heading, by the first column."""
    table = page.split(f"## {title}\n\n", 1)[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


def test_runs_differ_by_seed_and_the_variant_s_keys_alone(tmp_path):
    runs = runs_of(tmp_path)
    assert len(runs) == len({run.folder for run in runs}) == 2 * len(VARIANTS) * 3
    for run in runs:
        base = next(r for r in runs if (r.dataset, r.variant, r.seed) == (run.dataset, "polarity", 0))
        changed = differences(run.config, base.config)
        allowed = {"SEED", "TAG", *VARIANTS[run.variant].options[::2]}
        assert changed.keys() <= allowed
        for key, value in zip(VARIANTS[run.variant].options[::2], VARIANTS[run.variant].options[1::2], strict=True):
            assert str(changed[key][0]).replace(" ", "") == value


def test_the_fresh_weights_of_a_seed_are_the_same_for_every_kind(tmp_path):
    states = {}
    for run in runs_of(tmp_path, seeds=1):
        torch.manual_seed(5)
        states[run.variant] = build_model(run.config, 10).state_dict()
    reference = states.pop("polarity")
    for body in (*ablation.BODIES, *ablation.BASELINES):
        del states[body]
    bias = states.pop("polarity_open_gate")["layers.0.blocks.0.attn.qkvg.bias"]
    assert bias.tolist() == [0.0] * 96 + [1.0] * 32 and not reference["layers.0.blocks.0.attn.qkvg.bias"].any()
    ungated = {kind: states.pop(kind + ablation.UNGATED) for kind in ablation.KINDS}
    for state in ungated.values():  # of one size, and the same beside `power`
        shared = {name: value for name, value in state.items() if not name.endswith(("s1", "s2"))}
        assert all(torch.equal(value, ungated["polarity"][name]) for name, value in shared.items())
    rates = {name for name in states["polarity_pp"] if name.endswith(("s1", "s2"))}
    assert len(rates) == 8 and not any(name.endswith("scale") for name in states["polarity_pp"])
    for kind, state in states.items():
        kept = {name for name in reference if not name.endswith("power")}
        if kind in KERNELS and not KERNELS[kind].scaled:
            kept = {name for name in kept if not name.endswith("scale")} | (rates if kind == "polarity_pp" else set())
        assert state.keys() == kept
        state = {name: value for name, value in state.items() if name not in rates}
        assert all(torch.equal(value, reference[name]) for name, value in state.items())


def test_every_variant_trains_a_step_in_which_all_parameters_take_part(tmp_path):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for run in plan(["digits"], VARIANTS, 1, tmp_path, ("MODEL.DROP_PATH_RATE", "0.0")):
        torch.manual_seed(run.seed)
        model = build_model(run.config, ablation.CLASSES).train()
        before = torch.nn.functional.cross_entropy(model(images), torch.arange(4))
        before.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (run.variant, name)
                parameter -= 0.02 * parameter.grad
            after = torch.nn.functional.cross_entropy(model(images), torch.arange(4))
        assert after < before, run.variant


def test_the_whole_bodies_have_polarity_s_size_and_their_own_linear_attention_throughout(tmp_path):
    models = {
        run.variant: build_model(run.config, ablation.CLASSES)
        for run in plan(["digits"], ["polarity", *ablation.BODIES, *ablation.BASELINES], 1, tmp_path, ())
    }
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for body, kernel in {"pola_pp": "polarity_pp", "nalaformer": "norm_aware"}.items():
        attention = [module for name, module in models[body].named_modules() if name.endswith(".attn")]
        assert [getattr(module, "name", "softmax") for module in attention] == [kernel] * 4
    assert all(abs(size / sizes["polarity"] - 1) < 0.05 for size in sizes.values())


def test_the_page_holds_means_deviations_and_paired_differences_of_the_last_epochs(tmp_path):
    runs = runs_of(tmp_path)
    generator = np.random.default_rng(0)
    final = {}
    for run in runs:
        final[run.dataset, run.variant, run.seed] = round(float(generator.uniform(70, 90)), 3)
        pretend(run, 99.0, final[run.dataset, run.variant, run.seed])  # a better epoch before the last does not count
    page = write_page(runs, tmp_path / "docs", jobs=2).read_text()
    for dataset, title in ablation.DATASETS.items():
        rows = rows_of(page, title)
        assert list(rows) == [variant.title for variant in VARIANTS.values()]
        for name, variant in VARIANTS.items():
            values = [final[dataset, name, seed] for seed in range(3)]
            paired = [final[dataset, name, seed] - final[dataset, "polarity", seed] for seed in range(3)]
            parameters, top1, difference, seeds, cpu, wall = rows[variant.title]
            assert top1 == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            expected = f"{statistics.mean(paired):.2f} ± {statistics.stdev(paired):.2f}"
            assert difference == ("" if name == "polarity" else expected)
            assert seeds == ", ".join(f"{value:.2f}" for value in values)
            assert (cpu, wall) == ("10", "20")
            config = next(run.config for run in runs if (run.dataset, run.variant) == (dataset, name))
            assert parameters == f"{sum(p.numel() for p in build_model(config, 10).parameters()):,}"
    gates = rows_of(
        page, "Without the gate\n\nTop-1 without the gate minus top-1 with it, in percent, the same kind and seed:"
    )
    assert list(gates) == list(ablation.KINDS.values())
    paired = [final["digits", "elu_no_gate", seed] - final["digits", "elu", seed] for seed in range(3)]
    assert gates["linear, 1 + elu(x)"][0] == f"{statistics.mean(paired):.2f} ± {statistics.stdev(paired):.2f}"
    before_the_picture = page.split("![")[0]
    for said in ("**What can be concluded**", "digits and Fashion-MNIST", "variant: 3", "**What cannot**", "ImageNet"):
        assert said in before_the_picture
    assert "Only" not in page and "exceeded" not in page and "shared the machine" not in page


def test_only_differences_whose_interval_excludes_zero_are_told(tmp_path):
    runs = plan(["digits"], ["polarity", "softmax", "relu", "elu"], 3, tmp_path, ())
    offsets = {"polarity": (0, 0, 0), "softmax": (2, 2.1, 2.2), "relu": (-2, -2.1, -2.2), "elu": (2, 0.1, 1)}
    for run in runs:
        pretend(run, 90 + run.seed + offsets[run.variant][run.seed])
    page = write_page(runs, tmp_path / "docs", jobs=2).read_text()
    found = dict(re.findall(r"^\* (above|below|not told)[^:]*: (.*)$", page, re.MULTILINE))
    assert found == {"above": "softmax", "below": "linear, relu(x)", "not told": "linear, 1 + elu(x)"}


def test_missing_runs_slow_runs_and_a_busy_machine_are_said(tmp_path):
    runs = plan(["digits"], ["polarity", "softmax"], 2, tmp_path, ())
    for run in runs[:3]:
        pretend(run, 80.0, wall=70.0 if run.seed == 0 else 50.0, load=9.0 if run.seed == 0 else 1.0)
    page = write_page(runs, tmp_path / "docs", jobs=2).read_text()
    assert "**Only 3 of 4 runs are finished.**" in page
    assert "The longest run took 70 s" in page and "2 of 3 runs exceeded it." in page
    assert "2 of 3 runs shared the machine with other work" in page


def test_the_picture_has_a_dot_for_every_seed_at_its_accuracy(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *rest, **named: drawn.append(x) or plot(self, x, y, *rest, **named)
    )
    results = {"digits": {"polarity": {0: 91.0, 1: 92.0}, "relu": {0: 80.5, 1: 81.5}}}
    ablation.draw(results, tmp_path / "images" / "ablation.png")
    assert drawn == [[80.5, 81.5], [91.0, 92.0]]
    image = np.asarray(Image.open(tmp_path / "images" / "ablation.png").convert("RGB")).astype(int)
    assert image.shape[0] > 300 and image.shape[1] > 600
    red = (image[..., 0] - image[..., 1] > 80).any(axis=1).nonzero()[0]
    blue = (image[..., 2] - image[..., 0] > 80).any(axis=1).nonzero()[0]
    assert blue.max() < red.min()  # polarity, in red, in the row below


def test_a_folder_of_another_experiment_is_refused(tmp_path):
    (run,) = plan(["digits"], ["relu"], 1, tmp_path, ())
    pretend(run, 80.0)
    check_folder(run)
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("TRAIN_FRACTION: 1.0", "").replace(str(tmp_path), "/elsewhere"))
    check_folder(run)  # as a version without that key wrote it, in another place
    (other,) = plan(["digits"], ["relu"], 1, tmp_path, ("TRAIN.EPOCHS", "3"))
    with pytest.raises(AblationError, match="holds a run with TRAIN.EPOCHS 8, this experiment has 3: name another"):
        check_folder(other)


def test_a_failing_run_is_reported_with_its_last_words(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first; echo the reason; exit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(ablation.sys, "executable", str(python))
    with pytest.raises(RunFailedError, match="digits relu seed 0 exited 3: the reason"):
        execute_all(plan(["digits"], ["relu"], 1, tmp_path, ()), jobs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report-only"], "no run is finished in"),
        (["--opts", "TRAIN.EPOCH", "3"], "unknown key TRAIN.EPOCH; the nearest valid key is"),
        (["--data-path", "/nowhere"], "/nowhere holds no train-images-idx3-ubyte.gz"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    assert ablation.main(["--output", str(tmp_path), "--docs", str(tmp_path / "docs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "'0' is not a whole number from 1 on"),
        (["--variants", "gelu"], "choose from .*softmax.*relu.*polarity_no_gate"),
        (["--datasets", "cifar"], "choose from .*digits.*fashion_mnist"),
    ],
)
def test_a_wrong_argument_is_answered_with_the_valid_ones(capsys, arguments, message):
    with pytest.raises(SystemExit) as ending:
        ablation.main(arguments)
    assert ending.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_a_real_run_is_trained_by_main_and_not_repeated(tmp_path, capfd, monkeypatch):
    interpreter = sys.executable
    monkeypatch.setattr(sys, "executable", PYTHON)  # for its runs
    arguments = ["--datasets", "digits", "--variants", "relu", "--seeds", "1", "--jobs", "1"]
    arguments += ["--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    arguments += ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "DATA.TRAIN_FRACTION", "0.1"]
    assert ablation.main(arguments) == 0
    folder = tmp_path / "runs" / "digits" / "relu-seed0"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (top1,) = [record["top1"] for record in records if record["kind"] == "val"]
    assert f"[1/1] digits relu seed 0: top-1 {top1:.2f} %" in capfd.readouterr().out
    assert "relu attention" in (folder / "log.txt").read_text()
    page = (tmp_path / "docs" / "ablation.md").read_text()
    assert rows_of(page, "digits")["linear, relu(x)"][1] == f"{top1:.2f}"
    assert (tmp_path / "docs" / "images" / "ablation.png").stat().st_size > 5_000
    modified = (folder / "metrics.jsonl").stat().st_mtime_ns
    command = [interpreter, "experiments/ablation.py", *arguments]  # as a file, without -m
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1 runs, 1 of them finished before" in again and "[1/1]" not in again
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == modified
