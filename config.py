"""Configuration: every key once, with its default, meaning and range; how files, flags and --opts merge.

Precedence: defaults < BASE files < the YAML < flags the user really gave < --opts.

Only yacs (and through it PyYAML) is imported here, so that ``--help`` and every mistake in a key, flag or value is
answered before anything heavy is loaded. ``python config.py --cfg configs/X.yaml …`` takes the arguments of main.py and
prints the merged configuration.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from flags import explain
from utils.checkpoints.naming import best_files, run_checkpoints
from utils.environment import share_of_cores, short_path
from utils.schema import (
    Kind,
    boolean,
    choice,
    decoded,
    either,
    file_path,
    folder_name,
    integer,
    keywords,
    lower,
    optional,
    real,
    sequence,
    shown,
    text,
)
from utils.yaml_files import YamlError, read_yaml

TOKEN_DATASETS = ("lra",)  # of sequences; the others are of images
DATASETS = ("imagenet", "digits", "fashion_mnist", *TOKEN_DATASETS)
LRA_TASKS = ("listops", "text", "retrieval", "pathfinder", "image")
SCHEDULERS = ("cosine", "linear", "step", "onecycle")
DECODERS = ("pillow", "simplejpeg")
AUGMENTERS = ("pillow", "opencv")
BENCHMARKS = ("val", "real", "v2", "a", "r", "sketch", "c")  # the first two are the data set's own validation images
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")  # those that warping augmentations take too
SIMILAR = 0.6  # of two spellings, from 0 to 1, for one to be suggested for the other
DEEPEST_BASE = 20  # BASE files in a row, which no real file has
REFERENCE_BATCH = 512  # images per step that BASE_LR, WARMUP_LR and MIN_LR are given for
AUGMENT_POLICY = re.compile(
    r"none|rand(-((m|n|mmax|inc)\d+|(p|mstd)[\d.]+|t\w+))*|augmix(-((m|w|d|b)\d+|(a|mstd)[\d.]+))*"
    r"|(original|originalr|v0|v0r|3a)(-mstd[\d.]+)?"
)


class ConfigError(ValueError):
    """A configuration the user has to mend: the message says what was received, what is accepted, and where."""


class Keywords(CfgNode):
    """A value that is a mapping, written on one line."""

    __repr__ = __str__ = dict.__repr__


@dataclass(frozen=True)
class Key:
    default: Any
    kind: Kind
    help: str


# -- Every key

KEYS: dict[str, Key] = {
    "BASE": Key(
        [""], sequence(file_path()), "YAML files merged before this one, relative to it; each once, the first time"
    ),
    # -- data
    "DATA.BATCH_SIZE": Key(128, integer(1), "images per process and forward pass (--batch-size)"),
    "DATA.DATA_PATH": Key("", file_path(), "folder that holds train/ and val/, or the zip and map files (--data-path)"),
    "DATA.DATASET": Key(
        "imagenet",
        choice(*DATASETS),
        "imagenet: an image folder or zip + map with any classes; digits: the 1,797 handwritten digits of scikit-learn;"
        " fashion_mnist: 70,000 grey pictures of clothing, the idx files in DATA_PATH or, where that is empty, of"
        " Debian's package dataset-fashion-mnist; lra: a task of the Long Range Arena, the folder that"
        " tools/prepare_lra.py wrote in DATA_PATH (MODEL.TYPE lra)",
    ),
    "DATA.LRA.TASK": Key("listops", choice(*LRA_TASKS), "task that the folder of DATASET lra has to hold"),
    "DATA.LRA.BLACK_IS_PADDING": Key(
        True,
        boolean(),
        "images as sequences: grey level 0 gets id 0, that of padding, as in the published protocol; False: ids are the"
        " grey levels + 1",
    ),
    "DATA.LRA.CLOSING_BRACKETS": Key(
        True, boolean(), "ListOps: keep the symbol `]`; False drops it, as the published protocol's reader does"
    ),
    "DATA.LRA.HELD_OUT": Key(
        False,
        boolean(),
        "Text, which has no validation split: validate on a tenth held out from training; False: on the test set, as"
        " the published protocol does",
    ),
    "DATA.TRAIN_FRACTION": Key(
        1.0, real(1e-6, 1), "share of each class's training images that is used, the first ones; not with shards"
    ),
    "DATA.VAL_FRACTION": Key(
        0.0,
        real(0, 1, open_high=True),
        "for images without val/: the share of each class's images, in train/ or in class folders of DATA_PATH itself,"
        " that is for validation and not trained on; their names decide which, in every run alike. 0: val/ is there",
    ),
    "DATA.IMG_SIZE": Key(
        224,
        either(integer(1), sequence(integer(1), 2)),
        "input size in pixels, or [height, width]; a multiple of the patch size doubled at each further stage (32 at"
        " patch 4 and four stages)",
    ),
    "DATA.INTERPOLATION": Key("bicubic", choice(*INTERPOLATIONS), "resampling filter of every resize"),
    "DATA.FORMAT": Key(
        "auto",
        choice("auto", "folder", "zip", "shards", "parquet"),
        "how DATA_PATH holds the images: folder, train/ and val/ with a folder per class; zip, as ZIP_MODE; shards, tar"
        " files listed in shards.json; parquet, train*.parquet and val*.parquet, in it or the folder below it (pip"
        " install datasets); auto: shards where shards.json is, zip with ZIP_MODE, parquet where such files are, else"
        " folder",
    ),
    "DATA.LABEL_COLUMN": Key(
        "", text(), "column of parquet files that has the labels, where several may; empty: the one with class names"
    ),
    "DATA.SHUFFLE_BUFFER": Key(
        2000, integer(1), "encoded images that each loader process draws from when it streams shards; 1: no shuffling"
    ),
    "DATA.ZIP_MODE": Key(
        False, boolean(), "read train.zip, val.zip with train_map.txt, val_map.txt (`path<TAB>label`) (--zip)"
    ),
    "DATA.CACHE_MODE": Key(
        "part",
        choice("no", "full", "part"),
        "warming of the page cache for zip files: full, each node's first process reads all of it; part, every process"
        " of a node its share; sampling is the same in every mode (--cache-mode)",
    ),
    "DATA.PIN_MEMORY": Key(True, boolean(), "page-locked batches for faster copies to a GPU"),
    "DATA.NUM_WORKERS": Key(
        8,
        integer(0),
        "loader processes per process, of the default no more than its share of the cores; 0 loads in the main process",
    ),
    "DATA.PREFETCH_FACTOR": Key(2, integer(1), "batches that each loader process prepares ahead"),
    "DATA.DECODER": Key(
        "pillow",
        choice(*DECODERS),
        "of training images: pillow, exact; simplejpeg (pip install simplejpeg), faster, the same pixels from JPEGs and"
        " resized to within 0.004 grey levels on average; evaluation always uses pillow",
    ),
    "DATA.MEAN": Key([0.485, 0.456, 0.406], sequence(real(0, 1), 3), "subtracted from red, green and blue, of 0 to 1"),
    "DATA.STD": Key([0.229, 0.224, 0.225], sequence(real(1e-3), 3), "what is left is divided by"),
    "DATA.EXIF": Key(
        False,
        boolean(),
        "turn and mirror images as the orientation in their EXIF data says, in training, evaluation and every tool;"
        " False takes the pixels as they are stored, as the released models were trained",
    ),
    "DATA.MAX_UNREADABLE": Key(
        0.01,
        real(0, 1),
        "fraction of the training images that may be unreadable (each named, the next one takes its place) before the"
        " run stops; in evaluation one is an error",
    ),
    # -- model
    "MODEL.TYPE": Key("swin", text(), "architecture"),
    "MODEL.NAME": Key("swin_tiny_patch4_window7_224", folder_name(), "name of the run folder below OUTPUT"),
    "MODEL.RESUME": Key("", file_path(), "checkpoint to continue from, or to evaluate with --eval (--resume)"),
    "MODEL.PRETRAINED": Key(
        "", file_path(), "checkpoint whose weights start a new run, adapted to its classes and size (--pretrained)"
    ),
    "MODEL.WEIGHTS": Key(
        "auto",
        choice("auto", "model", "ema"),
        "which weights of a checkpoint are evaluated (--eval) or start a run (--pretrained): model, ema, their average;"
        " auto: --eval evaluates all that the file holds, --pretrained takes the model's",
    ),
    "MODEL.NUM_CLASSES": Key(
        1000, integer(1), "size of the head where no data set or checkpoint decides it (throughput, building by hand)"
    ),
    "MODEL.DROP_RATE": Key(0.0, real(0, 1, open_high=True), "dropout after embeddings, projections and in the MLP"),
    "MODEL.DROP_PATH_RATE": Key(
        0.1, real(0, 1, open_high=True), "stochastic depth of the last block, growing linearly from 0 at the first"
    ),
    "MODEL.LABEL_SMOOTHING": Key(0.1, real(0, 1, open_high=True), "label smoothing, with and without mixup"),
    "MODEL.SWIN.PATCH_SIZE": Key(4, integer(1), "pixels per side of a patch (Pola-Swin)"),
    "MODEL.SWIN.IN_CHANS": Key(3, integer(1), "input channels of every body; the image loaders deliver 3"),
    "MODEL.SWIN.EMBED_DIM": Key(96, integer(1), "channels of the first stage (Pola-Swin)"),
    "MODEL.SWIN.DEPTHS": Key([2, 2, 6, 2], sequence(integer(1)), "blocks per stage (Pola-Swin)"),
    "MODEL.SWIN.NUM_HEADS": Key([3, 6, 12, 24], sequence(integer(1)), "heads per stage (Pola-Swin)"),
    "MODEL.SWIN.WINDOW_SIZE": Key(
        7, integer(1), "window side of polarity (L) blocks, clipped to the map; S windows are 7 up to 56, else 12"
    ),
    "MODEL.SWIN.MLP_RATIO": Key(4.0, real(0.01), "hidden width of the MLP over its input width (Pola-Swin)"),
    "MODEL.SWIN.QKV_BIAS": Key(True, boolean(), "bias in the q, k, v (and gate) projections (Pola-Swin)"),
    "MODEL.SWIN.QK_SCALE": Key(
        None, optional(real(0)), "score scale of the softmax (S) blocks; null: head dimension ** -0.5 (Pola-Swin)"
    ),
    "MODEL.SWIN.APE": Key(False, boolean(), "learned absolute position embedding after the patches (Pola-Swin)"),
    "MODEL.SWIN.PATCH_NORM": Key(True, boolean(), "LayerNorm after the patch embedding (Pola-Swin)"),
    "MODEL.LA.ALPHA": Key(4, real(0), "range of the learnable exponent p = 1 + ALPHA·sigmoid(power)"),
    "MODEL.LA.KERNEL_SIZE": Key(5, integer(1), "side of the depthwise convolution over v; odd"),
    "MODEL.LA.ATTN_TYPE": Key(
        "LLLL",
        text(),
        "attention of each stage: L polarity, S softmax, M polarity in the first k blocks and softmax in the rest, k"
        " the number after the letters (MLSS4; Pola-Swin only)",
    ),
    "MODEL.LA.PVT_LA_SR_RATIOS": Key(
        1111, integer(1), "spatial reduction of the L stages of Pola-PVT, one digit per stage"
    ),
    "MODEL.LA.ATTENTION": Key(
        "polarity",
        text(),
        "kernel of the L blocks, a file of models/kernels; all else in them stays the same: linear attention of both"
        " polarities (by powers, or as PolaFormer++ by exponentials), of relu(x), of 1 + elu(x), of focused powers of"
        " relu(x), or softmax; MODEL.TYPE pola_pp has polarity_pp",
    ),
    "MODEL.LA.LEARN_EXPONENT": Key(
        True, boolean(), "learn the exponent of polarity attention; False fixes it at 1 + ALPHA/2, its initial value"
    ),
    "MODEL.LA.GATE": Key(True, boolean(), "multiply the output of the L blocks' attention by a gate from its input"),
    "MODEL.LA.GATE_BIAS": Key(
        None,
        optional(real()),
        "initial value of the bias of the L blocks' gate, which then lets values through from the start; null: 0 in"
        " Pola-Swin and Pola-PVT, PyTorch's in others",
    ),
    "MODEL.LA.BACKEND": Key(
        "auto",
        text(),
        "implementation of linear attention: auto, eager or reference; of polarity, polarity_pp and norm_aware also"
        " triton, of polarity also native",
    ),
    "MODEL.PPP.EMBED_DIMS": Key([32, 64, 128, 384], sequence(integer(1)), "channels per stage (PolaFormer++)"),
    "MODEL.PPP.DEPTHS": Key([2, 2, 2, 2], sequence(integer(1)), "blocks per stage (PolaFormer++)"),
    "MODEL.PPP.NUM_HEADS": Key([1, 2, 4, 12], sequence(integer(1)), "heads per stage (PolaFormer++)"),
    "MODEL.PPP.MLP_RATIOS": Key(
        [3.5, 3.5, 3.5, 3.5], sequence(real(0.01)), "hidden width of the feed-forward over its input's, per stage"
    ),
    "MODEL.PPP.PROJECTION": Key(2048, integer(1), "channels before the head (PolaFormer++)"),
    "MODEL.PPP.LAYER_INIT_VALUES": Key(
        [1.0, 1.0, 1.0, 1.0], sequence(real(0)), "what the learned scales of both branches begin with, per stage"
    ),
    "MODEL.PPP.STAGE_TYPES": Key(
        "LLSS", text(), "a letter per stage: L polarity linear attention, S softmax attention (PolaFormer++)"
    ),
    "MODEL.TIMM.NAME": Key(
        "", text(), "the model of timm that MODEL.TYPE timm trains, such as swin_tiny_patch4_window7_224"
    ),
    "MODEL.TIMM.KWARGS": Key(
        {},
        keywords(),
        "further arguments of its constructor, {name: value}; sizes, classes and drop rates come from the other keys",
    ),
    "MODEL.LRA.LENGTH": Key(2048, integer(1), "tokens of a document, padding included (MODEL.TYPE lra)"),
    "MODEL.LRA.VOCABULARY": Key(32, integer(2), "rows of the token table; ids from 1, 0 is padding"),
    "MODEL.LRA.DOCUMENTS": Key(1, integer(1), "documents of a sample: 1, or 2 that are compared"),
    "MODEL.LRA.DIM": Key(64, integer(1), "channels of a token"),
    "MODEL.LRA.DEPTH": Key(2, integer(1), "encoder blocks"),
    "MODEL.LRA.NUM_HEADS": Key(2, integer(1), "attention heads"),
    "MODEL.LRA.MLP_DIM": Key(128, integer(1), "hidden width of the blocks' MLP and of the classifier"),
    "MODEL.LRA.POOL": Key(
        "mean_padded",
        text(),
        "vector of a document: mean_padded, sum over real tokens divided by LENGTH; mean_valid, their mean; cls, the"
        " output of a learned token before them",
    ),
    "MODEL.LRA.KERNEL_SIZE": Key(0, integer(0), "1-D depthwise convolution beside the attention, odd; 0: none"),
    "MODEL.LRA.LEARN_SCALE": Key(
        True, boolean(), "learn a scale that divides queries and keys; without effect on kernels that have none"
    ),
    "MODEL.LRA.ATTENTION_DROP": Key(
        0.0, real(0, 1, open_high=True), "dropout of attention weights; of softmax only, the others have none"
    ),
    # -- training
    "TRAIN.START_EPOCH": Key(0, integer(0), "first epoch of a run that resumes nothing"),
    "TRAIN.EPOCHS": Key(300, integer(1), "epochs of the schedule"),
    "TRAIN.WARMUP_EPOCHS": Key(20, integer(0), "epochs of linear warm-up from WARMUP_LR, part of EPOCHS"),
    "TRAIN.COOLDOWN_EPOCHS": Key(0, integer(0), "further epochs at the schedule's last rate (cosine: MIN_LR)"),
    "TRAIN.STEPS": Key(
        None,
        optional(integer(1)),
        "optimizer steps of the run, in place of EPOCHS; what is done once an epoch (validation, checkpoint, log) is"
        " then done every EVAL_STEPS, and training draws one permutation of the data after the other. null: EPOCHS",
    ),
    "TRAIN.EVAL_STEPS": Key(500, integer(1), "with STEPS, which it divides: optimizer steps between validations"),
    "TRAIN.WARMUP_STEPS": Key(0, integer(0), "with STEPS: steps of linear warm-up, part of STEPS"),
    "TRAIN.WEIGHT_DECAY": Key(0.05, real(0), "decoupled weight decay; 1-D parameters and biases have none"),
    "TRAIN.BASE_LR": Key(5e-4, real(0), "peak learning rate for 512 images a step, scaled by the real global batch"),
    "TRAIN.SCALE_LR": Key(True, boolean(), "scale the learning rates by global batch / 512; False: take them as given"),
    "TRAIN.LAYER_DECAY": Key(
        1.0,
        real(0, 1),
        "for fine-tuning: ratio of a layer's learning rate to that of the next (stem, blocks, head); 1.0: one rate",
    ),
    "TRAIN.WARMUP_LR": Key(5e-7, real(0), "learning rate at the start of the warm-up, scaled likewise"),
    "TRAIN.MIN_LR": Key(5e-6, real(0), "lowest learning rate after the warm-up, scaled likewise"),
    "TRAIN.SCALE_WARMUP_MIN_LR": Key(
        True, boolean(), "scale WARMUP_LR and MIN_LR as BASE_LR is; False: take these two as given"
    ),
    "TRAIN.CLIP_GRAD": Key(5.0, optional(real(0)), "largest total gradient norm; null or 0: no clipping"),
    "TRAIN.CLIP_VALUE": Key(
        None, optional(real(0)), "largest magnitude of a gradient's element, after CLIP_GRAD; null: no limit"
    ),
    "TRAIN.LOSS": Key(
        "ce",
        choice("ce", "bce"),
        "ce: cross-entropy; bce: binary cross-entropy of each class by itself, mean over both",
    ),
    "TRAIN.CLASS_WEIGHTS": Key(
        "none",
        either(choice("none", "balanced"), sequence(real(1e-6))),
        "factor of each class in the training loss: none; balanced, images / (classes × images of the class), not with"
        " shards; or a number a class, in the order of the class names",
    ),
    "TRAIN.FREEZE": Key(
        None,
        optional(sequence(text())),
        "regular expressions: parameters whose name begins with one are not trained, and their BatchNorm layers gather"
        " no statistics; ['(?!head)'] trains the head alone. null: none",
    ),
    "TRAIN.AUTO_RESUME": Key(True, boolean(), "continue from the newest readable checkpoint of the run folder"),
    "TRAIN.USE_CHECKPOINT": Key(
        False, boolean(), "recompute block activations in backward to save memory (--use-checkpoint)"
    ),
    "TRAIN.ACCUMULATION_STEPS": Key(1, integer(1), "forward passes per optimizer step (--accumulation-steps)"),
    "TRAIN.GLOBAL_BATCH": Key(
        None,
        optional(integer(1, 2**20)),
        "images per optimizer step over all processes; the forward passes per step follow from it, each of at most"
        " DATA.BATCH_SIZE images, so that any number of processes trains alike. null: DATA.BATCH_SIZE ×"
        " ACCUMULATION_STEPS × processes; where it does not divide by the processes, the nearest that does. What a"
        " file says after its BASE, or --opts after both, about one of GLOBAL_BATCH and ACCUMULATION_STEPS replaces the"
        " other",
    ),
    "TRAIN.NON_FINITE": Key(
        "stop",
        choice("stop", "skip"),
        "a loss or gradient that is not finite: stop and write a report, or skip that step and count it",
    ),
    "TRAIN.MAX_SKIPPED": Key(10, integer(0), "steps that NON_FINITE skip may skip in a run before it stops"),
    "TRAIN.SYNC_BN": Key(
        False, boolean(), "BatchNorm over the batches of all GPUs (PolaFormer++); on a CPU it is left out, and said"
    ),
    "TRAIN.FIND_UNUSED_PARAMS": Key(False, boolean(), "DDP's find_unused_parameters (--find-unused-params)"),
    "TRAIN.LR_SCHEDULER.NAME": Key(
        "cosine",
        choice(*SCHEDULERS),
        "learning rate after the warm-up; onecycle: torch's OneCycleLR in straight lines, which ignores"
        " WARMUP_LR and MIN_LR and cycles AdamW's first decay rate with the learning rate",
    ),
    "TRAIN.LR_SCHEDULER.PER_EPOCH": Key(
        False,
        boolean(),
        "cosine: one rate for an epoch, the schedule's at the epoch before, as in DeiT's script (epochs 0 and 1 are"
        " at WARMUP_LR), in place of one for each step",
    ),
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": Key(
        False,
        boolean(),
        "cosine and step: begin the curve after the warm-up, so that the rate does not drop there; False: it began with"
        " the run, as in the released recipes (timm's warmup_prefix)",
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, integer(1), "epochs between the drops of the step schedule"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(0.1, real(0, 1), "factor of each drop of the step schedule"),
    "TRAIN.OPTIMIZER.NAME": Key(
        "adamw",
        lower(text()),
        "adamw; sgd, with Nesterov momentum; or another of timm.optim.list_optimizers(), with timm's defaults and a"
        " wait for the device at each step",
    ),
    "TRAIN.OPTIMIZER.KWARGS": Key({}, keywords(), "further arguments of timm's optimizers, {name: value}"),
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, real(0), "AdamW's epsilon"),
    "TRAIN.OPTIMIZER.BETAS": Key(
        (0.9, 0.999), sequence(real(0, 1, open_high=True), 2, make=tuple), "AdamW's moment decay rates"
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, real(0, 1, open_high=True), "momentum of sgd, and of timm's that have one"),
    "EMA.ENABLE": Key(False, boolean(), "keep an exponential moving average of the weights and evaluate it too"),
    "EMA.DECAY": Key(0.9999, real(0, 1, open_high=True), "share of the old average kept at each step"),
    "EMA.DECAY_PER_512": Key(
        False, boolean(), "DECAY is for 512 images a step: the real one is DECAY^(global batch / 512)"
    ),
    "EMA.WARMUP": Key(
        False,
        boolean(),
        "begin with a lower share, min(DECAY, 1 − step^(−2/3)), so that the average of a short run moves too",
    ),
    "CHECKPOINT.KEEP": Key(3, integer(1), "newest checkpoints kept, beside the best one"),
    "CHECKPOINT.EVERY_STEPS": Key(
        0, integer(0), "optimizer steps between checkpoints inside an epoch, counted from its start; 0: none"
    ),
    "CHECKPOINT.EVERY_MINUTES": Key(0.0, real(0), "minutes between checkpoints, wherever the run is; 0: none"),
    # -- augmentation
    "AUG.REPEATS": Key(
        1,
        integer(1),
        "repeated augmentation: how often an image is drawn in a row, each time augmented anew and on another process;"
        " an epoch keeps its length, and sees that part of the images",
    ),
    "AUG.SCALE": Key(
        [0.08, 1.0],
        sequence(real(1e-3, 1), 2),
        "area of the random crop over that of the image, from and to; a higher lower end keeps small things in view;"
        " images of IMG_SIZE up to 32 pixels are padded and cropped instead",
    ),
    "AUG.RATIO": Key([3 / 4, 4 / 3], sequence(real(1e-3), 2), "width over height of the random crop, from and to"),
    "AUG.COLOR_JITTER": Key(0.4, real(0), "strength of colour jitter; without effect beside AUTO_AUGMENT, as in timm"),
    "AUG.AUTO_AUGMENT": Key(
        "rand-m9-mstd0.5-inc1",
        text(AUGMENT_POLICY, "a timm policy (rand-…, augmix-…, original, originalr, v0, v0r, 3a) or none"),
        "timm's automatic augmentation policy, or none",
    ),
    "AUG.BACKEND": Key(
        "pillow",
        choice(*AUGMENTERS),
        "what does AUTO_AUGMENT's operations: pillow, exact; opencv (pip install opencv-python-headless), faster, with"
        " the same random numbers and pixels to within 0.005 grey levels on average, rotations to within 1; not for"
        " augmix and 3a",
    ),
    "AUG.HFLIP": Key(0.5, real(0, 1), "probability of a horizontal flip"),
    "AUG.VFLIP": Key(0.0, real(0, 1), "probability of a vertical flip"),
    "AUG.REPROB": Key(0.25, real(0, 1), "probability of random erasing"),
    "AUG.REMODE": Key("pixel", choice("const", "rand", "pixel"), "fill of erased boxes: zero, one colour, noise"),
    "AUG.RECOUNT": Key(1, integer(1), "boxes per erased image"),
    "AUG.MIXUP": Key(0.8, real(0), "mixup alpha; 0 disables"),
    "AUG.CUTMIX": Key(1.0, real(0), "CutMix alpha; 0 disables"),
    "AUG.CUTMIX_MINMAX": Key(
        None,
        optional(sequence(real(0, 1), 2)),
        "smallest and largest box side of CutMix as fractions; overrides CUTMIX",
    ),
    "AUG.MIXUP_PROB": Key(1.0, real(0, 1), "probability that a batch is mixed"),
    "AUG.MIXUP_SWITCH_PROB": Key(0.5, real(0, 1), "probability of CutMix where both are enabled"),
    "AUG.MIXUP_MODE": Key("batch", choice("batch", "pair", "elem"), "one draw per batch, pair or image"),
    # -- evaluation
    "TEST.BENCHMARK": Key(
        "val",
        choice(*BENCHMARKS),
        "what --eval evaluates on: val, the data set's own validation images; real, those with the ReaL labels; v2, a,"
        " r, sketch, c: ImageNet-V2, -A, -R, -Sketch and -C, whose folder DATA_PATH then is; docs/evaluation.md tells"
        " of each (--benchmark)",
    ),
    "TEST.REAL_LABELS": Key(
        "", file_path(), "the ReaL labels, real.json of the reassessed ImageNet; empty: the copy that timm brings"
    ),
    "TEST.FLIP": Key(
        False,
        boolean(),
        "in --eval, the mean of the class probabilities of an image and its mirror image; twice the time",
    ),
    "TEST.IMG_SIZE": Key(
        None,
        optional(either(integer(1), sequence(integer(1), 2))),
        "input size of --eval, as DATA.IMG_SIZE, where it differs from that of training; position tables are resized."
        " null: DATA.IMG_SIZE",
    ),
    "TEST.CROP": Key(
        True, boolean(), "resize to 1/CROP_RATIO of the size, then crop the centre; False: resize to the size"
    ),
    "TEST.CROP_RATIO": Key(
        0.875,
        real(0.1, 1),
        "side of the centre crop over that of the resized image; 0.875 resizes to 256 for 224 pixels",
    ),
    "TEST.RESIZE": Key(
        "squash",
        choice("squash", "shorter"),
        "resize before the crop: squash ignores the aspect ratio (the released evaluation), shorter keeps it",
    ),
    "TEST.AMP": Key(False, boolean(), "evaluate under autocast; False: float32 with TF32 off"),
    # -- run
    "AMP": Key(False, boolean(), "train under autocast (--amp)"),
    "AMP_DTYPE": Key(
        "auto",
        choice("auto", "bfloat16", "float16"),
        "autocast type; auto: bfloat16 where the device has it, else float16 with a gradient scaler",
    ),
    "COMPILE": Key(False, boolean(), "compile the model with torch.compile"),
    "TENSORBOARD": Key(
        False,
        boolean(),
        "write TensorBoard files to the run folder: scalars, a few augmented inputs, histograms of the exponents",
    ),
    "TRACKER": Key(
        "none",
        text(re.compile(r"none|wandb|[A-Za-z_][\w.]*:[A-Za-z_]\w*"), "none, wandb, or MODULE:CLASS"),
        "experiment tracker that rank 0 tells what metrics.jsonl gets, the configuration and the result: none; wandb"
        " (pip install wandb); or a class of yours with three methods (docs/training.md)",
    ),
    "OUTPUT": Key("", file_path(), "root of the run folders; empty means `output` (--output)"),
    "TAG": Key("default", folder_name(), "last part of the run folder OUTPUT/NAME/TAG (--tag)"),
    "SAVE_FREQ": Key(1, integer(1), "epochs between checkpoints; the last epoch is always saved"),
    "PRINT_FREQ": Key(100, integer(1), "optimizer steps between log lines"),
    "PROFILE": Key(0, integer(0), "training steps to trace with torch.profiler, into the run folder (--profile)"),
    "SEED": Key(0, integer(0), "seed of every random generator"),
    "DETERMINISTIC": Key(
        False,
        boolean(),
        "only algorithms that give the same bits every time; on a GPU a resumed run then equals the unbroken one bit"
        " for bit (on a CPU it always does), and steps are slower",
    ),
    "DIST.TIMEOUT": Key(
        1800.0, real(1), "seconds without progress, or of waiting for another process, after which a run ends"
    ),
    "EVAL_MODE": Key(False, boolean(), "evaluate the --resume file and stop (--eval)"),
    "THROUGHPUT_MODE": Key(False, boolean(), "measure images/s on synthetic input and stop (--throughput)"),
    "CHECK_DATA_MODE": Key(
        False,
        boolean(),
        "examine every file of the data set, print a report and stop; exit code 1 on findings (--check-data)",
    ),
    "DRY_RUN_MODE": Key(
        False,
        boolean(),
        "build everything, do two steps on synthetic input, say what the run will take, write nothing and stop"
        " (--dry-run)",
    ),
    "DEVICE": Key(
        "auto",
        choice("auto", "cpu", "cuda", "mps", "xpu"),
        "what to compute on: cuda (NVIDIA's and AMD's GPUs), mps (Apple's), xpu (Intel's), cpu; auto: the accelerator"
        " that torch finds, else the CPU (--device)",
    ),
    "LOCAL_RANK": Key(0, integer(0), "GPU of a single process; torchrun's LOCAL_RANK takes precedence (--local-rank)"),
}

# Keys of this family's older configurations that no code ever read, or that only select other architectures.
DEAD_KEYS = frozenset(
    [f"MODEL.SWIN.{name}" for name in ("KA", "DIM_REDUCTION", "STAGES", "STAGES_NUM", "RPB", "PADDING_MODE")]
    + [f"MODEL.SWIN.{name}" for name in ("SHARE_DWC_KERNEL", "SHARE_QKV", "LR_FACTOR", "DEPTHS_LR", "FUSION_TYPE")]
    + ["MODEL.SWIN.STAGE_CFG", "MODEL.LA.CSWIN_LA_SPLIT_SIZE", "MODEL.SWIN_HR", "MODEL.SWIN_LRVIT", "MODEL.PVD"]
)
_MAPPINGS = {key for key, declared in KEYS.items() if isinstance(declared.default, dict)}
_SECTIONS = {key.rsplit(".", 1)[0] for key in KEYS if "." in key} | {"TRAIN", "MODEL"}


def is_dead_key(key: str) -> bool:
    """True for a key that never had an effect, or anything below one."""
    return any(key == dead or key.startswith(dead + ".") for dead in DEAD_KEYS)


# -- Merging


def default_config() -> CfgNode:
    """A mutable tree of the defaults."""
    config = CfgNode()
    for key, declared in KEYS.items():
        node = config
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, CfgNode())
        value = declared.kind.parse(declared.default)
        node[leaf] = list(value) if isinstance(value, list) else Keywords(value) if isinstance(value, dict) else value
    return config


def _nearest(name: str, names: Iterable[str], words: str, separator: str = ".") -> str:
    """`words` with the name that is spelled much like this one, also in what follows its last separator; else ""."""
    spelled = {each.casefold(): each for each in names}
    for close in difflib.get_close_matches(name.casefold(), spelled):
        own, theirs = (each.rpartition(separator)[2] for each in (name.casefold(), close))
        if difflib.SequenceMatcher(None, own, theirs).ratio() >= SIMILAR:
            return words.format(spelled[close])
    return ""


def _set(config: CfgNode, key: str, value: Any, source: str) -> None:
    if key == "BASE":
        raise ConfigError(f"{source}: BASE can only stand in a YAML file")
    if key in _SECTIONS:
        raise ConfigError(f"{source}: {key} is a section and needs keys below it, received {shown(value)}")
    if is_dead_key(key):
        raise ConfigError(f"{source}: {key} has no effect here and was removed; delete it")
    if key not in KEYS:
        nearest = _nearest(key, KEYS, "the nearest valid key is {}") or "docs/configuration.md lists all"
        raise ConfigError(f"{source}: unknown key {key[:80]}; {nearest}")
    kind = KEYS[key].kind
    spelled = decoded(value) if isinstance(value, str) else value
    for candidate in (value, spelled):
        try:
            parsed = kind.parse(candidate)
            break
        except ValueError:
            continue
    else:
        raise ConfigError(f"{source}: {key} is {shown(value)} ({type(spelled).__name__}), expected {kind.accepts}")
    node = config
    *sections, leaf = key.split(".")
    for section in sections:
        node = node[section]
    node[leaf] = Keywords(parsed) if isinstance(parsed, dict) else parsed
    config.__dict__.setdefault("given", set()).add(key)


def _flatten(tree: dict[str, Any], source: str, prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for part, value in tree.items():
        key = f"{prefix}{part}"
        if isinstance(value, dict) and not is_dead_key(key) and key not in _MAPPINGS:
            if key not in _SECTIONS:
                known = "is a value, not a section" if key in KEYS else "is unknown"
                nearest = _nearest(key, sorted(_SECTIONS), "; the nearest valid section is {}")
                raise ConfigError(f"{source}: section {key[:80]} {known}{nearest}")
            items += _flatten(value, source, key + ".")
        elif key in _SECTIONS:
            raise ConfigError(f"{source}: {key} is a section and needs keys below it, received {shown(value)}")
        else:
            items.append((key, value))
    return items


def _merge_file(config: CfgNode, file: Path, done: set[Path] | None = None, parents: tuple[Path, ...] = ()) -> None:
    """Merge a YAML file after its BASE files, each of which counts once, where it is named first (`done`)."""
    done = set() if done is None else done
    try:
        tree, resolved = read_yaml(file), Path(os.path.realpath(file))
    except FileNotFoundError:
        folder = short_path(Path(__file__).with_name("configs"))
        available = [path.stem for path in Path(folder).glob("*.yaml")]
        nearest = _nearest(file.stem[-200:], available, f"did you mean {folder}/{{}}.yaml?") or f"{folder}/ holds many"
        raise ConfigError(f"config file {str(file)[:200]} does not exist; {nearest}") from None
    except YamlError as error:
        raise ConfigError(str(error)) from error
    if resolved in parents or len(parents) > DEEPEST_BASE:
        names = " → ".join([*(each.name for each in parents[-5:]), file.name])
        raise ConfigError(f"{file}: BASE files include each other, or more than {DEEPEST_BASE} in a row: {names}")
    bases = tree.pop("BASE", None) or []
    try:
        bases = KEYS["BASE"].kind.parse([bases] if isinstance(bases, str) else bases) if bases else []
    except ValueError:
        raise ConfigError(f"{file}: BASE is {shown(bases)}, expected {KEYS['BASE'].kind.accepts}") from None
    for base in bases:
        if base and Path(os.path.realpath(file.parent / base)) not in done:
            _merge_file(config, file.parent / base, done, (*parents, resolved))
    done.add(resolved)
    items = _flatten(tree, str(file))
    for key, value in items:
        _set(config, key, value, str(file))
    _settle_batch(config, [key for key, _ in items], file=True)


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that --opts is given as KEY VALUE or KEY=VALUE."""
    rest, pairs = list(words), []
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals and not rest:
            raise ConfigError(f"--opts takes KEY VALUE pairs, and {key} has no value: {' '.join(words)}")
        pairs.append((key, value if equals else rest.pop(0)))
    return pairs


def load_config(cfg_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The frozen, validated configuration of a YAML file and KEY VALUE overrides; the path that main.py takes.

    Raises ConfigError for a missing file, an unknown key (naming the nearest), a wrong type or value.
    """
    return _merge(cfg_file, {}, opts)


def _merge(cfg: str | CfgNode, flags: Mapping[str, str], opts: Sequence[str]) -> CfgNode:
    """`cfg`: a YAML file, or a configuration that a checkpoint holds."""
    config = cfg.clone() if isinstance(cfg, CfgNode) else default_config()
    config.defrost()
    if not isinstance(cfg, CfgNode):
        _merge_file(config, Path(os.path.expanduser(cfg)))
    overrides = _pairs(opts)
    for key, value in flags.items():
        _set(config, key, value, "command line")
    for key, value in overrides:
        _set(config, key, value, "--opts")
    _settle_batch(config, {*flags, *(key for key, _ in overrides)}, file=False)
    validate(config)
    config.freeze()
    return config


def _settle_batch(config: CfgNode, keys: Collection[str], *, file: bool) -> None:
    """What one source (a file, or the command line) says about the batch replaces what an earlier one said.

    TRAIN.GLOBAL_BATCH and TRAIN.ACCUMULATION_STEPS exclude each other. The global batch of a file stays known as that
    of the recipe, and the lines about what became of it are for `notes_of`.
    """
    accumulates, divides = "TRAIN.ACCUMULATION_STEPS" in keys, "TRAIN.GLOBAL_BATCH" in keys
    total, about = config.TRAIN.GLOBAL_BATCH, config.__dict__.setdefault("about_batch", {})
    if divides:
        about.pop("note", None)
        if file:
            about["recipe"] = total
        if not accumulates:
            config.TRAIN.ACCUMULATION_STEPS = 1
    elif accumulates and total is not None:
        config.TRAIN.GLOBAL_BATCH = None
        about["note"] = (
            f"TRAIN.ACCUMULATION_STEPS {config.TRAIN.ACCUMULATION_STEPS} replaces TRAIN.GLOBAL_BATCH {total} of the"
            " file"
        )
    elif "DATA.BATCH_SIZE" in keys and total is not None:
        about["note"] = (
            f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} only limits the passes: TRAIN.GLOBAL_BATCH {total} of the file"
            " stays; null replaces it"
        )


def notes_of(config: CfgNode) -> list[str]:
    """What the merge decided, in lines for the log."""
    about = config.__dict__.get("about_batch", {})
    return [about["note"]] if "note" in about else []


def config_from_tree(tree: dict[str, Any], source: str) -> tuple[CfgNode, list[str]]:
    """The configuration a checkpoint carries, and the names in it that have no effect or no valid value here.

    Older files of this family store their whole tree, unknown sections included, so that these are no error. Raises
    ConfigError for a value that a key about the model does not accept: the file's weights would mean something else.
    """
    config, ignored = default_config(), []

    def visit(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key == "BASE":
                continue
            if key in KEYS:
                try:
                    _set(config, key, value, source)
                except ConfigError:
                    if key.startswith("MODEL.") or key == "DATA.IMG_SIZE":
                        raise
                    ignored.append(key)
            elif isinstance(value, dict) and key in _SECTIONS:
                visit(value, key + ".")
            else:
                ignored.append(key[:80])

    visit(tree, "")
    config.__dict__["given"] = set()  # by the one who ran it, perhaps elsewhere
    config.freeze()
    return config, ignored


# -- Validation across keys, and what is derived from several


def image_size(config: CfgNode) -> tuple[int, int]:
    """DATA.IMG_SIZE as (height, width) in pixels."""
    size = config.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def evaluation_config(config: CfgNode) -> CfgNode:
    """The configuration that --eval works with: DATA.IMG_SIZE is TEST.IMG_SIZE where that is set."""
    if config.TEST.IMG_SIZE is None:
        return config
    sized = config.clone()
    sized.defrost()
    sized.DATA.IMG_SIZE = config.TEST.IMG_SIZE
    sized.freeze()
    return sized


def value_of(config: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return node


@dataclass(frozen=True)
class Plan:
    """What several keys and the number of processes decide together: computed once, and handed down as values."""

    folder: Path  # of the run: everything that it writes
    image_size: tuple[int, int]  # (height, width) in pixels
    epochs: int  # of the schedule; with TRAIN.STEPS the number of times that EVAL_STEPS fits into them
    last_epoch: int  # cooldown included
    epoch_steps: int | None  # optimizer steps that count as an epoch; None: one pass through the data
    warmup_epochs: int
    warmup_steps_given: int  # with TRAIN.STEPS
    per_process: int  # images per process and forward pass
    accumulation: int  # forward passes per optimizer step
    world_size: int
    scales_lr: bool
    workers: int  # loader processes of each process
    recipe_batch: int | None  # what TRAIN.GLOBAL_BATCH of the files says, else of the command line

    @property
    def global_batch(self) -> int:
        """Images per optimizer step over all processes."""
        return self.per_process * self.accumulation * self.world_size

    @property
    def lr_scale(self) -> float:
        """Factor of BASE_LR, WARMUP_LR and MIN_LR, which are given for REFERENCE_BATCH images a step."""
        return self.global_batch / REFERENCE_BATCH if self.scales_lr else 1.0

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the warm-up."""
        return self.warmup_epochs * steps_per_epoch if self.epoch_steps is None else self.warmup_steps_given


def make_plan(config: CfgNode, world_size: int = 1) -> Plan:
    """The plan of a configuration for a number of processes."""
    by_steps = config.TRAIN.STEPS is not None
    epochs = config.TRAIN.STEPS // config.TRAIN.EVAL_STEPS if by_steps else config.TRAIN.EPOCHS
    per_process, accumulation = _divide_step(config, world_size)
    return Plan(
        folder=Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG,
        image_size=image_size(config),
        epochs=epochs,
        last_epoch=epochs + config.TRAIN.COOLDOWN_EPOCHS,
        epoch_steps=config.TRAIN.EVAL_STEPS if by_steps else None,
        warmup_epochs=config.TRAIN.WARMUP_EPOCHS,
        warmup_steps_given=config.TRAIN.WARMUP_STEPS,
        per_process=per_process,
        accumulation=accumulation,
        world_size=world_size,
        scales_lr=config.TRAIN.SCALE_LR,
        workers=_loader_processes(config),
        recipe_batch=config.__dict__.get("about_batch", {}).get("recipe") or config.TRAIN.GLOBAL_BATCH,
    )


def _loader_processes(config: CfgNode) -> int:
    """DATA.NUM_WORKERS where it was given; its default as far as this process's share of the cores goes."""
    wanted = config.DATA.NUM_WORKERS
    return wanted if "DATA.NUM_WORKERS" in config.__dict__.get("given", ()) else min(wanted, share_of_cores())


def _divide_step(config: CfgNode, world_size: int) -> tuple[int, int]:
    """Images per process and pass, and passes per optimizer step: as configured, or derived from GLOBAL_BATCH.

    All passes are equal: as few as BATCH_SIZE allows, up to four times as many where only they give GLOBAL_BATCH
    exactly; where none do, the fewest, of the size that comes nearest to it.
    """
    total, limit = config.TRAIN.GLOBAL_BATCH, config.DATA.BATCH_SIZE
    if total is None:
        return limit, config.TRAIN.ACCUMULATION_STEPS
    fewest = max(1, ceil(total / (world_size * limit)))
    most = min(4 * fewest, total // world_size)
    exact = (passes for passes in range(fewest, most + 1) if total % (world_size * passes) == 0)
    passes = next(exact, fewest)
    return min(limit, max(1, round(total / (world_size * passes)))), passes


def validate(config: CfgNode) -> None:
    """Raise ConfigError where keys contradict each other; what a model or data source accepts is theirs to say."""
    _validate_schedule(config)
    _validate_modes(config)
    minmax = config.AUG.CUTMIX_MINMAX
    if minmax is not None and not minmax[0] < minmax[1]:
        raise ConfigError(f"AUG.CUTMIX_MINMAX {minmax}: expected the smaller fraction first")
    if config.DATA.VAL_FRACTION and config.DATA.DATASET != "imagenet":
        raise ConfigError(f"DATA.DATASET {config.DATA.DATASET} has validation data: set DATA.VAL_FRACTION to 0")
    for name in ("SCALE", "RATIO"):
        if (span := config.AUG[name])[0] > span[1]:
            raise ConfigError(f"AUG.{name} {span}: expected the smaller number first")
    if config.DATA.ZIP_MODE and config.DATA.FORMAT not in ("auto", "zip"):
        raise ConfigError(
            f"DATA.FORMAT {config.DATA.FORMAT} contradicts DATA.ZIP_MODE True (--zip); leave one of them out"
        )


def _validate_schedule(config: CfgNode) -> None:
    steps, interval = config.TRAIN.STEPS, config.TRAIN.EVAL_STEPS
    if steps is not None and steps % interval:
        nearest = max(1, round(steps / interval)) * interval
        raise ConfigError(f"TRAIN.EVAL_STEPS {interval} does not divide TRAIN.STEPS {steps}; {nearest} steps would do")
    if config.TRAIN.LR_SCHEDULER.NAME == "onecycle" and steps is not None and steps <= config.TRAIN.WARMUP_STEPS:
        raise ConfigError(
            f"TRAIN.WARMUP_STEPS {config.TRAIN.WARMUP_STEPS} leaves none of TRAIN.STEPS {steps} for the way down of"
            " onecycle; a shorter run needs a shorter warm-up"
        )
    last_epoch = make_plan(config).last_epoch
    if last_epoch <= config.TRAIN.START_EPOCH:
        raise ConfigError(f"TRAIN.START_EPOCH {config.TRAIN.START_EPOCH} is not below the run's {last_epoch} epochs")
    if config.TRAIN.MIN_LR > config.TRAIN.BASE_LR:
        raise ConfigError(f"TRAIN.MIN_LR {config.TRAIN.MIN_LR} exceeds TRAIN.BASE_LR {config.TRAIN.BASE_LR}")
    if config.TRAIN.GLOBAL_BATCH is not None and config.TRAIN.ACCUMULATION_STEPS > 1:
        raise ConfigError("TRAIN.GLOBAL_BATCH decides the accumulation: leave TRAIN.ACCUMULATION_STEPS at 1")


def _validate_modes(config: CfgNode) -> None:
    modes = ("EVAL_MODE", "THROUGHPUT_MODE", "CHECK_DATA_MODE", "DRY_RUN_MODE")
    given = [flag for flag, key in SWITCHES.items() if key in modes and config[key]]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other")
    if config.EVAL_MODE and not config.MODEL.RESUME:
        raise ConfigError("--eval needs --resume FILE: the checkpoint to evaluate")
    benchmark = config.TEST.BENCHMARK
    if benchmark != "val":
        if not config.EVAL_MODE:
            raise ConfigError(f"TEST.BENCHMARK {benchmark} (--benchmark) is what --eval evaluates on; add --eval")
        if config.DATA.DATASET != "imagenet":
            raise ConfigError(
                f"TEST.BENCHMARK {benchmark} is a variant of ImageNet, expected DATA.DATASET imagenet, received"
                f" {config.DATA.DATASET}"
            )


# -- Command line

# Flags that set a key to their value, and flags that set a key to True.
VALUE_FLAGS = {
    "--batch-size": "DATA.BATCH_SIZE",
    "--data-path": "DATA.DATA_PATH",
    "--cache-mode": "DATA.CACHE_MODE",
    "--resume": "MODEL.RESUME",
    "--pretrained": "MODEL.PRETRAINED",
    "--accumulation-steps": "TRAIN.ACCUMULATION_STEPS",
    "--output": "OUTPUT",
    "--tag": "TAG",
    "--profile": "PROFILE",
    "--benchmark": "TEST.BENCHMARK",
    "--local-rank": "LOCAL_RANK",
    "--device": "DEVICE",
}
SWITCHES = {
    "--zip": "DATA.ZIP_MODE",
    "--use-checkpoint": "TRAIN.USE_CHECKPOINT",
    "--amp": "AMP",
    "--eval": "EVAL_MODE",
    "--throughput": "THROUGHPUT_MODE",
    "--check-data": "CHECK_DATA_MODE",
    "--dry-run": "DRY_RUN_MODE",
    "--find-unused-params": "TRAIN.FIND_UNUSED_PARAMS",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        allow_abbrev=False,
        description="Train, evaluate or time Pola-Swin, Pola-PVT and PolaFormer++. Flags and --opts override the YAML"
        " file; docs/configuration.md lists every key.",
        epilog="example: torchrun --nproc_per_node=8 main.py --cfg configs/pola_swin_t.yaml --data-path IMAGENET --amp",
    )
    what = "YAML configuration, for example configs/pola_swin_t.yaml; without it, --eval takes the checkpoint's own"
    parser.add_argument("--cfg", metavar="FILE", help=what)
    what = "override keys: --opts TRAIN.EPOCHS 100 SEED=1"
    parser.add_argument("--opts", nargs="*", action="extend", default=[], metavar="KEY VALUE", help=what)
    for flag, key in VALUE_FLAGS.items():
        names = [flag, "--local_rank"] if flag == "--local-rank" else [flag]
        parser.add_argument(*names, dest=key, default=argparse.SUPPRESS, metavar="VALUE", help=KEYS[key].help)
    for flag, key in SWITCHES.items():
        parser.add_argument(
            flag, dest=key, action="store_const", const="True", default=argparse.SUPPRESS, help=KEYS[key].help
        )
    return parser


def parse_command_line(argv: Sequence[str] | None = None, stored: Callable[[str], CfgNode] | None = None) -> CfgNode:
    """The frozen configuration of the command line (default: sys.argv). A mistake exits with status 2 and one line.

    `stored` reads the configuration that a checkpoint was written with, which --eval without --cfg takes.
    """
    parser = _parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(parser, unknown))
    given = vars(namespace)
    flags = {key: given[key] for key in KEYS if key in given}
    try:
        if namespace.cfg is None and stored and "EVAL_MODE" in flags and "MODEL.RESUME" in flags:
            path = os.path.expanduser(flags["MODEL.RESUME"])
            _require_checkpoint("--resume", path)
            namespace.cfg = stored(path)
        if namespace.cfg is None:
            parser.error(
                "--cfg FILE is required, for example --cfg configs/pola_swin_t.yaml (--eval --resume FILE does without)"
            )
        config = _merge(namespace.cfg, flags, namespace.opts)
        _require_files(config)
    except ConfigError as error:
        parser.error(str(error))
    return config


def _unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """What to write in place of words that are no flags here."""
    if explained := explain(words, {key: declared.help for key, declared in KEYS.items()}):
        return explained
    if not words[0].startswith("-"):
        return f"unexpected word {words[0][:200]}: settings are flags, or keys after --opts; main.py --help lists them"
    names = [name for action in parser._actions for name in action.option_strings]
    nearest = _nearest(words[0].partition("=")[0], names, "the nearest valid one is {}", "--")
    return f"unknown argument {words[0][:200]}; {nearest or 'main.py --help lists the flags'}"


def _require_files(config: CfgNode) -> None:
    """Raise ConfigError for a checkpoint or data folder that the run needs and that is not there."""
    reads = not config.THROUGHPUT_MODE and not config.CHECK_DATA_MODE  # which reports what is missing
    if config.DATA.DATA_PATH and reads and not Path(config.DATA.DATA_PATH).exists():
        raise ConfigError(f"--data-path {config.DATA.DATA_PATH}: no such folder")
    if not config.EVAL_MODE and continues(config):  # without them; the log says so
        return
    for flag, given in (("--resume", config.MODEL.RESUME), ("--pretrained", config.MODEL.PRETRAINED)):
        if given:
            _require_checkpoint(flag, given)


def _require_checkpoint(flag: str, path: str) -> None:
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {path}: {'not a file' if Path(path).exists() else 'no such file'}")


def continues(config: CfgNode) -> bool:
    """Whether the run folder holds a checkpoint that this run would continue from."""
    if not config.TRAIN.AUTO_RESUME and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    folder = make_plan(config).folder
    return bool(run_checkpoints(folder) or best_files(folder))


if __name__ == "__main__":
    sys.stdout.write(parse_command_line().dump())
