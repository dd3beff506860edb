"""Train one tiny backbone with each kind of attention, and write the table and the plot of docs/ablation.md.

python -m experiments.ablation                         every kind, three seeds, two data sets: make ablation
python -m experiments.ablation --datasets digits --variants softmax polarity --output output/mine --docs output/mine
python -m experiments.ablation --report-only           table and plot again, from the runs there are

Each run is `main.py` on a file of configs/experiments with one CPU thread. Finished runs are kept and interrupted ones
continued when the same command is given again.

Exit codes: 0 finished; 1 a run failed; 2 a mistake; 130 Ctrl-C.
"""

import argparse
import itertools
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
from scipy.stats import ttest_1samp
from yacs.config import CfgNode

from config import ConfigError, image_size, load_config, make_plan
from data.sources.base import DataError
from data.sources.bundled import FASHION_MNIST, FashionMnistSource
from experiments.settings import differences, stored_config
from logger import read_metrics
from models import build_model
from models.kernels import KERNELS
from tools.command_line import answer, file_path, program, whole
from tools.pages import markdown, render_page
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


KINDS = {
    "softmax": "softmax",
    "relu": "linear, relu(x)",
    "elu": "linear, 1 + elu(x)",
    "focused": "linear, focused power 3 of relu(x)",
    "polarity": "polarity",
    "polarity_pp": "PolaFormer++'s polarity",
    "norm_aware": "NaLaFormer's norm-aware",
    "nala_cosine": "NaLaFormer's cosine",
}
UNGATED = "_no_gate"
VARIANTS = {}
for _kind, _title in KINDS.items():
    _options = () if _kind == BASELINE else ("MODEL.LA.ATTENTION", _kind)
    VARIANTS[_kind] = Variant(_title, _options)
    VARIANTS[_kind + UNGATED] = Variant(f"{_title}, without gate", (*_options, "MODEL.LA.GATE", "False"))
VARIANTS["polarity_open_gate"] = Variant("polarity, gate's bias from 1", ("MODEL.LA.GATE_BIAS", "1.0"))
BODY = "MODEL.PPP.EMBED_DIMS [32,48] MODEL.PPP.DEPTHS [3,1] MODEL.PPP.NUM_HEADS [2,4] MODEL.PPP.STAGE_TYPES LL"
BODY += " MODEL.PPP.MLP_RATIOS [1.75,1.75] MODEL.PPP.PROJECTION 64 MODEL.PPP.LAYER_INIT_VALUES [1.0,1.0]"
BODIES = {"pola_pp": "PolaFormer++", "nalaformer": "NaLaFormer"}
for _type, _family in BODIES.items():
    VARIANTS[_type] = Variant(f"{_family}, whole body", ("MODEL.TYPE", _type, *BODY.split()))
BASELINES = {  # timm's own, of polarity's size, whose windows and maps are as large
    "swin": ("Swin", "swin_tiny_patch4_window7_224", "'embed_dim':32,'window_size':8,'mlp_ratio':3.0"),
    "pvt": ("PVT v2", "pvt_v2_b0", "'embed_dims':[32,64],'sr_ratios':[1,1],'mlp_ratios':[2,2]"),
}
for _type, (_family, _name, _keywords) in BASELINES.items():
    _keywords = f"{{'depths':[3,1],'num_heads':[2,4],{_keywords}}}"
    _keys = ("MODEL.TYPE", "timm", "MODEL.TIMM.NAME", _name, "MODEL.TIMM.KWARGS", _keywords)
    VARIANTS[_type] = Variant(f"timm's {_family}, whole body", _keys)
VARIANTS["polarity_fixed_exponent"] = Variant("polarity, exponent fixed at 3", ("MODEL.LA.LEARN_EXPONENT", "False"))
NAMED = tuple(VARIANTS)  # those of docs/ablation.md; a kernel that is not among them is compared by its own name
VARIANTS |= {name: Variant(name, ("MODEL.LA.ATTENTION", name)) for name in KERNELS if name not in NAMED}


class AblationError(ValueError):
    """A mistake of the user, or a run folder that holds something else."""


class RunFailedError(RuntimeError):
    """A training run that ended with an error."""


# -- Runs


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
    for seed, dataset, variant in itertools.product(range(seeds), datasets, variants):
        file = str(CONFIGS / f"{dataset}.yaml")
        pairs = ["OUTPUT", str(output), "TAG", f"{variant}-seed{seed}", "SEED", str(seed)]
        pairs += [*VARIANTS[variant].options, *opts]
        runs.append(TrainingRun(dataset, variant, seed, load_config(file, pairs), ("--cfg", file, "--opts", *pairs)))
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


# -- Results


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


def differences_to_baseline(results: Mapping[str, dict[int, float]], by_seed: Mapping[int, float]) -> list[float]:
    """Of each seed that the baseline has as well."""
    reference = results.get(BASELINE, {})
    return [top1 - reference[seed] for seed, top1 in by_seed.items() if seed in reference]


def times_of(runs: Iterable[TrainingRun]) -> list[dict[str, float]]:
    """What the runs took that have noted it."""
    return [json.loads((run.folder / TIMES).read_text()) for run in runs if (run.folder / TIMES).exists()]


def result_table(runs: Sequence[TrainingRun], results: Mapping[str, dict[int, float]], dataset: str) -> str:
    """Markdown: a row a variant, with its difference to polarity seed by seed."""
    rows = []
    for variant, by_seed in results.items():
        own = [r for r in runs if (r.dataset, r.variant) == (dataset, variant) and r.seed in by_seed]
        times, paired = times_of(own), differences_to_baseline(results, by_seed)
        rows.append(
            [
                VARIANTS[variant].title,
                f"{parameters(own[0]):,}",
                spread(list(by_seed.values())),
                spread(paired) if paired and variant != BASELINE else "",
                ", ".join(f"{top1:.2f}" for _, top1 in sorted(by_seed.items())),
                *(f"{statistics.mean(t[key] for t in times):.0f}" if times else "" for key in ("cpu_s", "wall_s")),
            ]
        )
    header = ("attention", "parameters", "top-1, %", "minus polarity, %", "seeds", "CPU s a run", "wall s a run")
    return markdown(header, rows)


def findings(results: Mapping[str, dict[int, float]]) -> dict[str, list[str]]:
    """Which variants differ from polarity: the 95 % interval of their paired differences (Student's t) excludes 0."""
    groups: dict[str, list[str]] = {"above polarity": [], "below polarity": [], "not told from polarity": []}
    for variant, by_seed in results.items():
        paired = differences_to_baseline(results, by_seed)
        if variant == BASELINE or len(paired) < 2:
            continue
        low, high = ttest_1samp(paired, 0).confidence_interval(0.95)
        told = "above polarity" if low > 0 else "below polarity" if high < 0 else None
        groups[told or "not told from polarity"].append(VARIANTS[variant].title)
    return {group: titles for group, titles in groups.items() if titles}


def gate_table(results: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """Markdown: what leaving out the gate changes for each kind, seed by seed; empty without such pairs."""
    rows = []
    for kind, title in KINDS.items():
        cells = []
        for variants in results.values():
            gated, plain = (variants.get(name, {}) for name in (kind, kind + UNGATED))
            paired = [plain[seed] - top1 for seed, top1 in gated.items() if seed in plain]
            cells.append(spread(paired) if paired else "")
        if any(cells):
            rows.append((title, *cells))
    return markdown(("attention", *(DATASETS[each] for each in results)), rows) if rows else ""


def draw(results: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """One panel a data set: every seed a dot, the mean a bar with the standard deviation over seeds."""
    from matplotlib.figure import Figure  # slow to import

    names = [name for name in VARIANTS if any(name in variants for variants in results.values())]
    size = 1.5 + 5.5 * len(results), max(3.6, 1.0 + 0.2 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)
    for axes, (dataset, variants) in zip(panels[0], results.items(), strict=True):
        for row, name in enumerate(names):
            values = list(variants.get(name, {}).values())
            if not values:
                continue
            colour = "tab:red" if name == BASELINE else "tab:blue"
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(statistics.mean(values), row, xerr=deviation, fmt="|", markersize=14, capsize=4, color=colour)
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.45)
        axes.set(title=DATASETS[dataset], xlabel="validation top-1 after the last epoch, %")
        axes.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_page(runs: Sequence[TrainingRun], docs: Path, jobs: int) -> Path:
    """docs/ablation.md and its picture, from what the runs logged. Raises AblationError where no run is finished."""
    results = collect(runs)
    if not results:
        raise AblationError(f"no run is finished in {runs[0].folder.parents[1]}: leave out --report-only")
    image = docs / "images" / "ablation.png"
    draw(results, image)
    finished = [run for run in runs if final_top1(run) is not None]
    times, machine = times_of(finished), describe(torch.device("cpu"), 1)
    page = render_page(
        Path(__file__).with_suffix(".md"),
        parameters=f"{max(parameters(run) for run in {run.variant: run for run in finished}.values()):,}",
        image=image.relative_to(docs).as_posix(),
        results=[
            (DATASETS[dataset], result_table(runs, variants, dataset), findings(variants))
            for dataset, variants in results.items()
        ],
        gates=gate_table(results),
        seeds=len({run.seed for run in finished}),
        finished=len(finished),
        planned=len(runs),
        longest=max((entry["wall_s"] for entry in times), default=0.0),
        bar=f"{BAR_S:.0f} s",
        slow=sum(entry["wall_s"] > BAR_S for entry in times),
        busy=sum(entry["load"] > jobs + 1 for entry in times),
        timed=len(times),
        variants=[VARIANTS[name] for name in dict.fromkeys(run.variant for run in runs)],
        settings=[
            (DATASETS[each], config, image_size(config))
            for each in results
            for config in [next(run.config for run in runs if run.dataset == each)]
        ],
        device=machine["cpu"] or "CPU",
        torch=machine["torch"],
        git_revision=machine["commit"],
        date=machine["started"][:10],
        jobs=jobs,
    )
    path = docs / "ablation.md"
    path.write_text(page, encoding="utf-8")
    return path


# -- Command line


def _parser() -> argparse.ArgumentParser:
    parser = program("python -m experiments.ablation", __doc__)
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), help="default: both")
    add("--variants", nargs="+", choices=VARIANTS, default=list(NAMED), help="default: all")
    add("--seeds", type=whole(), default=3, help="runs of each variant, seeds 0, 1, … (default 3)")
    add("--jobs", type=whole(), default=2, help="runs at a time (default 2)")
    add("--output", type=file_path, default=Path("output/ablation"), help="run folders: output/ablation")
    add("--docs", type=file_path, default=ROOT / "docs", help="where ablation.md is written: docs")
    add("--data-path", default="", help=f"Fashion-MNIST's folder, otherwise {FASHION_MNIST}")
    add("--report-only", action="store_true", help="train nothing; write the page from finished runs")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="keys for every run of all variants")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment and write its page; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return answer(lambda: run(arguments), mistakes=(AblationError, ConfigError, DataError))


def run(arguments: argparse.Namespace) -> int:
    """Train what is not finished and write the page; 1 where a run failed, or the disk did."""
    runs: list[TrainingRun] = []
    for dataset in dict.fromkeys(arguments.datasets):
        path = ["DATA.DATA_PATH", arguments.data_path] if dataset == "fashion_mnist" and arguments.data_path else []
        opts = [*path, *arguments.opts]
        runs += plan([dataset], dict.fromkeys(arguments.variants), arguments.seeds, arguments.output.resolve(), opts)
    runs.sort(key=lambda run: run.seed)  # an experiment cut short has the first seeds of everything
    for each in runs:
        check_folder(each)
    try:
        if not arguments.report_only:
            for pictures in [each for each in runs if each.dataset == "fashion_mnist"][:1]:
                for split in ("train", "val"):
                    FashionMnistSource(Path(pictures.config.DATA.DATA_PATH or FASHION_MNIST), split, (32, 32))
            execute_all(runs, arguments.jobs)
        print(f"written: {write_page(runs, arguments.docs, arguments.jobs)}")
    except (RunFailedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
