"""Train one tiny backbone with each kind of attention, and write the table and the plot of docs/ablation.md.

python -m experiments.ablation                         every kind, three seeds, two data sets: make ablation
python -m experiments.ablation --datasets digits --variants softmax polarity --output output/mine --docs output/mine
python -m experiments.ablation --report-only           table and plot again, from the runs there are

Each run is `main.py` on a file of configs/experiments with one CPU thread. Finished runs are kept and interrupted ones
continued when the same command is given again.

Exit codes: 0 finished; 1 a run failed; 2 a mistake; 130 Ctrl-C.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from scipy.stats import t as student_t
from yacs.config import CfgNode

from config import ConfigError, image_size, load_config, make_plan
from data.sources.base import DataError
from data.sources.bundled import FASHION_MNIST, FashionMnistSource
from experiments.settings import differences, stored_config
from logger import read_metrics
from models import build_model
from tools.command_line import INTERRUPTED, whole
from utils.environment import describe

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "experiments"
DATASETS = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
CLASSES = 10
BASELINE = "polarity"  # what the others are compared with
TIMES = "ablation.json"  # in each run folder: what its training took
BAR_S = 60.0  # a run is to take at most this


@dataclass(frozen=True)
class Variant:
    title: str
    options: tuple[str, ...]


VARIANTS = {
    "softmax": Variant("softmax", ("MODEL.LA.ATTENTION", "softmax")),
    "relu": Variant("linear, relu(x)", ("MODEL.LA.ATTENTION", "relu")),
    "elu": Variant("linear, 1 + elu(x)", ("MODEL.LA.ATTENTION", "elu")),
    "focused": Variant("linear, focused power 3 of relu(x)", ("MODEL.LA.ATTENTION", "focused")),
    "polarity": Variant("polarity", ()),
    "polarity_fixed_exponent": Variant("polarity, exponent fixed at 3", ("MODEL.LA.LEARN_EXPONENT", "False")),
    "polarity_no_gate": Variant("polarity, without gate", ("MODEL.LA.GATE", "False")),
}


class AblationError(ValueError):
    """A mistake of the user, or a run folder that holds something else."""


class RunFailedError(RuntimeError):
    """A training run that ended with an error."""


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRun:
    """One training run: its place in the experiment and the configuration that main.py will have."""

    dataset: str
    variant: str
    seed: int
    config: CfgNode
    arguments: tuple[str, ...]  # of main.py

    @property
    def folder(self) -> Path:
        return make_plan(self.config).folder

    def __str__(self) -> str:
        return f"{self.dataset} {self.variant} seed {self.seed}"


def plan(
    datasets: Iterable[str], variants: Iterable[str], seeds: int, output: Path, opts: Sequence[str]
) -> list[TrainingRun]:
    """Every run, seed by seed, so that an experiment that is cut short has the first seeds of everything."""
    runs = []
    variants, datasets = list(variants), list(datasets)
    for seed in range(seeds):
        for dataset in datasets:
            for variant in variants:
                file = str(CONFIGS / f"{dataset}.yaml")
                pairs = ["OUTPUT", str(output), "TAG", f"{variant}-seed{seed}", "SEED", str(seed)]
                pairs += [*VARIANTS[variant].options, *opts]
                runs.append(
                    TrainingRun(dataset, variant, seed, load_config(file, pairs), ("--cfg", file, "--opts", *pairs))
                )
    return runs


def final_top1(run: TrainingRun) -> float | None:
    """Validation top-1 in percent after the last epoch; None where the run is not finished."""
    metrics = run.folder / "metrics.jsonl"
    last = make_plan(run.config).last_epoch - 1
    records = read_metrics(metrics) if metrics.exists() else []
    return next((r["top1"] for r in records if r["kind"] == "val" and r["epoch"] == last), None)


def check_folder(run: TrainingRun) -> None:
    """Raise AblationError where the run's folder holds a run of another configuration."""
    stored = stored_config(run.folder)
    if stored is None:
        return
    for key, (held, own) in differences(stored, run.config, ("OUTPUT",)).items():  # the folder may have been moved
        raise AblationError(
            f"{run.folder} holds a run with {key} {held}, this experiment has {own}: name another --output, or remove"
            " that folder"
        )


def execute(run: TrainingRun) -> None:
    """Train, or continue to train, in a process of its own on one CPU thread, and add up what that takes.

    Raises RunFailedError with the run's last words.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    output = run.folder / "ablation.log"
    with output.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "main.py", *run.arguments], cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)  # subprocess would not say what processor time it took
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = output.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        raise RunFailedError(f"{run} exited {process.returncode}: {lines[-1]} ({output})")
    path = run.folder / TIMES
    before = json.loads(path.read_text()) if path.exists() else {"wall_s": 0.0, "cpu_s": 0.0, "load": 0.0, "starts": 0}
    record = {
        "wall_s": before["wall_s"] + time.monotonic() - start,
        "cpu_s": before["cpu_s"] + usage.ru_utime + usage.ru_stime,
        "load": max(before["load"], os.getloadavg()[0]),
        "starts": before["starts"] + 1,
    }
    path.write_text(json.dumps(record) + "\n")


def execute_all(runs: Sequence[TrainingRun], jobs: int) -> None:
    """The runs that are not finished, `jobs` at a time. Raises RunFailedError at the first that fails."""
    waiting = [run for run in runs if final_top1(run) is None]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    done = 0

    def one(run: TrainingRun) -> None:
        nonlocal done
        execute(run)
        done += 1
        seconds = json.loads((run.folder / TIMES).read_text())["wall_s"]
        print(f"[{done}/{len(waiting)}] {run}: top-1 {final_top1(run):.2f} % in {seconds:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(one, run) for run in waiting]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` of a sample; a single value has none."""
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def collect(runs: Iterable[TrainingRun]) -> dict[str, dict[str, dict[int, float]]]:
    """Final top-1 by data set, variant and seed, of the finished runs."""
    results: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        if (top1 := final_top1(run)) is not None:
            results.setdefault(run.dataset, {}).setdefault(run.variant, {})[run.seed] = top1
    return results


def parameters(run: TrainingRun) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(run.config, CLASSES).parameters())


def result_table(runs: Sequence[TrainingRun], results: Mapping[str, dict[int, float]], dataset: str) -> str:
    """Markdown: a row a variant, with its difference to polarity seed by seed."""
    lines = [
        "| attention | parameters | top-1, % | minus polarity, % | seeds | CPU s a run | wall s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = results.get(BASELINE, {})
    for variant, by_seed in results.items():
        own = [r for r in runs if (r.dataset, r.variant) == (dataset, variant) and r.seed in by_seed]
        times = [json.loads((r.folder / TIMES).read_text()) for r in own if (r.folder / TIMES).exists()]
        paired = [top1 - reference[seed] for seed, top1 in by_seed.items() if seed in reference]
        cells = [
            VARIANTS[variant].title,
            f"{parameters(own[0]):,}",
            spread(list(by_seed.values())),
            spread(paired) if paired and variant != BASELINE else "",
            ", ".join(f"{top1:.2f}" for _, top1 in sorted(by_seed.items())),
            *(f"{statistics.mean(t[key] for t in times):.0f}" if times else "" for key in ("cpu_s", "wall_s")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def findings(results: Mapping[str, dict[int, float]], dataset: str) -> str:
    """Which variants differ from polarity: the 95 % interval of their paired differences (Student's t) excludes 0."""
    reference = results.get(BASELINE, {})
    groups: dict[str, list[str]] = {"above polarity": [], "below polarity": [], "not told from polarity": []}
    for variant, by_seed in results.items():
        paired = [top1 - reference[seed] for seed, top1 in by_seed.items() if seed in reference]
        if variant == BASELINE or len(paired) < 2:
            continue
        mean, error = statistics.mean(paired), statistics.stdev(paired) / len(paired) ** 0.5
        told = abs(mean) > student_t.ppf(0.975, len(paired) - 1) * error
        group = "not told from polarity" if not told else "above polarity" if mean > 0 else "below polarity"
        groups[group].append(VARIANTS[variant].title)
    lines = [f"{group}: {'; '.join(titles)}" for group, titles in groups.items() if titles]
    if not lines:
        return ""
    return (
        f"By the 95 % confidence interval of the paired differences (Student's t, each comparison by itself) on"
        f" {DATASETS[dataset]}:\n\n" + "".join(f"* {line}\n" for line in lines)
    )


def draw(results: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """One panel a data set: every seed a dot, the mean a bar with the standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(1.5 + 5.5 * len(results), 3.6), layout="constrained", squeeze=False, sharey=True
    )
    names = [name for name in VARIANTS if any(name in variants for variants in results.values())]
    for axes, (dataset, variants) in zip(panels[0], results.items(), strict=True):
        for row, name in enumerate(names):
            values = list(variants.get(name, {}).values())
            if not values:
                continue
            colour = "tab:red" if name == BASELINE else "tab:blue"
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(statistics.mean(values), row, xerr=deviation, fmt="|", markersize=18, capsize=4, color=colour)
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.45)
        axes.set(title=DATASETS[dataset], xlabel="validation top-1 after the last epoch, %")
        axes.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


PAGE = """# Kinds of attention on small data

Generated by `make ablation` (`experiments/ablation.py`) from the logs of its runs;
`python -m experiments.ablation --report-only` writes it again.

The same tiny backbone, trained with softmax attention, with three kinds of linear attention and with polarity
attention, the last also without its learnable exponent and without its gate. What is trained here has {parameters:,}
parameters at most and sees small pictures for a minute: it shows that the kinds can be compared by a config value, and
how far they are apart in this setting. It says little about ImageNet.

![Top-1 of every kind of attention and seed]({image})

{results}
## How to read it

{incomplete}Top-1 is that of the validation set after the **last** epoch (no epoch is chosen by its validation result),
as mean ± sample standard deviation over seeds. "Minus polarity" is the same of the differences between runs of one
seed. CPU s is processor time, wall s the time from start to end, PyTorch's start included.
{bar_sentence}

## What is the same and what differs

All variants are values of one module's config keys, and run through the ordinary `main.py`:

| attention | `--opts` |
|---|---|
{options}

Every other setting is that of `configs/experiments`:

{setting}

Projections, learned scale, learned position of the keys, depthwise branch over the values and the gate are the same
module in every variant; the data order and augmentation of a seed are the same too, and so are its fresh weights,
except without gate, where the projection is smaller. What differs:

* `softmax`: exp(q·k/√d) through PyTorch's scaled dot-product attention;
* `relu`, `elu`, `focused`: φ(q)·φ(k) with φ = relu, 1 + elu (Katharopoulos et al. 2020), and the cube of relu with the
  norm it had before (Han et al. 2023), power 3; divided by the sum over keys;
* `polarity`: PolaFormer's same-signed and opposite-signed streams with p = 1 + 4·sigmoid(power); it alone has the
  parameter `power`, one value a channel in each block;
* exponent fixed: p = 3 for every channel, where the learnable one starts, and `power` is gone;
* without gate: the output is not multiplied by g, and the quarter of the projection that makes g is gone.

## How the settings were chosen

Weight decay and stochastic depth are those of `configs/quickstart.yaml`, whose model has two polarity and two softmax
stages. The rest was not fixed in advance. A first attempt with the quickstart's peak learning rate was stopped after
18 of 42 runs, because so short a run learned little: 52 to 56 % on Fashion-MNIST, all kinds, seed 0, and 78 to 84 %
in the five digits runs whose results were looked at. Four times that rate was then tried with softmax and polarity
alone, seed 0: on Fashion-MNIST they rose from 53.1 and 52.2 % to 65.4 and 67.2 %; on digits there is no matched pair,
they reached 97.2 and 95.8 % in 10 epochs. That rate was taken for all variants, and digits cut to 8 epochs so that a
run takes at most {bar} on one thread, without another look. So one of two rates was picked on the validation images
that the tables report, by two of the seven kinds; the tables hold runs of the final settings only, seed 0 trained
anew among them. No other rate was tried, and another one might order the kinds differently.

## Where it ran

{device}, one thread a run, {jobs} runs at a time; PyTorch {torch}, revision {git_revision}, {date}.
{load}

## Again

`make ablation`. Fashion-MNIST is not downloaded: `apt install dataset-fashion-mnist`, or `--data-path` with a folder
that holds its four idx files; `--datasets digits` does without. Finished runs are kept in `output/ablation` and
interrupted ones continued.
"""


def write_page(runs: Sequence[TrainingRun], docs: Path, jobs: int) -> Path:
    """docs/ablation.md and its picture, from what the runs logged. Raises AblationError where no run is finished."""
    results = collect(runs)
    if not results:
        raise AblationError(f"no run is finished in {runs[0].folder.parents[1]}: leave out --report-only")
    image = docs / "images" / "ablation.png"
    draw(results, image)
    finished = [run for run in runs if final_top1(run) is not None]
    times = [json.loads((run.folder / TIMES).read_text()) for run in finished if (run.folder / TIMES).exists()]
    busy = sum(entry["load"] > jobs + 1 for entry in times)
    machine = describe(torch.device("cpu"), 1)
    longest, bar = max((entry["wall_s"] for entry in times), default=0.0), f"{BAR_S:.0f} s"
    over = sum(entry["wall_s"] > BAR_S for entry in times)
    page = PAGE.format(
        parameters=max(parameters(run) for run in {run.variant: run for run in finished}.values()),
        image=image.relative_to(docs).as_posix(),
        bar=bar,
        results="\n".join(
            f"## {DATASETS[dataset]}\n\n{result_table(runs, variants, dataset)}\n{findings(variants, dataset)}"
            for dataset, variants in results.items()
        ),
        incomplete=""
        if len(finished) == len(runs)
        else f"**Only {len(finished)} of {len(runs)} runs are finished.**\n",
        bar_sentence=f"The longest run took {longest:.0f} s from start to end, the bar being {bar}"
        + (f"; {over} of {len(times)} runs exceeded it." if over else "."),
        options="\n".join(
            f"| {VARIANTS[name].title} | {_options(VARIANTS[name])} |"
            for name in dict.fromkeys(run.variant for run in runs)
        ),
        setting="\n".join(f"* {_setting(next(r for r in runs if r.dataset == dataset))}" for dataset in results),
        device=machine["cpu"] or "CPU",
        torch=machine["torch"],
        git_revision=machine["commit"],
        date=machine["started"][:10],
        jobs=jobs,
        load=f"{busy} of {len(times)} runs shared the machine with other work (a load average above {jobs + 1}):"
        " their seconds are upper bounds."
        if busy
        else f"The load average never rose above {jobs + 1}.",
    )
    path = docs / "ablation.md"
    path.write_text(page, encoding="utf-8")
    return path


def _options(variant: Variant) -> str:
    return f"`{' '.join(variant.options)}`" if variant.options else "(the defaults)"


def _setting(run: TrainingRun) -> str:
    config = run.config
    height, width = image_size(config)
    share, steps = config.DATA.TRAIN_FRACTION, config.TRAIN.STEPS
    duration = f"{config.TRAIN.EPOCHS} epochs" if steps is None else f"{steps} steps"
    return (
        f"{DATASETS[run.dataset]} at {height}×{width} pixels, "
        + (f"{share:.0%} of the training images, " if share < 1 else "")
        + f"{duration}, batch {config.DATA.BATCH_SIZE}, peak learning rate"
        f" {config.TRAIN.BASE_LR * config.DATA.BATCH_SIZE / 512:g}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablation",
        description=__doc__.split("\n", 1)[0],
        epilog="example: python -m experiments.ablation --datasets digits --variants softmax polarity --seeds 5",
        allow_abbrev=False,
    )
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), help="default: both")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=whole(), default=3, help="runs of each variant, seeds 0, 1, … (default 3)")
    parser.add_argument("--jobs", type=whole(), default=2, help="runs at a time (default 2)")
    parser.add_argument("--output", type=Path, default=Path("output/ablation"), help="run folders: output/ablation")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where ablation.md is written: docs")
    parser.add_argument("--data-path", default="", help=f"Fashion-MNIST's folder, otherwise {FASHION_MNIST}")
    parser.add_argument("--report-only", action="store_true", help="train nothing; write the page from finished runs")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="keys for every run of all variants")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment and write its page; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        runs: list[TrainingRun] = []
        for dataset in dict.fromkeys(arguments.datasets):
            path = ["DATA.DATA_PATH", arguments.data_path] if dataset == "fashion_mnist" and arguments.data_path else []
            opts = [*path, *arguments.opts]
            runs += plan(
                [dataset], dict.fromkeys(arguments.variants), arguments.seeds, arguments.output.resolve(), opts
            )
        runs.sort(key=lambda run: run.seed)  # an experiment cut short has the first seeds of everything
        for run in runs:
            check_folder(run)
        if not arguments.report_only:
            for run in runs:
                if run.dataset == "fashion_mnist":
                    for split in ("train", "val"):
                        FashionMnistSource(Path(run.config.DATA.DATA_PATH or FASHION_MNIST), split, (32, 32))
                    break
            execute_all(runs, arguments.jobs)
        print(f"written: {write_page(runs, arguments.docs, arguments.jobs)}")
    except (AblationError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunFailedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
