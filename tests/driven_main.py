"""main.py with one thing going wrong on purpose, for tests that start processes: driven_main.py MODE ARGUMENTS…

stop-at-epoch-1   every rank is interrupted where epoch 1 would begin
nan-on-rank-1     the loss of rank 1 is NaN at step 7
"""

import math
import sys

import torch

import main
from config import parse_command_line
from engine import NonFiniteError
from utils import distributed

torch.set_flush_denormal(True)


def stop_at_epoch_1() -> None:
    train = main.train_one_epoch

    def stopping(config, training, batches, epoch, metrics, **where):
        if epoch == 1:
            raise KeyboardInterrupt
        train(config, training, batches, epoch, metrics, **where)

    main.train_one_epoch = stopping


def nan_on_rank_1() -> None:
    build = main.build_training

    def building(*arguments):
        training = build(*arguments)
        criterion, calls = training.criterion, []

        def poisoned(logits, targets):
            calls.append(None)
            loss = criterion(logits, targets)
            return loss * math.nan if len(calls) == 8 and distributed.rank() == 1 else loss

        training.criterion = poisoned
        return training

    main.build_training = building


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    {"stop-at-epoch-1": stop_at_epoch_1, "nan-on-rank-1": nan_on_rank_1}[mode]()
    try:
        main.main(parse_command_line(arguments))
    except KeyboardInterrupt:
        sys.exit(0)
    except NonFiniteError as error:
        print(f"rank {distributed.rank()} stopped: {error}", flush=True)
        sys.exit(2)
