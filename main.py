"""Train, evaluate or time Pola-Swin, Pola-PVT, PolaFormer++ and NaLaFormer: the story of a run, from top to bottom.

python main.py --cfg configs/quickstart.yaml                                  one process, CPU or one GPU
torchrun --nproc_per_node=8 main.py --cfg configs/pola_swin_t.yaml --data-path IMAGENET --amp
python main.py --cfg configs/pola_swin_t.yaml --data-path IMAGENET --eval --resume FILE.pth
"""

from config import CfgNode, ConfigError, parse_command_line


def stored_configuration(path: str) -> CfgNode:
    """What --eval without --cfg takes; only this question needs more than config.py."""
    from engine.state import evaluated_configuration

    return evaluated_configuration(path)


if __name__ == "__main__":
    # Before anything heavy is imported: --help and mistakes answer at once, and on a CPU denormals are flushed before
    # the first tensor operation (threads started earlier would keep their setting).
    COMMAND_LINE = parse_command_line(stored=stored_configuration)

    import signal

    import torch

    from logger import open_streams

    open_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

    torch.set_flush_denormal(True)

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import errors

from config import Plan, evaluation_config, make_plan, notes_of
from data.builders import builder_of
from data.check import run_check
from data.loaders import Loaders, build_loaders
from data.sources.base import DataError
from engine.epoch import train_one_epoch
from engine.evaluation import evaluate
from engine.memory import OutOfMemoryError, leave_to_the_loader, memory_problem
from engine.monitoring import RunFiles, watched
from engine.non_finite import NonFiniteError
from engine.published import best_predictions, log_reference, run_evaluation
from engine.rehearsal import rehearse
from engine.saving import Checkpointer
from engine.state import Progress, resume
from engine.throughput import run_throughput
from engine.tracking import hangs as tracker_hangs
from engine.tracking import tracker_class
from engine.training import Interval, Training, build_training, check_training, place, wrap
from logger import MetricsWriter, get_logger, setup_logger
from models import build_model
from models.files import CheckpointError
from models.registry import announce_attention, body_of
from utils import distributed
from utils.checkpoints.writing import CheckpointWriter
from utils.devices import described, device_type, lacks
from utils.faults.folder_lock import LOG_FILE, Hold, RunFolderError, RunLock, nothing_left, open_folder, own_folder
from utils.faults.preemption import PeersLostError, Preempted, StopRequest
from utils.faults.watchdog import Watchdog
from utils.metrics import Accuracy
from utils.precision import autocast_dtype
from utils.predictions import PredictionRecorder
from utils.randomness import deterministic, seed_everything

# -- Set-up


def check(config: CfgNode) -> None:
    """Raise ConfigError where no run of this configuration can begin.

    The model answers for its arguments: it is built for every size that the run will use, on the meta device, where
    that takes no memory and little time. Nothing is opened, read or joined before.
    """
    modality = builder_of(config).modality
    where = ""
    try:
        if (reads := body_of(config).reads) != modality.reads:
            raise ValueError(
                f"MODEL.TYPE {config.MODEL.TYPE} reads {reads}, and DATA.DATASET {config.DATA.DATASET} has"
                f" {modality.reads}: one of them has to change"
            )
        if not config.THROUGHPUT_MODE:  # which is measured on synthetic input
            modality.require(config)
        with torch.device("meta"):
            model = build_model(config)
            if not (config.EVAL_MODE or config.THROUGHPUT_MODE):
                check_training(config, model)
            if config.TEST.IMG_SIZE is not None:
                where = f"TEST.IMG_SIZE {config.TEST.IMG_SIZE}: "
                build_model(evaluation_config(config))
                where = ""
        if not (config.EVAL_MODE or config.THROUGHPUT_MODE):
            tracker_class(config.TRACKER)
        announce_attention(config, torch.device(device_type(config.DEVICE)))
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"{where}{problem}") from None


def setup(config: CfgNode) -> tuple[torch.device, Plan]:
    """Join the other processes, open the run folder, seed every generator."""
    setup_logger(int(os.environ.get("RANK", 0)))  # for what goes wrong before the ranks know each other
    device = distributed.init(config.LOCAL_RANK, config.DIST.TIMEOUT, config.DEVICE)
    plan = make_plan(config, distributed.world_size())
    if not config.THROUGHPUT_MODE and not config.DRY_RUN_MODE:
        open_folder(plan.folder)
    # sizes are fixed, so the search for fast kernels pays
    torch.backends.cudnn.benchmark = not config.EVAL_MODE and not config.DETERMINISTIC
    if config.DETERMINISTIC:
        deterministic()
    seed_everything(config.SEED)  # the same on every rank: all build the same model
    return device, plan


def begin_log(config: CfgNode, device: torch.device, folder: Path | None, lock: RunLock | None = None) -> None:
    """Open a run folder's log, and say on what the run is; a training run does so once it has the folder to itself."""
    setup_logger(distributed.rank(), folder / LOG_FILE if folder else None, lock.check if lock else lambda: None)
    get_logger().info(
        "%d × %s, torch %s, %s",
        distributed.world_size(),
        described(device),
        torch.__version__,
        announce_attention(config, device),
    )
    if without := lacks(device):
        get_logger().info("this device is used without %s", without)
    for note in notes_of(config):
        get_logger().warning("%s", note)


# -- Training


def build_run(config: CfgNode, plan: Plan, device: torch.device) -> tuple[Loaders, Training]:
    """The data, the model on its device, and what trains it."""
    logger = get_logger()
    loaders = build_loaders(config, plan)
    assert loaders.train is not None
    sizes = loaders.train.num_images, loaders.val.num_images, loaders.num_classes
    logger.info("%d training and %d validation samples of %d classes", *sizes)
    log_reference(loaders)
    model = place(build_model(config, loaders.num_classes), device)  # the classes are the data's, not the config's
    logger.info("%s: %.2f M parameters", config.MODEL.TYPE, sum(p.numel() for p in model.parameters()) / 1e6)
    return loaders, build_training(config, plan, model, loaders, device)


def run_training(config: CfgNode, plan: Plan, device: torch.device, request: StopRequest, hold: Hold) -> Progress:
    """Train from where the run stands to its last epoch, saving and evaluating on the way; `hold` is its folder's.

    Raises Preempted when the run was told to stop by `request` and has saved.
    """
    logger = get_logger()
    loaders, training = build_run(config, plan, device)
    # resume
    seed_everything(config.SEED, distributed.rank())  # from here each rank draws its own
    progress, interval, skipped, claims = resume(config, training, loaders)  # on the bare model: wrapping comes after
    lock = hold.lock
    record, writer = RunFiles(config, training, progress, lock.check if lock else lambda: None), None
    if lock:
        writer = CheckpointWriter(plan.folder, config.CHECKPOINT.KEEP, skipped, claims, lock.check)
    wrap(config, training)
    if plan.warmup_steps(training.steps_per_epoch) > plan.epochs * training.steps_per_epoch:
        logger.warning("the warm-up of %d steps outlasts the run", plan.warmup_steps(training.steps_per_epoch))
    if progress.epoch >= plan.last_epoch:
        logger.info("this run is finished: all %d epochs are done; evaluating it", progress.epoch)
        validate_epoch(config, training, loaders, progress.epoch, MetricsWriter(None))
    # loop: the watchdog hears of every phase and ends a run that stands still, which a hung collective would not
    watchdog = Watchdog(config.DIST.TIMEOUT)

    def keep_folder() -> None:
        if lock and lock.keep():
            writer.claims.clear()  # type: ignore[union-attr]
            record.restore()

    saver = Checkpointer(config, training, loaders, writer, request, watchdog.all_alive, keep_folder)
    hold.began = True
    with watched(config, training, loaders, record, writer, watchdog, EXPECTED):
        while progress.epoch < plan.last_epoch:
            progress = run_epoch(config, training, loaders, progress, interval, record.metrics, saver)
            interval = Interval(device)
            record.epoch_ended(progress.epoch)
    record.summarise(progress, loaders, main_file=__file__)
    distributed.barrier()
    return progress


def run_epoch(
    config: CfgNode,
    training: Training,
    loaders: Loaders,
    progress: Progress,
    interval: Interval,
    metrics: MetricsWriter,
    saver: Checkpointer,
) -> Progress:
    """Finish the epoch that the run is in: the rest of its steps, its validation, its checkpoint."""
    assert loaders.train is not None
    epoch = progress.epoch
    if progress.done < training.steps_per_epoch:
        train_one_epoch(
            config, training, loaders.train, epoch, metrics, start=progress.done, interval=interval, saver=saver
        )

    began = time.perf_counter()

    def after_batch() -> None:
        done = training.steps_per_epoch
        training.beat((epoch + 1) * done - 1, "validation")
        if saver.decide(done).stop:
            saver.save(epoch, done, Interval(training.device), stop=True)

    recorder = PredictionRecorder()
    # validation can take minutes: told to stop inside it, the run saves the finished steps, and resumes with it
    results = validate_epoch(config, training, loaders, epoch + 1, metrics, after_batch, recorder)
    validated = {kind: result.top1 for kind, result in results.items()}
    better = saver.better(validated)
    beside: Mapping[str, Callable[[], None]] = {}
    if "model" in better:
        beside = best_predictions(config, training.plan.folder, loaders, recorder, epoch + 1)
    saver.end_epoch(epoch + 1, validated, better, beside)
    training.pause = time.perf_counter() - began
    return Progress(epoch + 1)


def validate_epoch(
    config: CfgNode,
    training: Training,
    loaders: Loaders,
    epoch: int,
    metrics: MetricsWriter,
    after_batch: Callable[[], None] | None = None,
    recorder: PredictionRecorder | None = None,
) -> dict[str, Accuracy]:
    """Evaluate the model after `epoch` epochs, and its average where there is one.

    `recorder` is shown what the model, not its average, says about every image.
    """
    amp_dtype = autocast_dtype(config.AMP_DTYPE, training.device) if config.TEST.AMP else None
    averaged = training.ema.module if training.ema else None
    training.share_statistics()
    results = {}
    for kind, model in (("val", training.bare_model), ("ema", averaged)):
        if model is None:
            continue
        seen_by = recorder if kind == "val" else None
        result = evaluate(model, loaders.val, training.device, amp_dtype, after_batch, seen_by)
        top5 = {} if result.top5 is None else {"top5": result.top5}
        metrics.write(kind, epoch - 1, epoch * training.steps_per_epoch, loss=result.loss, top1=result.top1, **top5)
        get_logger().info("epoch %d %s: %s", epoch - 1, {"val": "validation", "ema": "validation (EMA)"}[kind], result)
        results["model" if kind == "val" else kind] = result
    return results


# -- The command


EXPECTED = (ConfigError, DataError, CheckpointError, distributed.LaunchError, NonFiniteError, RunFolderError)
EXPECTED += (PeersLostError, OutOfMemoryError, OSError)  # type: ignore[assignment]
LASTING = (ConfigError, DataError, CheckpointError, NonFiniteError)  # these would come again


@errors.record
def reported(config: CfgNode) -> None:
    """`main`, so that torchrun repeats the reason of an expected failure, without its traceback, in its own report."""
    try:
        main(config)
    except Preempted as preempted:
        get_logger().warning("%s", preempted)
        # The traceback holds the DDP model. Freed after its process group, it would wait for the group's thread while
        # this one has the interpreter's lock, for which that thread may wait.
        traceback.clear_frames(preempted.__traceback__)
        distributed.barrier()  # the store may be in rank 0, which has to be the last to leave
        distributed.cleanup()
    except Exception as problem:
        if why := memory_problem(problem):
            raise OutOfMemoryError(why) from None
        if isinstance(problem, EXPECTED):
            raise type(problem)(str(problem)) from None
        raise


def main(config: CfgNode) -> None:
    """Run what the configuration asks for: a check of the data, throughput, a rehearsal, evaluation, or training."""
    if config.CHECK_DATA_MODE:  # needs no device, no run folder and no other process
        sys.exit(run_check(config))
    check(config)
    if config.THROUGHPUT_MODE:
        device, _ = setup(config)
        begin_log(config, device, None)
        run_throughput(config, device)
    elif config.DRY_RUN_MODE:
        device, plan = setup(config)
        begin_log(config, device, None)
        rehearse(config, *build_run(config, plan, device))
    elif config.EVAL_MODE:
        device, plan = setup(config)
        with nothing_left(plan.folder):
            begin_log(config, device, plan.folder)
            run_evaluation(config, plan, device)
    else:
        request = StopRequest()
        with request.listening():  # told to stop while it starts, a run stops at its first step
            device, plan = setup(config)
            with own_folder(plan.folder, LASTING) as hold:
                begin_log(config, device, plan.folder, hold.lock)
                run_training(config, plan, device, request, hold)
    distributed.cleanup()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = leave_to_the_loader
    status = 0
    try:
        reported(COMMAND_LINE)
    except EXPECTED as problem:
        get_logger().error("error: %s", problem)
        status = 2
    except KeyboardInterrupt:
        get_logger().warning(
            "interrupted; the last complete checkpoint is intact, and the same command continues from it"
        )
        status = 130
    distributed.leave(status, at_once=tracker_hangs())
