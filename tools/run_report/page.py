"""The page: one HTML document that needs nothing but itself."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from config import KEYS, make_plan, value_of
from tools.run_report.charts import POINTS, Line, line_chart, matrix_picture, number, swatch
from tools.run_report.classes import ByClass, by_class, error_blocks
from tools.run_report.examples import Gallery, gallery
from tools.run_report.runs import NOTHING, ReportError, Run
from utils.curves import thin

HERE = Path(__file__).parent
MAX_RUNS = 8  # colours that can be told apart
WORST = 12  # classes and pairs in a table
MATRIX = 30  # classes up to which the matrix shows counts
BLOCKS = 100  # of neighbouring classes, where there are more of them
ERROR_COLOUR = (208, 84, 0)

# What can be drawn: title, unit ({noun}: what a sample is called), and factor from what metrics.jsonl holds.
CURVES: dict[str, tuple[str, str, float]] = {
    "loss": ("Loss", "cross-entropy", 1),
    "top1": ("Top-1 accuracy", "%", 1),
    "top5": ("Top-5 accuracy", "%", 1),
    "lr": ("Learning rate", "", 1),
    "grad_norm": ("Gradient norm", "before clipping", 1),
    "images_per_s": ("Throughput", "{noun}s/s, all processes", 1),
    "data_time": ("Waiting for data", "ms per step", 1000),
    "step_time": ("Step time", "ms", 1000),
    "communication_time": ("Waiting for gradients of other processes", "ms per step", 1000),
    "memory_mb": ("Largest memory use so far", "MiB, rank 0", 1),
}
SPIKES = ("grad_norm", "data_time", "communication_time")  # whose outliers would flatten everything else
DEFAULT_CURVES = ("loss", "top1", "top5", "lr", "grad_norm", "images_per_s", "data_time")
KINDS = {"train": ("training", "faint"), "val": ("validation", "solid"), "ema": ("validation, EMA", "dashed")}
LINE_POINTS = {"train": 150, "val": POINTS, "ema": POINTS}  # training lines are many, and noisy
ENVIRONMENT = {
    "started": "started (UTC)",
    "command": "command",
    "commit": "commit",
    "processes": "processes",
    "device": "device",
    "device_memory_gib": "device memory (GiB)",
    "cpu": "CPU",
    "cpu_cores": "CPU cores",
    "system": "system",
    "python": "Python",
    "torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "timm": "timm",
}


def render(
    runs: Sequence[Run], *, curves: Sequence[str] = DEFAULT_CURVES, images: int = 8, data_path: str | None = None
) -> str:
    """The page of one run, or of several compared.

    Args:
        curves: of CURVES, in the order of the page.
        images: hardest validation images of each run.
        data_path: where the data set is now, instead of where the configuration says.

    Raises:
        ReportError: too many runs, or a curve that there is none of.
    """
    if len(runs) > MAX_RUNS:
        raise ReportError(f"{len(runs)} runs are too many for one page, at most {MAX_RUNS} can be compared; name fewer")
    if unknown := [name for name in curves if name not in CURVES]:
        raise ReportError(f"unknown metric {', '.join(unknown)}; expected some of {', '.join(CURVES)}")
    results = [by_class(run.predictions) if run.predictions else None for run in runs]
    sections = [
        ("Results", _results(runs)),
        ("Curves", _curves(runs, curves)),
        ("Configuration", _configuration(runs)),
        ("Classes", _classes(runs, results)),
        ("Confusions", _confusions(runs, results)),
        (f"Hardest {_noun(runs)}s", _examples(runs, images, data_path)),
        ("Environment", _environment(runs)),
    ]
    sections = [(title, body) for title, body in sections if body]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in sections)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{name}</h2>{text}</section>' for name, text in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # nothing is ever fetched: the browser itself would refuse
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body>"
        f'<header><p class="kicker">PolaFormer run report</p><h1>{escape(title)}</h1>{_subtitle(runs)}</header>'
        f"<nav>{links}</nav><main>{_notes(runs)}{body}</main>"
        '<div id="tip" hidden></div>'
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls in its own frame. Cells are HTML; all but a row's first are aligned as numbers if `kind` has
    `numbers`."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f'<th scope="row">{c}</th>' if i == 0 else f"<td>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _details_of_each(runs: Sequence[Run], title: str, bodies: Sequence[str]) -> str:
    """Something long of every run, folded away under its name."""
    if len(runs) == 1:
        return _details(title, bodies[0])
    return "".join(
        _details(f"{title}: {_run_label(i, run)}", body) for i, (run, body) in enumerate(zip(runs, bodies, strict=True))
    )


def _bar(value: float, colour: int, text: str) -> str:
    """A percentage as a bar with its number."""
    width = 0.0 if math.isnan(value) else value
    return f'<span class="bar c{colour}"><i style="width:{width:.1f}%"></i></span><span class="value">{text}</span>'


def _run_label(number_: int, run: Run) -> str:
    return f'<span class="run">{swatch(number_)}{escape(run.name)}</span>'


def _noun(runs: Sequence[Run]) -> str:
    """What a sample is called where it may be any of these runs'."""
    nouns = {run.noun for run in runs}
    return nouns.pop() if len(nouns) == 1 else "sample"


def _each(runs: Sequence[Run], bodies: Sequence[str]) -> str:
    """One block per run, under its name where there are several."""
    if len(runs) == 1:
        return bodies[0]
    return "".join(
        f'<div class="of-run"><h3>{_run_label(i, run)}</h3>{body}</div>'
        for i, (run, body) in enumerate(zip(runs, bodies, strict=True))
        if body
    )


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h"


def _state(run: Run) -> str:
    planned = make_plan(run.config).last_epoch if run.config else None
    if planned and (steps := run.eval_steps):
        done = f"{run.epochs * steps:,} of {planned * steps:,} steps, {steps:,} an epoch"
    else:
        done = f"{run.epochs} of {planned} epochs" if planned else f"{run.epochs} epochs"
    return done + (f", ended early: {run.ending}" if run.ending else "")


def _subject(run: Run) -> str:
    """The model and the data."""
    if run.config is None:
        return ""
    return f"{run.config.MODEL.TYPE} · {run.config.DATA.LRA.TASK if run.sequences else run.config.DATA.DATASET} · "


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        run = runs[0]
        return f'<p class="sub">{escape(_subject(run) + _state(run))}</p>'
    return '<p class="sub keys">' + "".join(_run_label(i, run) for i, run in enumerate(runs)) + "</p>"


def _notes(runs: Sequence[Run]) -> str:
    lines = [
        f"<li>{escape(note if len(runs) == 1 else f'{run.name}: {note}')}</li>" for run in runs for note in run.notes
    ]
    return f"<aside><ul>{''.join(lines)}</ul></aside>" if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# Results, curves
# ---------------------------------------------------------------------------------------------------------------------


def _results(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f'<dl class="tiles">{"".join(_tiles(runs[0]))}</dl>'
    best = [run.best() for run in runs]
    top = max((record["top1"] for record in best if record), default=None)
    rows = []
    for i, run in enumerate(runs):
        record, ema, timing = best[i], run.best("ema"), run.timing
        rows.append(
            [
                _run_label(i, run),
                _marked(f"{record['top1']:.2f} %", record["top1"] == top) if record else "–",
                _percent(record, "top5"),
                _percent(ema, "top1"),
                _loss(record),
                str(record["epoch"] + 1) if record else "–",
                escape(_state(run)),
                _duration(timing["seconds"]) if timing else "–",
                number(timing["images_per_s"]) if timing else "–",
                f"{100 * timing['data_share']:.1f} %" if timing else "–",
            ]
        )
    head = [
        "run",
        "best top-1",
        "top-5",
        "EMA top-1",
        "loss",
        "at epoch",
        "trained",
        "in",
        f"{_noun(runs)}s/s",
        "waiting for data",
    ]
    if not any(run.best("ema") for run in runs):
        head, rows = head[:3] + head[4:], [row[:3] + row[4:] for row in rows]
    return _table(head, rows, "numbers")


def _marked(text: str, marked: bool) -> str:
    return f"<b>{text}</b>" if marked else text


def _percent(record: dict[str, Any] | None, name: str) -> str:
    value = record.get(name) if record else None
    return f"{value:.2f} %" if isinstance(value, int | float) else "–"


def _loss(record: dict[str, Any] | None) -> str:
    value = record.get("loss") if record else None
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _tile(name: str, value: str, more: str = "") -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"


def _moment(run: Run, record: dict[str, Any]) -> str:
    return f"step {record['step']:,}" if run.eval_steps else f"epoch {record['epoch'] + 1}"


def _tiles(run: Run) -> Iterable[str]:
    record, ema, timing = run.best(), run.best("ema"), run.timing
    if record:
        yield _tile("best top-1", _percent(record, "top1"), f"validation after {_moment(run, record)}")
        yield _tile("top-5 there", _percent(record, "top5"), f"loss {_loss(record)}")
    if ema:
        yield _tile("best top-1, EMA", _percent(ema, "top1"), f"after {_moment(run, ema)}")
    if timing:
        yield _tile("training time", _duration(timing["seconds"]), "without validation and checkpoints")
        yield _tile("throughput", number(timing["images_per_s"]), f"{run.noun}s per second, all processes")
        yield _tile("waiting for data", f"{100 * timing['data_share']:.1f} %", "of the training time")


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Of one run, its kinds in one chart; of several, a chart for each kind with a line per run."""
    charts = []
    for name in names:
        title, unit, factor = CURVES[name]
        unit = unit.format(noun=_noun(runs))
        found = {
            kind: [(i, *thin(*run.series(kind, name), LINE_POINTS[kind])) for i, run in enumerate(runs)]
            for kind in KINDS
        }
        found = {kind: lines for kind, lines in found.items() if any(len(x) for _, x, _ in lines)}
        if len(runs) == 1:
            single = len(found) == 1
            lines = [
                Line(KINDS[kind][0], x, factor * y, 0, "solid" if single else KINDS[kind][1])
                for kind, ((_, x, y),) in found.items()
            ]
            charts.append(line_chart(title, unit, lines, spikes=name in SPIKES, note=_gaps(lines)))
            continue
        for kind, per_run in found.items():
            named = title if len(found) == 1 and kind == "train" else f"{title}, {KINDS[kind][0]}"
            lines = [Line(runs[i].name, x, factor * y, i) for i, x, y in per_run if len(x)]
            charts.append(line_chart(named, unit, lines, spikes=name in SPIKES, note=_gaps(lines)))
    tables = _details_of_each(runs, "Values by epoch", [_epoch_table(run) for run in runs])
    return f'<div class="charts">{"".join(charts)}</div>{tables}'


def _gaps(lines: Sequence[Line]) -> str:
    gaps = [f"{line.label}: {int(np.isnan(line.y).sum())}" for line in lines if np.isnan(line.y).any()]
    return f"values that were not finite: {', '.join(gaps)}" if gaps else ""


def _epoch_table(run: Run) -> str:
    """The last training line and the validation of each epoch."""
    epochs: dict[int, dict[str, dict[str, Any]]] = {}
    for record in run.records:
        epochs.setdefault(record["epoch"], {})[record["kind"]] = record
    columns: list[tuple[str, str, str, Callable[[float], str]]] = [
        ("train", "loss", "training loss", "{:.4f}".format),
        ("val", "loss", "validation loss", "{:.4f}".format),
        ("val", "top1", "top-1 (%)", "{:.2f}".format),
        ("val", "top5", "top-5 (%)", "{:.2f}".format),
        ("ema", "top1", "EMA top-1 (%)", "{:.2f}".format),
        ("train", "lr", "learning rate", number),
        ("train", "grad_norm", "gradient norm", number),
        ("train", "images_per_s", f"{run.noun}s/s", number),
        ("train", "data_time", "data wait (ms)", lambda value: number(1000 * value)),
    ]
    columns = [c for c in columns if any(c[1] in kinds.get(c[0], {}) for kinds in epochs.values())]

    def cell(kinds: dict[str, dict[str, Any]], kind: str, name: str, text: Callable[[float], str]) -> str:
        value = kinds.get(kind, {}).get(name)
        return text(value) if isinstance(value, int | float) else "–"

    rows = [
        [str(epoch + 1), *(cell(kinds, kind, name, text) for kind, name, _, text in columns)]
        for epoch, kinds in sorted(epochs.items())
    ]
    return _table(["epoch", *(title for *_, title, _ in columns)], rows, "numbers")


# ---------------------------------------------------------------------------------------------------------------------
# Configuration, environment
# ---------------------------------------------------------------------------------------------------------------------


def _configuration(runs: Sequence[Run]) -> str:
    """One run's keys beside the defaults, or the keys in which several runs differ."""
    known = [(i, run) for i, run in enumerate(runs) if run.config is not None]
    if not known:
        return ""

    def values(key: str) -> list[Any]:
        return [value_of(run.config, key) for _, run in known]

    def differs(key: str) -> bool:
        own = values(key)
        return own[0] != KEYS[key].default if len(runs) == 1 else any(value != own[0] for value in own)

    rows = [
        [
            f'<code title="{escape(KEYS[key].help)}">{key.replace(".", ".<wbr>").replace("_", "_<wbr>")}</code>',
            *(f"<code>{escape(str(value))}</code>" for value in values(key)),
            f'<code class="default">{escape(str(KEYS[key].default))}</code>',
        ]
        for key in KEYS
        if key != "BASE" and differs(key)
    ]
    if len(runs) == 1:
        text, head = "Keys that differ from the defaults.", ["key", "this run", "default"]
    else:
        text, head = "Keys in which the runs differ.", ["key", *(_run_label(i, run) for i, run in known), "default"]
    table = _table(head, rows) if rows else f"<p>{'None' if len(runs) == 1 else 'The configurations are equal'}.</p>"
    texts = [f"<pre>{escape(run.config_text)}</pre>" for run in runs]
    whole = _details_of_each(runs, "Whole configuration", texts)
    return f'<p class="lead">{text}</p>{table}{whole}'


def _environment(runs: Sequence[Run]) -> str:
    known = [(i, run) for i, run in enumerate(runs) if run.starts]
    if not known:
        return ""
    last = [run.starts[-1] for _, run in known]
    rows = [
        [title, *(f"<code>{escape(str(start[name]))}</code>" if start.get(name) is not None else "–" for start in last)]
        for name, title in ENVIRONMENT.items()
        if any(start.get(name) is not None for start in last)
    ]
    head = ["", "this run"] if len(runs) == 1 else ["", *(_run_label(i, run) for i, run in known)]
    again = [
        f"{'It' if len(runs) == 1 else run.name} was started {len(run.starts)} times; these are the values of the last."
        for _, run in known
        if len(run.starts) > 1
    ]
    return _table(head, rows) + "".join(f'<p class="note">{escape(line)}</p>' for line in again)


# ---------------------------------------------------------------------------------------------------------------------
# Classes, confusions
# ---------------------------------------------------------------------------------------------------------------------


def _classes(runs: Sequence[Run], results: Sequence[ByClass | None]) -> str:
    known = [(i, run, result) for i, (run, result) in enumerate(zip(runs, results, strict=True)) if result]
    if not known:
        return ""
    lines = []
    for i, run, result in known:
        accuracy = np.sort(result.accuracy[result.images > 0])
        lines.append(Line(run.name, np.arange(1, len(accuracy) + 1, dtype=float), accuracy, i))
    profile = line_chart("Top-1 of every class", "%", lines, x_label="classes, worst first")
    bodies = [
        _worst_classes(i, run, result) if result else ""
        for i, (run, result) in enumerate(zip(runs, results, strict=True))
    ]
    if len(runs) == 1:
        return f'<div class="two"><div>{bodies[0]}</div>{profile}</div>'
    return f'<div class="charts">{profile}</div>{_differences(known)}<div class="two">{_each(runs, bodies)}</div>'


def _worst_classes(colour: int, run: Run, result: ByClass) -> str:
    assert run.predictions is not None
    names, taken = run.predictions.classes, result.mostly_taken_for()
    accuracy = result.accuracy
    top5 = 100 * result.among_guesses / np.maximum(result.images, 1)
    present = np.flatnonzero(result.images)
    order = present[np.lexsort((present, -result.images[present], accuracy[present]))]

    def row(c: int) -> list[str]:
        wrong = taken.get(c)
        mostly = f"{escape(names[wrong[0]])} ({wrong[1]})" if wrong else "–"
        return [
            escape(names[c]),
            _bar(accuracy[c], colour, f"{accuracy[c]:.1f}"),
            f"{top5[c]:.1f}",
            str(result.images[c]),
            mostly,
        ]

    k = run.predictions.guesses.shape[1]
    head = ["class", "top-1 (%)", f"top-{k} (%)", f"{run.noun}s", "mostly taken for"]
    mean = accuracy[present].mean()
    text = (
        f"{len(run.predictions.label):,} {run.noun}s of {len(present):,} classes, from"
        f" {escape(run.predictions.checkpoint)}: {100 * run.predictions.correct.mean():.2f} % right, {mean:.2f} % as"
        " the mean over classes."
    )
    worst = _table(head, (row(c) for c in order[:WORST]), "numbers last-text")
    rest = (
        _details(f"All {len(order):,} classes", _table(head, map(row, order), "numbers last-text"))
        if len(order) > WORST
        else ""
    )
    return f'<p class="lead">{text}</p>{worst}{rest}'


def _differences(known: Sequence[tuple[int, Run, ByClass]]) -> str:
    """The classes whose accuracy differs most between runs over the same classes."""
    if len(known) < 2:
        return ""
    classes = [run.predictions.classes for _, run, _ in known if run.predictions]
    if any(names != classes[0] for names in classes):
        return '<p class="note">The runs were evaluated on different classes, so these are not compared one by one.</p>'
    accuracy = np.stack([result.accuracy for *_, result in known])
    spread = np.nan_to_num(accuracy.max(axis=0) - accuracy.min(axis=0), nan=0.0)
    order = [c for c in np.argsort(-spread, kind="stable")[:WORST] if spread[c] > 0]
    if not order:
        return ""
    rows = [
        [
            escape(classes[0][c]),
            *(_bar(a, i, f"{a:.1f}") for a, (i, *_) in zip(accuracy[:, c], known, strict=True)),
            f"{spread[c]:.1f}",
        ]
        for c in order
    ]
    head = ["class", *(_run_label(i, run) for i, run, _ in known), "spread"]
    return f'<p class="lead">Classes whose top-1 (%) differs most.</p>{_table(head, rows, "numbers")}'


def _confusions(runs: Sequence[Run], results: Sequence[ByClass | None]) -> str:
    if not any(results):
        return ""
    return _each(runs, [_confusion(run, result) if result else "" for run, result in zip(runs, results, strict=True)])


def _confusion(run: Run, result: ByClass) -> str:
    assert run.predictions is not None
    names = run.predictions.classes
    nothing = int((run.predictions.guesses[:, 0] == NOTHING).sum())
    matrix = (_small_matrix if len(names) <= MATRIX else _blocked_matrix)(names, result, run.noun)
    rows = [
        [escape(names[label]), escape(names[guess]), str(count), f"{100 * count / result.images[label]:.1f} %"]
        for label, guess, count in zip(
            result.confused_label[:WORST], result.confused_guess[:WORST], result.confused_count[:WORST], strict=True
        )
    ]
    pairs = _table(["label", "taken for", f"{run.noun}s", "of the label's"], rows, "numbers two-texts") if rows else ""
    remark = f'<p class="note">{nothing} {run.noun}s had no finite output and are in no cell.</p>' if nothing else ""
    if not rows:
        return f"<p>No {run.noun} was taken for another class.</p>{remark}"
    return f'<div class="two">{matrix}<div><h4>Most frequent confusions</h4>{pairs}{remark}</div></div>'


def _small_matrix(names: Sequence[str], result: ByClass, noun: str) -> str:
    """Counts of every pair."""
    C = len(names)
    counts = np.zeros((C, C), dtype=int)
    counts[result.confused_label, result.confused_guess] = result.confused_count
    largest = counts.max() or 1
    counts[np.arange(C), np.arange(C)] = result.correct
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    rows = []
    for label in range(C):
        cells = []
        for guess, count in enumerate(counts[label].tolist()):
            if label == guess:
                cells.append(f'<td class="right">{count}</td>')
            elif count:
                cells.append(f'<td style="--a:{math.sqrt(count / largest):.2f}">{count}</td>')
            else:
                cells.append("<td></td>")
        rows.append(f"<tr><th>{escape(names[label])}</th>{''.join(cells)}</tr>")
    return (
        f'<figure class="matrix"><figcaption><b>Confusion matrix</b> <span class="unit">{noun}s; row: label, column:'
        ' prediction</span></figcaption><div class="scroll"><table class="counts">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def _blocked_matrix(names: Sequence[str], result: ByClass, noun: str) -> str:
    """A picture of the errors between blocks of neighbouring classes."""
    errors, first = error_blocks(result, BLOCKS)
    blocks, C = len(first), len(names)
    size, left, bottom = 400, 44, 34
    ticks = []
    for i in range(0, blocks, max(1, blocks // 5)):
        at = (i + 0.5) * size / blocks
        ticks.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{first[i]}</text>')
        ticks.append(f'<text x="{left + at:.1f}" y="{size + 16}" text-anchor="middle">{first[i]}</text>')
    per_block = f"blocks of {math.ceil(C / blocks)} neighbouring classes" if blocks < C else "classes"
    inside = "; on the diagonal, errors inside a block" if blocks < C else ""
    return (
        f'<figure class="matrix"><figcaption><b>Errors by class</b> <span class="unit">% of the row’s {noun}s;'
        f" strongest: {errors.max():.1f} %</span></figcaption>"
        f'<svg viewBox="0 0 {left + size + 4} {size + bottom}" role="img" aria-label="Errors between {per_block}">'
        f'<rect class="frame" x="{left}" y="0" width="{size}" height="{size}"/>'
        f'<image class="pixels" x="{left}" y="0" width="{size}" height="{size}" preserveAspectRatio="none"'
        f' href="{matrix_picture(errors, ERROR_COLOUR)}"/>{"".join(ticks)}'
        f'<text class="label" x="{left + size / 2}" y="{size + bottom - 3}" text-anchor="middle">predicted class</text>'
        f'<text class="label" transform="translate(11 {size / 2}) rotate(-90)" text-anchor="middle">label</text></svg>'
        f'<p class="note">Errors between {per_block}, in the order of their labels{inside}.</p></figure>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def _examples(runs: Sequence[Run], count: int, data_path: str | None) -> str:
    if not count or not any(run.predictions for run in runs):
        return ""
    bodies = [_cards(run, gallery(run, count, data_path)) if run.predictions else "" for run in runs]
    return _each(runs, bodies)


def _cards(run: Run, found: Gallery) -> str:
    predictions = run.predictions
    assert predictions is not None
    names, cards = predictions.classes, []
    for i, row in enumerate(found.rows):
        guess = int(predictions.guesses[row, 0])
        label, file = escape(names[predictions.label[row]]), escape(str(predictions.file[row]))
        said = escape(names[guess]) if guess != NOTHING else "nothing finite"
        pictures = [group[i] for group in (found.pictures, found.overlays) if group]
        shown = "".join(
            f'<img src="{source}" alt="{alt}">' for source, alt in zip(pictures, (file, "attention"), strict=False)
        )
        verdict = "right" if predictions.correct[row] else "wrong"
        sure = f"{100 * predictions.probability[row, 0]:.0f} %"
        cards.append(
            f'<figure class="card"><div class="pictures">{shown}</div>'
            f'<figcaption>predicted <b class="{verdict}">{said}</b> <span class="unit">{sure}</span>'
            f"<br>label <b>{label}</b>"
            f"<small>loss {number(float(predictions.loss[row]))} · {file}</small></figcaption></figure>"
        )
    lead = f"The validation {run.noun}s with the highest loss: what the model said, how sure it was, and what they are."
    if found.layer:
        lead += (
            f" Right: where {found.layer} looks, the attention that each place receives, mean of all heads and queries."
        )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)
    return f'<p class="lead">{escape(lead)}</p>{notes}<div class="cards">{"".join(cards)}</div>'
