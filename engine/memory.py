"""Memory that ran out, in one line: of what, and which keys lower the need."""

import errno
import os
import re
import sys
import traceback

import torch

SHARED = "/dev/shm"
# what torch says of a loader process that has gone, or that finds no room for a batch
GONE = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)"
)
NO_ROOM = re.compile(r"</?torch_\d+")  # a file there; a GPU has shared memory of its own
NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|[Cc]annot allocate memory|bad_alloc")

KILLED = (
    "a loader process was killed, as the system does with the largest when memory runs out: lower DATA.NUM_WORKERS"
    " (each needs its own memory) or DATA.PREFETCH_FACTOR, or give the run more memory"
)


class OutOfMemoryError(RuntimeError):
    """Memory ran out, or a loader process ended as if it had."""


def memory_problem(error: BaseException) -> str | None:
    """What ran out of memory and what helps, where `error` comes from that; else None."""
    text = str(error)
    if gone := GONE.search(text):
        if gone[2] == "Bus error":
            return _shared_memory()
        if gone[2] not in (None, "Killed"):
            return f"a loader process ended: {gone[2]}. DATA.NUM_WORKERS 0 loads in the main process and shows where"
        return KILLED
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError) and _raised_in(error, "reductions.py"):
        return KILLED  # while its batch was being received
    if "Too many open files" in text:
        import resource  # Windows has neither this limit nor the module

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"this process may have {limit} files open (ulimit -n), too few for its loader processes: raise the limit,"
            " or lower DATA.NUM_WORKERS or DATA.PREFETCH_FACTOR"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU has no memory left ({text.splitlines()[0]}): lower DATA.BATCH_SIZE, with TRAIN.GLOBAL_BATCH for"
            " the same images per step; --amp and --use-checkpoint need less too"
        )
    if isinstance(error, RuntimeError) and NO_ROOM.search(text):
        return _shared_memory()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and _raised_in(error, "synchronize.py"):
        return _shared_memory()  # a queue to loader processes could not be made, whose semaphores are files there
    if isinstance(error, MemoryError) or NO_MEMORY.search(text) or getattr(error, "errno", None) == errno.ENOMEM:
        return (
            "there is no memory left: lower DATA.NUM_WORKERS, DATA.PREFETCH_FACTOR or DATA.BATCH_SIZE, or give the run"
            " more memory"
        )
    return None


def leave_to_the_loader(unraisable: "sys.UnraisableHookArgs") -> None:
    """sys.unraisablehook of a run. A loader process that ends raises wherever the main thread is, also where that leads
    to nothing but a traceback; the loader notices it again, and is not always whole when it is taken apart."""
    error = unraisable.exc_value
    if not (error and memory_problem(error)) and "_MultiProcessingDataLoaderIter" not in repr(unraisable.object):
        sys.__unraisablehook__(unraisable)


def _shared_memory() -> str:
    status = os.statvfs(SHARED)
    size = status.f_blocks * status.f_frsize / 2**20
    return (
        f"the loader processes pass batches through shared memory, and {SHARED} has no room left (of {size:.0f} MiB):"
        " enlarge it (docker run --shm-size=8g, or --ipc=host), or lower DATA.NUM_WORKERS, DATA.PREFETCH_FACTOR or"
        " DATA.BATCH_SIZE"
    )


def _raised_in(error: BaseException, file: str) -> bool:
    """Whether an error came from below a file of multiprocessing, Python's or torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.endswith(f"multiprocessing/{file}") for frame in frames)
