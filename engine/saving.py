"""When a run saves inside an epoch, how it stops where it is told to, and what a write that fails means to it."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from yacs.config import CfgNode

from data.loaders import Loaders
from engine.state import Progress, checkpoint_state
from engine.training import Interval, Training
from logger import get_logger
from utils import distributed
from utils.checkpoints.naming import BESTS, run_checkpoints
from utils.checkpoints.writing import CheckpointWriter
from utils.faults.preemption import Agreement, Decision, Preempted, StopRequest, leave_marker

QUIET = 600.0  # seconds for which writes that fail for the same reason are not told again


class Checkpointer:
    """When and what a run saves, apart from the end of an epoch: every so many steps or minutes, and told to stop.

    A write that fails does not end the run while older checkpoints are there to continue from: it is logged, and the
    next one tries again. Only the last one of a run has to succeed.
    """

    def __init__(
        self,
        config: CfgNode,
        training: Training,
        loaders: Loaders,
        writer: CheckpointWriter | None,
        request: StopRequest,
        all_alive: Callable[[], bool],
        keep_folder: Callable[[], None] = lambda: None,
    ) -> None:
        """`keep_folder` puts a run folder that has gone back, or raises."""
        self.config, self.training, self.loaders = config, training, loaders
        self.writer = writer  # rank 0's
        self.request, self.keep_folder = request, keep_folder
        self.agreement = Agreement(request, timedelta(seconds=config.DIST.TIMEOUT + 30), all_alive)
        self.owed = False  # a checkpoint was due at the end of the epoch
        self.saved_at = time.monotonic()
        self._told = "", 0.0  # the last reason why a write failed, and when it was told

    def decide(self, done: int) -> Decision:
        if self.writer:
            self.keep_folder()
            self._report(self.writer.raise_problem)
        minutes, steps = self.config.CHECKPOINT.EVERY_MINUTES, self.config.CHECKPOINT.EVERY_STEPS
        due = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        decision = self.agreement.decide(due)
        save = decision.save or (steps > 0 and done % steps == 0)
        if done == self.training.steps_per_epoch:  # the checkpoint of the epoch follows
            self.owed |= save
            save = False
        return Decision(decision.stop, save)

    def save(self, epoch: int, done: int, interval: Interval, stop: bool) -> None:
        if stop:  # the loader processes were told to stop too, and are not waited for while it saves
            self.loaders.close()
        self.write(Progress(epoch, done), interval, stop=stop)
        if stop:
            folder, reason = self.training.plan.folder, self.request.signal
            why = f"told to stop by {reason.name if reason else 'another rank'}"
            epochs = "1 epoch" if epoch == 1 else f"{epoch} epochs"
            where = f"after {epochs} and {done} of {self.training.steps_per_epoch} steps"
            if distributed.rank() == 0:
                leave_marker(folder, f"{why}, saved {where}")
            raise Preempted(f"{why}: saved {where}; the same command continues")

    def better(self, validated: dict[str, float]) -> list[str]:
        """The kinds of weights whose top-1, `validated`, exceeds all before; on every rank what rank 0 knows."""
        found: list[str] = []
        if self.writer:
            before = {kind: self.writer.best(BESTS[kind].key) for kind in validated}
            found = [kind for kind, top1 in validated.items() if (best := before[kind]) is None or top1 > best]
        return distributed.broadcast_object(found)

    def end_epoch(
        self, epoch: int, validated: dict[str, float], better: list[str], beside: Mapping[str, Callable[[], None]]
    ) -> None:
        """`epoch` epochs are finished: save where that is due, the best weights and what is `beside` them always."""
        last = epoch == self.training.plan.last_epoch
        saves = epoch % self.config.SAVE_FREQ == 0 or last or self.owed
        if saves or better:
            best = {BESTS[kind].file: {BESTS[kind].key: validated[kind]} for kind in better}
            progress, interval = Progress(epoch), Interval(self.training.device)
            self.write(progress, interval, validated, best=best, beside=beside, own=saves, last=last)
        elif self.writer:
            self.writer.retry()

    def write(
        self,
        progress: Progress,
        interval: Interval,
        validated: dict[str, float] | None = None,
        *,
        last: bool = False,
        stop: bool = False,
        **what: Any,
    ) -> None:
        """Save a position, collectively; returns while rank 0 still writes, but not from the `last` one or to `stop`.

        Raises OSError on every rank when such a one cannot be written. `what` is for CheckpointWriter.save.
        """
        state = checkpoint_state(self.config, self.training, self.loaders, progress, interval, validated)
        problem = None
        if self.writer:
            self.keep_folder()
            self._report(self.writer.wait)
            self.writer.save(state, progress.position, **what)
            if last or stop:
                try:
                    self.writer.wait()
                except Exception as error:  # whatever it is, every rank has to hear of it
                    problem = str(error)
                    if stop and self.writer.written == progress.position:  # a best file: the run can continue
                        get_logger().error("%s", problem)
                        problem = None
        if (last or stop) and (problem := distributed.broadcast_object(problem)):
            raise OSError(problem)
        self.saved_at, self.owed = time.monotonic(), False

    def _report(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:
            reason, now = str(error).rpartition(": ")[2], time.monotonic()
            if self._told[0] == reason and now - self._told[1] < QUIET:
                return
            self._told = reason, now
            newest = next((path.name for _, path in run_checkpoints(self.training.plan.folder)), "nothing yet")
            get_logger().error("%s. The run goes on; it could continue from %s", error, newest)
