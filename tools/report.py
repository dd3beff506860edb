"""A run, or several compared, as one HTML page that needs nothing but itself.

python -m tools.report output/pola_swin_t/default                          writes report.html into the run folder
python -m tools.report output/pola_swin_t/{a,b,c} --output compared.html   compares three runs

docs/report.md says what the page shows and where each part comes from. Exit codes: 0 written, 2 a mistake.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as tools/report.py: what it imports lies beside tools/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.command_line import answer, file_path, program, say
from tools.run_report.page import DEFAULT_CURVES, render
from tools.run_report.runs import ReportError, find_runs, names_of, read_run
from utils.curves import METRICS
from utils.files import write_atomically


def build_parser() -> argparse.ArgumentParser:
    parser = program("python -m tools.report", __doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=file_path, help="run folder, OUTPUT/NAME/TAG, or a folder of some")
    where = "the page (default: report.html in the run folder, of several in the folder that holds them all)"
    add("--output", metavar="FILE", type=file_path, help=where)
    what = f"what to draw, of {', '.join(METRICS)} (default: {' '.join(DEFAULT_CURVES)})"
    add("--curves", metavar="METRIC", nargs="+", default=DEFAULT_CURVES, help=what)
    add("--images", metavar="N", type=int, default=8, help="hardest validation images per run (default 8; 0: none)")
    add("--data-path", metavar="PATH", help="where the data set is, if not where the run's configuration says")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.images < 0:
        parser.error(f"--images {arguments.images}: expected 0 or more")
    return answer(lambda: run(arguments), mistakes=(ReportError,))


def run(arguments: argparse.Namespace) -> None:
    """Read the runs, write the page, and say what the reader of a run had to leave out."""
    folders = find_runs(arguments.runs)
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    page = render(runs, curves=arguments.curves, images=arguments.images, data_path=arguments.data_path)
    home = folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.resolve() for f in folders]))
    path = arguments.output or home / "report.html"
    _write(path, page)
    for run in runs:
        for note in run.notes:
            say(f"note: {run.name}: {note}")
    say(f"{path} ({path.stat().st_size / 1e6:.2f} MB): {', '.join(run.name for run in runs)}")


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ReportError(
            f"{path} cannot be written ({error.strerror}); --output FILE puts the page elsewhere"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
