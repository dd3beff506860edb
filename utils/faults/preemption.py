"""Asked to stop: signals, what all ranks agree on at a step boundary, and the marker that a preempted run leaves.

SIGTERM, SIGUSR1 and SIGHUP (the terminal is gone) on any rank ask the whole run to save and end. The ranks share the
request, and whether a timed checkpoint is due, by a reduction on the CPU that nobody waits for: what is posted at one
step boundary is read at the next, so that every rank acts at the same step.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from utils.files import write_note

# those of them that the system has
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
AGREEMENT_TIMEOUT = 10.0  # seconds a rank that was told to stop waits for the others' answer
MARKER = "PREEMPTED"


class Preempted(Exception):
    """The run was asked to stop and has saved everything; the same command continues it."""


class PeersLostError(RuntimeError):
    """Other processes of the run do not answer any more."""


class StopRequest:
    """Whether this process was told to stop, by which signal, and when (time.monotonic())."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.time = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.time = signal.Signals(number), time.monotonic()

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note the stop signals instead of dying of them; one that is ignored, as nohup does with SIGHUP, stays so."""
        listened = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in listened}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Decision(NamedTuple):
    """What every rank does at this step boundary."""

    stop: bool = False
    save: bool = False


class Agreement:
    """One `decide` per step boundary, on every rank; collective, and late by one boundary on several processes."""

    def __init__(self, request: StopRequest, timeout: timedelta, all_alive: Callable[[], bool]) -> None:
        """`all_alive` says whether the other processes still give signs of life: a slow step is no dead peer."""
        self.request, self.all_alive = request, all_alive
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def decide(self, save: bool = False) -> Decision:
        """What to do here: stop when any rank was told to, save when any rank asked for it (`save`).

        Raises PeersLostError when this rank was told to stop, and others neither answered within AGREEMENT_TIMEOUT nor
        are all alive.
        """
        if self._group is None:
            return Decision(bool(self.request), save)
        decision = self._answer()
        if not decision.stop:  # else no rank posts another question
            question = torch.tensor([bool(self.request), save and not decision.save], dtype=torch.uint8)
            work = dist.all_reduce(question, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = work, question
        return decision

    def _answer(self) -> Decision:
        if self._pending is None:
            return Decision()
        (work, answer), self._pending = self._pending, None
        began = time.monotonic()
        while not work.is_completed():  # polled, because a signal is not seen while a wait blocks
            waited = time.monotonic() - max(began, self.request.time)
            if self.request and waited > AGREEMENT_TIMEOUT and not self.all_alive():
                raise PeersLostError(
                    f"told to stop by {self.request.signal.name}, but other processes did not answer within"  # type: ignore[union-attr]
                    f" {AGREEMENT_TIMEOUT:g} s; nothing was saved, the last checkpoint is intact"
                )
            time.sleep(2e-4)
        work.wait()  # raises what went wrong
        stop, save = answer.tolist()
        return Decision(bool(stop), bool(save))


def leave_marker(folder: Path, message: str) -> None:
    """Write the marker by which launch scripts know a preempted run from a finished one."""
    write_note(folder / MARKER, message)


def remove_marker(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)
