"""Say for whom a rendezvous of several nodes waits: run beside torchrun by pretrain.sh, ends when all nodes have come.

python utils/rendezvous.py ADDRESS PORT NODE_RANK NODES [SECONDS]

Every node writes its name to the store that node 0's torchrun opens at ADDRESS:PORT, and reads the others'.
"""

import socket
import sys
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore


def missing_nodes(store: TCPStore, nodes: int) -> list[int]:
    """The ranks of the nodes that have not come yet."""
    return [node for node in range(nodes) if not store.check([_key(node)])]


def watch(address: str, port: int, node: int, nodes: int, seconds: float) -> None:
    """Print a line every `seconds` until all nodes have come."""
    began, noticed, store = time.monotonic(), 0.0, None
    while True:
        try:
            if store is None:
                store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
                store.set(_key(node), socket.gethostname())
            missing = missing_nodes(store, nodes)
        except (DistError, RuntimeError):
            store, missing = None, [0]
        if not missing:
            return
        waited = time.monotonic() - began
        if waited - noticed >= seconds:
            noticed = waited
            who = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {nodes}"
            print(
                f"node {node} on {socket.gethostname()} waits for {who} at {address}:{port} since {waited:.0f} s: start"
                " pretrain.sh there with the same MASTER_ADDR, MASTER_PORT and NNODES",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(min(0.5, seconds))


def _key(node: int) -> str:
    return f"polaformer/node/{node}"


if __name__ == "__main__":
    _, address, port, node, nodes, *seconds = sys.argv
    watch(address, int(port), int(node), int(nodes), float(seconds[0]) if seconds else 30.0)
