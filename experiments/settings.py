"""What a run folder was started with, and how that differs from another configuration."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import KEYS, config_from_tree, value_of
from utils.yaml_files import read_yaml


def stored_config(folder: Path) -> CfgNode | None:
    """The configuration of the run in a folder; None where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    return config_from_tree(read_yaml(path), str(path))[0]


def differences(config: CfgNode, other: CfgNode, ignored: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Both values of every key that the two differ in; BASE, which only says where others come from, is left out."""
    values = {key: (value_of(config, key), value_of(other, key)) for key in KEYS if key not in ("BASE", *ignored)}
    return {key: (one, another) for key, (one, another) in values.items() if one != another}
