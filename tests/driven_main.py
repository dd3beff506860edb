"""main.py with one thing going wrong on purpose, for tests that start processes: driven_main.py MODE ARGUMENTS…

stop-at-epoch-1   every rank is interrupted where epoch 1 would begin
nan-on-rank-1     the loss of rank 1 is NaN at step 7
stop-in-validation   rank 1 gets SIGUSR1 in the middle of the first validation
tell-statistics   every rank prints a digest of its running statistics before and after each validation
slow              the first step and the first validation take 5 s each, a save 7 s; the watchdog is quick to judge
"""

import hashlib
import math
import os
import signal
import sys
import time

import torch

import engine.evaluation
import main
from config import parse_command_line
from engine.non_finite import NonFiniteError
from models.classifier import TrainableModel
from utils import distributed
from utils.checkpoints import writing
from utils.faults import watchdog
from utils.faults.preemption import Preempted

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


def stop_in_validation() -> None:
    update, calls = engine.evaluation.AccuracyCounter.update, []

    def signalled(*arguments):
        calls.append(update(*arguments))
        if len(calls) == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    engine.evaluation.AccuracyCounter.update = signalled


def tell_statistics() -> None:
    validate = main.validate_epoch

    def telling(config, training, *arguments):
        def digest() -> str:
            entries = [*training.bare_model.buffers(), *training.ema.module.buffers()]
            return hashlib.sha256(b"".join(entry.numpy().tobytes() for entry in entries)).hexdigest()[:8]

        before, results = digest(), validate(config, training, *arguments)
        print(f"statistics of rank {distributed.rank()}: {before} {digest()}", flush=True)
        return results

    main.validate_epoch = telling


def slow() -> None:
    watchdog.INTERVAL, watchdog.SILENCE = 0.3, 2.0
    forward, update = TrainableModel.__call__, engine.evaluation.AccuracyCounter.update
    save = writing.save_checkpoint
    trained, validated = [], []

    def slow_forward(model, images):
        if model.training and len(trained) < 2:  # passes of the first step
            trained.append(time.sleep(2.5))
        return forward(model, images)

    def slow_update(*arguments):
        if len(validated) < 4:
            validated.append(time.sleep(1.25))
        return update(*arguments)

    def slow_save(state, path):
        if path.name.startswith("ckpt"):
            time.sleep(7)
        save(state, path)

    TrainableModel.__call__, engine.evaluation.AccuracyCounter.update = slow_forward, slow_update
    writing.save_checkpoint = slow_save


MODES = {
    "stop-at-epoch-1": stop_at_epoch_1,
    "nan-on-rank-1": nan_on_rank_1,
    "stop-in-validation": stop_in_validation,
    "tell-statistics": tell_statistics,
    "slow": slow,
}

if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    MODES[mode]()
    try:
        main.main(parse_command_line(arguments))
    except (KeyboardInterrupt, Preempted):
        sys.exit(0)
    except NonFiniteError as error:
        print(f"rank {distributed.rank()} stopped: {error}", flush=True)
        sys.exit(2)
