"""Say for whom a rendezvous of several nodes waits: run beside torchrun by pretrain.sh, and ended by it.

python utils/faults/rendezvous.py ADDRESS PORT NODE_RANK NODES [SECONDS]

While pretrain.sh runs on a node, this counts upwards in the store that node 0's torchrun opens at ADDRESS:PORT, and
watches the other nodes' counts: one that has not come, or that stands still, is one that torchrun waits for, at the
start and after a restart.
"""

import math
import os
import socket
import sys
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore


class Nodes:
    """What the store says of the other nodes: when each count was last seen to change."""

    def __init__(self, node: int, nodes: int) -> None:
        self._changed = dict.fromkeys((each for each in range(nodes) if each != node), time.monotonic())
        self._counts: dict[int, bytes] = {}

    def look(self, store: TCPStore) -> None:
        for node in self._changed:
            if store.check([_key(node)]) and (count := store.get(_key(node))) != self._counts.get(node):
                self._counts[node], self._changed[node] = count, time.monotonic()

    def waits(self) -> dict[int, float]:
        """Seconds since each node was last seen there, or since this one came."""
        return {node: time.monotonic() - changed for node, changed in self._changed.items()}


def watch(address: str, port: int, node: int, nodes: int, seconds: float) -> None:
    """Print a line every `seconds` while nodes have been missing for as long, until the parent is gone."""
    parent, count, noticed = os.getppid(), 0, -math.inf
    store, others = None, Nodes(node, nodes)
    while os.getppid() == parent:
        try:
            if store is None:
                store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
            count += 1
            store.set(_key(node), str(count))
            others.look(store)
        except (DistError, RuntimeError):
            store = None
        missing = {other: wait for other, wait in others.waits().items() if wait >= seconds}
        if missing and time.monotonic() - noticed >= seconds:
            noticed = time.monotonic()
            who = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {nodes}"
            print(
                f"node {node} on {socket.gethostname()} waits for {who} at {address}:{port} since"
                f" {max(missing.values()):.0f} s: start pretrain.sh there with the same MASTER_ADDR, MASTER_PORT and"
                " NNODES",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(min(0.5, seconds / 4))


def _key(node: int) -> str:
    return f"polaformer/node/{node}"


if __name__ == "__main__":
    _, address, port, node, nodes, *seconds = sys.argv
    watch(address, int(port), int(node), int(nodes), float(seconds[0]) if seconds else 30.0)
