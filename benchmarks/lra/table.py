"""Write docs/lra.md from finished runs of Long Range Arena: python -m benchmarks.lra.table --runs output/lra

benchmarks/lra/run.sh does this at its end. A run counts when its best checkpoint has been evaluated on the test split;
without any, the page has protocol and published rows alone.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT
from config import KEYS, LRA_TASKS, config_from_tree, load_config, value_of
from logger import read_metrics

TITLES = {"listops": "ListOps", "text": "Text", "retrieval": "Retrieval", "pathfinder": "Pathfinder", "image": "Image"}
# Test accuracies in percent. PolaFormer's rows: README of its repository. Skyformer's: Table 1 of arXiv 2111.00035, one
# protocol, three seeds.
POLAFORMER = {
    "PolaFormer α = 3": {"text": 73.06, "listops": 37.35, "retrieval": 80.50, "pathfinder": 70.53, "image": 42.15},
    "PolaFormer α = 5": {"text": 72.33, "listops": 38.76, "retrieval": 80.37, "pathfinder": 68.98, "image": 41.91},
    "PolaFormer α = 7": {"text": 71.93, "listops": 37.60, "retrieval": 81.47, "pathfinder": 69.09, "image": 42.77},
}
SKYFORMER = {
    "Self-attention": {"text": 61.95, "listops": 38.37, "retrieval": 80.69, "pathfinder": 65.26, "image": 40.57},
    "Performer": {"text": 64.19, "listops": 38.02, "retrieval": 80.04, "pathfinder": 66.30, "image": 41.43},
    "Nyströmformer": {"text": 64.83, "listops": 38.51, "retrieval": 80.52, "pathfinder": 69.48, "image": 41.30},
    "Skyformer": {"text": 64.70, "listops": 38.69, "retrieval": 82.06, "pathfinder": 70.73, "image": 40.77},
}
PROTOCOL_STEPS = 50_000
GENERATED = ("listops", "pathfinder")  # the others need downloads
# What may differ between runs of one row and one cell; all else that differs makes another cell.
FREE = ("SEED", "TAG", "OUTPUT", "DATA.DATA_PATH", "MODEL.RESUME", "EVAL_MODE", "LOCAL_RANK", "PRINT_FREQ", "SAVE_FREQ")
NAMED = ("MODEL.NAME", "MODEL.LA.ATTENTION", "MODEL.LA.ALPHA", "MODEL.LA.GATE", "MODEL.LRA.LEARN_SCALE")


@dataclass(frozen=True)
class Run:
    """One finished run: `accuracy` is the test split's in percent, `changed` the keys that its preset's file lacks."""

    task: str
    preset: str
    attention: str
    data: str
    seed: int
    steps: int
    changed: tuple[str, ...]
    device: str
    accuracy: float
    best_step: int
    reference: Mapping[str, float]

    @property
    def cell(self) -> tuple[str, str, str]:
        return (self.task, self.data, self.attention)


def attention_of(config: Any) -> str:
    """What a table calls the attention of a run."""
    kind = value_of(config, "MODEL.LA.ATTENTION")
    name = f"polarity, α = {value_of(config, 'MODEL.LA.ALPHA'):g}" if kind == "polarity" else kind
    kernel = value_of(config, "MODEL.LRA.KERNEL_SIZE")
    return name + (f", depthwise {kernel}" if kernel else "")


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None where it is not finished."""
    evaluation, stored = folder / "eval_val.json", folder / "config.yaml"
    if not evaluation.is_file() or not stored.is_file():
        return None
    result = json.loads(evaluation.read_text(encoding="utf-8"))
    config, _ = config_from_tree(yaml.safe_load(stored.read_text(encoding="utf-8")), str(stored))
    name = value_of(config, "MODEL.NAME")
    preset = "clean" if name.endswith("_clean") else "skyformer"
    base = load_config(str(ROOT / "configs" / "lra" / f"{name.removeprefix('lra_')}.yaml"))
    kernel = "MODEL.LRA.KERNEL_SIZE"
    changed = tuple(
        f"{key} {value_of(config, key)}"
        for key in KEYS
        if key not in (*FREE, *NAMED, kernel) and key != "BASE" and value_of(config, key) != value_of(base, key)
    )
    records = read_metrics(folder / "metrics.jsonl")
    validations = [record for record in records if record["kind"] == "val"]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[-1]
    return Run(
        task=value_of(config, "DATA.LRA.TASK"),
        preset=preset,
        attention=attention_of(config),
        data=result["title"].removesuffix(", test split"),
        seed=value_of(config, "SEED"),
        steps=max(record["step"] for record in validations),
        changed=changed,
        device=f"{environment['processes']} × {environment['device']}",
        accuracy=result["result"]["top1"],
        best_step=max(validations, key=lambda record: (record["top1"], -record["step"]))["step"],
        reference=result["reference"],
    )


def cell_text(runs: Sequence[Run]) -> str:
    """`mean ± standard deviation (number)` of the seeds' accuracies."""
    accuracies = [run.accuracy for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}{spread} ({len(runs)})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def own_table(runs: Sequence[Run]) -> str:
    """One row a task, data and attention, with everything that a number depends on."""
    cells: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        cells[(*run.cell, run.steps, run.changed, run.device)].append(run)
    rows = []
    for (task, data, attention, steps, changed, device), members in sorted(
        cells.items(), key=lambda item: (LRA_TASKS.index(item[0][0]), item[0][1:4])
    ):
        seeds = ", ".join(str(run.seed) for run in sorted(members, key=lambda run: run.seed))
        where = ", ".join(f"{run.best_step:,}" for run in sorted(members, key=lambda run: run.seed))
        rows.append(
            (
                TITLES[task],
                attention,
                cell_text(members),
                data,
                f"{steps:,}" + ("" if steps == PROTOCOL_STEPS else f" of {PROTOCOL_STEPS:,}"),
                seeds,
                where,
                "; ".join(c for c in changed if not c.startswith(("TRAIN.STEPS", "TRAIN.EVAL_STEPS"))) or "none",
                device,
            )
        )
    header = ("task", "attention", "test accuracy, % (seeds)", "data", "steps", "seeds", "best validation at step")
    return markdown((*header, "changed keys", "device"), rows)


def reference_table(runs: Sequence[Run]) -> str:
    """What answers without a model score on the data of these runs; empty where no data say."""
    found = {(run.task, run.data): run.reference for run in runs if run.reference}
    rows = [
        (TITLES[task], data, name, f"{accuracy:.1f}")
        for (task, data), scores in sorted(found.items())
        for name, accuracy in scores.items()
    ]
    return markdown(("task", "data", "answer", "test accuracy, %"), rows) if rows else ""


def published_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    order = ("text", "listops", "retrieval", "pathfinder", "image")
    return markdown(
        ("model", *(TITLES[task] for task in order), "average"),
        [
            (name, *(f"{row[task]:.2f}" for task in order), f"{statistics.mean(row[task] for task in order):.2f}")
            for name, row in rows.items()
        ],
    )


def page(runs: Sequence[Run]) -> str:
    """The whole of docs/lra.md."""
    text = (Path(__file__).with_name("page.md")).read_text(encoding="utf-8")
    parts = {}
    for preset in ("skyformer", "clean"):
        mine = [run for run in runs if run.preset == preset]
        table = own_table(mine) if mine else "No run yet."
        reference = reference_table(mine)
        parts[preset] = table + (
            f"\n\nAnswers without a model, on the same test data:\n\n{reference}" if reference else ""
        )
    missing = [task for task in LRA_TASKS if task not in {run.task for run in runs}]
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
    parts |= {"polaformer": published_table(POLAFORMER), "skyformer_paper": published_table(SKYFORMER)}
    for name, content in parts.items():
        text = text.replace(f"<!-- {name} -->", content)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write, and say how many runs there were."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lra.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "output" / "lra", metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "lra.md", metavar="FILE")
    options = parser.parse_args(arguments)
    found = [run for folder in sorted(options.runs.glob("lra_*/*")) if (run := read_run(folder))]
    options.docs.write_text(page(found), encoding="utf-8")
    print(f"{len(found)} runs in {options.docs}")


if __name__ == "__main__":
    main()
