"""`main.py --check-data`: read every file of a data set once, and say what is wrong with it.

An error makes training, evaluation or their results wrong; a warning is something to know about. What is examined, the
data set's builder says; every image is decoded whole, by DATA.NUM_WORKERS processes, and of a token cache every file is
compared with its digest. Nothing is written.
"""

import os
import sys

from yacs.config import CfgNode

from data.builders import builder_of
from data.findings import Report
from utils.distributed import LaunchError


def run_check(config: CfgNode) -> int:
    """Print the report; the exit code: 0 where there is nothing to report, else 1."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise LaunchError("--check-data is one process with DATA.NUM_WORKERS helpers; start it without torchrun")
    report = Report()
    builder_of(config).check(config, report)
    sys.stdout.write(report.render())
    return 0 if report.is_clean else 1
