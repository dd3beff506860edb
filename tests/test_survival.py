"""Faults while a run is going: what it says, what it leaves, and that the same command then gives the same weights.

pytest tests/test_survival.py
"""

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, PYTHON, ROOT, folder_of, run, write_tiny
from faulty_disk import READ_ONLY, FaultyDisk
from forkserver import rank_of
from run_files import epoch_file, read_position
from test_resume import EVERYTHING, assert_same_run
from torch.distributed import HashStore, TCPStore

import engine.epoch
import main
from engine.non_finite import NonFiniteError
from models.attention import PolaLinearAttention
from models.files import CheckpointError, load_checkpoint
from utils import distributed
from utils.checkpoints import writing
from utils.checkpoints.finding import newest_checkpoint
from utils.checkpoints.naming import run_checkpoints
from utils.faults import folder_lock
from utils.faults.folder_lock import RunFolderBusyError
from utils.faults.preemption import Preempted

EVERY_TEN = "TRAIN.EPOCHS 2 CHECKPOINT.EVERY_STEPS 10"
OPTIONS = f"{EVERYTHING} AMP True TRAIN.EPOCHS 2 CHECKPOINT.EVERY_STEPS 4 PRINT_FREQ 2 DIST.TIMEOUT 600"

# Seconds within which ends, on a busy machine too, what needs a few: well below the 600 s of OPTIONS and pretrain.sh,
# which it must not wait for.
SOON = 120


class Job:
    """A run of main.py under torchrun, or of `command`, in a process group of its own."""

    def __init__(
        self,
        *arguments: object,
        processes: int = 2,
        command: list[str] | None = None,
        script: Sequence[str] = ("main.py",),
        **env: str,
    ):
        launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *script]
        self.process = subprocess.Popen(
            [*(command or launcher), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout
        self.pipe = os.readlink(f"/proc/self/fd/{self.process.stdout.fileno()}")
        self.output = ""

    def wait_for(self, pattern: str, timeout: float = PATIENCE) -> re.Match:
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

    def read(self) -> None:
        """Read output to its end."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.output += line

    def processes(self, rank: int | None = None) -> set[int]:
        """Process ids of all that writes to this job's output: launchers, ranks, their loaders; or those of a rank."""
        found = set()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):
                    if os.readlink(folder / "fd" / "1") == self.pipe and rank in (None, rank_of(folder)):
                        found.add(int(folder.name))
        return found - {os.getpid()}

    def worker(self, rank: int) -> int:
        """Process id of a rank's main process."""
        found = self.processes(rank)
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in found}
        (main_process,) = (pid for pid in found if parents[pid] not in found)  # the others are its loaders
        return main_process

    def signal_everything(self, number: int) -> None:
        """As a terminal or a batch system does: no process is told by another one first."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, timeout: float = PATIENCE) -> tuple[int, float]:
        """Exit status and seconds until it came."""
        began = time.monotonic()
        try:
            rest, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.signal_everything(signal.SIGKILL)
            pytest.fail(f"still running after {timeout} s:\n{self.output}")
        self.output += rest
        return self.process.returncode, time.monotonic() - began


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """With all training images: 22 steps an epoch, so that there is time to strike."""
    return write_tiny(tmp_path)


def pretrain(tiny: Path, options: str = OPTIONS, **settings: str) -> Job:
    """A run of two processes by pretrain.sh, into the folder `parts`."""
    default = {"PYTHON": PYTHON, "NPROC": "2", "CONFIG": str(tiny), "TAG": "parts", "SHUTDOWN_TIMEOUT": "600"}
    return Job(command=["bash", "pretrain.sh", "--opts", *options.split()], **default | settings)


def arguments(tiny: Path, options: str, tag: str) -> list[str]:
    return ["--cfg", str(tiny), "--tag", tag, "--opts", *options.split()]


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run folder of two processes that nobody disturbs."""

    def train(tiny: Path) -> None:
        job = Job(*arguments(tiny, OPTIONS, "default"))
        assert job.end()[0] == 0, job.output

    return shared_run(tmp_path_factory, "two-processes", train)


@pytest.fixture(scope="session")
def undamaged(tmp_path_factory) -> Path:
    """The run folder of one process that saves every ten steps."""
    return shared_run(tmp_path_factory, "one-process", lambda tiny: run(tiny, EVERY_TEN))


def shared_run(tmp_path_factory, name: str, train: Callable[[Path], object]) -> Path:
    """A run folder that all processes of pytest-xdist use: the first that asks for it trains, others wait."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            train(write_tiny(root))
            (root / "done").touch()
    return folder_of(root / "tiny.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["training", "validation"])
def test_one_rank_told_to_stop_saves_the_whole_run_once(tiny, whole, where):
    """SIGTERM from outside inside an epoch; SIGUSR1, which a rank sends itself, inside the validation."""
    script = ("main.py",) if where == "training" else ("tests/driven_main.py", "stop-in-validation")
    job = Job(*arguments(tiny, OPTIONS, "parts"), script=script)
    if where == "training":
        job.wait_for(r"epoch 0 \[6/")
        os.kill(job.worker(1), signal.SIGTERM)
    status, seconds = job.end()
    folder = folder_of(tiny).parent / "parts"
    assert status == 0 and (where != "training" or seconds < SOON), job.output  # workers end with 0 of their own accord
    marker = (folder / "PREEMPTED").read_text()
    done = re.match(r"told to stop by (?:SIG\w+|another rank), saved after 0 epochs and (\d+) of 11 steps", marker)[1]
    assert (done == "11") == (where == "validation")
    newest = newest_checkpoint(folder, read_position).path
    assert newest.name == f"ckpt_epoch_0_step_{done}.pth"
    again = Job(*arguments(tiny, OPTIONS, "parts"))
    assert again.end()[0] == 0, again.output
    assert f"continues from {newest}" in again.output
    assert_same_run(whole, folder, 2)


def test_a_killed_worker_restarts_and_continues_without_a_human(tiny, whole):
    job = pretrain(tiny, MAX_RESTARTS="2")
    job.wait_for(r"epoch 0 \[10/")
    os.kill(job.worker(1), signal.SIGKILL)
    job.wait_for(r"continues from \S+ckpt_epoch_0_step_(4|8).pth")
    job.wait_for(r"epoch 1 \[6/")
    os.kill(job.worker(0), signal.SIGKILL)
    assert job.end()[0] == 0, job.output
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_a_dead_rank_ends_the_job_and_is_named(tiny):
    """No restart is left: torchrun tells the survivor by SIGTERM, which finds that nobody agrees to save."""
    job = pretrain(tiny, OPTIONS + " TRAIN.EPOCHS 50", MAX_RESTARTS="0")
    job.wait_for(r"epoch 5 \[10/")  # seconds after the start: a rank says once a second where it is
    os.kill(job.worker(1), signal.SIGKILL)
    status, seconds = job.end()
    assert status not in (0, 75) and seconds < SOON, job.output
    assert re.search(r"rank 1 failed first, with exit code -9: Signal 9 .*, as the system does when memory", job.output)
    host = re.escape(os.uname().nodename)
    assert re.search(rf"rank 1 on host {host}, last seen in .* of step \d+, does not answer any more", job.output)
    assert not job.processes()
    folder = folder_of(tiny).parent / "parts"
    assert newest_checkpoint(folder, read_position).path.name in ("ckpt_epoch_5_step_8.pth", "ckpt_epoch_6.pth")
    assert not newest_checkpoint(folder, read_position).skipped and not list(folder.glob(".*.tmp"))
    assert not (folder / "PREEMPTED").exists()


def test_a_hung_rank_ends_the_job_and_is_named(tiny):
    options = OPTIONS.replace("DIST.TIMEOUT 600", "DIST.TIMEOUT 6")
    job = Job(*arguments(tiny, options + " TRAIN.EPOCHS 50", "parts"))
    job.wait_for(r"epoch 5 \[10/")
    os.kill(job.worker(1), signal.SIGSTOP)
    status, seconds = job.end()
    assert status != 0 and seconds < 6 + SOON, job.output
    assert re.search(r"no progress for 6 s, waiting for rank 1 on host \S+, last seen in .* of step \d+", job.output)


def test_a_hung_rank_0_which_holds_the_store_is_named_too(tiny):
    options = OPTIONS.replace("DIST.TIMEOUT 600", "DIST.TIMEOUT 6") + " TRAIN.EPOCHS 50"
    job = pretrain(tiny, options, MAX_RESTARTS="0")
    job.wait_for(r"epoch 5 \[10/")
    os.kill(job.worker(0), signal.SIGSTOP)
    status, seconds = job.end()
    assert status not in (0, 75) and seconds < 6 + SOON, job.output
    assert re.search(r"rank 1 error: no progress for 6 s, waiting for rank 0 on host \S+, last seen in", job.output)


def test_a_slow_step_a_long_validation_and_a_long_save_are_not_taken_for_a_hang(tiny):
    options = OPTIONS.replace("DIST.TIMEOUT 600", "DIST.TIMEOUT 4") + " TRAIN.EPOCHS 1"
    job = Job(*arguments(tiny, options, "parts"), script=("tests/driven_main.py", "slow"))
    assert job.end()[0] == 0, job.output
    assert "no progress" not in job.output
    assert newest_checkpoint(folder_of(tiny).parent / "parts", read_position).path.name == "ckpt_epoch_1.pth"


def test_an_error_that_would_come_again_is_not_tried_again(tiny):
    (tiny.parent / "empty").mkdir()
    job = pretrain(tiny, f"DATA.DATASET imagenet DATA.DATA_PATH {tiny.parent / 'empty'}", MAX_RESTARTS="2")
    assert job.end()[0] != 0
    assert len(re.findall(r"\] error: data set folder .*empty/train does not exist", job.output)) == 1
    assert re.search("error: not tried again: .*empty/train does not exist", job.output)
    assert not folder_of(tiny).exists()
    assert re.search(
        r"rank \d failed first, with exit code 2: RunFolder\w*Error: not tried again: data set", job.output
    )
    assert "Traceback" not in job.output


def test_told_to_stop_while_it_starts_a_run_stops_at_its_first_step(tiny, monkeypatch):
    """Further signals, while it saves, change nothing."""
    build, save, further = main.build_loaders, writing.save_checkpoint, []

    def saving(state, path):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            further.append(number)
        save(state, path)

    monkeypatch.setattr(writing, "save_checkpoint", saving)

    def building(config, plan):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(config, plan)

    monkeypatch.setattr(main, "build_loaders", building)
    with pytest.raises(Preempted, match="told to stop by SIGTERM: saved after 0 epochs and 1 of 22 steps"):
        run(tiny)
    assert (
        len(further) == 3 and newest_checkpoint(folder_of(tiny), read_position).path.name == "ckpt_epoch_0_step_1.pth"
    )


def test_a_checkpoint_due_at_the_end_of_an_epoch_is_written_whatever_save_freq_says(tiny):
    run(tiny, "TRAIN.EPOCHS 3 SAVE_FREQ 100 CHECKPOINT.EVERY_STEPS 22 CHECKPOINT.KEEP 9")
    assert [position for position, _ in run_checkpoints(folder_of(tiny))] == [(3, 0), (2, 0), (1, 0)]


def test_an_epoch_does_not_continue_with_other_images(tiny, monkeypatch):
    at_step(monkeypatch, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Preempted):
        run(tiny)
    with pytest.raises(CheckpointError, match="inside an epoch of 1442 images drawn with SEED 0; now there are 1442"):
        run(tiny, "SEED 1")
    with pytest.raises(CheckpointError, match=r"\(AUG.REPEATS was 1, is 3\), so its rest would be other images"):
        run(tiny, "AUG.REPEATS 3")
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


@pytest.mark.parametrize("launched", [False, True], ids=["one process", "pretrain.sh"])
def test_a_signal_to_everything_at_once_spares_the_loader_processes(tiny, launched):
    options = OPTIONS + " DATA.NUM_WORKERS 2"
    job = pretrain(tiny, options) if launched else Job(*arguments(tiny, options, "parts"), command=[PYTHON, "main.py"])
    job.wait_for(r"epoch 0 \[6/")
    assert len(job.processes(0)) == 3
    job.signal_everything(signal.SIGTERM)
    status, _ = job.end()
    assert status == (75 if launched else 0), job.output
    assert re.search("told to stop by SIGTERM: saved after 0 epochs", job.output)
    folder = folder_of(tiny).parent / "parts"
    done = re.search(r"and (\d+) of", (folder / "PREEMPTED").read_text())[1]
    assert newest_checkpoint(folder, read_position).path.name == f"ckpt_epoch_0_step_{done}.pth" and not job.processes()


def test_another_number_of_processes_keeps_the_global_batch_and_the_schedule(tiny, monkeypatch):
    """One process, then two, then one."""
    options = "TRAIN.GLOBAL_BATCH 64 DATA.BATCH_SIZE 32 TRAIN.EPOCHS 2 PRINT_FREQ 5 CHECKPOINT.EVERY_STEPS 5"
    run(tiny, f"{options} TAG one")
    with monkeypatch.context() as patched:
        at_step(patched, {6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        with pytest.raises(Preempted, match="0 epochs and 6 of 22 steps"):
            run(tiny, f"{options} TAG changed")
    job = Job(*arguments(tiny, options, "changed"))
    job.wait_for(r"global batch 64 = 2 processes × 1 passes × 32 samples")
    job.wait_for(r"written by 1 processes, this run has 2: the global batch stays 64, and so does the schedule")
    job.wait_for(r"epoch 0 \[15/")
    os.kill(job.worker(0), signal.SIGTERM)
    assert job.end()[0] == 0, job.output
    folder = folder_of(tiny).parent / "changed"
    run(tiny, f"{options} TAG changed")
    assert "written by 2 processes, this run has 1: the global batch stays 64" in (folder / "log.txt").read_text()
    rates = [
        [(r["step"], r["lr"]) for r in map(json.loads, (root / "metrics.jsonl").read_text().splitlines()) if "lr" in r]
        for root in (folder_of(tiny).parent / "one", folder)
    ]
    assert rates[0] == rates[1] and len(rates[0]) > 6


# Slow: with interpreters of their own, whose imports take longer than all else here.
@pytest.mark.parametrize("python", [PYTHON, pytest.param(sys.executable, marks=pytest.mark.slow)], ids=["fork", "real"])
def test_pretrain_told_to_stop_exits_75_and_the_same_command_finishes(tiny, whole, python):
    """Told three times, as impatient users and batch systems do."""
    job = pretrain(tiny, PYTHON=python)
    job.wait_for(r"epoch 0 \[4/")
    began = time.monotonic()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        job.process.send_signal(number)
        time.sleep(0.2)
    status, _ = job.end()
    assert status == 75 and time.monotonic() - began < SOON, job.output
    again = pretrain(tiny)
    assert again.end()[0] == 0, again.output
    assert re.search(r"continues from \S+ckpt_epoch_[01]", again.output)
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_a_closed_terminal_saves_and_the_same_command_finishes(tiny, whole):
    """SIGHUP to the script, as when its terminal closes."""
    job = pretrain(tiny)
    job.wait_for(r"epoch 0 \[4/")
    job.process.send_signal(signal.SIGHUP)
    status, _ = job.end()
    assert status == 75 and "told to stop by SIGHUP: saved after" in job.output, job.output
    assert "Traceback" not in job.output and "SignalException" not in job.output  # torchrun's own
    again = pretrain(tiny)
    assert again.end()[0] == 0, again.output
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_started_with_nohup_the_script_torchrun_and_the_run_go_on(tiny, whole):
    settings = {"PYTHON": PYTHON, "NPROC": "2", "CONFIG": str(tiny), "TAG": "parts"}
    command = ["bash", "-c", "trap '' HUP; exec bash pretrain.sh \"$@\"", "nohup", "--opts", *OPTIONS.split()]
    job = Job(command=command, **settings)
    job.wait_for(r"epoch 0 \[4/")
    job.signal_everything(signal.SIGHUP)
    assert job.end()[0] == 0, job.output
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def slurm(folder: Path, srun: str, *arguments: str, **settings: str) -> Job:
    """slurm/train.sbatch on two nodes, against stand-ins of Slurm's commands that note how they are called."""
    nodes = "echo localhost; echo node8"
    scripts = {
        "srun": f'echo "srun $NNODES $MASTER_ADDR $TAG" >> {folder}/calls\n{srun}',
        "scontrol": f'if [[ $1 == show ]]; then {nodes}; else echo "scontrol $*" >> {folder}/calls; fi',
        # the signal reaches the processes that srun has started, not the batch script
        "scancel": f'echo "scancel $*" >> {folder}/calls\nkill "-${{1#--signal=}}" $(cat {folder}/started)',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    settings |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "DATA": str(folder)}
    settings |= {"PATH": f"{folder}:{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    return Job(*arguments, command=["bash", "slurm/train.sbatch"], **settings)


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_slurm_job_queues_itself_again_when_it_was_told_to_stop(tmp_path, status, requeued):
    job = slurm(tmp_path, f"exit {status}")
    assert job.end()[0] == status, job.output
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "srun 2 localhost slurm-41" and calls[1:] == ["scontrol requeue 41"] * requeued


# What srun does with `--kill-on-bad-exit=0 COMMAND`: COMMAND once on every node; the largest of their exit statuses.
SRUN = """
[[ $1 == --kill-on-bad-exit=0 ]] || exit 99
shift
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & echo -n "$! " >> FOLDER/started; done
largest=0
for process in $(cat FOLDER/started); do
  wait "$process"; status=$?
  largest=$(( status > largest ? status : largest ))
done
exit "$largest"
"""


def test_the_slurm_job_trains_on_its_nodes_stops_before_the_limit_and_continues(tiny, whole, tmp_path):
    """Its command really started, once for each of two nodes that are this machine."""
    settings = {"PYTHON": PYTHON, "NPROC": "1", "CONFIG": str(tiny), "TAG": "parts"}
    srun = SRUN.replace("FOLDER", str(tmp_path))
    job = slurm(tmp_path, srun, "--opts", *OPTIONS.split(), **settings)
    job.wait_for(r"epoch 0 \[6/")
    job.process.send_signal(signal.SIGUSR1)  # --signal=B:USR1@300: to the batch script alone
    assert job.end()[0] == 75, job.output
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["srun 2 localhost parts", "scancel --signal=USR1 41", "scontrol requeue 41"]
    (tmp_path / "started").unlink()
    again = slurm(tmp_path, srun, "--opts", *OPTIONS.split(), **settings)
    assert again.end()[0] == 0, again.output
    assert re.search(r"continues from \S+ckpt_epoch_0_step_\d+", again.output)
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


@pytest.mark.slow
def test_two_nodes_of_which_one_is_killed_and_started_again(tiny, whole):
    """Two launchers, a rendezvous on loopback; the job continues by itself once the node is back."""
    settings = {"NPROC": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def node(rank: int) -> Job:
        return pretrain(tiny, NODE_RANK=str(rank), SHUTDOWN_TIMEOUT="20", **settings)

    first, second = node(0), node(1)
    wait_until(lambda: (folder_of(tiny).parent / "parts").glob("ckpt_epoch_0_step_8.pth"))
    second.signal_everything(signal.SIGKILL)
    again = node(1)
    assert first.end()[0] == 0, first.output
    assert again.end()[0] == 0, again.output
    output = first.output + again.output  # the log is that of the node which holds rank 0
    assert re.search(r"continues from \S+ckpt_epoch_[01]", output) and "2 × CPU" in output and "best top-1" in output
    assert_same_run(whole, folder_of(tiny).parent / "parts", 2)


def test_a_node_that_waits_says_for_whom_also_after_a_restart():
    port = str(free_port())
    store = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    command = [PYTHON, "utils/faults/rendezvous.py", "127.0.0.1", port]
    watcher = Job("1", "3", "2", command=command)
    watcher.wait_for(r"node 1 on \S+ waits for nodes 0, 2 of 3 at 127.0.0.1:\d+ since \d+ s")
    alive, count = {0, 2}, 0

    def until(line: str) -> None:
        """The nodes that are alive count, until the watcher says `line`."""
        said = threading.Event()

        def counting() -> None:
            nonlocal count
            while not said.wait(0.1):
                count += 1
                for node in alive:
                    store.set(f"polaformer/node/{node}", str(count))

        thread = threading.Thread(target=counting)
        thread.start()
        try:
            watcher.wait_for(line)
        finally:
            said.set()
            thread.join()

    alive = {2}
    until(r"waits for node 0 of 3")
    alive = {0}  # node 2 has died
    until(r"waits for node 2 of 3 at .* since \d s")
    watcher.process.kill()
    absent = Job("1", "2", "1", command=[PYTHON, "utils/faults/rendezvous.py", "127.0.0.1", str(free_port())])
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


def wait_until(found: Callable[[], Iterator[Path]], timeout: float = PATIENCE) -> None:
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
    step, count = engine.epoch.optimizer_step, 0

    def counted(*arguments):
        nonlocal count
        result = step(*arguments)
        count += 1
        actions.get(count, lambda: None)()
        return result

    monkeypatch.setattr(engine.epoch, "optimizer_step", counted)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """By a file-size limit: checkpoints of tens of kilobytes fail, log lines do not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_refuses_for_a_while_does_not_end_the_run(tiny, kind, monkeypatch, log):
    refusing, reason = {
        "full": (full_disk, "File too large"),
        "read-only": (lambda folder: FaultyDisk(folder, READ_ONLY), "Read-only file system"),
    }[kind]
    during: list[str] = []
    with ExitStack() as fault:

        def end():
            fault.close()
            during.extend(path.name for _, path in run_checkpoints(folder_of(tiny)))

        at_step(monkeypatch, {8: lambda: fault.enter_context(refusing(folder_of(tiny))), 18: end})
        run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_STEPS 3 CHECKPOINT.KEEP 2")
    assert during == ["ckpt_epoch_0_step_6.pth", "ckpt_epoch_0_step_3.pth"]  # not fewer than before
    message = rf"ckpt_epoch_0_step_9\.pth could not be written: {reason}\. The run goes on; it could continue from"
    assert re.search(message + r" ckpt_epoch_0_step_6\.pth", log.text)
    assert ("metrics.jsonl could not be written: Read-only" in log.text) == (kind == "read-only")
    assert newest_checkpoint(folder_of(tiny), read_position).path == epoch_file(folder_of(tiny), 1)


def test_a_run_folder_removed_under_the_run_comes_back(tiny, monkeypatch, log):
    at_step(monkeypatch, {8: lambda: shutil.rmtree(folder_of(tiny))})
    run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_STEPS 3 PRINT_FREQ 2 TENSORBOARD False")
    assert "was deleted or renamed under the run: it is made anew" in log.text
    assert newest_checkpoint(folder_of(tiny), read_position).path == epoch_file(folder_of(tiny), 1)


def test_a_last_checkpoint_that_cannot_be_written_ends_in_an_error_and_keeps_the_others(tiny, monkeypatch):
    real = writing.save_checkpoint

    def refusing(state, path):
        if path.name == "ckpt_epoch_1.pth":
            raise OSError(f"checkpoint {path} could not be written: No space left on device")
        real(state, path)

    monkeypatch.setattr(writing, "save_checkpoint", refusing)
    with pytest.raises(OSError, match=r"ckpt_epoch_1\.pth could not be written: No space left"):
        run(tiny, "TRAIN.EPOCHS 1 CHECKPOINT.EVERY_STEPS 20")
    assert (
        newest_checkpoint(folder_of(tiny), read_position).path.name == "max_acc.pth"
    )  # of the same epoch, and written before
    assert [path.name for _, path in run_checkpoints(folder_of(tiny))] == ["ckpt_epoch_0_step_20.pth"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no longer there"])
def test_a_damaged_newest_checkpoint_is_skipped_and_the_weights_are_the_same(tiny, undamaged, damage, log):
    folder = Path(shutil.copytree(undamaged, folder_of(tiny)))
    newest, step_20 = epoch_file(folder, 2), folder / "ckpt_epoch_1_step_20.pth"
    for path in (newest, folder / "max_acc.pth"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:1000], "empty": b""}.get(damage, content))
        if damage == "no longer there":
            path.unlink()
    run(tiny, EVERY_TEN)
    assert ("skipped: checkpoint" in log.text) == (damage != "no longer there")
    assert f"continues from {step_20}: 1 epochs and 20 of 22 steps finished" in log.text
    assert_same_run(undamaged, folder, 2)


def test_two_runs_in_one_folder_by_mistake_the_second_refuses(tiny, monkeypatch):
    job = Job(*arguments(tiny, "TRAIN.EPOCHS 50", "default"), command=[PYTHON, "main.py"])
    job.wait_for(r"epoch 0 \[5/")
    before = {path.name for path in folder_of(tiny).iterdir()}
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.5)
    with pytest.raises(RunFolderBusyError, match=rf"in use by process {job.worker(0)} on \S+, since"):
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
    assert report["attention"]["layers.0.blocks.0.attn"]["exponent"] == ["nan", "nan"]
    healthy = report["attention"]["layers.1.blocks.0.attn"]["exponent"]
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
        [PYTHON, "tests/kill_loop.py", str(tiny), str(kills)],
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
def test_killed_a_hundred_times_at_random_moments(tiny):
    kill_repeatedly(tiny, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes: any of everything killed
# ---------------------------------------------------------------------------------------------------------------------


def kill_any(tiny: Path, whole: Path, kills: int) -> None:
    """Kill any process of a run by pretrain.sh, and give the same command again whenever it has ended.

    The script itself, what it starts on the way, torchrun, a rank or a loader process, at a random moment.
    """
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    generator, victims, starts = random.Random(seed), list[str](), 0
    folder = folder_of(tiny).parent / "parts"
    while True:
        job = pretrain(tiny, OPTIONS + " DATA.NUM_WORKERS 1", MAX_RESTARTS="2")
        killed_before, starts = len(victims), starts + 1
        reader = threading.Thread(target=job.read, daemon=True)
        reader.start()
        while len(victims) < kills:
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(generator.uniform(0.5, 5))
                break
            pid = generator.choice(sorted(job.processes()))
            with suppress(OSError):  # it has just ended
                process = Path(f"/proc/{pid}")
                rank = rank_of(process)
                name = (process / "comm").read_text().strip() if rank is None else f"rank {rank}"
                os.kill(pid, signal.SIGKILL)
                victims.append(name)
        status = job.process.wait(PATIENCE)
        report = f"KILL_SEED={seed}: killed {victims} in {starts} starts"
        if len(victims) == killed_before:
            reader.join(PATIENCE)
            assert status == 0, f"{report}; a start that nobody disturbed exited {status}:\n{job.output}"
        if status == 0 and len(victims) == kills:
            break
        if status == 0:  # finished too early
            while folder.exists():  # the drawing of curves, which outlives a killed run, may put a file there meanwhile
                shutil.rmtree(folder, ignore_errors=True)
    print(report)
    assert_same_run(whole, folder, 2)


def test_any_process_killed_at_random_moments_the_same_command_gives_the_same_weights(tiny, whole):
    kill_any(tiny, whole, 4)


@pytest.mark.slow
def test_any_process_killed_forty_times_the_same_command_gives_the_same_weights(tiny, whole):
    kill_any(tiny, whole, 40)
