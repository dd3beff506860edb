"""What the page says, as plain values; page.html says how, and escapes every one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from config import KEYS, make_plan, value_of
from tools.pages import render_page
from tools.run_report.charts import chart, matrix
from tools.run_report.classes import ByClass
from tools.run_report.examples import gallery
from tools.run_report.runs import ReportError, RunRecord
from utils.curves import KINDS, METRICS, PALETTE, Line, Panel, number, training_panels

MAX_RUNS = len(PALETTE)
WORST = 12  # classes and pairs in a table
MATRIX = 30  # classes up to which the matrix shows counts
BLOCKS = 100  # of neighbouring classes, where there are more of them
DEFAULT_CURVES = ("loss", "top1", "top5", "lr", "grad_norm", "images_per_s", "data_time")


def render(
    runs: Sequence[RunRecord], *, curves: Sequence[str] = DEFAULT_CURVES, images: int = 8, data_path: str | None = None
) -> str:
    """The page of one run, or of several compared.

    Args:
        curves: of METRICS, in the order of the page.
        images: hardest validation images of each run.
        data_path: where the data set is now, instead of where the configuration says.

    Raises:
        ReportError: too many runs, or a curve that there is none of.
    """
    if len(runs) > MAX_RUNS:
        raise ReportError(f"{len(runs)} runs are too many for one page, at most {MAX_RUNS} can be compared; name fewer")
    if unknown := [name for name in curves if name not in METRICS]:
        raise ReportError(f"unknown metric {', '.join(unknown)}; expected some of {', '.join(METRICS)}")
    runs = [replace(run, number=i) for i, run in enumerate(runs)]
    evaluated = [run for run in runs if run.by_class]
    started = [run for run in runs if run.starts]
    facts = [_facts(run) for run in runs]
    nouns = {run.noun for run in runs}
    noun = nouns.pop() if len(nouns) == 1 else "sample"
    return render_page(
        Path(__file__).with_name("page.html"),
        {"number": number, "chart": chart},
        runs=runs,
        several=len(runs) > 1,
        noun=noun,
        state=_state,
        facts=facts,
        names_of_facts=dict.fromkeys(name for each in facts for name in each),
        top1=max((best["top1"] for run in runs if (best := run.best())), default=None),
        panels=training_panels([(run.name, run.records) for run in runs], curves, noun),
        epochs=_epochs,
        configured=[run for run in runs if run.config],
        differing=_differing(runs),
        keys=KEYS,
        evaluated=evaluated,
        profile=_profile(evaluated),
        differences=_differences([run.by_class for run in evaluated if run.by_class]),
        worst=WORST,
        counts=_counts,
        blocks=_blocks,
        images=images,
        gallery=partial(gallery, count=images, data_path=data_path),
        started=started,
        environment=dict.fromkeys(k for run in started for k, value in run.starts[-1].items() if value is not None),
    )


def _state(run: RunRecord) -> str:
    """The model, the data, and how far the run has come."""
    config, subject = run.config, ""
    if config:
        data = [config.DATA.LRA.TASK if run.sequences else config.DATA.DATASET]
        data += [f"in {config.DATA.DATA_PATH}"] if config.DATA.DATA_PATH else []
        classes = f", {len(run.by_class.names):,} classes" if run.by_class else ""
        subject = f"{config.MODEL.TYPE} · {' '.join(data)}{classes} · "
    planned = make_plan(config).last_epoch if config else None
    if planned and (steps := run.eval_steps):
        done = f"{run.epochs * steps:,} of {planned * steps:,} steps, {steps:,} an epoch"
    else:
        done = f"{run.epochs} of {planned} epochs" if planned else f"{run.epochs} epochs"
    return subject + done + (f", ended early: {run.ending}" if run.ending else "")


def _facts(run: RunRecord) -> dict[str, tuple[str, str]]:
    """Value and remark of each result, by its name."""

    def value(record: dict[str, Any], name: str, pattern: str) -> str:
        return pattern.format(record[name]) if isinstance(record.get(name), int | float) else "–"

    def moment(record: dict[str, Any]) -> str:
        return f"step {record['step']:,}" if run.eval_steps else f"epoch {record['epoch'] + 1}"

    best, timing, facts = run.best(), run.timing, {}
    if best:
        weights = {"val": "", "ema": "average of the weights (EMA), "}[best["kind"]]
        facts["best top-1"] = value(best, "top1", "{:.2f} %"), f"{weights}validation after {moment(best)}"
        if "top5" in best:
            facts["top-5 there"] = value(best, "top5", "{:.2f} %"), f"loss {value(best, 'loss', '{:.4f}')}"
    if ema := run.best("ema"):
        for title, record in (("the model", run.best("val")), ("EMA", ema)):
            if record:
                facts[f"best top-1, {title}"] = value(record, "top1", "{:.2f} %"), f"after {moment(record)}"
    if timing:
        minutes = timing["seconds"] / 60
        text = f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
        facts["training time"] = text if minutes >= 2 else f"{60 * minutes:.0f} s", "without validation and checkpoints"
        facts["throughput"] = number(timing["images_per_s"]), f"{run.noun}s per second, all processes"
        facts["waiting for data"] = f"{100 * timing['data_share']:.1f} %", "of the training time"
    return facts


def _epochs(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of every metric by epoch; of the training lines it is the last."""
    epochs: dict[int, dict[str, dict[str, Any]]] = {}
    for record in run.records:
        epochs.setdefault(record["epoch"], {})[record["kind"]] = record
    titles, rows = ["epoch"], [[str(epoch + 1)] for epoch in sorted(epochs)]
    for metric, (title, unit, factor) in METRICS.items():
        kinds = [kind for kind in KINDS if any(metric in records.get(kind, {}) for records in epochs.values())]
        for kind in kinds:
            titles.append(title if kinds == ["train"] else f"{title}, {KINDS[kind][0]}")
            titles[-1] += f" ({unit.format(noun=run.noun)})" if unit else ""
            for row, (_, records) in zip(rows, sorted(epochs.items()), strict=True):
                value = records.get(kind, {}).get(metric)
                row.append(number(factor * value) if isinstance(value, int | float) else "–")
    return titles, rows


def _differing(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """The keys of one run that differ from the defaults, or in which several do: values by run, and the default."""
    configs = [run.config for run in runs if run.config]
    found = []
    for key, declared in KEYS.items():
        values = [value_of(config, key) for config in configs]
        others = values if len(runs) > 1 else [declared.default]
        if key != "BASE" and any(value != other for value in values[:1] for other in others):
            found.append((key, [*values, declared.default]))
    return found


# -- Classes, confusions


def _profile(evaluated: Sequence[RunRecord]) -> Panel:
    """Accuracy over the classes of each run, from the worst to the best."""
    lines = []
    for run in evaluated:
        assert run.by_class is not None
        accuracy = run.by_class.accuracy[run.by_class.worst_first]
        lines.append(Line(run.name, np.arange(1, len(accuracy) + 1, dtype=float), accuracy, run.number, "stairs"))
    return Panel("Top-1 of every class", "%", lines, "classes, worst first", y_range=(0, 102))


def _differences(results: Sequence[ByClass]) -> list[tuple[str, list[float], float]] | None:
    """Accuracies and spread of the classes that differ most between runs; None where not all have the same classes."""
    if any(result.names != results[0].names for result in results):
        return None
    if len(results) < 2:
        return []
    accuracy = np.stack([result.accuracy for result in results], axis=1)
    spread = np.nan_to_num(accuracy.max(axis=1) - accuracy.min(axis=1), nan=0.0)
    order = np.argsort(-spread, kind="stable")[:WORST].tolist()
    return [(results[0].names[c], accuracy[c].tolist(), float(spread[c])) for c in order if spread[c] > 0]


def _counts(result: ByClass) -> list[list[int]] | None:
    """Images by label and prediction, of at most MATRIX classes."""
    if len(result.names) > MATRIX:
        return None
    counts = np.diag(result.correct)
    for label, guess, count in result.confusions:
        counts[label, guess] = count
    return counts.tolist()


def _blocks(run: RunRecord, result: ByClass) -> tuple[Markup, float, str]:
    """A picture of the errors between blocks of classes, the largest (%), and what a block is."""
    errors, size = result.error_blocks(BLOCKS)
    blocks = f"blocks of {size} neighbouring classes" if size > 1 else "classes"
    return matrix(errors, size, f"{run.name}: errors between {blocks}"), errors.max(), blocks
