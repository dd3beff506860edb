"""Finished runs of Long Range Arena, and how far a run is: python -m experiments.lra.runs ARGUMENTS OF main.py

Prints `untrained`, `trained` (its best checkpoint is not evaluated on the test split yet) or `finished` for the folder
that main.py would use. Exit code 2, with the keys, where that folder holds a run of other settings.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import load_config, make_plan, parse_command_line, value_of
from experiments.settings import differences, stored_config
from logger import read_metrics
from models.kernels import KERNELS
from utils.checkpoints.naming import BEST_FILE
from utils.environment import ENVIRONMENT_FILE

# What may change when a run is continued, because no number depends on it.
HARMLESS = (
    "TAG",
    "OUTPUT",
    "MODEL.RESUME",
    "EVAL_MODE",
    "LOCAL_RANK",
    "TRACKER",
    "PRINT_FREQ",
    "SAVE_FREQ",
    "CHECKPOINT.KEEP",
    "DATA.NUM_WORKERS",
)
# What may differ between runs of one row; the table names the data by their title.
FREE = (*HARMLESS, "SEED", "DATA.DATA_PATH")
# What the name of the attention says, the column of the precision, and the name of the task.
NAMED = (
    "MODEL.NAME",
    "MODEL.LA.ATTENTION",
    "MODEL.LA.ALPHA",
    "MODEL.LA.GATE",
    "MODEL.LA.GATE_BIAS",
    "MODEL.LRA.LEARN_SCALE",
    "MODEL.LRA.KERNEL_SIZE",
    "AMP",
    "AMP_DTYPE",
)
QUIRKS = ("MODEL.LRA.POOL", "DATA.LRA.BLACK_IS_PADDING", "DATA.LRA.HELD_OUT")  # what the presets differ in


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: `accuracy` is the test split's in percent, `changed` the keys that its preset's file lacks."""

    task: str
    preset: str
    attention: str
    data: str
    seed: int
    steps: int
    changed: tuple[str, ...]
    precision: str
    device: str
    accuracy: float
    best_step: int
    reference: Mapping[str, float]

    @property
    def cell(self) -> tuple:
        """What runs have in common whose accuracies may be averaged."""
        return self.task, self.data, self.attention, self.steps, self.changed, self.precision, self.device


def attention_of(config: CfgNode) -> str:
    """What a table calls the attention of a run, and what stands around it; plain: neither gate nor scale."""
    kind = value_of(config, "MODEL.LA.ATTENTION")
    words = [f"polarity, α = {value_of(config, 'MODEL.LA.ALPHA'):g}" if kind == "polarity" else kind]
    gate, bias = value_of(config, "MODEL.LA.GATE"), value_of(config, "MODEL.LA.GATE_BIAS")
    if gate:
        words.append("gate" if bias is None else f"gate from {bias:g}")
    if value_of(config, "MODEL.LRA.LEARN_SCALE") and getattr(KERNELS.get(kind), "scaled", True):
        words.append("scale")
    if len(words) == 1:
        words.append("plain")
    if kernel := value_of(config, "MODEL.LRA.KERNEL_SIZE"):
        words.append(f"depthwise {kernel}")
    return ", ".join(words)


def best_validation(folder: Path, config: CfgNode) -> int | None:
    """Step of the best validation of a run that came to its end; None while it has steps left."""
    path = folder / "metrics.jsonl"
    validations = [record for record in read_metrics(path) if record["kind"] == "val"] if path.is_file() else []
    if max((record["step"] for record in validations), default=0) < config.TRAIN.STEPS:
        return None
    return int(max(validations, key=lambda record: (record["top1"], -record["step"]))["step"])


def test_result(folder: Path, config: CfgNode, best_step: int) -> dict[str, Any] | None:
    """The evaluation of the checkpoint that validated best; None where another, or none, has been evaluated."""
    path = folder / "eval_test.json"
    if not path.is_file():
        return None
    evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    subject = evaluation["subject"]
    right = Path(subject["checkpoint"]).name == BEST_FILE and subject["weights"] == "model"
    return evaluation if right and subject["epoch"] * config.TRAIN.EVAL_STEPS == best_step else None


def preset_of(config: CfgNode) -> tuple[str, CfgNode]:
    """The preset whose tables a run belongs to, and the preset's configuration of its task."""
    folder, task = Path(__file__).resolve().parents[2] / "configs" / "lra", config.DATA.LRA.TASK
    published = load_config(str(folder / f"{task}.yaml"))
    if all(value_of(config, key) == value_of(published, key) for key in QUIRKS):
        return "skyformer", published
    return "clean", load_config(str(folder / f"{task}_clean.yaml"))


def read_run(folder: Path) -> FinishedRun | None:
    """The run in a folder; None where it is not finished."""
    config = stored_config(folder)
    if config is None or config.DATA.DATASET != "lra" or config.TRAIN.STEPS is None:
        return None
    best_step = best_validation(folder, config)
    evaluation = None if best_step is None else test_result(folder, config, best_step)
    if best_step is None or evaluation is None:
        return None
    preset, base = preset_of(config)
    starts = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    devices = dict.fromkeys(f"{start['processes']} × {start['device']}" for start in starts)
    return FinishedRun(
        task=config.DATA.LRA.TASK,
        preset=preset,
        attention=attention_of(config),
        data=evaluation["title"].removesuffix(", test split"),
        seed=config.SEED,
        steps=config.TRAIN.STEPS,
        changed=tuple(f"{key} {value}" for key, (value, _) in differences(config, base, (*FREE, *NAMED)).items()),
        precision=config.AMP_DTYPE if config.AMP else "float32",
        device=", then ".join(devices),
        accuracy=evaluation["result"]["top1"],
        best_step=best_step,
        reference=evaluation["reference"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how far the run is that main.py would make with these arguments."""
    config = parse_command_line(arguments)
    folder = make_plan(config).folder
    stored = stored_config(folder)
    if stored and (other := differences(stored, config, HARMLESS)):
        held = ", ".join(f"{key} {value}" for key, (value, _) in other.items())
        print(f"{folder} holds a run with {held}; remove it, or name another OUTPUT", file=sys.stderr)
        sys.exit(2)
    best_step = best_validation(folder, config) if stored else None
    if best_step is None:
        print("untrained")
    else:
        print("finished" if test_result(folder, config, best_step) else "trained")


if __name__ == "__main__":
    main()
