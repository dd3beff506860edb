"""What a run continues from: where it stands, all of its state as a checkpoint holds it, and putting that back."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from config import KEYS, ConfigError, config_from_tree, value_of
from data.loaders import Loaders
from data.sources.base import Modality
from engine.training import Interval, Training
from logger import get_logger, printable
from models.files import CHECKPOINT_VERSION, CheckpointError, load_checkpoint, num_classes_of, stored_config, weights_of
from models.loading import load_pretrained, load_weights
from models.registry import announce_attention, function_differences
from optimizer import load_optimizer_state
from utils import distributed
from utils.checkpoints.finding import Found, NoneUsableError, newest_checkpoint, set_aside
from utils.checkpoints.naming import BESTS, Position
from utils.checkpoints.writing import save_checkpoint
from utils.randomness import generator_states, restore_generators, seed_everything

LASTING = ("TRAIN.OPTIMIZER.NAME", "TRAIN.FREEZE", "DATA.VAL_FRACTION")  # what a run cannot change on its way
STARTING_POINTS = ("MODEL.RESUME", "MODEL.PRETRAINED")  # what a run begins with, and does not need any more later
# What putting a damaged state back raises.
NO_STATE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Progress(NamedTuple):
    """Where a run stands: finished epochs, and optimizer steps done in the epoch after them (all of them: only its
    validation is missing)."""

    epoch: int = 0
    done: int = 0

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.done)


class Start(NamedTuple):
    """Where a run begins or continues: the sums since its last log line, the checkpoints of its folder that cannot be
    used, and what the best files there hold (rank 0)."""

    progress: Progress
    interval: Interval
    skipped: frozenset[Path]
    claims: dict[str, float]


def checkpoint_state(
    config: CfgNode,
    training: Training,
    loaders: Loaders,
    progress: Progress,
    interval: Interval,
    validated: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Everything a run continues from, as tensors and plain values; collective, because every rank has generators.

    `validated`: top-1 of these very weights, in percent, by their kind (model, ema).
    """
    training.share_statistics()
    return {
        "model": training.bare_model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "lr_scheduler": {
            name: value
            for name, value in training.scheduler.state_dict().items()
            if not isinstance(value, torch.Tensor)
        },
        "scaler": training.scaler.state_dict() if training.scaler else None,
        "model_ema": training.ema.module.state_dict() if training.ema else None,
        "epoch": progress.epoch,
        "step": progress.epoch * training.steps_per_epoch + progress.done,
        "continuation": {
            "done": progress.done,
            "intervals": distributed.gather_objects(interval.state()),
            "skipped": training.skipped,
            "epoch_steps": training.plan.epoch_steps,
            "global_batch": training.plan.global_batch,
            "images": loaders.train.num_images if loaders.train else 0,
            "seed": config.SEED,
            "repeats": config.AUG.REPEATS,
            "world_size": distributed.world_size(),
            "attention": announce_attention(config, training.device),
        },
        **{best.key: 0.0 for best in BESTS.values()},  # CheckpointWriter puts in what the best files hold
        "validated": validated,
        "rng": distributed.gather_objects(generator_states()),
        "classes": list(loaders.classes) if loaders.classes else None,
        "config": config.dump(),
        "version": CHECKPOINT_VERSION,
    }


def restore(
    config: CfgNode, training: Training, loaders: Loaders, checkpoint: dict[str, Any], source: str
) -> tuple[Progress, Interval]:
    """Put everything a checkpoint holds back, the configuration's schedule and hyperparameters staying in force.

    Raises CheckpointError where it belongs to another model, data set, function or optimizer, or was written after a
    part of an epoch that this configuration divides into other steps.
    """
    if differing := differing_function(checkpoint, config, loaders.modality, source):
        raise CheckpointError("; ".join(differing))
    try:
        check_classes(checkpoint, config, loaders, source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Another --tag begins a run of its own, for which --pretrained {source} may give the weights"
        ) from None
    if not _is_count(checkpoint.get("epoch")):
        raise CheckpointError(f"{source} has no epoch to continue from; --pretrained starts from its weights")
    _log_changed_keys(checkpoint, config, source)
    continuation = _continuation(checkpoint, source)
    _check_plan(config, training, continuation, source)
    _check_epoch(config, loaders, continuation, source)
    stored, own = continuation.get("attention"), announce_attention(config, training.device)
    if isinstance(stored, str) and stored != own:
        get_logger().warning(
            "%s was computed with %s, and goes on with %s: to rounding, not bit for bit", source, printable(stored), own
        )
    weights = weights_of(checkpoint, "model", source)["model"]
    load_weights(training.bare_model, weights, source)
    if training.ema:
        load_weights(training.ema.module, checkpoint.get("model_ema") or weights, source)
    training.skipped = continuation.get("skipped", 0)
    states: Any = checkpoint.get("rng")
    position = stored_position(checkpoint)
    interval = Interval(training.device)
    try:
        load_optimizer_state(training.optimizer, training.bare_model, checkpoint.get("optimizer"), source)
        if training.scaler and checkpoint.get("scaler"):
            training.scaler.load_state_dict(checkpoint["scaler"])
        restored = bool(states) and len(states) == distributed.world_size()
        if restored:
            restore_generators(states[distributed.rank()])
            if sums := continuation.get("intervals"):
                interval.load_state(sums[distributed.rank()])
    except CheckpointError:
        raise
    except NO_STATE as error:
        raise CheckpointError(
            f"{source}: the state of its optimizer, generators or scaler is damaged ({error}); --pretrained starts from"
            " its weights"
        ) from error
    if not restored:  # another number of processes, or a file that stores none
        seed_everything(config.SEED, distributed.rank(), *position)
        get_logger().info("random generators start from SEED, rank and position: the file has none for each process")
    if position.done and loaders.train and loaders.train.is_stream:
        get_logger().info(
            "inside an epoch of shards: it continues exactly with the batch size, processes, DATA.NUM_WORKERS and"
            " DATA.SHUFFLE_BUFFER it began with; with others its rest is another draw of the images"
        )
    return Progress(position.epoch, position.done), interval


def _continuation(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """What only files of ours hold: where inside an epoch they were written, and what must not have changed since."""
    stored = checkpoint.get("continuation") or {}
    numbers = ("done", "skipped", "global_batch", "images", "seed", "repeats", "world_size")
    if not isinstance(stored, dict) or not all(_is_count(stored.get(name, 0)) for name in numbers):
        raise CheckpointError(f"{source}: its `continuation` is damaged; --pretrained starts from its weights")
    return stored


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _check_plan(config: CfgNode, training: Training, continuation: dict[str, Any], source: str) -> None:
    """Refuse a change of the global batch that nobody asked for, or that a part of an epoch does not survive, and
    one of the steps that count as an epoch with TRAIN.STEPS."""
    per_epoch = training.plan.epoch_steps
    if (stored := continuation.get("epoch_steps", per_epoch)) != per_epoch:
        now = "one pass through the data" if per_epoch is None else f"{per_epoch} steps (TRAIN.EVAL_STEPS)"
        then = "one pass through the data" if stored is None else f"{stored} steps"
        raise CheckpointError(
            f"{source} counts epochs of {then}, this configuration of {now}: restore that to continue"
        )
    stored = continuation.get("global_batch", training.plan.global_batch)
    if stored == training.plan.global_batch:
        if continuation.get("world_size", distributed.world_size()) != distributed.world_size():
            get_logger().warning(
                "%s was written by %d processes, this run has %d: the global batch stays %d, and so does the schedule",
                source,
                continuation["world_size"],
                distributed.world_size(),
                stored,
            )
        return
    if config.TRAIN.GLOBAL_BATCH is None:
        raise CheckpointError(
            f"{source} was trained with {stored} images per step ({continuation['world_size']} processes), this run"
            f" would use {training.plan.global_batch}: --opts TRAIN.GLOBAL_BATCH {stored} keeps them and the schedule,"
            f" TRAIN.GLOBAL_BATCH {training.plan.global_batch} changes them on purpose"
        )
    if continuation["done"]:
        raise CheckpointError(
            f"{source} lies inside an epoch of {stored} images per step, which does not continue with"
            f" TRAIN.GLOBAL_BATCH {training.plan.global_batch}; finish the epoch with {stored} first"
        )


def _check_epoch(config: CfgNode, loaders: Loaders, continuation: dict[str, Any], source: str) -> None:
    """Refuse to continue inside an epoch whose order of images was another one."""
    assert loaders.train is not None
    mine = {"images": loaders.train.num_images, "seed": config.SEED, "repeats": config.AUG.REPEATS}
    changed = [name for name, value in mine.items() if continuation.get(name, value) != value]
    if continuation.get("done") and changed:
        raise CheckpointError(
            f"{source} lies inside an epoch of {continuation['images']} images drawn with SEED {continuation['seed']};"
            f" now there are {mine['images']} and SEED is {mine['seed']} (AUG.REPEATS was"
            f" {continuation.get('repeats', mine['repeats'])}, is {mine['repeats']}), so its rest would be other images"
            ". Restore them, or continue from a checkpoint between two epochs with --opts TRAIN.AUTO_RESUME False"
            " --resume FILE"
        )


def _log_changed_keys(checkpoint: dict[str, Any], config: CfgNode, source: str) -> None:
    """Name every training key that changed since a checkpoint of ours was written; the new values apply.

    Raises CheckpointError for one of LASTING.
    """
    if not isinstance(checkpoint.get("config"), str):
        get_logger().info(
            "%s stores no unscaled learning rates: schedule and optimizer follow the configuration", source
        )
        return
    stored = configuration_in(checkpoint, source)
    assert stored is not None
    for key in LASTING:
        if (theirs := value_of(stored, key)) != (ours := value_of(config, key)):
            raise CheckpointError(
                f"{source} was trained with {key} {theirs}, this configuration has {ours}, which cannot change within a"
                f" run: restore it, or begin another run (--tag) from its weights with --pretrained {source}"
            )
    changed = [
        f"{key} {value_of(stored, key)} → {value_of(config, key)}"
        for key in KEYS
        if key.startswith(("TRAIN.", "DATA.", "AUG.", "EMA.", "MODEL.", "AMP", "SEED"))
        and key not in STARTING_POINTS
        and value_of(stored, key) != value_of(config, key)
    ]
    if changed:
        get_logger().warning("changed since %s, the new values apply: %s", source, "; ".join(changed))


def stored_classes(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """The names of a checkpoint's classes as data sets have theirs; none where it stores none."""
    return tuple(map(printable, checkpoint.get("classes") or ()))


def check_classes(checkpoint: dict[str, Any], config: CfgNode, loaders: Loaders, source: str) -> None:
    """Raise CheckpointError unless the checkpoint's classes are the data set's: by name, else by number."""
    stored, head = stored_classes(checkpoint), num_classes_of(checkpoint, source, config)
    if stored and loaders.classes:
        own = loaders.classes
        if stored == own:
            return
        lacking, strange = sorted(set(stored) - set(own)), sorted(set(own) - set(stored))
        raise CheckpointError(
            f"{source} was trained on {len(stored)} classes, the data set has {len(own)}, and their names differ:"
            f" missing in the data set: {', '.join(lacking[:5]) or 'none'}; unknown to the checkpoint:"
            f" {', '.join(strange[:5]) or 'none'}" + ("" if lacking or strange else "; the order differs")
        )
    if head != loaders.num_classes:
        raise CheckpointError(f"{source} has {head} classes, the data set {loaders.num_classes}")


def stored_position(checkpoint: dict[str, Any]) -> Position:
    """The position a checkpoint was written at; of a released file, the number of its epochs."""
    epoch = checkpoint.get("epoch", 0)
    done = _continuation(checkpoint, "the checkpoint").get("done", 0)
    return Position(epoch if isinstance(epoch, int) else 0, done)


def configuration_in(checkpoint: dict[str, Any], source: str) -> CfgNode | None:
    """The configuration that a checkpoint was written with, or None; keys without effect are dropped with a log line.

    The learning rates in a released file are already scaled by its batch size; they are never reused.
    """
    tree = stored_config(checkpoint)
    if tree is None:
        return None
    try:
        config, ignored = config_from_tree(tree, source)
    except ConfigError as error:
        raise CheckpointError(f"the configuration in {error}") from None
    if ignored:
        names = ", ".join(ignored[:40]) + (", …" if len(ignored) > 40 else "")
        get_logger().info("%s: ignored %d stored keys without effect: %s", source, len(ignored), names)
    return config


def evaluated_configuration(path: str) -> CfgNode:
    """The configuration in a checkpoint, as --eval takes it: without what the run began with, its device and, of a
    released file, places on another machine. Raises ConfigError where there is none that can be used."""
    try:
        checkpoint = load_checkpoint(path)
        config = configuration_in(checkpoint, path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if config is None:
        raise ConfigError(f"{path} stores no configuration: --cfg names the YAML file of its model")
    others = [*STARTING_POINTS, "DEVICE", "LOCAL_RANK"]
    others += [] if "version" in checkpoint else ["DATA.DATA_PATH", "OUTPUT", "TAG"]
    config.defrost()
    config.merge_from_list([word for key in others for word in (key, KEYS[key].default)])
    config.freeze()
    return config


def differing_function(checkpoint: dict[str, Any], config: CfgNode, modality: Modality, source: str) -> list[str]:
    """A line for each key by which the file's configuration computes another function with the same shapes."""
    return function_differences(configuration_in(checkpoint, source), config, source, modality.function_keys)


def _log_unused(config: CfgNode, found: Path | None, source: str, stored: dict[str, Any] | None) -> None:
    """A line for each checkpoint that was named and is not used; a job that is queued again with its flags is quiet."""
    for key in STARTING_POINTS:
        given, flag = value_of(config, key), "--" + key.rpartition(".")[2].lower()
        if not given or given == source:
            continue
        if not found:
            get_logger().warning("%s %s is not used: %s comes first", flag, given, source)
        elif not Path(given).is_file():
            get_logger().warning("%s %s is not there, and not needed: this run continues from its own", flag, given)
        elif stored is None or (stored.get("MODEL") or {}).get(key.rpartition(".")[2]) != given:
            get_logger().warning(
                "%s %s is not used: the run folder holds %s, which comes first; another --tag starts from the file, and"
                " so does --opts TRAIN.AUTO_RESUME False, which moves what is there aside",
                flag,
                given,
                found.name,
            )


def start_from_pretrained(config: CfgNode, training: Training, loaders: Loaders) -> None:
    """Take the weights of --pretrained where it is given."""
    if source := config.MODEL.PRETRAINED:
        pretrained = load_checkpoint(source)
        for line in differing_function(pretrained, config, loaders.modality, source):
            get_logger().warning("%s", line)
        load_pretrained(training.bare_model, pretrained, source, config.MODEL.WEIGHTS)
        if training.ema:
            training.ema.set(training.bare_model)
        get_logger().info("starts from the weights of %s", source)


def resume(config: CfgNode, training: Training, loaders: Loaders) -> Start:
    """Continue the run folder's newest verified checkpoint, else --resume, else start from --pretrained or scratch."""
    logger, folder = get_logger(), training.plan.folder
    progress, interval = Progress(epoch=config.TRAIN.START_EPOCH), Interval(training.device)
    found, claims, checkpoint = Found(None), dict[str, float](), dict[str, Any]()

    def read(path: Path) -> Position:
        held = load_checkpoint(path)
        claims.update({best.key: percent(held, best.key) for best in BESTS.values() if path.name == best.file})
        return stored_position(held)

    if config.TRAIN.AUTO_RESUME or distributed.restarts():  # what a restart finds is this very run's
        problem = None
        if distributed.rank() == 0:
            try:
                found = newest_checkpoint(folder, read)
            except NoneUsableError as error:
                problem = str(error)
        found, problem = distributed.broadcast_object((found, problem))
        if problem:
            raise CheckpointError(problem)
    source = str(found.path or config.MODEL.RESUME)
    if source:
        checkpoint = load_checkpoint(source)
        progress, interval = restore(config, training, loaders, checkpoint, source)
        inside = f" and {progress.done} of {training.steps_per_epoch} steps" if progress.done else ""
        of_average = ""
        if training.ema and (key := BESTS["ema"].key) in checkpoint:
            of_average = f", of the average {percent(checkpoint, key):.3f} %"
        logger.info(
            "continues from %s: %d epochs%s finished, best top-1 %.3f %%%s",
            source,
            progress.epoch,
            inside,
            percent(checkpoint, BESTS["model"].key),
            of_average,
        )
    elif config.MODEL.PRETRAINED:
        source = config.MODEL.PRETRAINED
        start_from_pretrained(config, training, loaders)
    _log_unused(config, found.path, source, stored_config(checkpoint) if found.path else None)
    distributed.barrier()  # every rank has read its file
    if not found.path and distributed.rank() == 0 and (aside := set_aside(folder, Path(config.MODEL.RESUME))):
        logger.warning("the run folder held checkpoints of an earlier run; they are now in %s", aside)
    if distributed.rank() == 0:
        _complete_bests(folder, checkpoint, claims)
    if (steps := progress.epoch * training.steps_per_epoch + progress.done) > 0:
        training.scheduler.step_update(steps - 1)
    return Start(progress, interval, found.skipped, claims)


def _complete_bests(folder: Path, checkpoint: dict[str, Any], claims: dict[str, float]) -> None:
    """Write the best files that the run was killed before, or that --resume brings from elsewhere, and claim them."""
    validated = checkpoint.get("validated")
    for kind, best in BESTS.items():
        if not isinstance(validated, dict) or kind not in validated:
            continue
        top1 = percent(validated, kind)
        if top1 > claims.get(best.key, -1.0):
            try:
                save_checkpoint({**checkpoint, **claims, best.key: top1}, folder / best.file)
            except OSError as error:
                get_logger().error("%s", error)
            else:
                claims[best.key] = top1


def percent(values: Mapping[str, Any], key: str) -> float:
    """An accuracy of a file that may hold anything there."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and isfinite(value) else 0.0
