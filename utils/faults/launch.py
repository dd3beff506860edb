"""torchrun, for pretrain.sh: without a traceback of its own where a signal ended it, or where a process failed.

python utils/faults/launch.py TORCHRUN_ARGUMENTS…

What a process said of its failure is in its output; this names the first of them.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as told:
        sys.exit(128 + told.sigval)
    except RendezvousError as problem:
        sys.exit(f"the nodes of the run did not find each other: {type(problem).__name__} {problem}".rstrip())
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        message = failure.message if isinstance(failure.message, str) else failure.message.get("message", "")
        if failure.exitcode == -signal.SIGKILL:
            message += ", as the system does when memory runs out"
        print(f"rank {rank} failed first, with exit code {failure.exitcode}: {message}", file=sys.stderr)
        sys.exit(1)
