"""environment.json: where and how a run was started, one entry a start, for the reader of its results.

No names of machines or users and no environment variables are stored; the command is, as it was given.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ENVIRONMENT_FILE = "environment.json"
KEPT = 50  # starts
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's microseconds of computing in so many of time
ROOT = Path(__file__).resolve().parents[1]


def short_path(path: Path | str) -> str:
    """A path as it is written from here, where it lies below."""
    there = os.path.abspath(path)
    return os.path.relpath(there) if there.startswith(os.getcwd() + os.sep) else str(path)


def cores() -> int:
    """Cores that this process may use, of its machine or container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        time, period = QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(allowed, int(time) // int(period)))
    except (OSError, ValueError):  # there is no limit, or its word is `max`
        return allowed


def share_of_cores() -> int:
    """Cores for each of the run's processes on this node."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def describe(device: "torch.device", processes: int) -> dict[str, Any]:
    """Versions, hardware, commit and command of this process, as plain values."""
    import timm  # slow to import, which readers of the file need not wait for
    import torch

    from utils.devices import described

    cuda = device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "processes": processes,
        "device": described(device),
        "device_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else None,
        "cpu": cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_cores": cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "timm": timm.__version__,
    }


def environment_with(folder: Path, device: "torch.device", processes: int) -> bytes:
    """What `folder`/environment.json has to hold: the earlier starts, as far as it can be read, and this one."""
    path = folder / ENVIRONMENT_FILE
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        starts = []
    starts = [*(starts if isinstance(starts, list) else []), describe(device, processes)][-KEPT:]
    return (json.dumps(starts, indent=1) + "\n").encode()


@cache
def commit() -> str | None:
    """The checked-out commit, with `+` where tracked files were changed; None outside a repository or without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def cpu_field(name: str) -> str:
    """What Linux says of the first processor under a name such as `model name` or `flags`; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
