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
HEADER = """# Configuration reference

Generated from `config.py` by `make reference`. Precedence: defaults < BASE files < the YAML < flags the user gave <
`--opts`. Any key can be set from the command line: `--opts TRAIN.EPOCHS 100 MODEL.LA.ALPHA 3`.

| key | default | accepts | meaning |
|---|---|---|---|
"""


def render() -> str:
    """The page as Markdown."""
    flags = {key: flag for flag, key in (VALUE_FLAGS | SWITCHES).items()}
    rows = []
    for key, declared in KEYS.items():
        flag = f" (`{flags[key]}`)" if key in flags else ""
        meaning = declared.help.replace(f" ({flags[key]})", "") if key in flags else declared.help
        default = "null" if declared.default is None else declared.default if declared.default != "" else '""'
        accepts = f"one of {', '.join(NAMES[key])}" if key in NAMES else declared.kind.accepts.replace("|", "\\|")
        rows.append(f"| `{key}` | `{default}` | {accepts} | {meaning}{flag} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(render())
