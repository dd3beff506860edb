"""What a run says where nobody can hear it: consoles, log file, metrics and TensorBoard that refuse, and the folder.

pytest tests/test_sinks.py
"""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, folder_of, run
from faulty_disk import FULL, FaultyDisk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_survival import at_step

import logger
import main
from config import load_config
from logger import MetricsWriter, Sink, append, append_line, get_logger, read_metrics, setup_logger
from models.files import load_checkpoint
from utils.faults.folder_lock import RunFolderBusyError, RunLock
from utils.faults.preemption import Preempted
from utils.files import write_atomically

SHORT = "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 2"


# ---------------------------------------------------------------------------------------------------------------------
# One place that refuses
# ---------------------------------------------------------------------------------------------------------------------


def test_what_a_place_refuses_comes_later_in_its_order_with_one_warning(caplog):
    taken, refusing = [], False

    def write(item):
        if refusing:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken.append(item)

    sink = Sink("the place", write)
    sink.put(1)
    refusing = True
    for item in (2, 3):
        sink.put(item)
    assert taken == [1]
    refusing = False
    sink.put(4)
    refusing = True
    sink.put(5)
    assert taken == [1, 2, 3, 4]
    sink.close()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the place could not be written: No space left on device. The run goes on, and it is tried again",
        "the place lacks 1 records, which could not be written",
    ]


def test_a_place_that_never_comes_back_costs_little_memory_and_its_loss_is_counted(caplog, monkeypatch):
    monkeypatch.setattr(logger, "KEPT", 3)
    sink = Sink("the place", lambda item: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    for item in range(10):
        sink.put(item)
    sink.close()
    assert caplog.messages[-1] == "the place lacks 10 records, which could not be written" and len(caplog.messages) == 2


class Short(io.FileIO):
    """A file on a disk with room for ten bytes more."""

    def write(self, content):
        return super().write(bytes(content)[:10])


def test_a_line_that_was_cut_short_swallows_no_other(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"kind": "train", "epoch": 0, "step": 1}')
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, *arguments, **named: Short(self, "ab"))
        with pytest.raises(OSError, match="No space left"):
            append(path, b'{"kind": "train", "epoch": 0, "step": 2}\n')
    append_line(path, '{"kind": "train", "epoch": 0, "step": 3}')
    with path.open("a") as file:  # what a kill leaves
        file.write('{"kind": "train", "ep')
    append_line(path, '{"kind": "train", "epoch": 0, "step": 4}')
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert len(path.read_text().splitlines()) == 4


def test_metrics_and_tensorboard_are_whole_after_a_disk_was_full_for_a_while(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    for step in range(1, 8):
        with FaultyDisk(tmp_path, FULL) if step in (2, 3, 4) else nullcontext():
            writer.write("train", 0, step, loss=float(step))
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 8))
    messages = [record.getMessage() for record in caplog.records if record.name == get_logger().name]
    assert len(messages) == 2 and "metrics.jsonl could not be written: No space" in messages[0]
    assert re.search(r"tensorboard/events\S+ could not be written: No space", messages[1])


def test_a_start_on_a_full_disk_forgets_what_it_will_write_again_once_there_is_room(tmp_path):
    first = MetricsWriter(tmp_path)
    for step in (5, 10, 15):
        first.write("train", step // 10, step, loss=1.0)
    with FaultyDisk(tmp_path, FULL):
        again = MetricsWriter(tmp_path, epoch=1, step=10)
        again.write("train", 1, 15, loss=2.0)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 15]
    again.write("train", 1, 20, loss=2.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]


def test_a_metrics_file_that_cannot_be_read_does_not_end_the_start_and_is_kept(tmp_path, caplog, monkeypatch):
    MetricsWriter(tmp_path).write("train", 0, 1, loss=1.0)

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(logger, "read_records", unreadable)
        MetricsWriter(tmp_path, epoch=1, step=1).write("train", 1, 2, loss=1.0)
    assert "metrics.jsonl could not be read: Input/output error" in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_is_no_regular_file_is_not_waited_for(tmp_path, caplog):
    """A pipe that nobody reads would block whoever opens it."""
    os.mkfifo(tmp_path / "log.txt")
    os.mkfifo(tmp_path / "metrics.jsonl")
    setup_logger(0, tmp_path / "log.txt").info("one")
    MetricsWriter(tmp_path).write("train", 0, 1, loss=1.0)
    assert (tmp_path / "log.txt").is_fifo() and len(read_metrics(tmp_path / "metrics.jsonl")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Consoles
# ---------------------------------------------------------------------------------------------------------------------


class Console(io.RawIOBase):
    """A standard output whose reader goes after some lines, and may come back."""

    def __init__(self):
        self.lines, self.refusing = [], False

    def writable(self):
        return True

    def write(self, content):
        if self.refusing:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        self.lines.append(bytes(content).decode())
        return len(content)


@contextmanager
def on_console() -> Iterator[Console]:
    raw = Console()
    with redirect_stdout(io.TextIOWrapper(io.BufferedWriter(raw), encoding="ascii")):
        yield raw


def test_a_console_that_goes_is_named_in_the_log_file_and_gets_its_lines_when_it_is_back(tmp_path):
    with on_console() as console:
        log = setup_logger(0, tmp_path / "log.txt")
        log.info("1 × CPU")
        console.refusing = True
        log.info("two")
        log.info("three")
        written = (tmp_path / "log.txt").read_text()
        console.refusing = False
        log.info("four")
    assert written.count("the console could not be written: Broken pipe") == 1 and "three" in written
    text = "".join(console.lines)
    assert "1 \\xd7 CPU\n" in text  # what ASCII cannot show
    assert re.findall(r"\] (two|three|four)$", text, re.M) == ["two", "three", "four"]
    assert "1 × CPU" in written


@pytest.mark.parametrize("how", ["none", "closed", "text"])
def test_a_program_with_another_kind_of_console_can_log(tmp_path, how):
    console = {"none": None, "closed": io.StringIO(), "text": io.StringIO()}[how]
    if how == "closed":
        console.close()
    with redirect_stdout(console):
        log = setup_logger(0, tmp_path / "log.txt")
        log.info("one")
        log.info("two")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[-3:] for line in lines if line.endswith(("one", "two"))] == ["one", "two"]
    assert len(lines) == 2 + (how == "closed")  # where it is named
    if how == "text":
        assert console.getvalue().splitlines() == lines


def test_a_log_file_that_goes_is_named_on_the_console_and_lacks_nothing_in_the_end(tmp_path):
    path = tmp_path / "log.txt"
    with on_console() as console:
        log = setup_logger(0, path)
        log.info("one")
        with FaultyDisk(tmp_path, FULL):
            log.info("two")
        log.info("three")
    assert "".join(console.lines).count("log.txt could not be written: No space left on device") == 1
    lines = [line.partition("] ")[2] for line in path.read_text().splitlines()]
    assert lines[0] == "one" and lines[1] == "two" and lines[-1] == "three" and len(lines) == 4


HEAD = "import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w); "


# Slow: an interpreter of its own, which at its end writes again what a stream still holds.
@pytest.mark.parametrize("python", [PYTHON, pytest.param(sys.executable, marks=pytest.mark.slow)], ids=["fork", "real"])
@pytest.mark.parametrize("how", ["full", "reader gone", "closed", "all closed", "ascii"])
def test_no_console_ends_a_run_or_its_exit_code(tiny, how, python):
    before = {
        "full": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); ",
        "reader gone": HEAD,
        "closed": "import os, sys; os.close(1); sys.stdout = None; ",
        "all closed": "import os, sys; [os.close(n) for n in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None; ",
        "ascii": "import io, sys; sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w', closefd=False), encoding='ascii'); ",
    }[how]
    program = f"{before}import runpy, sys; sys.argv[0] = 'main.py'; runpy.run_path('main.py', run_name='__main__')"
    words = [python, "-c", program, "--cfg", str(tiny), "--opts", *SHORT.split(), "TRAIN.EPOCHS", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (folder_of(tiny) / "log.txt").read_text()
    assert result.stderr == "" and "best top-1" in log
    assert log.count("the console could not be written") == (how in ("full", "reader gone"))
    if how == "ascii":
        assert "1 \\xd7 CPU" in result.stdout
    assert load_checkpoint(folder_of(tiny) / "max_acc.pth")["epoch"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while_costs_a_run_few_lines_and_no_record(tiny, monkeypatch, log):
    """With TensorBoard, from the fifth step to the fifteenth of twenty-two."""
    run(tiny, f"{SHORT} TENSORBOARD True TAG whole")
    undisturbed = len(log.text.splitlines())
    log.clear()
    disk = FaultyDisk(folder_of(tiny), FULL)
    at_step(monkeypatch, {5: disk.__enter__, 15: disk.__exit__})
    run(tiny, f"{SHORT} TENSORBOARD True")
    folder, whole = folder_of(tiny), folder_of(tiny).parent / "whole"
    assert disk.refused
    for name in ("train/loss", "val/top1"):
        found = [EventAccumulator(str(each / "tensorboard")).Reload().Scalars(name) for each in (folder, whole)]
        assert [event.value for event in found[0]] == [event.value for event in found[1]]
    steps = [[record["step"] for record in read_metrics(each / "metrics.jsonl")] for each in (folder, whole)]
    assert steps[0] == steps[1]
    assert len(log.text.splitlines()) <= undisturbed + 5 and log.text.count("could not be written") <= 5
    assert "best top-1" in log.text and load_checkpoint(folder / "max_acc.pth")["epoch"] == 2
    lines = (folder / "log.txt").read_text().splitlines()
    assert len(lines) == len(log.text.splitlines())


def test_a_run_that_is_told_to_stop_writes_what_a_full_disk_refused_before(tiny, monkeypatch):
    disk = FaultyDisk(folder_of(tiny), FULL)
    at_step(monkeypatch, {3: disk.__enter__, 7: lambda: (disk.__exit__(), os.kill(os.getpid(), signal.SIGTERM))})
    with pytest.raises(Preempted):
        run(tiny, SHORT)
    assert disk.refused and [each["step"] for each in read_metrics(folder_of(tiny) / "metrics.jsonl")] == [2, 4, 6]


@pytest.mark.parametrize("how", ["deleted", "renamed", "its lock deleted"])
def test_a_run_folder_that_goes_under_the_run_comes_back_whole(tiny, monkeypatch, log, how):
    folder, away = folder_of(tiny), folder_of(tiny).with_name("away")
    go = {
        "deleted": lambda: shutil.rmtree(folder),
        "renamed": lambda: folder.rename(away),
        "its lock deleted": lambda: (folder / ".lock").unlink(),
    }[how]
    during = []

    def look():
        during.append(sorted(path.name for path in folder.iterdir()))
        with pytest.raises(RunFolderBusyError, match="is in use by process"):
            other_process(folder)

    def gone():
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # else it may find the folder gone while it writes
                thread.join()
        go()

    at_step(monkeypatch, {13: gone, 15: look})
    run(tiny, f"{SHORT} TENSORBOARD True")
    assert {".lock", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "tensorboard"} <= set(during[0])
    assert log.text.count("was deleted or renamed under the run: it is made anew, and the run goes on in it") == 1
    steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
    assert steps == [2, 4, 6, 8, 10, 11, 11, 13, 15, 17, 19, 21, 22, 22]
    evaluated = re.findall("evaluate it with: .* --eval --resume (\\S+)", log.text)[-1]
    assert load_config(str(folder / "config.yaml")).TRAIN.EPOCHS == 2 and load_checkpoint(evaluated)["epoch"] == 2
    assert len(json.loads((folder / "environment.json").read_text())) == 1
    shown = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in shown] == list(dict.fromkeys(steps))
    if how == "renamed":
        before = sorted(path.name for path in away.iterdir())
        assert "could not be written" not in log.text
        assert "max_acc.pth" in before and "ckpt_epoch_1.pth" in before and "ckpt_epoch_2.pth" not in before


def test_a_file_system_that_numbers_files_anew_is_not_taken_for_a_folder_that_went(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda first, second: False)
    lock = RunLock(tmp_path)
    lock.check()
    assert not lock.keep()
    lock.release()


def other_process(folder: Path) -> None:
    """Try to take a run folder from another process; raises what it is told."""
    program = (
        "import sys; from pathlib import Path; import utils.faults.folder_lock as f; f.PATIENCE = 0\n"
        "try: f.RunLock(Path(sys.argv[1]))\n"
        "except f.RunFolderBusyError as problem: print(problem); sys.exit(3)"
    )
    result = subprocess.run([PYTHON, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 3:
        raise RunFolderBusyError(result.stdout)
    assert result.returncode == 0, result.stderr


def test_where_another_run_took_the_folder_the_first_one_stops_and_writes_nothing_there(tiny, monkeypatch, log):
    folder, holders = folder_of(tiny), []

    def taken():
        folder.rename(folder.with_name("away"))
        folder.mkdir()
        program = (
            "import sys, time; from pathlib import Path; from utils.faults.folder_lock import RunLock\n"
            "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
        )
        words = [PYTHON, "-c", program, str(folder)]
        holders.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert holders[0].stdout.readline() == "held\n"

    at_step(monkeypatch, {14: taken})
    try:
        with pytest.raises(RunFolderBusyError, match=r"was deleted or renamed under this run, and process \d+ on"):
            run(tiny, f"{SHORT} TENSORBOARD True CHECKPOINT.EVERY_STEPS 1")
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        for holder in holders:
            holder.send_signal(signal.SIGKILL)
            holder.wait()


def test_a_refusal_is_final_for_the_torchrun_that_heard_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "logs" / "attempt_0" / "0" / "error.json"))
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(main.own_folder.__wrapped__.__globals__["RunLock"], "__init__", refused)
    with pytest.raises(RunFolderBusyError, match="^in use by process 7$"), main.own_folder(folder, ()):
        pass
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "logs" / "attempt_1" / "0" / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with (
        pytest.raises(RunFolderBusyError, match="^not tried again: in use by process 7$"),
        main.own_folder(folder, ()),
    ):
        pass
    assert not folder.exists()  # it held nothing, and `open_folder` had made it
    folder.mkdir()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    with main.own_folder(folder, ()):  # another start
        assert RunLock.check


def refused(self, folder):
    raise RunFolderBusyError("in use by process 7")


def test_writes_that_keep_failing_for_one_reason_are_told_once(tiny, monkeypatch, log):
    """From the first epoch to the last but one, at every third step and at every epoch's end."""
    disk = FaultyDisk(folder_of(tiny), FULL)
    at_step(monkeypatch, {4: disk.__enter__, 40: disk.__exit__})
    run(tiny, "TRAIN.EPOCHS 4 TRAIN.WARMUP_EPOCHS 0 CHECKPOINT.EVERY_STEPS 3")
    told = [line for line in log.text.splitlines() if "could not be written" in line]
    assert len(told) == 4, told  # a checkpoint, metrics, log and predictions
    assert all(load_checkpoint(folder_of(tiny) / name)["epoch"] == 4 for name in ("ckpt_epoch_4.pth", "max_acc.pth"))


def test_a_disk_that_is_full_when_a_file_is_written_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):  # the system says no name
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/environment\.json'"):
        write_atomically(tmp_path / "environment.json", b"[]")
