"""Python processes for tests, started by fork: a stand-in for the interpreter that has the project imported already.

Importing torch, timm and torchvision takes seconds of a core in every process, more than most tests train for. So tests
that start processes give them this interpreter: `Forkserver.python` is an executable that takes `-m module`, `-c code`
or a script, as python does. It asks a server, which was forked from pytest before any test ran, for a fork that runs
them; torchrun, started so, forks its workers in turn. Everything else is as always: torchrun's own agent and signals,
`main.py` as `__main__`, process groups, standard streams, exit status.
"""

import atexit
import faulthandler
import gc
import importlib
import io
import json
import logging
import multiprocessing.util
import os
import random
import re
import runpy
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import forked_client
from forked_client import FORWARDED, receive

# What a run imports on its way, beyond what main.py imports.
PRELOADED = ("torch.distributed.run", "torch.distributed.elastic.agent.server.local_elastic_agent")
PRELOADED += ("sklearn.datasets", "matplotlib.pyplot")


class Forkserver:
    """The server, forked from this process; `python` is the executable that uses it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-python-")
        self.python = str(Path(self._folder.name) / "python")
        path = str(Path(self._folder.name) / "socket")
        client_command = shlex.join([sys.executable, "-IS", forked_client.__file__, path])
        Path(self.python).write_text(f'#!/bin/sh\nexec {client_command} "$@"\n')
        os.chmod(self.python, 0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        read_end, self._alive = os.pipe()  # the server ends with this process, however that ends
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(listener, read_end)
            except BaseException:
                (Path(path).parent / "error").write_text(traceback.format_exc())
            finally:
                os._exit(1)
        os.close(read_end)
        listener.close()

    def cpu_seconds(self) -> float:
        """CPU time of the server and of its forks that have ended."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        os.close(self._alive)
        os.waitpid(self.pid, 0)
        self._folder.cleanup()


def _serve(listener: socket.socket, alive: int) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    kept = sorted((listener.fileno(), alive))
    for low, high in zip([3, kept[0] + 1, kept[1] + 1], [*kept, 1 << 16], strict=True):
        os.closerange(low, high)  # pytest's files and connections
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2)
    )
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler) and type(handler) is not type(logging.lastResort):
            handler.stream = sys.stderr  # the number of the file it had may soon be another file's
    faulthandler.disable()
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    atexit._clear()
    gc.freeze()  # objects of pytest are never finalised here
    wake, waker = socket.socketpair()
    for end in (wake, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    clients: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, alive, wake, *clients.values()], [], [])
        if alive in ready:
            for pid in clients:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if wake in ready:
            wake.recv(4096)
        for pid in [pid for pid, connection in clients.items() if connection in ready]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # its client was killed
        for pid in list(clients):
            if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                with suppress(OSError), clients.pop(pid) as connection:
                    connection.sendall(struct.pack("!q", ended[1]))
        if listener in ready:
            for name in PRELOADED:
                importlib.import_module(name)
            connection, _ = listener.accept()
            header, streams, _, _ = socket.recv_fds(connection, 8, 3)
            arguments, environment, folder, ignored = json.loads(receive(connection, *struct.unpack("!q", header)))
            pid = os.fork()
            if pid == 0:
                os.chdir(folder)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                _become(arguments, environment, ignored)
            for stream in streams:
                os.close(stream)
            clients[pid] = connection
            with suppress(OSError):
                connection.sendall(struct.pack("!q", pid))


def rank_of(process: Path) -> int | None:
    """The rank that a folder of /proc belongs to: of a fork by its file 3, of a program by its environment."""
    with suppress(FileNotFoundError):
        if mark := re.match(r"/memfd:rank (\d+) ", os.readlink(process / "fd" / "3")):
            return int(mark[1])
    variables = (process / "environ").read_bytes().decode().split("\0")
    return next((int(each.removeprefix("RANK=")) for each in variables if each.startswith("RANK=")), None)


# ---------------------------------------------------------------------------------------------------------------------
# The forked process
# ---------------------------------------------------------------------------------------------------------------------


def _become(arguments: list[str], environment: dict[str, str], ignored: Sequence[int]) -> None:
    """Run, in this fresh fork, what python would run with these arguments; does not return."""
    os.setsid()
    os.closerange(3, 1 << 16)
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in (*FORWARDED, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    random.seed()
    faulthandler.register(signal.SIGUSR2, file=2)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.clear()
    os.environ.update(environment)
    while arguments[0] in ("-u", "-W"):
        arguments = arguments[2 if arguments[0] == "-W" else 1 :]
    launcher = arguments[0].endswith("utils/faults/launch.py")
    launcher |= arguments[0] == "-m" and arguments[1].startswith("torch.distributed.")
    if launcher:
        Path("/proc/self/comm").write_text("torchrun")
    else:
        os.memfd_create(
            f"rank {environment.get('RANK', 0)}"
        )  # file 3: `rank_of` knows it and its loader processes by it
    status: int | None = 1
    try:
        if launcher:
            _fork_workers()
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            multiprocessing.util._exit_function()
            atexit._run_exitfuncs()
        os._exit(status & 255)


class _Fork(subprocess.Popen):
    """A child that is forked where subprocess would start a program."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self._environment = environment
        super().__init__(list(arguments))

    def _execute_child(self, arguments: list[str], *others: object) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
            _become(arguments[1:], self._environment, ignored)
        self._child_created = True


def _fork_workers() -> None:
    """Let torchrun, in this process, fork its workers."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    SubprocessHandler._popen = lambda self, args, env: _Fork(args, env)  # type: ignore[method-assign]
    # a label of its records, which inspect.stack takes from all frames, pytest's too: seconds for every exchange
    dynamic_rendezvous.get_method_name = lambda depth=2: "rendezvous"
