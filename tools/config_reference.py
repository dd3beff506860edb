"""Print the configuration reference (docs/configuration.md) from config.py: `make reference`."""

import sys
from collections.abc import Iterable

from config import KEYS, SWITCHES, VALUE_FLAGS
from models.kernels import KERNELS
from models.lra import POOLS
from models.ops.polarity_attention import BACKENDS
from models.registry import BODIES

# Keys whose values the models answer for.
NAMES: dict[str, Iterable[str]] = {
    "MODEL.TYPE": BODIES,
    "MODEL.LA.ATTENTION": KERNELS,
    "MODEL.LA.BACKEND": ("auto", *BACKENDS),
    "MODEL.LRA.POOL": POOLS,
}
FLAGS = {key: flag for flag, key in (VALUE_FLAGS | SWITCHES).items()}
HEADER = """# Configuration reference

Generated from `config.py` by `make reference`. Precedence: defaults < BASE files < the YAML < flags the user gave <
`--opts`. Any key can be set from the command line: `--opts TRAIN.EPOCHS 100 MODEL.LA.ALPHA=3`.
"""
# What people change.
FIRST = ["DATA.DATA_PATH", "DATA.BATCH_SIZE", "DATA.IMG_SIZE", "DATA.NUM_WORKERS", "MODEL.PRETRAINED"]
FIRST += ["TRAIN.EPOCHS", "TRAIN.BASE_LR", "TRAIN.GLOBAL_BATCH", "AUG.AUTO_AUGMENT", "OUTPUT"]
# By how a key begins; the first that fits.
SECTIONS = {
    "DATA.LRA.": "Long Range Arena",
    "DATA.": "Data",
    "MODEL.SWIN.": "Pola-Swin",
    "MODEL.LA.": "Attention",
    "MODEL.PPP.": "PolaFormer++ and NaLaFormer",
    "MODEL.LRA.": "Models of the Long Range Arena",
    "MODEL.": "Model",
    "TRAIN.LR_SCHEDULER.": "Learning rate schedule",
    "TRAIN.OPTIMIZER.": "Optimizer",
    "TRAIN.": "Training",
    "EMA.": "Average of the weights",
    "CHECKPOINT.": "Checkpoints",
    "AUG.": "Augmentation",
    "TEST.": "Evaluation",
    "": "Run",
}
COLUMNS = "\n| key | default | accepts | meaning |\n|---|---|---|---|\n"


def render() -> str:
    """The page as Markdown: what people change first, then every key by section, each in the order of config.py."""
    tables = {"The ten keys that people change": FIRST}
    for key in KEYS:
        title = next(title for start, title in SECTIONS.items() if key.startswith(start))
        tables.setdefault(title, []).append(key)
    parts = (f"\n## {title}\n{COLUMNS}" + "".join(map(_row, keys)) for title, keys in tables.items())
    return HEADER + "".join(parts)


def _row(key: str) -> str:
    declared, flag = KEYS[key], FLAGS.get(key)
    meaning = declared.help.replace(f" ({flag})", "") + (f" (`{flag}`)" if flag else "")
    default = "null" if declared.default is None else declared.default if declared.default != "" else '""'
    accepts = f"one of {', '.join(NAMES[key])}" if key in NAMES else declared.kind.accepts.replace("|", "\\|")
    return f"| `{key}` | `{default}` | {accepts} | {meaning} |\n"


if __name__ == "__main__":
    sys.stdout.write(render())
