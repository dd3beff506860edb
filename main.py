"""Train, evaluate or time Pola-Swin and Pola-PVT: the story of a run, from top to bottom.

python main.py --cfg configs/quickstart.yaml                                  one process, CPU or one GPU
torchrun --nproc_per_node=8 main.py --cfg configs/pola_swin_t.yaml --data-path IMAGENET --amp
python main.py --cfg configs/pola_swin_t.yaml --data-path IMAGENET --eval --resume FILE.pth
"""

from config import ConfigError, parse_command_line

if __name__ == "__main__":
    # Before anything heavy is imported: --help and mistakes answer at once, and on a CPU denormals are flushed before
    # the first tensor operation (threads started earlier would keep their setting).
    COMMAND_LINE = parse_command_line()

    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

    torch.set_flush_denormal(True)

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from config import batch_plan, evaluation_config, image_size, last_epoch, run_folder, schedule_epochs, warmup_steps
from data.check import run_check
from data.loaders import DataError, Loaders, build_loaders
from data.sources.tokens import TokenBatch
from data.test_sets import Benchmark
from data.transforms import TrainBatch, mixup_enabled
from engine.epoch import train_one_epoch
from engine.evaluation import EvaluatedModel, evaluate
from engine.non_finite import NonFiniteError
from engine.observer import Observer
from engine.profiling import step_profiler
from engine.published import Subject, build_benchmark, evaluate_benchmark, keep_predictions, write_evaluation
from engine.saving import CheckpointKeeper
from engine.state import Progress, read_position, restore
from engine.throughput import throughput
from engine.training import Interval, Training
from logger import MetricsWriter, get_logger, setup_logger
from lr_scheduler import build_scheduler
from models import build_model
from models.classifier import TrainableModel
from models.files import CheckpointError, differing_function_keys, load_checkpoint, num_classes_of
from models.loading import load_pretrained, load_resized, load_weights
from models.ops.polarity_attention import choose_backend
from optimizer import build_optimizer
from utils import distributed
from utils.checkpoints.finding import Found, NoneUsableError, newest_checkpoint, set_aside
from utils.checkpoints.naming import BEST_FILE, run_file
from utils.checkpoints.writing import CheckpointWriter
from utils.environment import record_environment
from utils.faults.folder_lock import RunFolderError, open_folder, own_folder
from utils.faults.preemption import PeersLostError, Preempted, StopRequest
from utils.faults.watchdog import Watchdog
from utils.files import file_digest
from utils.metrics import Accuracy
from utils.precision import autocast_dtype
from utils.predictions import PredictionRecorder
from utils.randomness import deterministic, seed_everything

REFERENCE_BATCH = 512  # images per step that BASE_LR, WARMUP_LR and MIN_LR are given for


# ---------------------------------------------------------------------------------------------------------------------
# Set-up
# ---------------------------------------------------------------------------------------------------------------------


def setup(config: CfgNode) -> torch.device:
    """Join the other processes, open the run folder and its log, seed every generator; returns the device."""
    setup_logger(int(os.environ.get("RANK", 0)))
    device = distributed.init(config.LOCAL_RANK, config.DIST.TIMEOUT)
    folder = run_folder(config)
    if not config.THROUGHPUT_MODE:
        open_folder(folder)
        setup_logger(distributed.rank(), folder / "log.txt")
    # sizes are fixed, so the search for fast kernels pays
    torch.backends.cudnn.benchmark = not config.EVAL_MODE and not config.DETERMINISTIC
    if config.DETERMINISTIC:
        deterministic()
    seed_everything(config.SEED)  # the same on every rank: all build the same model
    try:
        backend = choose_backend(config.MODEL.LA.BACKEND, device)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    kind = config.MODEL.LA.ATTENTION
    get_logger().info(
        "%d × %s, torch %s, %s attention%s",
        distributed.world_size(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)",
        torch.__version__,
        kind,
        f" backend: {backend}" if kind == "polarity" else "",
    )
    return device


def place(model: TrainableModel, device: torch.device) -> TrainableModel:
    """Move a model to its device; dense convolutions channels last, as tokens reach and leave them in that order.

    (Their gradients come in that layout too, and DDP's buckets want both alike.)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return model.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and throughput
# ---------------------------------------------------------------------------------------------------------------------


def run_evaluation(config: CfgNode, device: torch.device) -> Accuracy:
    """Evaluate exactly the --resume file; a second line for its averaged weights where it holds them."""
    logger, path, folder = get_logger(), config.MODEL.RESUME, run_folder(config)
    checkpoint = load_checkpoint(path)
    if differing := differing_function_keys(checkpoint, config, path):
        raise CheckpointError("; ".join(differing))
    sized = evaluation_config(config)
    benchmark = build_benchmark(sized, checkpoint, path)
    model = build_model(sized, num_classes_of(checkpoint, path))
    amp_dtype = autocast_dtype(config, device) if config.TEST.AMP else None
    precision = str(amp_dtype or torch.float32).removeprefix("torch.")
    log_reference(benchmark)
    digest, epoch = file_digest(path), checkpoint.get("epoch")
    results = []
    for kind, weights in (("model", checkpoint["model"]), ("ema", checkpoint.get("model_ema"))):
        if weights is None:
            continue
        if image_size(sized) == image_size(config):
            load_weights(model, weights, path)
        else:
            load_resized(model, weights, config, path)
        evaluated = EvaluatedModel(place(model, device), benchmark.outputs, config.TEST.FLIP)
        result = evaluate_benchmark(benchmark, evaluated, device, amp_dtype)
        title = {"model": "", "ema": "EMA weights of "}[kind]
        logger.info("evaluated %s%s (sha256 %s), %s: %s", title, path, digest, precision, result)
        if distributed.rank() == 0:
            subject = Subject(path, digest, kind, epoch if isinstance(epoch, int) else -1, precision)
            logger.info("written: %s", write_evaluation(folder, result, subject, sized))
        results.append(result.accuracy)
    return results[0]


def log_reference(data: Loaders | Benchmark) -> None:
    """What validation or evaluation is on, and what answers without a model score there, where the data say so."""
    if data.description:
        scores = ", ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in (data.reference or {}).items())
        get_logger().info("evaluated on %s%s", data.description, f"; for comparison: {scores}" if scores else "")


def run_throughput(config: CfgNode, device: torch.device) -> None:
    """Measure the forward pass on synthetic input; no data set is needed."""
    model = place(build_model(config), device)
    if config.COMPILE:
        model.compile()
    amp_dtype = autocast_dtype(config, device) if config.AMP else None
    result = throughput(config, model, device, amp_dtype)
    sequences = config.MODEL.TYPE == "lra"
    get_logger().info(
        "throughput of %s, batch %d, %s, %s: median %.1f %s/s (lowest %.1f, highest %.1f, %d batches)",
        config.MODEL.NAME,
        config.DATA.BATCH_SIZE,
        str(amp_dtype or torch.float32).removeprefix("torch."),
        f"{config.MODEL.LRA.LENGTH} tokens" if sequences else f"size {config.DATA.IMG_SIZE}",
        result.median,
        "samples" if sequences else "images",
        result.low,
        result.high,
        result.batches,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def build_training(config: CfgNode, model: TrainableModel, loaders: Loaders, device: torch.device) -> Training:
    """Optimizer, schedule, scaler, average and loss around a bare model that is already on its device."""
    assert loaders.train is not None
    plan = batch_plan(config, distributed.world_size())
    lr_scale = plan.global_batch / REFERENCE_BATCH if config.TRAIN.SCALE_LR else 1.0
    steps_per_epoch = len(loaders.train) // plan.accumulation
    optimizer = build_optimizer(config, model, lr_scale)
    amp_dtype = autocast_dtype(config, device) if config.AMP else None
    get_logger().info(
        "global batch %d = %d processes × %d passes × %d samples, learning rate %.3e (%g × %.3e), %d steps an epoch,"
        " %s",
        plan.global_batch,
        plan.world_size,
        plan.accumulation,
        plan.per_process,
        config.TRAIN.BASE_LR * lr_scale,
        lr_scale,
        config.TRAIN.BASE_LR,
        steps_per_epoch,
        str(amp_dtype or torch.float32).removeprefix("torch."),
    )
    smoothing = 0.0 if mixup_enabled(config) else config.MODEL.LABEL_SMOOTHING  # mixup's targets are smoothed already
    return Training(
        model=model,
        bare_model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, steps_per_epoch, lr_scale),
        criterion=nn.CrossEntropyLoss(label_smoothing=smoothing),
        prepare=TokenBatch()
        if config.DATA.DATASET == "lra"
        else TrainBatch(config, loaders.num_classes, device, next(model.parameters()).dtype),
        device=device,
        steps_per_epoch=steps_per_epoch,
        global_batch=plan.global_batch,
        accumulation_steps=plan.accumulation,
        clip_grad=config.TRAIN.CLIP_GRAD,
        clip_value=config.TRAIN.CLIP_VALUE,
        amp_dtype=amp_dtype,
        scaler=torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None,
        ema=ModelEmaV3(model, decay=config.EMA.DECAY) if config.EMA.ENABLE else None,
        max_skipped=config.TRAIN.MAX_SKIPPED if config.TRAIN.NON_FINITE == "skip" else None,
    )


def wrap(config: CfgNode, training: Training) -> None:
    """Compile and distribute the model that the loop calls; `bare_model` stays what it is."""
    if config.COMPILE:
        training.bare_model.compile()
    if distributed.world_size() > 1:
        training.model = DistributedDataParallel(
            training.bare_model,
            device_ids=[training.device.index] if training.device.type == "cuda" else None,
            broadcast_buffers=False,  # masks and indices: every rank derives the same
            find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMS,
        )
        training.model._set_ddp_runtime_logging_sample_rate(config.PRINT_FREQ)  # steps between two timed ones


def resume(config: CfgNode, training: Training, loaders: Loaders) -> tuple[Progress, Interval, Found]:
    """Continue the run folder's newest verified checkpoint, else --resume, else start from --pretrained or scratch.

    Returns where the run stands, the sums since its last log line, and what was found in the run folder.
    """
    logger, folder = get_logger(), run_folder(config)
    progress, interval = Progress(epoch=config.TRAIN.START_EPOCH), Interval(training.device)
    found = Found(None)
    if config.TRAIN.AUTO_RESUME or distributed.restarts():  # what a restart finds is this very run's
        problem = None
        if distributed.rank() == 0:
            try:
                found = newest_checkpoint(folder, read_position)
            except NoneUsableError as error:
                problem = str(error)
        found, problem = distributed.broadcast_object((found, problem))
        if problem:
            raise CheckpointError(problem)
    source = str(found.path or config.MODEL.RESUME)
    if source:
        progress, interval = restore(config, training, loaders, load_checkpoint(source), source)
        inside = f" and {progress.done} of {training.steps_per_epoch} steps" if progress.done else ""
        logger.info(
            "continues from %s: %d epochs%s finished, best top-1 %.3f %%", source, progress.epoch, inside, progress.best
        )
    elif config.MODEL.PRETRAINED:
        source = config.MODEL.PRETRAINED
        checkpoint = load_checkpoint(source)
        for line in differing_function_keys(checkpoint, config, source):
            logger.warning("%s", line)
        load_pretrained(training.bare_model, checkpoint, source)
        if training.ema:
            training.ema.set(training.bare_model)
        logger.info("starts from the weights of %s", source)
    distributed.barrier()  # every rank has read its file
    if not found.path and distributed.rank() == 0 and (aside := set_aside(folder, Path(config.MODEL.RESUME))):
        logger.warning("the run folder held checkpoints of an earlier run; they are now in %s", aside)
    if (steps := progress.epoch * training.steps_per_epoch + progress.done) > 0:
        training.scheduler.step_update(steps - 1)
    return progress, interval, found


def validate_epoch(
    config: CfgNode,
    training: Training,
    loaders: Loaders,
    epoch: int,
    metrics: MetricsWriter,
    after_batch: Callable[[], None] | None = None,
    recorder: PredictionRecorder | None = None,
) -> Accuracy:
    """Evaluate the model after `epoch` epochs, and its average where there is one; returns the model's accuracy.

    `recorder` is shown what the model, not its average, says about every image.
    """
    amp_dtype = autocast_dtype(config, training.device) if config.TEST.AMP else None
    averaged = training.ema.module if training.ema else None
    results = []
    for kind, model in (("val", training.bare_model), ("ema", averaged)):
        if model is None:
            continue
        seen_by = recorder if kind == "val" else None
        result = evaluate(model, loaders.val, training.device, amp_dtype, after_batch, seen_by)
        metrics.write(
            kind, epoch - 1, epoch * training.steps_per_epoch, loss=result.loss, top1=result.top1, top5=result.top5
        )
        get_logger().info("epoch %d %s: %s", epoch - 1, {"val": "validation", "ema": "validation (EMA)"}[kind], result)
        results.append(result)
    return results[0]


def run_training(config: CfgNode, device: torch.device, request: StopRequest) -> Progress:
    """Train from where the run stands to its last epoch, saving and evaluating on the way.

    Raises Preempted when the run was told to stop by `request` and has saved.
    """
    logger, folder, is_main = get_logger(), run_folder(config), distributed.rank() == 0
    # data
    loaders = build_loaders(config)
    assert loaders.train is not None
    logger.info(
        "%d training and %d validation samples of %d classes",
        loaders.train.num_images,
        loaders.val.num_images,
        loaders.num_classes,
    )
    log_reference(loaders)
    # model and optimiser
    model = place(build_model(config, loaders.num_classes), device)
    logger.info("%s: %.2f M parameters", config.MODEL.TYPE, sum(p.numel() for p in model.parameters()) / 1e6)
    training = build_training(config, model, loaders, device)
    # resume
    seed_everything(config.SEED, distributed.rank())  # from here each rank draws its own
    progress, interval, found = resume(config, training, loaders)
    metrics = MetricsWriter(
        folder if is_main else None,
        config.TENSORBOARD,
        epoch=progress.epoch,
        step=progress.epoch * training.steps_per_epoch + progress.done,
    )
    writer = CheckpointWriter(folder, config.CHECKPOINT.KEEP, found.skipped) if is_main else None
    if is_main:
        (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
        record_environment(folder, device, distributed.world_size())
    observer = Observer(training, folder, metrics) if is_main else None
    wrap(config, training)
    if (warmup := warmup_steps(config, training.steps_per_epoch)) > schedule_epochs(config) * training.steps_per_epoch:
        logger.warning("the warm-up of %d steps outlasts the run", warmup)
    if progress.epoch >= last_epoch(config):
        logger.info("this run is finished: all %d epochs are done; evaluating it", progress.epoch)
        validate_epoch(config, training, loaders, progress.epoch, MetricsWriter(None))
    # loop
    watchdog = Watchdog(config.DIST.TIMEOUT)
    keeper = CheckpointKeeper(config, training, loaders, writer, progress.best, request, watchdog.all_alive)
    training.beat = watchdog.beat
    if writer:
        writer.waiting = watchdog.go_on
    training.profiler = step_profiler(config, folder)
    try:
        with watchdog.watching(), training.profiler or nullcontext():
            try:
                while progress.epoch < last_epoch(config):
                    progress = run_epoch(config, training, loaders, progress, interval, metrics, keeper)
                    interval = Interval(device)
                    if observer:
                        observer.epoch_ended(progress.epoch)
            except RuntimeError as error:
                if not isinstance(error, EXPECTED):
                    watchdog.explain(error)
                raise
    finally:
        loaders.close()
        if observer:
            observer.close()
    metrics.close()
    if observer:
        summarise(config, progress, observer.draw_curves())
    distributed.barrier()
    return progress


def run_epoch(
    config: CfgNode,
    training: Training,
    loaders: Loaders,
    progress: Progress,
    interval: Interval,
    metrics: MetricsWriter,
    keeper: CheckpointKeeper,
) -> Progress:
    """Finish the epoch that the run is in: the rest of its steps, its validation, its checkpoint."""
    assert loaders.train is not None
    epoch = progress.epoch
    if progress.done < training.steps_per_epoch:
        train_one_epoch(
            config,
            training,
            loaders.train,
            epoch,
            metrics,
            start=progress.done,
            interval=interval,
            keeper=keeper,
        )

    def after_batch() -> None:
        done = training.steps_per_epoch
        training.beat((epoch + 1) * done, "validation")
        if keeper.decide(done).stop:
            keeper.save(epoch, done, Interval(training.device), stop=True)

    recorder = PredictionRecorder()
    top1 = validate_epoch(config, training, loaders, epoch + 1, metrics, after_batch, recorder).top1
    is_best = top1 > progress.best or epoch == 0
    if is_best:  # before the checkpoint: killed in between, a start repeats this epoch and writes both
        keep_predictions(config, loaders, recorder, epoch + 1)
    progress = Progress(epoch + 1, max(top1, progress.best))
    keeper.best = progress.best
    last = epoch + 1 == last_epoch(config)
    saves = (epoch + 1) % config.SAVE_FREQ == 0 or last or keeper.owed
    if saves or is_best:
        keeper.write(progress, Interval(training.device), best=is_best, own=saves, last=last)
    return progress


def summarise(config: CfgNode, progress: Progress, curves: Path | None) -> None:
    """Say where the run lies, how good it is, and how to evaluate it again."""
    logger, folder = get_logger(), run_folder(config)
    candidates = [folder / BEST_FILE, run_file(folder, progress.position), Path(config.MODEL.RESUME)]
    checkpoint = next((path for path in candidates if path.is_file()), candidates[0])
    remark = "" if checkpoint == candidates[0] else " (of the run it continued from; not exceeded here)"
    python, script = (
        os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
        for path in (sys.executable, os.path.abspath(__file__))
    )
    words = [python, script, "--cfg", str(folder / "config.yaml"), "--eval", "--resume", str(checkpoint)]
    logger.info("run folder: %s", folder)
    logger.info("best top-1: %.3f %%%s", progress.best, remark)
    if curves:
        logger.info("curves: %s", curves)
    logger.info("evaluate it with: %s", shlex.join(words))


EXPECTED = (
    ConfigError,
    DataError,
    CheckpointError,
    distributed.LaunchError,
    NonFiniteError,
    RunFolderError,
    PeersLostError,
    OSError,
)
LASTING = (ConfigError, DataError, CheckpointError, NonFiniteError)  # these would come again


@record
def reported(config: CfgNode) -> None:
    """`main`, so that torchrun repeats the reason of an expected failure, without its traceback, in its own report."""
    try:
        main(config)
    except Preempted as preempted:
        get_logger().warning("%s", preempted)
        distributed.barrier()  # the store may be in rank 0, which has to be the last to leave
        distributed.cleanup()
    except EXPECTED as problem:
        raise type(problem)(str(problem)) from None


def main(config: CfgNode) -> None:
    """Run what the configuration asks for: a check of the data, throughput, evaluation, or training."""
    if config.CHECK_DATA_MODE:  # needs no device, no run folder and no other process
        sys.exit(run_check(config))
    if config.THROUGHPUT_MODE:
        run_throughput(config, setup(config))
    elif config.EVAL_MODE:
        run_evaluation(config, setup(config))
    else:
        request = StopRequest()
        with request.listening():  # told to stop while it starts, a run stops at its first step
            device = setup(config)
            with own_folder(run_folder(config), LASTING):
                run_training(config, device, request)
    distributed.cleanup()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reported(COMMAND_LINE)
    except EXPECTED as problem:
        get_logger().error("error: %s", problem)
        sys.exit(2)
    except KeyboardInterrupt:
        get_logger().warning(
            "interrupted; the last complete checkpoint is intact, and the same command continues from it"
        )
        sys.exit(130)
