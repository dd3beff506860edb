"""Memory that runs out is one line, which names what ran out and what helps.

pytest tests/test_memory.py
"""

import errno
import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from test_survival import at_step

import main
from config import load_config
from engine import memory
from engine.memory import OutOfMemoryError, leave_to_the_loader, memory_problem

KILLED = "DataLoader worker (pid 13603) is killed by signal: Killed. "
BUS = (
    "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    " shared memory. Please try to raise your shared memory limit."
)
NO_ROOM = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File …\n"
    "RuntimeError: unable to allocate shared memory(shm) for file </torch_12827_3327822361_0>: No space left on device"
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(KILLED), ["was killed", "memory", "DATA.NUM_WORKERS"]),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), ["killed", "DATA.NUM_WORKERS"]),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Segmentation fault. "), ["Segmentation fault"]),
        (RuntimeError(BUS), ["/dev/shm has no room", "--shm-size", "DATA.NUM_WORKERS"]),
        (RuntimeError(NO_ROOM), ["/dev/shm has no room", "MiB", "--shm-size", "DATA.NUM_WORKERS"]),
        (RuntimeError("unable to write to file </torch_7_8_9>: No space left on device (28)"), ["--shm-size"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), ["DATA.BATCH_SIZE"]),
        (RuntimeError("Too many open files. Communication with the workers is"), ["ulimit -n", "DATA.NUM_WORKERS"]),
        (OSError(errno.EMFILE, "Too many open files"), ["ulimit -n", "DATA.NUM_WORKERS"]),
        (MemoryError(), ["no memory left", "DATA.NUM_WORKERS"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["no memory left", "DATA.NUM_WORKERS"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), ["GPU", "DATA.BATCH_SIZE"]),
    ],
)
def test_every_kind_is_one_line_with_what_helps(error, words):
    line = memory_problem(error)
    assert line and "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left", "log.txt"),
        KeyError("memory"),
        RuntimeError("OutOfResources: out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    ],
)
def test_other_errors_are_left_alone(error):
    assert memory_problem(error) is None


def test_semaphores_that_find_no_room_are_named(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", full)
    with pytest.raises(OSError, match="No space left") as raised:
        multiprocessing.Lock()
    assert "/dev/shm has no room" in memory_problem(raised.value)


def test_a_loader_process_killed_in_a_run_ends_it_in_one_line(tiny, monkeypatch):
    """As the system does when memory runs out; whoever asks the loader next hears of it."""
    at_step(monkeypatch, {3: lambda: [os.kill(each.pid, signal.SIGKILL) for each in multiprocessing.active_children()]})
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(OutOfMemoryError, match="a loader process was killed, as the system does") as raised:
            main.reported.__wrapped__(load_config(str(tiny), ["TRAIN.EPOCHS", "1", "DATA.NUM_WORKERS", "1"]))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert raised.value.__suppress_context__


def test_what_falls_apart_after_it_leaves_no_traceback(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)

    def unraisable(error, place):
        leave_to_the_loader(SimpleNamespace(exc_value=error, object=place))

    unraisable(RuntimeError(KILLED), print)
    unraisable(AttributeError("_workers"), torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__del__)
    assert not shown
    unraisable(RuntimeError("another"), print)
    assert len(shown) == 1
    assert memory.SHARED == "/dev/shm"
