"""Two threads of every process of a distributed run that end the process when the run cannot go on.

Each process publishes once a second, in the store by which the processes found each other, how far it is. From this a
process that makes no progress for the configured time, or that is told to stop while a peer is gone, can say which rank
on which host was last seen at which step, and end: the launcher then ends, or restarts, the rest.
"""

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from logger import get_logger
from utils import distributed
from utils.faults.preemption import STOP_SIGNALS, Preempted

INTERVAL = 1.0  # seconds between two publications
SILENCE = 5.0  # seconds without one after which a process counts as gone
ENDED = -1  # tick of a process that has left on purpose
LAUNCHER = "POLAFORMER_LAUNCHER"  # environment variable with the process id of the script that started torchrun


class RunStuckError(RuntimeError):
    """The run made no progress for too long, or lost a process."""


class Sign(NamedTuple):
    """What a process says of itself: how many beats it has done and where the last one was."""

    beats: int
    step: int  # from 0; messages count from 1, as log lines do
    phase: str
    host: str
    pid: int
    tick: int  # publications so far: a process that hangs in Python still publishes, one that is gone does not; ENDED


class Watchdog:
    """Watches over `beat`s. Does nothing on one process."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._beats, self._step, self._phase = 0, 0, "start"
        self._changed = time.monotonic()
        self._peer_error: str | None = None
        self._peers: _Peers | None = None

    def all_alive(self) -> bool:
        """Whether every process gave signs of life lately, as far as this one has looked."""
        return self._peers is None or not self._peers.silent()

    def beat(self, step: int, phase: str) -> None:
        """This process begins `phase` of optimizer step `step`."""
        self._step, self._phase = step, phase
        self.go_on()

    def go_on(self) -> None:
        """What this process is at takes long, and is known to go on."""
        self._beats += 1
        self._changed = time.monotonic()

    def explain(self, error: RuntimeError) -> None:
        """An exchange with other processes failed: end this process, saying who is gone; return if nobody is."""
        if dist.is_initialized():
            self._peer_error = str(error).splitlines()[0]
            time.sleep(2 * SILENCE)

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch while the run goes on. Who leaves by an error is missed by the others; who leaves otherwise is not."""
        if not dist.is_initialized():
            yield self
            return
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        ended = threading.Event()
        # a connection of its own: that of the main thread may be waiting
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        # who they are is known before anyone can hang, whom nobody could ask then
        known = [Sign(*each) for each in distributed.gather_objects(self._sign(0))]
        self._peers = _Peers(store, self._sign, known)
        threads = [
            threading.Thread(target=self._watch, args=(ended, reader, self._peers), name="watchdog", daemon=True),
            threading.Thread(target=self._peers.exchange, args=(ended,), name="signs", daemon=True),
        ]
        for thread in threads:
            thread.start()
        meant = False
        try:
            yield self
            meant = True
        except Preempted:
            meant = True
            raise
        finally:
            ended.set()
            for thread in threads:
                thread.join(2 * INTERVAL)  # the store may hang
            if meant and not threads[1].is_alive():
                self._peers.leave()
            signal.set_wakeup_fd(before)
            reader.close()
            writer.close()

    def _watch(self, ended: threading.Event, signals: socket.socket, peers: "_Peers") -> None:
        """Judge once a second. Only clocks and what the other thread has read: this one must never wait."""
        parent, launcher = os.getppid(), int(os.environ.get(LAUNCHER, 0))
        told_to_stop, orphan = False, False
        while not ended.wait(INTERVAL):
            if not orphan and (os.getppid() != parent or (launcher and not _exists(launcher))):
                orphan = True
                get_logger().warning("the launcher of this run is gone: saving and stopping")
                os.kill(os.getpid(), signal.SIGTERM)
            with suppress(BlockingIOError):  # the main thread may be blocked, and Python's own handler with it
                told_to_stop = told_to_stop or any(number in STOP_SIGNALS for number in signals.recv(64))
            stuck = time.monotonic() - self._changed > self.timeout
            if not (stuck or told_to_stop or self._peer_error):
                continue
            peers.look()
            silent = peers.silent()
            if stuck and not silent and time.monotonic() - peers.advanced < self.timeout:
                continue  # it waits for a process that is busy: rank 0 with its disk
            if stuck and peers.watched() > SILENCE + INTERVAL:
                slowest = silent or peers.slowest()
                self._end(peers, f"no progress for {self.timeout:g} s, waiting for {peers.describe(slowest)}")
            if not stuck and silent:
                why = self._peer_error or "told to stop"
                self._end(peers, f"{peers.describe(silent)}, does not answer any more ({why})")

    def _sign(self, tick: int) -> Sign:
        return Sign(self._beats, self._step, self._phase, socket.gethostname(), os.getpid(), tick)

    def _end(self, peers: "_Peers", reason: str) -> None:
        """Say why, end what hangs on this host too, and end this process at once: its main thread may be blocked."""
        message = (
            f"{reason}. This is rank {distributed.rank()} on host {socket.gethostname()}, in {self._phase} of step"
            f" {self._step + 1}. The last checkpoint is intact; the same command continues from it"
        )
        get_logger().error("error: %s", message)
        try:
            raise RunStuckError(message)
        except RunStuckError as error:
            get_error_handler().record_exception(error)
        for rank in peers.silent():
            sign = peers.signs.get(rank)
            if sign is not None and sign.host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(sign.pid, signal.SIGKILL)
        os._exit(1)


class _Peers:
    """The signs of all processes, and since when each has not changed; read and written by a thread of their own.

    The store may be in rank 0: one that does not reply is taken as rank 0's silence.
    """

    def __init__(self, store: Any, sign: Callable[[int], Sign], known: Sequence[Sign]) -> None:
        """`known`: what each said before the first step."""
        self.store, self.sign, self.known = store, sign, known
        self.signs: dict[int, Sign] = {}
        self.advanced = -math.inf  # when a process was last seen to have done more than before
        self._seen: dict[int, tuple[int, float]] = {}
        self._replied = time.monotonic()
        self._began: float | None = None

    def exchange(self, ended: threading.Event) -> None:
        """Once a second publish this process's sign and read rank 0's, and all of them when somebody looks."""
        tick = 0
        while not ended.wait(INTERVAL):
            tick += 1
            with suppress(RuntimeError, dist.DistError):  # no reply
                self.store.set(_key(distributed.rank()), json.dumps(self.sign(tick)))
                for rank in range(distributed.world_size()) if self._began is not None else [0]:
                    self._read(rank)
                self._replied = time.monotonic()

    def leave(self) -> None:
        """Publish that this process ends on purpose."""
        with suppress(RuntimeError, dist.DistError):
            self.store.set(_key(distributed.rank()), json.dumps(self.sign(ENDED)))

    def _read(self, rank: int) -> None:
        if self.store.check([_key(rank)]):
            sign = Sign(*json.loads(self.store.get(_key(rank))))
            if rank in self.signs and sign.beats > self.signs[rank].beats:
                self.advanced = time.monotonic()
            self.signs[rank] = sign
            if rank not in self._seen or self._seen[rank][0] != sign.tick:
                self._seen[rank] = sign.tick, time.monotonic()

    def look(self) -> None:
        """From now on read every process's sign."""
        if self._began is None:
            self._began = time.monotonic()

    def watched(self) -> float:
        """Seconds since the first look."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def silent(self) -> list[int]:
        """Ranks that have published nothing for SILENCE, as far as this process has looked."""
        now = time.monotonic()
        first_ended = 0 in self.signs and self.signs[0].tick == ENDED
        if now - self._replied > SILENCE and not first_ended:
            return [0]
        if self._began is None:
            return []
        return [
            rank
            for rank in range(distributed.world_size())
            if now - max(self._began, self._seen.get(rank, (0, 0.0))[1]) > SILENCE
            and (rank not in self.signs or self.signs[rank].tick != ENDED)
        ]

    def slowest(self) -> list[int]:
        """Ranks with the fewest beats: those that the others wait for."""
        fewest = min(sign.beats for sign in self.signs.values())
        return [rank for rank, sign in self.signs.items() if sign.beats == fewest]

    def describe(self, ranks: list[int]) -> str:
        return ", ".join(self._described(rank) for rank in ranks)

    def _described(self, rank: int) -> str:
        """A sign is up to a second old, in which many steps may go by; but no process is more than one step ahead of
        another, because it waits for their gradients."""
        sign = self.signs.get(rank, self.known[rank])
        step, phase = sign.step, sign.phase
        if (together := self.sign(0).step - 1) > step:
            step, phase = together, "the exchange of gradients"
        return f"rank {rank} on host {sign.host}, last seen in {phase} of step {step + 1}"


def _key(rank: int) -> str:
    return f"polaformer/sign/{rank}"


def _exists(pid: int) -> bool:
    try:
        with suppress(PermissionError):  # it exists, and is somebody else's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
