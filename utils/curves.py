"""curves.png: loss, accuracy and learning rate of a run, from its metrics.jsonl."""

from pathlib import Path

from logger import read_metrics


def draw_curves(folder: Path) -> Path | None:
    """Draw `folder`/curves.png and return its path, or None where nothing has been logged yet."""
    metrics_file = folder / "metrics.jsonl"
    records = read_metrics(metrics_file) if metrics_file.exists() else []
    if not records:
        return None
    import matplotlib  # slow to import, and needed once, at the end of a run

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(kind: str, field: str) -> tuple[list[float], list[float]]:
        chosen = [record for record in records if record["kind"] == kind and record.get(field) is not None]
        return [record["step"] for record in chosen], [record[field] for record in chosen]

    figure, (loss, accuracy, rate) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    labels = {"train": "training (as optimised)", "val": "validation", "ema": "validation (EMA)"}
    for kind, label in labels.items():
        steps, values = series(kind, "loss")
        if steps:
            loss.plot(steps, values, label=label)
        for field, style in (("top1", "-"), ("top5", ":")):
            steps, values = series(kind, field)
            if steps:
                accuracy.plot(steps, values, style, label=f"{label} {field.replace('top', 'top-')}")
    rate.plot(*series("train", "lr"), color="tab:green")
    for axes, title, unit in (
        (loss, "Loss", "cross-entropy"),
        (accuracy, "Accuracy", "%"),
        (rate, "Learning rate", ""),
    ):
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
