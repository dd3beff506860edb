"""Build the native backend of polarity attention for this machine: python -m models.ops.polarity_attention."""

import sys

from .native import build

try:
    sys.stdout.write(f"built {build()}\n")
except (RuntimeError, OSError) as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(2)
