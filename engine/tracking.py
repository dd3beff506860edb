"""TRACKER: what a run tells an experiment tracker beside its own folder, on a thread that the run never waits for."""

import json
import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml
from yacs.config import CfgNode

from logger import Sink, get_logger
from utils.files import write_note

TRACKER_FILE = "tracker.json"  # in the run folder: which tracker, and under which id it knows the run
THREAD = "tracker"
METHODS = ("start", "log", "finish")
PATIENCE = 15.0  # seconds that the end of a run waits for its tracker
PAUSE = 60.0  # seconds after a call that raised, before the next one


class Tracker(Protocol):
    """What TRACKER module:Class names. Made without arguments; all calls come from one thread, of rank 0 alone.

    A call that raises is made again later, in its place; those after it wait.
    """

    def start(self, folder: str, config: dict[str, Any], run_id: str | None) -> str | None:
        """Begin the run of a folder, or continue the one that an earlier call gave the id of; returns the id."""
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """What a line of metrics.jsonl holds, by names such as train/loss, after `step` optimizer steps."""
        ...

    def finish(self, report: dict[str, Any]) -> None:
        """The run has ended: whether it is finished, the best accuracies, where its folder is."""
        ...


class WandbTracker:
    """Weights & Biases; its environment variables (WANDB_PROJECT, WANDB_MODE, …) say where and how."""

    def start(self, folder: str, config: dict[str, Any], run_id: str | None) -> str | None:
        import wandb  # optional

        settings = wandb.Settings(console="off")  # the run's own log stays as it is
        self.run = wandb.init(id=run_id, resume="allow", name=folder, dir=folder, config=config, settings=settings)
        self.run.define_metric("*", step_metric="step")  # a run that continues goes back to its last checkpoint
        return self.run.id

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def finish(self, report: dict[str, Any]) -> None:
        self.run.summary.update(report)
        self.run.finish()


def tracker_class(name: str) -> type[Tracker] | None:
    """What TRACKER names; None for none. Raises ValueError where it cannot be imported, or is no tracker."""
    if name == "none":
        return None
    if name == "wandb":
        if find_spec("wandb") is None:
            raise ValueError("TRACKER is wandb, which is not installed: `pip install wandb`, or set TRACKER none")
        return WandbTracker
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as problem:  # a module of the user's may raise anything, and end as a program does
        raise ValueError(
            f"TRACKER {name} cannot be imported ({type(problem).__name__}: {problem}); its module has to lie beside"
            " main.py or on PYTHONPATH"
        ) from problem
    if missing := [each for each in METHODS if not callable(getattr(found, each, None))]:
        raise ValueError(f"TRACKER {name} lacks {', '.join(missing)} of its methods {', '.join(METHODS)}")
    return found


def hangs() -> bool:
    """Whether a tracker still has not answered: what its library does at the end of the program may hang too."""
    return any(thread.name == THREAD for thread in threading.enumerate())


class Tracking:
    """Hands a run's numbers to its tracker. One that is down, hangs or raises costs a warning, and no time."""

    def __init__(self, config: CfgNode, folder: Path, *, continues: bool) -> None:
        """`continues`: the run goes on from a checkpoint, and so does the tracker's."""
        self.name, self.path = config.TRACKER, folder / TRACKER_FILE
        kind = tracker_class(self.name)
        assert kind is not None
        self._kind, self._again = kind, 0.0
        self._tracker: Tracker | None = None
        self._calls: queue.SimpleQueue[tuple[str, tuple] | None] = queue.SimpleQueue()
        self._sink = Sink(f"the tracker {self.name}", self._call)
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()
        known = self._stored_id() if continues else None
        self._calls.put(("start", (str(folder), yaml.safe_load(config.dump()), known)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._calls.put(("log", (dict(values), step)))

    def finish(self, report: Mapping[str, Any]) -> None:
        """Hand over the end of the run, and wait for the tracker for a while."""
        self._calls.put(("finish", (dict(report),)))
        self._calls.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            get_logger().warning(
                "the tracker %s gave no answer within %g s: the run ends without it", self.name, PATIENCE
            )

    def _stored_id(self) -> str | None:
        with suppress(OSError, ValueError, AttributeError):
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            return stored.get("id") if stored.get("tracker") == self.name else None
        return None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._sink.put(call)
        self._again = 0.0
        self._sink.close()

    def _call(self, call: tuple[str, tuple]) -> None:
        method, arguments = call
        if time.monotonic() < self._again:
            raise BlockingIOError  # "not now"
        try:
            self._tracker = self._tracker or self._kind()
            answer = getattr(self._tracker, method)(*arguments)
        except BaseException as problem:  # a library may even ask to exit
            self._again = time.monotonic() + PAUSE
            raise OSError(f"{type(problem).__name__}: {problem}") from problem
        if method == "start":
            write_note(self.path, json.dumps({"tracker": self.name, "id": answer}))
