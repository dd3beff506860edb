"""Faults while a run is going: what it says, what it leaves, and that the same command then gives the same weights.

pytest tests/test_survival.py
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, folder_of, run
from test_resume import EVERYTHING, assert_same_run
from torch.distributed import HashStore, TCPStore

import engine
import main
from engine import NonFiniteError
from models.attention import PolaLinearAttention
from utils import checkpoint_store, distributed, run_lock
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.checkpoint_store import epoch_file, newest_checkpoint, run_checkpoints
from utils.preemption import Preempted
from utils.run_lock import RunFolderBusyError

OPTIONS = f"{EVERYTHING} AMP True TRAIN.EPOCHS 2 CHECKPOINT.EVERY_STEPS 4 PRINT_FREQ 2 DIST.TIMEOUT 60"


class Job:
    """A run of main.py under torchrun, or of `command`, in a process group of its own."""

    def __init__(self, *arguments: str, processes: int = 2, restarts: int = 0, command: list[str] | None = None, **env):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max_restarts={restarts}", "main.py"]
        self.token = f"TEST_JOB={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [*(command or [sys.executable, *launcher]), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_JOB": self.token.partition("=")[2], **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def wait_for(self, pattern: str, timeout: float = 120) -> re.Match:
        """Read output until a line matches."""
        deadline = time.monotonic() + timeout
        assert self.process.stdout
        while time.monotonic() < deadline:
            line = self.process.stdout.readline()
            if not line:
                break
            self.output += line
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"{pattern!r} did not come:\n{self.output}")

    def processes(self, *variables: str) -> set[int]:
        """Process ids of everything that this job has started and that has these environment variables."""
        found = set()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):
                    if {self.token, *variables} <= set((folder / "environ").read_bytes().decode().split("\0")):
                        found.add(int(folder.name))
        return found

    def worker(self, rank: int) -> int:
        """Process id of a rank's main process."""
        found = self.processes(f"RANK={rank}")
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in found}
        (main_process,) = (pid for pid in found if parents[pid] not in found)  # the others are its loaders
        return main_process

    def end(self, timeout: float = 120) -> tuple[int, float]:
        """Exit status and seconds until it came."""
        began = time.monotonic()
        try:
            rest, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"still running after {timeout} s:\n{self.output}")
        self.output += rest
        return self.process.returncode, time.monotonic() - began


def arguments(tiny: Path, options: str, tag: str) -> list[str]:
    return ["--cfg", str(tiny), "--tag", tag, "--opts", *options.split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run folder of two processes that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.yaml").write_text(TINY + f"OUTPUT: {root / 'out'}\n")
    job = Job(*arguments(root / "tiny.yaml", OPTIONS, "default"))
    assert job.end()[0] == 0, job.output
    return root / "out" / "tiny" / "default"


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_rank_told_to_stop_saves_the_whole_run_once(tiny, whole, number):
    job = Job(*arguments(tiny, OPTIONS, "parts"))
    job.wait_for(r"epoch 0 \[6/")
    os.kill(job.worker(1), number)
    status, seconds = job.end()
    folder = folder_of(tiny).parent / "parts"
    assert status == 0 and seconds < 20, job.output  # workers end with 0 of their own accord
    marker = (folder / "PREEMPTED").read_text()
    assert re.match(r"told to stop by (SIG\w+|another rank), saved after 0 epochs and \d+ of 11 steps", marker)
    newest = newest_checkpoint(folder).path
    done = re.search(r"and (\d+) of", marker)[1]
    assert newest.name == f"ckpt_epoch_0_step_{done}.pth"
    again = Job(*arguments(tiny, OPTIONS, "parts"))
    assert again.end()[0] == 0, again.output
    assert f"continues from {newest}" in again.output
    assert_same_run(whole, folder, 2)


def test_a_killed_worker_restarts_and_continues_without_a_human(tiny, whole):
    job = Job(*arguments(tiny, OPTIONS, "parts"), restarts=2)
    job.wait_for(r"epoch 0 \[10/")
    os.kill(job.worker(1), signal.SIGKILL)
    job.wait_for(r"continues from \S+ckpt_epoch_0_step_(4|8).pth")
    job.wait_for(r"epoch 1 \[6/")
    os.kill(job.worker(0), signal.SIGKILL)
    assert job.end()[0] == 0, job.output
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_a_dead_rank_ends_the_job_and_is_named(tiny):
    job = Job(*arguments(tiny, OPTIONS + " TRAIN.EPOCHS 50", "parts"))
    job.wait_for(r"epoch 0 \[10/")
    os.kill(job.worker(1), signal.SIGKILL)
    status, seconds = job.end()
    assert status != 0 and seconds < 20, job.output
    host = re.escape(os.uname().nodename)
    assert re.search(rf"rank 1 on host {host}, last seen in .* of step \d+, does not answer any more", job.output)


def test_a_hung_rank_ends_the_job_and_is_named(tiny):
    options = OPTIONS.replace("DIST.TIMEOUT 60", "DIST.TIMEOUT 6")
    job = Job(*arguments(tiny, options + " TRAIN.EPOCHS 50", "parts"))
    job.wait_for(r"epoch 0 \[10/")
    os.kill(job.worker(1), signal.SIGSTOP)
    status, seconds = job.end()
    assert status != 0 and seconds < 6 + 10, job.output
    assert re.search(r"no progress for 6 s, waiting for rank 1 on host \S+, last seen in .* of step \d+", job.output)


def test_a_hung_rank_0_which_holds_the_store_is_named_too(tiny):
    options = OPTIONS.replace("DIST.TIMEOUT 60", "DIST.TIMEOUT 6") + " TRAIN.EPOCHS 50"
    settings = {"PYTHON": sys.executable, "NPROC": "2", "CONFIG": str(tiny), "MAX_RESTARTS": "0"}
    job = Job(command=["bash", "pretrain.sh", "--opts", *options.split()], **settings)
    job.wait_for(r"epoch 0 \[10/")
    os.kill(job.worker(0), signal.SIGSTOP)
    status, seconds = job.end()
    assert status not in (0, 75) and seconds < 6 + 10, job.output
    assert re.search(r"rank 1 error: no progress for 6 s, waiting for rank 0 on host \S+, last seen in", job.output)


def test_an_error_that_would_come_again_is_not_tried_again(tiny):
    job = Job(*arguments(tiny, "DATA.DATASET imagenet DATA.DATA_PATH absent", "parts"), restarts=2)
    assert job.end()[0] != 0
    assert len(re.findall(r"\] error: data set folder absent does not exist", job.output)) == 1
    assert "error: not tried again: data set folder absent does not exist" in job.output


def test_told_to_stop_while_it_starts_a_run_stops_at_its_first_step(tiny, monkeypatch):
    build = main.build_loaders

    def building(config):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(config)

    monkeypatch.setattr(main, "build_loaders", building)
    with pytest.raises(Preempted, match="saved after 0 epochs and 1 of 22 steps"):
        run(tiny)


def test_a_checkpoint_due_at_the_end_of_an_epoch_is_written_whatever_save_freq_says(tiny):
    run(tiny, "TRAIN.EPOCHS 3 SAVE_FREQ 100 CHECKPOINT.EVERY_STEPS 22 CHECKPOINT.KEEP 9")
    assert [position for position, _ in run_checkpoints(folder_of(tiny))] == [(3, 0), (2, 0), (1, 0)]


def test_an_epoch_does_not_continue_with_other_images(tiny, monkeypatch):
    at_step(monkeypatch, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Preempted):
        run(tiny)
    with pytest.raises(CheckpointError, match="inside an epoch of 1442 images drawn with SEED 0; now there are 1442"):
        run(tiny, "SEED 1")
    with pytest.raises(CheckpointError, match=r"trained with 64 images per step .*, this run would use 32"):
        run(tiny, "DATA.BATCH_SIZE 32")
    with pytest.raises(CheckpointError, match="lies inside an epoch of 64 images per step"):
        run(tiny, "TRAIN.GLOBAL_BATCH 32")
    run(tiny, "DATA.BATCH_SIZE 32 TRAIN.GLOBAL_BATCH 64")


def test_processes_whose_launcher_is_killed_save_and_end(tiny, whole):
    job = Job(*arguments(tiny, OPTIONS, "parts"))
    job.wait_for(r"epoch 0 \[10/")
    job.process.kill()
    job.wait_for("the launcher of this run is gone: saving and stopping")
    again = Job(*arguments(tiny, OPTIONS, "parts"))  # at once: it waits for the earlier run to end
    assert again.end()[0] == 0, again.output
    job.process.communicate()
    assert re.search(r"continues from \S+ckpt_epoch_[01](_step_\d+)?\.pth", again.output)
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_a_signal_to_everything_at_once_spares_the_loader_processes(tiny):
    job = Job(*arguments(tiny, OPTIONS + " DATA.NUM_WORKERS 2", "parts"), command=[sys.executable, "main.py"])
    job.wait_for(r"epoch 0 \[6/")
    os.killpg(job.process.pid, signal.SIGTERM)
    status, _ = job.end()
    assert status == 0 and "told to stop by SIGTERM: saved after 0 epochs" in job.output, job.output


def test_another_number_of_processes_keeps_the_global_batch_and_the_schedule(tiny):
    options = "TRAIN.GLOBAL_BATCH 64 DATA.BATCH_SIZE 32 TRAIN.EPOCHS 2 PRINT_FREQ 5 CHECKPOINT.EVERY_STEPS 5"
    run(tiny, f"{options} TAG one")
    job = Job(*arguments(tiny, options, "changed"))
    job.wait_for(r"global batch 64 = 2 processes × 1 passes × 32 images")
    job.wait_for(r"epoch 0 \[10/")
    os.kill(job.worker(0), signal.SIGTERM)
    assert job.end()[0] == 0, job.output
    folder = folder_of(tiny).parent / "changed"
    run(tiny, f"{options} TAG changed")
    assert "the global batch stays 64, and so does the schedule" in (folder / "log.txt").read_text()
    rates = [
        [(r["step"], r["lr"]) for r in map(json.loads, (root / "metrics.jsonl").read_text().splitlines()) if "lr" in r]
        for root in (folder_of(tiny).parent / "one", folder)
    ]
    assert rates[0] == rates[1] and len(rates[0]) > 6


def test_pretrain_told_to_stop_exits_75_and_the_same_command_finishes(tiny, whole):
    command = ["bash", "pretrain.sh", "--opts", *OPTIONS.split()]
    settings = {"PYTHON": sys.executable, "NPROC": "2", "CONFIG": str(tiny), "TAG": "parts"}
    job = Job(command=command, **settings)
    job.wait_for(r"epoch 0 \[4/")
    job.process.send_signal(signal.SIGUSR1)
    status, seconds = job.end()
    assert status == 75 and seconds < 30, job.output
    again = Job(command=command, **settings)
    assert again.end()[0] == 0, again.output
    assert re.search(r"continues from \S+ckpt_epoch_[01]", again.output)
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_slurm_job_queues_itself_again_when_it_was_told_to_stop(tmp_path, status, requeued):
    """Against stand-ins of Slurm's commands that note how they are called."""
    scripts = {
        "srun": f'echo "srun $NNODES $MASTER_ADDR $TAG" >> calls\nexit {status}',
        "scontrol": 'if [[ $1 == show ]]; then echo node7; echo node8; else echo "scontrol $*" >> calls; fi',
        "scancel": 'echo "scancel $*" >> calls',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    settings = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "DATA": "imagenet"}
    result = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch")],
        cwd=tmp_path,
        env={**os.environ, **settings, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == status, result.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "srun 2 node7 slurm-41" and calls[1:] == ["scontrol requeue 41"] * requeued


def test_two_nodes_of_which_one_is_killed_and_started_again(tiny, whole):
    """Two launchers, a rendezvous on loopback; the job continues by itself once the node is back."""
    settings = {"PYTHON": sys.executable, "NPROC": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "TAG": "parts"}
    settings |= {"MASTER_PORT": str(free_port()), "CONFIG": str(tiny), "SHUTDOWN_TIMEOUT": "20"}

    def node(rank: int) -> Job:
        command = ["bash", "pretrain.sh", "--opts", *OPTIONS.split()]
        return Job(command=command, NODE_RANK=str(rank), **settings)

    first, second = node(0), node(1)
    wait_until(lambda: (folder_of(tiny).parent / "parts").glob("ckpt_epoch_0_step_8.pth"))
    os.killpg(second.process.pid, signal.SIGKILL)
    for pid in second.processes():
        os.kill(pid, signal.SIGKILL)
    again = node(1)
    assert first.end()[0] == 0, first.output
    assert again.end()[0] == 0, again.output
    output = first.output + again.output  # the log is that of the node which holds rank 0
    assert re.search(r"continues from \S+ckpt_epoch_[01]", output) and "2 × CPU" in output and "best top-1" in output
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_a_node_that_waits_says_for_whom():
    port = str(free_port())
    store = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    command = [sys.executable, "utils/rendezvous.py", "127.0.0.1", port]
    watcher = Job("1", "3", "1", command=command)
    watcher.wait_for(r"node 1 on \S+ waits for nodes 0, 2 of 3 at 127.0.0.1:\d+ since \d+ s")
    store.set("polaformer/node/2", "there")
    watcher.wait_for(r"waits for node 0 of 3")
    store.set("polaformer/node/0", "there")
    assert watcher.end(20)[0] == 0
    absent = Job("1", "2", "1", command=[sys.executable, "utils/rendezvous.py", "127.0.0.1", str(free_port())])
    absent.wait_for("waits for node 0 of 2")
    absent.process.kill()


def test_a_process_that_waits_for_another_says_for_whom(monkeypatch, caplog):
    store = HashStore()
    monkeypatch.setattr(distributed, "WAITING_NOTICE", 0.2)
    with pytest.raises(distributed.LaunchError, match="rank 1 of 2 did not come within 1 s"):
        distributed._await_processes(store, 0, 2, 1.0)
    assert "waiting for rank 1 of 2 since 0 s; present: " + os.uname().nodename in caplog.text


def test_a_process_whose_launcher_is_gone_when_it_starts_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(distributed, "LAUNCHER_PATIENCE", 1.0)
    surroundings = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}
    for name, value in (surroundings | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(distributed.LaunchError, match=r"the launcher .* did not answer at localhost:\d+ within 1 s"):
        distributed.init(timeout=1800)


def wait_until(found: Callable[[], Iterator[Path]], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not list(found()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------------
# One process: the disk
# ---------------------------------------------------------------------------------------------------------------------


def at_step(monkeypatch, actions: dict[int, Callable[[], object]]) -> None:
    """Do something after optimizer steps, counted over the run."""
    step, count = engine._optimizer_step, 0

    def counted(*arguments):
        nonlocal count
        result = step(*arguments)
        count += 1
        actions.get(count, lambda: None)()
        return result

    monkeypatch.setattr(engine, "_optimizer_step", counted)


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(tiny, monkeypatch, log):
    """By a file-size limit: checkpoints of tens of kilobytes fail, log lines do not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    during: list[str] = []

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        during.extend(path.name for _, path in run_checkpoints(folder_of(tiny)))

    at_step(
        monkeypatch,
        {8: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1])), 18: free},
    )
    try:
        run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_STEPS 3 CHECKPOINT.KEEP 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert during == ["ckpt_epoch_0_step_6.pth", "ckpt_epoch_0_step_3.pth"]  # not fewer than before
    message = r"ckpt_epoch_0_step_9\.pth could not be written: File too large\. The run goes on; it could continue from"
    assert re.search(message + r" ckpt_epoch_0_step_6\.pth", log.text)
    assert newest_checkpoint(folder_of(tiny)).path == epoch_file(folder_of(tiny), 1)


def test_a_run_folder_removed_under_the_run_comes_back(tiny, monkeypatch, log):
    at_step(monkeypatch, {8: lambda: shutil.rmtree(folder_of(tiny))})
    run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_STEPS 3 PRINT_FREQ 2 TENSORBOARD False")
    assert "metrics.jsonl could not be written: No such file or directory" in log.text
    assert newest_checkpoint(folder_of(tiny)).path == epoch_file(folder_of(tiny), 1)


def test_a_last_checkpoint_that_cannot_be_written_ends_in_an_error_and_keeps_the_others(tiny, monkeypatch):
    real = checkpoint_store.save_checkpoint

    def refusing(state, path):
        if path.name == "ckpt_epoch_1.pth":
            raise OSError(f"checkpoint {path} could not be written: No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint_store, "save_checkpoint", refusing)
    with pytest.raises(OSError, match=r"ckpt_epoch_1\.pth could not be written: No space left"):
        run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_STEPS 20")
    assert newest_checkpoint(folder_of(tiny)).path.name == "max_acc.pth"  # of the same epoch, and written before
    assert [path.name for _, path in run_checkpoints(folder_of(tiny))] == ["ckpt_epoch_0_step_20.pth"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no longer there"])
def test_a_damaged_newest_checkpoint_is_skipped_and_the_weights_are_the_same(tiny, damage, log):
    options = "TRAIN.EPOCHS 2 CHECKPOINT.EVERY_STEPS 10"
    run(tiny, f"{options} TAG whole")
    run(tiny, f"{options} TAG parts")
    folder = folder_of(tiny).parent / "parts"
    newest, step_20 = epoch_file(folder, 2), folder / "ckpt_epoch_1_step_20.pth"
    for path in (newest, folder / "max_acc.pth"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:1000], "empty": b""}.get(damage, content))
        if damage == "no longer there":
            path.unlink()
    log.clear()
    run(tiny, f"{options} TAG parts")
    assert ("skipped: checkpoint" in log.text) == (damage != "no longer there")
    assert f"continues from {step_20}: 1 epochs and 20 of 22 steps finished" in log.text
    assert_same_run(folder_of(tiny).parent / "whole", folder, 2)


def test_two_runs_in_one_folder_by_mistake_the_second_refuses(tiny, monkeypatch):
    job = Job(*arguments(tiny, "TRAIN.EPOCHS 50", "default"), command=[sys.executable, "main.py"])
    job.wait_for(r"epoch 0 \[5/")
    before = {path.name for path in folder_of(tiny).iterdir()}
    monkeypatch.setattr(run_lock, "PATIENCE", 0.5)
    with pytest.raises(RunFolderBusyError, match=rf"in use by process {job.process.pid} on \S+, since"):
        run(tiny, "TRAIN.EPOCHS 50")
    assert before <= {path.name for path in folder_of(tiny).iterdir()}
    assert not (folder_of(tiny) / "STOPPED").exists()  # the run that is in the folder has not failed
    job.process.kill()
    job.end()
    run(tiny, "TRAIN.EPOCHS 1 TRAIN.AUTO_RESUME False")  # a killed run holds nothing


def test_checkpoints_by_the_clock_do_not_mind_a_clock_that_goes_backwards(tiny, monkeypatch):
    """Every minute of a clock that the test drives: a minute a step, wall time running backwards meanwhile."""
    clock = iter(range(0, 10**9, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time", lambda: 1e9 - next(clock))
    names: list[str] = []
    at_step(
        monkeypatch,
        {step: lambda: names.extend(p.name for p in folder_of(tiny).glob("*_step_*.pth")) for step in (21,)},
    )
    run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_MINUTES 1 CHECKPOINT.KEEP 100")
    assert len(names) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_leaves_a_report_aimed_at_the_attention(tiny, monkeypatch):
    def poison():
        attention = next(m for m in poison.model.modules() if isinstance(m, PolaLinearAttention))
        with torch.no_grad():
            attention.power.fill_(torch.nan)  # type: ignore[operator]

    build = main.build_training

    def building(*everything):
        training = build(*everything)
        poison.model = training.bare_model
        return training

    monkeypatch.setattr(main, "build_training", building)
    at_step(monkeypatch, {7: poison})
    with pytest.raises(NonFiniteError, match=r"step 7: .*non_finite_step_7_rank_0\.json says where it began"):
        run(tiny, "TRAIN.EPOCHS 1 PRINT_FREQ 4")
    report = json.loads((folder_of(tiny) / "non_finite_step_7_rank_0.json").read_text())
    assert report["step"] == 7 and report["losses_computed_again"] == ["nan"] and report["learning_rate"] > 0
    assert len(report["samples"]) == 64 and all(name.startswith("digits/") for name in report["samples"])
    first = report["first_module_not_finite"]
    assert first["name"] == "layers.0.blocks.0.attn.proj" and not first["input_finite"]
    assert report["polarity_attention"]["layers.0.blocks.0.attn"]["exponent"] == ["nan", "nan"]
    healthy = report["polarity_attention"]["layers.1.blocks.0.attn"]["exponent"]
    assert 1 < healthy[0] <= healthy[1] < 5
    power = next(p for p in report["parameters"] if p["name"] == "layers.0.blocks.0.attn.power")
    assert not power["finite"]


def test_steps_that_are_not_finite_are_skipped_and_counted_up_to_the_limit(tiny, monkeypatch, log):
    real, calls = torch.nn.CrossEntropyLoss.forward, 0

    def poisoned(self, logits, targets):
        nonlocal calls
        calls += 1
        loss = real(self, logits, targets)
        return loss * torch.nan if calls in bad else loss

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", poisoned)
    bad = {4, 9, 10}
    options = "TRAIN.EPOCHS 1 PRINT_FREQ 4 TRAIN.NON_FINITE skip TRAIN.MAX_SKIPPED 3"
    run(tiny, f"{options} TAG goes-on")
    assert "step 3: non-finite" in log.text and "skipped, 3 of at most 3 steps so far" in log.text
    weights = load_checkpoint(epoch_file(folder_of(tiny).parent / "goes-on", 1))
    assert all(t.isfinite().all() for t in weights["model"].values()) and weights["continuation"]["skipped"] == 3
    calls, bad = 0, {4, 9, 10, 11}
    with pytest.raises(NonFiniteError, match="4 steps skipped in this run"):
        run(tiny, f"{options} TAG ends")


# ---------------------------------------------------------------------------------------------------------------------
# One process: killed at any moment
# ---------------------------------------------------------------------------------------------------------------------


def kill_repeatedly(tiny: Path, kills: int) -> None:
    result = subprocess.run(
        [sys.executable, "tests/kill_loop.py", str(tiny), str(kills)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] == kills and report["inside_a_save"] >= kills // 3
    # CHECKPOINT.EVERY_STEPS of the loop, and what is trained while a checkpoint is still being written
    assert report["most_steps_lost"] <= 3 + 2, report


def test_killed_ten_times_at_random_moments(tiny):
    kill_repeatedly(tiny, 10)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times_at_random_moments(tiny):
    kill_repeatedly(tiny, 100)
