"""YAML files that may be anything: read within limits, and what is wrong said without quoting what they hold."""

from pathlib import Path
from typing import Any

import yaml

LARGEST_FILE, LARGEST_MAPPING = 2**20, 10_000  # bytes and keys, which no configuration has


class YamlError(ValueError):
    """A file or text that is no mapping in YAML: the message names it and what is wrong."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with a bound on what merges (`<<`) may multiply a small file to; a key that stands twice in
    a section is an error, where the first one would be forgotten."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(names) > len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.YAMLError(f"{twice[:80]} stands twice in a section")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > LARGEST_MAPPING:
            raise yaml.YAMLError(f"a section of more than {LARGEST_MAPPING} keys")


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that a text holds; empty for an empty text. Raises YamlError."""
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:  # PyYAML's own message quotes the lines
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise YamlError(f"{source} is not valid YAML{line}") from error
    except RecursionError as error:
        raise YamlError(f"{source} is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        raise YamlError(f"{source} is not valid YAML: {str(error).splitlines()[0][:80]}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise YamlError(f"{source}: expected `KEY: value` lines, received a {type(tree).__name__}")
    return tree


def read_yaml(file: Path) -> dict[str, Any]:
    """`parse_yaml` of a file. Raises FileNotFoundError, and YamlError for what cannot be read or is no mapping."""
    shown = str(file)[:200]
    try:
        if file.is_dir():
            raise YamlError(f"config file {shown} is a folder")
        if file.exists() and not file.is_file():
            raise YamlError(f"config file {shown} is a pipe or device, expected a YAML file")
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise YamlError(f"config file {shown} has {size} bytes, expected at most {LARGEST_FILE}")
        return parse_yaml(file.read_text(encoding="utf-8"), shown)
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise YamlError(f"{shown} is not valid YAML: no UTF-8 text") from error
    except OSError as error:
        raise YamlError(f"config file {shown} cannot be read: {error.strerror}") from error
