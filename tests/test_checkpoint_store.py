"""The checkpoints of a run folder: nothing incomplete is ever left, nothing good is lost, the newest good one is found.

pytest tests/test_checkpoint_store.py
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE
from faulty_disk import FULL, READ_ONLY, FaultyDisk
from run_files import epoch_file, read_position

from engine import state
from models.files import CheckpointError, load_checkpoint
from utils.checkpoints import finding, writing
from utils.checkpoints.finding import newest_checkpoint, remove_temporary_files
from utils.checkpoints.naming import Position, position_of, run_checkpoints, run_file, sidecar_of
from utils.checkpoints.writing import CheckpointWriter, save_checkpoint

BEST = {"max_acc.pth": {"max_accuracy": 50.0}}
RELEASED = REFERENCE / "checkpoint_official_tiny.pth"


def _state(epoch: int, done: int = 0) -> dict:
    return {
        "model": {"weight": torch.full((1000,), float(100 * epoch + done))},
        "epoch": epoch,
        "step": 100 * epoch + done,
        "continuation": {"done": done},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_written_file_is_complete_and_described_by_its_sidecar(tmp_path):
    path = tmp_path / "file.pth"
    save_checkpoint(_state(1), path)
    assert load_checkpoint(path)["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["file.pth", "file.pth.json"]
    content = path.read_bytes()
    (entry,) = json.loads(sidecar_of(path).read_text())["files"]
    assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads(sidecar_of(path).read_text())["step"] == 100


class _Patched:
    """A module with one function replaced."""

    def __init__(self, name, function):
        module, attribute = name.split(".")
        self._module = {"torch": torch, "os": os}[module]
        setattr(self, attribute, function)

    def __getattr__(self, name):
        return getattr(self._module, name)


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_keeps_the_file_before(failing, tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    save_checkpoint(_state(1), path)

    def fail(*arguments):
        if failing == "torch.save":  # what torch makes of a full disk
            raise RuntimeError("[enforce fail] No space left on device")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "torch" if failing == "torch.save" else "os", _Patched(failing, fail))
    with pytest.raises(OSError, match=r"file\.pth could not be written: .*No space left"):
        save_checkpoint(_state(2), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["file.pth", "file.pth.json"]


class _Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test runs, as far as Python allows."""


@pytest.mark.parametrize("calls", range(1, 9))
def test_killed_at_any_step_of_a_write_one_good_file_remains(calls, tmp_path, monkeypatch):
    """Each flush and each rename is a point where a write can end."""
    path = tmp_path / "file.pth"
    save_checkpoint(_state(1), path)
    count = 0

    def killed_at(name):
        real = getattr(os, name)

        def function(*arguments):
            nonlocal count
            count += 1
            if count == calls:
                raise _Killed
            return real(*arguments)

        return function

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace"):
            patched.setattr(os, name, killed_at(name))
        patched.setattr(Path, "unlink", lambda *arguments, **keywords: None)
        try:
            save_checkpoint(_state(2), path)
            finished = True
        except _Killed:
            finished = False
    assert load_checkpoint(path)["epoch"] in ((2,) if finished else (1, 2))
    assert finished == (calls > 7)
    save_checkpoint(_state(3), path)
    assert load_checkpoint(path)["epoch"] == 3 and len(json.loads(sidecar_of(path).read_text())["files"]) == 1


def test_a_file_that_does_not_read_back_is_not_put_in_place(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    save_checkpoint(_state(1), path)
    monkeypatch.setattr(writing, "file_digest", lambda path: "0" * 64)
    with pytest.raises(OSError, match="could not be written: .*does not read back"):
        save_checkpoint(_state(2), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# In the background
# ---------------------------------------------------------------------------------------------------------------------


def test_what_changes_after_save_does_not_reach_the_file(tmp_path, monkeypatch):
    writer, go = CheckpointWriter(tmp_path, keep=3), threading.Event()
    real = writing.save_checkpoint

    def late(state, path):
        go.wait()
        real(state, path)

    monkeypatch.setattr(writing, "save_checkpoint", late)
    state = {**_state(1), "nested": [{"list": [torch.ones(3)]}, 5]}
    writer.save(state, Position(1))
    assert not epoch_file(tmp_path, 1).exists()  # save has returned before anything is written
    state["model"]["weight"].zero_()
    state["nested"][0]["list"][0].zero_()
    go.set()
    writer.wait()
    written = load_checkpoint(epoch_file(tmp_path, 1))
    assert (written["model"]["weight"] == 100).all() and (written["nested"][0]["list"][0] == 1).all()


def test_only_one_write_is_in_flight(tmp_path, monkeypatch):
    running, most, lock = 0, 0, threading.Lock()
    real = writing.save_checkpoint

    def counted(state, path):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        real(state, path)
        with lock:
            running -= 1

    monkeypatch.setattr(writing, "save_checkpoint", counted)
    writer = CheckpointWriter(tmp_path, keep=9)
    for epoch in range(1, 5):
        writer.save(_state(epoch), Position(epoch))
    writer.wait()
    assert most == 1 and len(run_checkpoints(tmp_path)) == 4


def test_an_error_of_the_writer_reaches_the_caller_once_and_nothing_old_is_deleted(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(_state(1), Position(1))
    writer.wait()

    def full(state, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "save_checkpoint", full)
        writer.save(_state(2), Position(2), best=BEST)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    writer.wait()
    assert [path.name for _, path in run_checkpoints(tmp_path)] == ["ckpt_epoch_1.pth"]
    writer.save(_state(3), Position(3), best=BEST)
    writer.wait()
    names = {"ckpt_epoch_3.pth", "max_acc.pth"}
    assert set(os.listdir(tmp_path)) == names | {name + ".json" for name in names}


def test_the_best_weights_are_never_lost_between_two_files(tmp_path, monkeypatch):
    """A checkpoint that counts an accuracy as reached exists only where the best file holds its weights, or itself."""
    writer, real = CheckpointWriter(tmp_path, keep=1), writing.save_checkpoint
    writer.save(_state(1), Position(1), best=BEST)
    writer.wait()

    def refusing(name):
        def save(state, path):
            if path.name == name:
                raise OSError(28, "No space left on device")
            real(state, path)

        return save

    monkeypatch.setattr(writing, "save_checkpoint", refusing("ckpt_epoch_2.pth"))  # as killed after the best file
    writer.save(_state(2), Position(2), best=BEST)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    assert newest_checkpoint(tmp_path, read_position).path == tmp_path / "max_acc.pth"
    monkeypatch.setattr(writing, "save_checkpoint", refusing("max_acc.pth"))
    writer.save(_state(3), Position(3), best=BEST)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    monkeypatch.undo()
    assert load_checkpoint(epoch_file(tmp_path, 3))["step"] == 300  # the position's own file was not refused
    for epoch in (4, 5):  # the best one is tried again, before anything older goes
        writer.save(_state(epoch), Position(epoch))
    writer.wait()
    assert [path.name for _, path in run_checkpoints(tmp_path)] == ["ckpt_epoch_5.pth"]
    assert load_checkpoint(tmp_path / "max_acc.pth")["step"] == 300


def test_a_best_counts_once_its_file_is_written_and_is_tried_again(tmp_path, monkeypatch):
    """What every file claims while the disk refuses one of the two best files, and when it takes it again."""
    writer, real, refused = CheckpointWriter(tmp_path, keep=9), writing.save_checkpoint, set[str]()

    def refusing(state, path):
        if path.name in refused:
            raise OSError(28, "No space left on device", str(path))
        real(state, path)

    def save(epoch, **best):
        files = {"model": ("max_acc.pth", "max_accuracy"), "ema": ("max_ema_acc.pth", "max_accuracy_e")}
        chosen = {files[kind][0]: {files[kind][1]: top1} for kind, top1 in best.items()}
        writer.save(_state(epoch) | {"max_accuracy": 0.0, "max_accuracy_e": 0.0}, Position(epoch), best=chosen)
        with suppress(OSError):
            writer.wait()

    def claims(name):
        checkpoint = load_checkpoint(tmp_path / name)
        return checkpoint["epoch"], checkpoint["max_accuracy"], checkpoint["max_accuracy_e"]

    monkeypatch.setattr(writing, "save_checkpoint", refusing)
    save(1, model=28.0, ema=20.0)
    assert claims("max_acc.pth") == (1, 28.0, 0.0) and claims("max_ema_acc.pth") == (1, 28.0, 20.0)
    refused = {"max_acc.pth", "max_ema_acc.pth"}
    save(2, model=39.0, ema=48.0)
    assert claims("ckpt_epoch_2.pth") == (2, 28.0, 20.0)
    refused = {"max_acc.pth"}
    save(3)
    assert claims("ckpt_epoch_3.pth") == (3, 28.0, 48.0) and claims("max_ema_acc.pth") == (2, 28.0, 48.0)
    assert writer.best("max_accuracy") == 39.0  # what a later epoch has to exceed
    refused = set()
    writer.retry()
    writer.wait()
    assert claims("max_acc.pth") == (2, 39.0, 48.0)
    save(4)
    assert claims("ckpt_epoch_4.pth") == (4, 39.0, 48.0)


def _good(folder: Path) -> dict[str, int]:
    """The checkpoints that verify, and the step each holds."""
    found = {}
    for path in folder.glob("*.pth"):
        with suppress(CheckpointError):
            found[path.name] = load_checkpoint(path)["step"]
    return found


@pytest.mark.parametrize("lasting", [True, False], ids=["from there on", "once"])
@pytest.mark.parametrize("error", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_refuses_any_operation_of_a_save_costs_no_checkpoint(error, lasting, tmp_path):
    """The first, second, … of all opens, flushes, renames and removals of a save of a new best."""
    ready, refused = tmp_path / "ready", []
    writer = CheckpointWriter(ready, keep=2)
    for epoch in (1, 2, 3):
        writer.save(_state(epoch), Position(epoch), best=BEST if epoch == 2 else None)
    writer.wait()
    before = {"ckpt_epoch_2.pth": 200, "ckpt_epoch_3.pth": 300, "max_acc.pth": 200}
    assert _good(ready) == before
    for operation in itertools.count(1):
        folder = Path(shutil.copytree(ready, tmp_path / str(operation)))
        writer, problem = CheckpointWriter(folder, keep=2), None
        with FaultyDisk(folder, error, operation, lasting) as disk:
            writer.save(_state(4), Position(4), best=BEST)
            try:
                writer.wait()
            except OSError as raised:
                problem = str(raised)
        if not disk.refused:
            break
        refused.append(disk.refused[0])
        after = _good(folder)
        assert len(after) >= len(before) and max(after.values()) >= 300, refused
        assert newest_checkpoint(folder, read_position).path
        assert after["max_acc.pth"] == 200 or 400 in after.values(), refused  # the best weights, old or new
        assert "ckpt_epoch_4.pth" in after or problem, refused  # not written, and nobody told
        assert problem is None or re.search("could not be (written|removed): (No space|Read-only)", problem), problem
        writer.save(_state(5), Position(5))
        writer.wait()
        assert {"ckpt_epoch_5.pth": 500, "max_acc.pth": 400}.items() <= _good(folder).items()  # it was tried again
        remove_temporary_files(folder)  # as the next start does
        names = set(os.listdir(folder))
        assert names == {f"{name}{end}" for name in _good(folder) for end in ("", ".json")}, refused
    targets = " ".join(refused)
    expected = ["open .max_acc.pth.tmp", "fsync .max_acc.pth.json.tmp", "rename max_acc.pth", "fsync folder"]
    expected += ["open .ckpt_epoch_4.pth.json.tmp", "rename ckpt_epoch_4.pth"]
    expected += ["remove ckpt_epoch_2.pth"] * (error == READ_ONLY)
    assert all(name in targets for name in expected), refused


def test_a_start_removes_what_killed_writes_and_removals_left(tmp_path):
    save_checkpoint(_state(1), epoch_file(tmp_path, 1))
    for name in (".ckpt_epoch_2.pth.tmp", "ckpt_epoch_2.pth.json", "max_acc.pth.json"):
        (tmp_path / name).write_text("left")
    (tmp_path / "somebody.json").write_text("kept")
    remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["ckpt_epoch_1.pth", "ckpt_epoch_1.pth.json", "somebody.json"]


def test_newest_files_and_the_best_are_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for position in (Position(1), Position(2), Position(9), Position(9, 5), Position(9, 40), Position(10)):
        writer.save(_state(*position), position, best=BEST if position == Position(2) else None)
    writer.wait()
    names = ["ckpt_epoch_10.pth", "ckpt_epoch_9_step_40.pth", "max_acc.pth"]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *(name + ".json" for name in names)])
    epoch_file(tmp_path, 12).write_bytes(b"cut short")  # skipped on resume, so epoch 11 was written again
    writer.save(_state(11), Position(11))
    writer.wait()
    assert [path.name for _, path in run_checkpoints(tmp_path)][:2] == ["ckpt_epoch_12.pth", "ckpt_epoch_11.pth"]


def test_files_that_were_found_damaged_do_not_count_as_kept(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint(_state(epoch), epoch_file(tmp_path, epoch))
    os.truncate(epoch_file(tmp_path, 3), 10)
    found = newest_checkpoint(tmp_path, read_position)
    assert found.path == epoch_file(tmp_path, 2)
    writer = CheckpointWriter(tmp_path, 2, found.skipped)
    writer.save(_state(4), Position(4))
    writer.wait()
    assert epoch_file(tmp_path, 2).exists() and not epoch_file(tmp_path, 1).exists()
    for epoch in (3, 5, 6):  # the damaged one, written again, counts again
        writer.save(_state(epoch), Position(epoch))
    writer.wait()
    assert [path.name for _, path in run_checkpoints(tmp_path)] == ["ckpt_epoch_6.pth", "ckpt_epoch_5.pth"]


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def test_names_and_positions_belong_together(tmp_path):
    for position in (Position(0, 3), Position(7), Position(12, 500)):
        assert position_of(run_file(tmp_path, position)) == position
    assert position_of(tmp_path / "max_acc.pth") is None and position_of(tmp_path / "ckpt_epoch_1.pth.json") is None
    assert Position(1) < Position(1, 3) < Position(2)


def test_newest_checkpoint_goes_by_position_not_by_time(tmp_path, caplog):
    assert newest_checkpoint(tmp_path, read_position).path is None
    for age, epoch in enumerate((11, 10, 9, 2)):
        save_checkpoint(_state(epoch), epoch_file(tmp_path, epoch))
        os.utime(epoch_file(tmp_path, epoch), (1e9 + age, 1e9 + age))  # a clock that went backwards
    assert newest_checkpoint(tmp_path, read_position).path == epoch_file(tmp_path, 11)
    save_checkpoint(_state(11, 7), run_file(tmp_path, Position(11, 7)))
    assert newest_checkpoint(tmp_path, read_position).path == run_file(tmp_path, Position(11, 7))
    run_file(tmp_path, Position(11, 7)).unlink()
    epoch_file(tmp_path, 11).write_bytes(b"")
    shutil.copyfile(RELEASED, epoch_file(tmp_path, 10))
    os.truncate(epoch_file(tmp_path, 10), 5000)
    found = newest_checkpoint(tmp_path, read_position)
    assert found.path == epoch_file(tmp_path, 9)
    assert found.skipped == {epoch_file(tmp_path, 11), epoch_file(tmp_path, 10)}
    assert "ckpt_epoch_11.pth is empty" in caplog.text and "ckpt_epoch_10.pth is" in caplog.text


def test_a_run_none_of_whose_checkpoints_can_be_used_does_not_begin_anew(tmp_path):
    save_checkpoint(_state(1), epoch_file(tmp_path, 1))
    os.truncate(epoch_file(tmp_path, 1), 10)
    with pytest.raises(finding.NoneUsableError, match="none of the 1 checkpoints in .* can be used"):
        newest_checkpoint(tmp_path, read_position)


def test_a_file_system_that_fails_for_a_moment_is_no_damage(tmp_path, monkeypatch):
    save_checkpoint(_state(1), epoch_file(tmp_path, 1))
    real, failures = state.load_checkpoint, iter([OSError(5, "Input/output error")] * 2)

    def flaky(path):
        for failure in failures:
            raise failure
        return real(path)

    monkeypatch.setattr(state, "load_checkpoint", flaky)
    monkeypatch.setattr(finding, "PATIENCE", (0.01, 0.01, 0.01))
    assert newest_checkpoint(tmp_path, read_position).path == epoch_file(tmp_path, 1)


@pytest.mark.parametrize("offset", [0, 500, -1, "every hundredth"])
def test_one_flipped_bit_is_noticed(offset, tmp_path):
    path = tmp_path / "file.pth"
    save_checkpoint(_state(1), path)
    content = path.read_bytes()
    for place in range(0, len(content), 100) if isinstance(offset, str) else [offset % len(content)]:
        flipped = bytearray(content)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="does not match the SHA-256"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["epoch"] == 1


def test_a_damaged_sidecar_does_not_cost_the_checkpoint(tmp_path, caplog):
    path = tmp_path / "file.pth"
    save_checkpoint(_state(1), path)
    for text in ("", "{", "[]", '{"files": [{"size": "x"}]}'):
        sidecar_of(path).write_text(text)
        assert load_checkpoint(path)["epoch"] == 1
    assert "the sidecar" in caplog.text and "is damaged" in caplog.text
    sidecar_of(path).unlink()
    assert load_checkpoint(path)["epoch"] == 1


def test_the_best_file_counts_by_its_position_too(tmp_path):
    best = tmp_path / "max_acc.pth"
    save_checkpoint(_state(2), best)
    epoch_file(tmp_path, 3).write_bytes(b"")
    assert newest_checkpoint(tmp_path, read_position).path == best
    save_checkpoint(_state(3), epoch_file(tmp_path, 3))
    assert newest_checkpoint(tmp_path, read_position).path == epoch_file(tmp_path, 3)
    save_checkpoint(_state(9), best)  # SAVE_FREQ left epoch 9 without a file of its own
    assert newest_checkpoint(tmp_path, read_position).path == best
