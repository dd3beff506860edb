"""Write docs/lra.md from finished runs of Long Range Arena: python -m experiments.lra.table --runs output/lra

experiments/lra/run.sh does this at its end. A run counts when it came to its end and its best checkpoint has been
evaluated on the test split; the others are named. Without any, the page has protocol and published rows alone.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from config import LRA_TASKS
from experiments.lra.runs import FinishedRun, read_run
from tools.command_line import file_path
from tools.pages import markdown

ROOT = Path(__file__).resolve().parents[2]

TITLES = {"listops": "ListOps", "text": "Text", "retrieval": "Retrieval", "pathfinder": "Pathfinder", "image": "Image"}
PROTOCOL_STEPS = 50_000
GENERATED = ("listops", "pathfinder")  # the others need downloads
STAND_IN = "Fashion-MNIST"  # begins the title of data that stand in for CIFAR-10


def cell_text(runs: Sequence[FinishedRun]) -> str:
    """`mean ± standard deviation (number)` of the seeds' accuracies."""
    accuracies = [run.accuracy for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}{spread} ({len(runs)})"


def own_table(runs: Sequence[FinishedRun]) -> str:
    """One row a task, data and attention, with everything that a number depends on."""
    cells: dict[tuple, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        cells[run.cell].append(run)
    rows = []
    for _, members in sorted(cells.items(), key=lambda item: (LRA_TASKS.index(item[0][0]), item[0][1:])):
        members = sorted(members, key=lambda run: run.seed)
        one = members[0]
        changed = [pair for pair in one.changed if not pair.startswith("TRAIN.STEPS ")]
        rows.append(
            (
                TITLES[one.task],
                one.attention,
                cell_text(members),
                one.data,
                f"{one.steps:,}" + ("" if one.steps == PROTOCOL_STEPS else f" of {PROTOCOL_STEPS:,}"),
                ", ".join(str(run.seed) for run in members),
                ", ".join(f"{run.best_step:,}" for run in members),
                one.precision,
                "; ".join(changed) or "none",
                one.device,
            )
        )
    header = ("task", "attention", "test accuracy, % (seeds)", "data", "steps", "seeds", "best validation at step")
    return markdown((*header, "precision", "changed keys", "device"), rows)


def reference_table(runs: Sequence[FinishedRun]) -> str:
    """What answers without a model score on the data of these runs; empty where no data say."""
    found = {(run.task, run.data): run.reference for run in runs if run.reference}
    rows = [
        (TITLES[task], data, name, f"{accuracy:.1f}")
        for (task, data), scores in sorted(found.items())
        for name, accuracy in scores.items()
    ]
    return markdown(("task", "data", "answer", "test accuracy, %"), rows) if rows else ""


def page(runs: Sequence[FinishedRun]) -> str:
    """The whole of docs/lra.md."""
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    parts = {}
    for preset in ("skyformer", "clean"):
        mine = [run for run in runs if run.preset == preset]
        parts[preset] = own_table(mine) if mine else "No run yet."
        if reference := reference_table(mine):
            parts[preset] += f"\n\nAnswers without a model, on the same test data:\n\n{reference}"
    missing = [task for task in LRA_TASKS if task not in {r.task for r in runs if not r.data.startswith(STAND_IN)}]
    generated, downloaded = (
        ", ".join(TITLES[task] for task in missing if (task in GENERATED) == kind) for kind in (True, False)
    )
    sentences = [f"Not run yet: {generated}."] if generated else []
    if downloaded:
        sentences.append(
            f"Not run: {downloaded}. Their data were not at hand; their readers, models and training are tested on"
            " small files in the official formats."
        )
    parts["missing"] = " ".join(sentences) or "All five tasks were run."
    for name, content in parts.items():
        text = text.replace(f"<!-- {name} -->", content)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write, and say how many runs there were."""
    parser = argparse.ArgumentParser(prog="python -m experiments.lra.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=file_path, default=ROOT / "output" / "lra", metavar="FOLDER")
    parser.add_argument("--docs", type=file_path, default=ROOT / "docs" / "lra.md", metavar="FILE")
    options = parser.parse_args(arguments)
    found = []
    for folder in sorted(options.runs.glob("lra_*/*")):
        if run := read_run(folder):
            found.append(run)
        else:
            print(f"left out, because it is not finished: {folder}")
    options.docs.write_text(page(found), encoding="utf-8")
    print(f"{len(found)} runs in {options.docs}")


if __name__ == "__main__":
    main()
