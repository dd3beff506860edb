"""Processes: the environment of torchrun, or one process without it. On one process everything here is a no-op."""

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from logger import get_logger
from utils.devices import device_type

T = TypeVar("T")


WAITING_NOTICE = 30.0  # seconds of waiting for a process before a log line says so, and between two such lines
LAUNCHER_PATIENCE = 60.0  # seconds for torchrun's store to answer, which is there before the processes are


class LaunchError(ValueError):
    """A launch that cannot work on this machine: the message names what to change."""


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def restarts() -> int:
    """How often torchrun has started this run's processes again."""
    return _environment("TORCHELASTIC_RESTART_COUNT", 0)


def local_rank() -> int:
    """Index of this process on its node."""
    return _environment("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this node."""
    return _environment("LOCAL_WORLD_SIZE", 1)


def init(single_process_gpu: int = 0, timeout: float = 1800.0, device_name: str = "auto") -> torch.device:
    """Join the process group that the environment describes and return this process's device.

    Without WORLD_SIZE in the environment this is one process on GPU `single_process_gpu`, or on the CPU. `device_name`
    is for utils.devices.device_type.
    Raises LaunchError when the node has fewer GPUs than processes, when srun started several tasks without torchrun,
    and when a process does not come within `timeout` seconds; from WAITING_NOTICE on, a log line says which are
    missing.
    """
    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    tasks = _environment("SLURM_STEP_NUM_TASKS", _environment("SLURM_NTASKS", 1))
    if not launched and tasks > 1 and "SLURM_PROCID" in os.environ:
        raise LaunchError(
            f"Slurm gives this job {tasks} tasks and this program would train alone in each (this is task"
            f" {os.environ['SLURM_PROCID']}): start one task a node, of pretrain.sh, as slurm/train.sbatch does; a"
            " single process with srun --ntasks 1"
        )
    index = local_rank() if launched else single_process_gpu
    device = torch.device(device_type(device_name))
    if device.type != "cpu":
        gpus = torch.accelerator.device_count()
        processes = local_world_size() if launched else index + 1
        if processes > gpus:
            raise LaunchError(
                f"{processes} processes need {processes} GPUs, and this node has {gpus}: lower --nproc_per_node (NPROC)"
            )
        torch.accelerator.set_device_index(index)
        device = torch.device(device.type, index)
    if launched and not dist.is_initialized():
        store, rank, world_size = _join_store(timeout)
        _await_processes(store, rank, world_size, timeout)
        limit = timedelta(seconds=timeout + 30)  # later than the watchdog, which has a name to give
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    return device


def _join_store(timeout: float) -> tuple[Any, int, int]:
    """The store of the run, this process's rank and the number of processes."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = min(timeout, LAUNCHER_PATIENCE) if by_torchrun else timeout
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        what = "the launcher that started this process" if by_torchrun else "rank 0"
        raise LaunchError(f"{what} did not answer at {address} within {patience:g} s") from error
    store.set_timeout(timedelta(seconds=timeout))
    if by_torchrun:  # its store outlives a restart, and so do the addresses in it
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, world_size


def _await_processes(store: Any, rank: int, world_size: int, timeout: float) -> None:
    """Return when every process has come; say for whom this one waits."""
    keys = [f"polaformer/arrived/{each}" for each in range(world_size)]
    store.set(keys[rank], socket.gethostname())
    began, noticed = time.monotonic(), 0.0
    while missing := [each for each in range(world_size) if not store.check([keys[each]])]:
        waited = time.monotonic() - began
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {world_size}"
        if waited > timeout:
            raise LaunchError(f"{who} did not come within {timeout:g} s (DIST.TIMEOUT)")
        if waited - noticed > WAITING_NOTICE:
            noticed = waited
            present = sorted({store.get(key).decode() for key in keys if store.check([key])})
            get_logger().warning("waiting for %s since %.0f s; present: %s", who, waited, ", ".join(present))
        time.sleep(0.05)


def cleanup() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int, *, at_once: bool = False) -> NoReturn:
    """End the program; `at_once`, without what libraries do at its end. Nor are torch's threads taken apart where the
    process failed: while other processes of the run are gone, that can abort with a report of its own."""
    logging.shutdown()
    if at_once or dist.is_initialized():
        os._exit(status)
    sys.exit(status)


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Rank 0's values into these tensors of every process."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(value: object) -> list:
    """`value` of every process, by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every process."""
    box: list[T] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
