"""What stands for a forked process where its parent sees it (forkserver.py): forked_client.py SOCKET ARGUMENTS…"""

import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)


def client(path: str, arguments: list[str]) -> None:
    """Have `arguments` run by a fork of the server, pass signals on to it, and end as it ends."""
    started, early = 0, []

    def forward(number: int, frame: object) -> None:
        if started:
            with suppress(ProcessLookupError):
                os.kill(started, number)
        else:
            early.append(number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except ConnectionRefusedError:
        with open(os.path.join(os.path.dirname(path), "error"), encoding="utf-8") as reason:
            sys.exit(reason.read())
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    request = json.dumps([arguments, dict(os.environ), os.getcwd(), ignored]).encode()
    socket.send_fds(connection, [struct.pack("!q", len(request))], [0, 1, 2])
    connection.sendall(request)
    (started,) = struct.unpack("!q", receive(connection, 8))
    for number in early:
        forward(number, None)
    (status,) = struct.unpack("!q", receive(connection, 8))
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionError("the other side has ended")
        content += part
    return content


if __name__ == "__main__":
    client(sys.argv[1], sys.argv[2:])
