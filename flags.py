"""Flags of related training scripts, and what says the same here: Swin's and DeiT's main.py, timm's train.py,
torchvision's references.

Their spelling with - or _ is the same flag.
"""

import shlex
from collections.abc import Mapping, Sequence

# By key: flags that take its value.
OF_KEYS = {
    "DATA.BATCH_SIZE": "-b -vb --validation-batch-size",
    "DATA.DATASET": "--dataset --data-set",
    "DATA.DATA_PATH": "--data-dir --data",
    "DATA.DECODER": "--input-img-mode",
    "DATA.IMG_SIZE": "--input-size --img-size --train-crop-size",
    "DATA.MEAN": "--mean",
    "DATA.STD": "--std",
    "DATA.INTERPOLATION": "--interpolation --train-interpolation",
    "DATA.NUM_WORKERS": "-j --workers --num-workers",
    "MODEL.TYPE": "--model --arch -a --variant",
    "MODEL.NAME": "--experiment",
    "MODEL.NUM_CLASSES": "--num-classes",
    "MODEL.PRETRAINED": "--finetune --initial-checkpoint --pretrained-path --weights",
    "MODEL.RESUME": "--checkpoint",
    "MODEL.DROP_RATE": "--drop",
    "MODEL.DROP_PATH_RATE": "--drop-path --drop-connect",
    "MODEL.LABEL_SMOOTHING": "--smoothing --label-smoothing",
    "MODEL.SWIN.IN_CHANS": "--in-chans",
    "TRAIN.START_EPOCH": "--start-epoch",
    "TRAIN.EPOCHS": "--epochs",
    "TRAIN.WARMUP_EPOCHS": "--warmup-epochs --lr-warmup-epochs",
    "TRAIN.COOLDOWN_EPOCHS": "--cooldown-epochs",
    "TRAIN.WEIGHT_DECAY": "--weight-decay --wd",
    "TRAIN.BASE_LR": "--lr --lr-base --base-lr --learning-rate",
    "TRAIN.WARMUP_LR": "--warmup-lr",
    "TRAIN.MIN_LR": "--min-lr --lr-min",
    "TRAIN.LAYER_DECAY": "--layer-decay",
    "TRAIN.CLIP_GRAD": "--clip-grad --clip-grad-norm",
    "TRAIN.ACCUMULATION_STEPS": "--grad-accum-steps --accum-iter --gradient-accumulation-steps",
    "TRAIN.LR_SCHEDULER.NAME": "--sched --lr-scheduler",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "--decay-epochs --lr-step-size",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "--decay-rate --dr --lr-gamma",
    "TRAIN.OPTIMIZER.NAME": "--opt --optim --optimizer",
    "TRAIN.OPTIMIZER.EPS": "--opt-eps",
    "TRAIN.OPTIMIZER.BETAS": "--opt-betas",
    "TRAIN.OPTIMIZER.MOMENTUM": "--momentum",
    "TRAIN.OPTIMIZER.KWARGS": "--opt-kwargs",
    "MODEL.TIMM.KWARGS": "--model-kwargs",
    "EMA.DECAY": "--model-ema-decay",
    "CHECKPOINT.KEEP": "--checkpoint-hist",
    "CHECKPOINT.EVERY_STEPS": "--recovery-interval",
    "AUG.REPEATS": "--aug-repeats --ra-reps",
    "AUG.COLOR_JITTER": "--color-jitter",
    "AUG.AUTO_AUGMENT": "--aa --auto-augment",
    "AUG.HFLIP": "--hflip",
    "AUG.RATIO": "--ratio",
    "AUG.SCALE": "--scale",
    "AUG.VFLIP": "--vflip",
    "AUG.REPROB": "--reprob --random-erase",
    "AUG.REMODE": "--remode",
    "AUG.RECOUNT": "--recount",
    "AUG.MIXUP": "--mixup --mixup-alpha",
    "AUG.CUTMIX": "--cutmix --cutmix-alpha",
    "AUG.CUTMIX_MINMAX": "--cutmix-minmax",
    "AUG.MIXUP_PROB": "--mixup-prob",
    "AUG.MIXUP_SWITCH_PROB": "--mixup-switch-prob",
    "AUG.MIXUP_MODE": "--mixup-mode",
    "TEST.CROP_RATIO": "--crop-pct --eval-crop-ratio",
    "TEST.IMG_SIZE": "--val-crop-size",
    "AMP_DTYPE": "--amp-dtype",
    "SAVE_FREQ": "--save-freq",
    "PRINT_FREQ": "--print-freq --log-interval -p",
    "SEED": "--seed",
}
# By what is written here: flags that say just that, whatever follows them.
OF_SETTINGS = {
    "AMP False": "--disable-amp --no-amp",
    "AMP True": "--amp-opt-level --amp-impl --fp16 --bf16",
    "AUG.AUTO_AUGMENT none AUG.REPROB 0 AUG.HFLIP 0 AUG.COLOR_JITTER 0": "--no-aug",
    "AUG.REPEATS 1": "--no-repeated-aug",
    "AUG.REPEATS 3": "--repeated-aug --ra-sampler",
    "AUG.AUTO_AUGMENT 3a": "--ThreeAugment",
    "COMPILE True": "--torchcompile --compile",
    "DATA.PIN_MEMORY False": "--no-pin-mem",
    "DATA.PIN_MEMORY True": "--pin-mem",
    "TRAIN.LOSS bce": "--bce-loss",
    "DETERMINISTIC True": "--use-deterministic-algorithms",
    "EMA.ENABLE False": "--no-model-ema",
    "EMA.ENABLE True": "--model-ema",
    "EMA.WARMUP True": "--model-ema-warmup",
    "MODEL.LA.BACKEND auto": "--fused-window-process",
    "TEST.FLIP True": "--tta",
    "TRACKER wandb": "--log-wandb --wandb",
    "TRAIN.AUTO_RESUME False": "--no-resume",
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX True": "--warmup-prefix",
    "TRAIN.SCALE_LR False": "--unscale-lr",
    "TRAIN.SYNC_BN True": "--sync-bn",
}
# By a flag of ours: flags that mean it; with a value where ours has one.
OF_FLAGS = {
    "--cfg": "--config -c",
    "--eval": "--test-only --evaluate -e",
    "--output": "--output-dir --logdir",
    "--use-checkpoint": "--grad-checkpointing",
}
# By the reason: flags that nothing stands for.
WITHOUT = {
    "not needed, torchrun says how many processes there are, and where": (
        "--world-size --dist-url --dist-backend --backend --distributed --rank --gpu --multiprocessing-distributed "
        "--ngpus"
    ),
    "not needed, evaluation always divides the images, each exactly once": "--dist-eval --no-dist-eval",
    "not needed, memory layouts, kernels and copies to the device are chosen by the device": (
        "--channels-last --fuser --fast-norm --fused-layernorm --no-prefetcher --no-ddp-bb --torchscript "
        "--synchronize-step --use-multi-epochs-loader --worker-seeding --device-modules --model-dtype "
        "--model-ema-force-cpu --dist-bn --force-cpu"
    ),
    "not needed, docs/data.md tells how a data set lies there": (
        "--train-split --val-split --dataset-download --class-map --input-key --target-key --train-num-samples "
        "--val-num-samples --dataset-trust-remote-code --inat-category --cache-dataset --num-samples"
    ),
    "wandb reads its environment variables, such as WANDB_PROJECT, where TRACKER is wandb": (
        "--wandb-project --wandb-tags --wandb-resume-id --wandb-entity --wandb-name"
    ),
    "not needed, --pretrained takes weights alone, and --resume everything": "--no-resume-opt --resume-opt",
    "not needed, the best checkpoint is that of the highest top-1": "--eval-metric --save-images",
    "nothing here does this; docs/configuration.md lists what can be set": (
        "--jsd-loss --aug-splits --split-bn --resplit --mixup-off-epoch --color-jitter-prob --grayscale-prob "
        "--gaussian-blur-prob --train-crop-mode --drop-block --ra-magnitude --augmix-severity --lr-noise "
        "--lr-noise-pct --lr-noise-std --lr-cycle-mul --lr-cycle-decay --lr-cycle-limit --lr-k-decay "
        "--lr-base-size --lr-base-scale --lr-warmup-method --lr-warmup-decay --decay-milestones --patience-epochs "
        "--sched-on-updates --epoch-repeats --clip-mode --layer-decay-min-scale --layer-decay-no-opt-scale "
        "--norm-weight-decay --bias-weight-decay --transformer-embedding-decay --model-ema-steps --bn-momentum "
        "--bn-eps --gp --head-init-scale --head-init-bias --bce-sum --bce-target-thresh --bce-pos-weight "
        "--teacher-model --teacher-path --distillation-type --distillation-alpha --distillation-tau "
        "--kd-model-name --cosub --attn-only --src --train-mode --no-train-mode --use-v2"
    ),
}
LISTS = (  # keys of several values
    *("TRAIN.OPTIMIZER.BETAS", "AUG.CUTMIX_MINMAX", "AUG.RATIO", "AUG.SCALE"),
    *("DATA.IMG_SIZE", "DATA.MEAN", "DATA.STD", "TEST.IMG_SIZE"),
)


def _by_flag(table: Mapping[str, str]) -> dict[str, str]:
    return {flag: meaning for meaning, flags in table.items() for flag in flags.split()}


KEYS, SETTINGS, FLAGS, REASONS = map(_by_flag, (OF_KEYS, OF_SETTINGS, OF_FLAGS, WITHOUT))


def explain(words: Sequence[str], helps: Mapping[str, str]) -> str:
    """One line about the flags of other scripts, and the keys, among words that are no flags here; empty where none is.

    It ends with what to write. `helps`: what every key means.
    """
    about, flags, pairs = [], list[str](), list[str]()
    for place, word in enumerate(words):
        name, _, given = word.partition("=")
        flag, values = name.replace("_", "-"), [given] if given else []
        for value in words[place + 1 :]:
            if given or value.startswith("--"):
                break
            values.append(value)
        key = name.lstrip("-") if name.lstrip("-") in helps else KEYS.get(flag)
        if reason := REASONS.get(flag):
            about.append(f"{name}: {reason}")
        elif key:
            about.append(f"{name} is the key {key} here ({helps[key]})")
            pairs += [key, _value(key, values)]
        elif setting := SETTINGS.get(flag):
            setting = "AMP False" if values[:1] == ["O0"] else setting
            about.append(f"{name} is {setting} here ({helps[setting.split()[0]]})")
            pairs += setting.split()
        elif ours := FLAGS.get(flag):
            about.append(f"{name} is {ours} here")
            flags += [ours, *map(shlex.quote, values[:1])]
    instead = " ".join([*flags, *(["--opts", *pairs] if pairs else [])])
    return "; ".join(about) + (f". Write {instead}" if instead else "")


def _value(key: str, values: Sequence[str]) -> str:
    """The value of a key as --opts takes it; timm writes sizes with the channels first, and mappings as NAME=VALUE."""
    if key.endswith(".KWARGS"):
        named = (word.partition("=")[::2] for word in values)
        return shlex.quote("{" + ",".join(f'"{name}":{value}' for name, value in named) + "}")
    values = values[-2:] if key == "DATA.IMG_SIZE" and len(values) == 3 else values if key in LISTS else values[:1]
    return shlex.quote(values[0] if len(values) == 1 else f"[{','.join(values)}]") if values else "VALUE"
