"""Print the configuration reference (docs/configuration.md) from config.py: `make reference`."""

import sys

from config import KEYS, SWITCHES, VALUE_FLAGS

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
        accepts = declared.kind.accepts.replace("|", "\\|")
        rows.append(f"| `{key}` | `{default}` | {accepts} | {meaning}{flag} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(render())
