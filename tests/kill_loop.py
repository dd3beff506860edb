"""Train, killed with SIGKILL again and again, and finally in peace: kill_loop.py CONFIG KILLS

Half of the kills come at a random moment, the others at a random one of the system calls by which a checkpoint is
written. After each, the newest checkpoint is looked for as a start would, and the next run starts; at the end the
weights are compared with those of a run that nobody killed. The last line printed is a report as JSON.

Every run is a fork of this process, which has everything imported.
"""

import json
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from run_files import epoch_file, read_position

import main
from config import load_config, make_plan
from logger import read_metrics
from models.files import load_checkpoint
from utils.checkpoints.finding import newest_checkpoint
from utils.checkpoints.naming import BESTS

EVERY = 3
EPOCHS = 3
OPTIONS = f"TRAIN.EPOCHS {EPOCHS} CHECKPOINT.EVERY_STEPS {EVERY} PRINT_FREQ 1 DATA.BATCH_SIZE 64"
OPTIONS += " EMA.ENABLE True EMA.DECAY 0.9"


def start(config, fatal_call: int | None = None) -> int:
    """Fork a run; one with a `fatal_call` dies at that system call of its checkpoints."""
    pid = os.fork()
    if pid:
        return pid
    if fatal_call is not None:
        count = 0

        def deadly(function):
            def call(*arguments):
                nonlocal count
                count += 1
                if count == fatal_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    try:
        with open(os.devnull, "w", encoding="utf-8") as sys.stdout:
            main.main(config)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def trained_steps(folder: Path) -> int:
    """The last step that was logged (every step is)."""
    path = folder / "metrics.jsonl"
    return max((r["step"] for r in read_metrics(path) if r["kind"] == "train"), default=0) if path.exists() else 0


def saved_steps(folder: Path) -> int:
    """Steps of the newest checkpoint; the best accuracies that it counts as reached have their weights in a file."""
    found = newest_checkpoint(folder, read_position).path
    if not found:
        return 0
    checkpoint = load_checkpoint(found)
    for best in BESTS.values():
        path = folder / best.file
        assert checkpoint[best.key] == (load_checkpoint(path)[best.key] if path.exists() else 0.0)
    return checkpoint["step"]


def loop(cfg: str, kills: int) -> dict[str, int]:
    whole = load_config(cfg, shlex.split(f"{OPTIONS} TAG whole"))
    config = load_config(cfg, shlex.split(f"{OPTIONS} TAG killed"))
    folder = make_plan(config).folder
    pid, began = start(whole), time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0, "the undisturbed run failed"
    duration = time.monotonic() - began
    generator = random.Random(0)
    inside, done, most_lost, runs = 0, 0, 0, 0
    while done < kills:
        runs += 1
        assert runs < 3 * kills + 10, "runs end before they can be killed"
        fatal_call = generator.randrange(1, 40) if done % 2 else None
        pid = start(config, fatal_call)
        if fatal_call is None:
            time.sleep(generator.uniform(0.05, 0.5) * duration)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            done += 1
            inside += fatal_call is not None
        else:
            assert os.WEXITSTATUS(status) == 0, "a start after a kill failed"
        saved = saved_steps(folder)
        most_lost = max(most_lost, trained_steps(folder) - saved)
        if saved >= EPOCHS * (1442 // 64):  # finished: begin anew
            for path in folder.iterdir():
                path.unlink()
    pid = start(config)
    assert os.waitpid(pid, 0)[1] == 0, "the last start failed"
    a, b = (load_checkpoint(epoch_file(make_plan(each).folder, EPOCHS))["model"] for each in (whole, config))
    assert all(torch.equal(a[name], b[name]) for name in a), "the weights differ from those of the undisturbed run"
    return {"kills": done, "inside_a_save": inside, "most_steps_lost": most_lost, "runs": runs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(json.dumps(loop(sys.argv[1], int(sys.argv[2]))))
