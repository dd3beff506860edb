"""What an examination of a data set finds, and the tasks that it divides the images into."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from logger import printable

EXAMPLES = 10  # of a finding that are printed
CHUNK = 256  # images of a task


class Finding(NamedTuple):
    is_error: bool
    text: str
    examples: tuple[str, ...]
    total: int


@dataclass
class Report:
    """What a data set holds, and what is wrong with it."""

    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def error(self, text: str, examples: Iterable[str] = ()) -> None:
        self._add(True, text, examples)

    def warn(self, text: str, examples: Iterable[str] = ()) -> None:
        self._add(False, text, examples)

    def _add(self, is_error: bool, text: str, examples: Iterable[str]) -> None:
        examples = tuple(examples)
        self.findings.append(Finding(is_error, text, examples[:EXAMPLES], len(examples)))

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def render(self) -> str:
        lines = list(self.facts)
        for finding in sorted(self.findings, key=lambda finding: not finding.is_error):
            lines.append(f"{'ERROR' if finding.is_error else 'WARNING'}: {finding.text}")
            lines += [f"    {example}" for example in finding.examples]
            if finding.total > len(finding.examples):
                lines.append(f"    … and {finding.total - len(finding.examples):,} more")
        errors = sum(finding.is_error for finding in self.findings)
        lines.append(
            "clean: no errors, no warnings"
            if self.is_clean
            else f"{errors} kinds of errors, {len(self.findings) - errors} of warnings"
        )
        return "".join(f"{printable(line)}\n" for line in lines)


class EncodedImages(Protocol):
    """Image files that are no files of their own, by position; small enough to be sent to each process."""

    def name(self, index: int) -> str: ...

    def encoded(self, index: int) -> bytes: ...


class Task(NamedTuple):
    """Images that one process examines in one go: paths, members of a zip, (none named) all of a shard, or those of
    `source` from `start` on."""

    split: str
    archive: Path | None  # the zip or shard, or the folder of parquet files
    names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    images: int = 0
    source: EncodedImages | None = None
    start: int = 0


class Layout(NamedTuple):
    """A split: its class names (None where a zip stores none), and what examines its images."""

    classes: tuple[str, ...] | None
    tasks: list[Task]


def chunks(split: str, archive: Path | None, samples: Sequence[tuple[str, int]]) -> list[Task]:
    tasks = []
    for start in range(0, len(samples), CHUNK):
        names, labels = zip(*samples[start : start + CHUNK], strict=True)
        tasks.append(Task(split, archive, names, labels, len(names)))
    return tasks
