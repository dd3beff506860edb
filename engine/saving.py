"""When a run saves inside an epoch, how it stops where it is told to, and what a write that fails means to it."""

import time
from collections.abc import Callable
from datetime import timedelta

from yacs.config import CfgNode

from data.loaders import Loaders
from engine.state import Progress, checkpoint_state
from engine.training import Interval, Training
from logger import get_logger
from utils import distributed
from utils.checkpoints.naming import run_checkpoints
from utils.checkpoints.writing import CheckpointWriter
from utils.faults.preemption import Agreement, Decision, Preempted, StopRequest, leave_marker


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
        best: float,
        request: StopRequest,
        all_alive: Callable[[], bool],
    ) -> None:
        self.config, self.training, self.loaders = config, training, loaders
        self.writer = writer  # rank 0's
        self.best = best
        self.request = request
        self.agreement = Agreement(request, timedelta(seconds=config.DIST.TIMEOUT + 30), all_alive)
        self.owed = False  # a checkpoint was due at the end of the epoch
        self.saved_at = time.monotonic()

    def decide(self, done: int) -> Decision:
        if self.writer:
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
        self.write(Progress(epoch, self.best, done), interval, last=stop)
        if stop:
            folder, reason = self.training.plan.folder, self.request.signal
            why = f"told to stop by {reason.name if reason else 'another rank'}"
            where = f"after {epoch} epochs and {done} of {self.training.steps_per_epoch} steps"
            if distributed.rank() == 0:
                leave_marker(folder, f"{why}, saved {where}")
            raise Preempted(f"{why}: saved {where}; the same command continues")

    def write(
        self,
        progress: Progress,
        interval: Interval,
        *,
        best: bool = False,
        own: bool = True,
        last: bool = False,
    ) -> None:
        """Save a position, collectively; returns while rank 0 still writes unless this is the `last` one.

        Raises OSError on every rank when the last one cannot be written.
        """
        state = checkpoint_state(self.config, self.training, self.loaders, progress, interval)
        problem = None
        if self.writer:
            self._report(self.writer.wait)
            self.writer.save(state, progress.position, best=best, own=own)
            if last:
                try:
                    self.writer.wait()
                except Exception as error:  # whatever it is, every rank has to hear of it
                    problem = str(error)
        if last and (problem := distributed.broadcast_object(problem)):
            raise OSError(problem)
        self.saved_at, self.owed = time.monotonic(), False

    def _report(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:
            newest = next((path.name for _, path in run_checkpoints(self.training.plan.folder)), "nothing yet")
            get_logger().error("%s. The run goes on; it could continue from %s", error, newest)
