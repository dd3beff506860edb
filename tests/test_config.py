"""Configuration: the official values, precedence, and what a mistake is answered with.

pytest tests/test_config.py
"""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import OFFICIAL, ROOT, config_file, cpu_seconds, read_json

import config
import flags
from config import (
    ConfigError,
    default_config,
    is_dead_key,
    load_config,
    make_plan,
    parse_command_line,
    value_of,
)
from main import check
from models import build_model, options
from models.registry import BODIES
from tools.config_reference import render

DEFAULTS = read_json("defaults.json")


def _leaves(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_family():
    tree = default_config()
    for key, expected in _leaves(DEFAULTS["defaults"]):
        assert (key in config.KEYS) != is_dead_key(key), key
        if key in config.KEYS:
            assert _plain(value_of(tree, key)) == expected, key


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_yaml_merges_to_the_reference(name):
    merged = load_config(config_file(name))
    for key, expected in _leaves(DEFAULTS["merged"][name]):
        if key == "OUTPUT":
            assert str(make_plan(merged).folder) == expected
        elif key in config.KEYS:
            assert _plain(value_of(merged, key)) == expected, key


@pytest.mark.parametrize("name", OFFICIAL)
def test_yaml_of_this_family_as_published_merges_to_the_reference(name, tmp_path):
    """The published files write 5e-4 and None, which YAML reads as strings, and use no BASE.

    They leave the global batch to the launcher: eight processes, which ours names.
    """
    path = tmp_path / "published.yaml"
    path.write_text(str(DEFAULTS["yaml"][name]))  # a Python dict of this kind is valid YAML flow style
    published, ours = load_config(str(path)), load_config(config_file(name))
    assert published == load_config(config_file(name), ["TRAIN.GLOBAL_BATCH", "null"])
    for world in (1, 2, 4, 8, 16):
        plan = make_plan(ours, world)
        assert plan.global_batch == make_plan(published, 8).global_batch, world
        assert plan.lr_scale == make_plan(published, 8).lr_scale


def test_precedence(tmp_path):
    (tmp_path / "base.yaml").write_text("TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 1}\nSEED: 1\nTAG: base\nOUTPUT: base\n")
    path = tmp_path / "own.yaml"
    path.write_text("BASE: [base.yaml]\nMODEL: {TYPE: pola_swin}\nSEED: 2\nTAG: own\nOUTPUT: own\n")
    merged = parse_command_line(["--cfg", str(path), "--tag", "flag", "--output", "flag", "--opts", "OUTPUT", "opts"])
    assert merged.TRAIN.EPOCHS == 1  # BASE over default
    assert merged.SEED == 2  # YAML over BASE
    assert merged.TAG == "flag"  # flag over YAML
    assert merged.OUTPUT == "opts"  # --opts over flag
    assert merged.DATA.BATCH_SIZE == 128  # a flag that was not given changes nothing


def test_frozen_and_reproducible(tmp_path):
    merged = load_config(config_file("pola_pvt_m"), ["MODEL.LA.ALPHA", "2.5", "DATA.IMG_SIZE", "[192, 256]"])
    with pytest.raises(AttributeError):
        merged.TRAIN.EPOCHS = 3
    path = tmp_path / "config.yaml"
    path.write_text(merged.dump())
    assert load_config(str(path)) == merged
    assert merged.TRAIN.OPTIMIZER.BETAS == (0.9, 0.999)


def test_integer_where_a_key_is_a_float_and_fractional_alpha():
    merged = load_config(config_file("pola_swin_t"), "MODEL.DROP_PATH_RATE 0 MODEL.LA.ALPHA 2.5".split())
    assert isinstance(merged.MODEL.DROP_PATH_RATE, float)
    assert merged.MODEL.LA.ALPHA == 2.5


@pytest.mark.parametrize("word", ["null", "None", "~"])
def test_null_in_opts(word):
    assert load_config(config_file("pola_swin_t"), ["TRAIN.CLIP_GRAD", word]).TRAIN.CLIP_GRAD is None


def test_a_short_run_may_be_all_warm_up():
    assert load_config(config_file("quickstart"), ["TRAIN.EPOCHS", "1"]).TRAIN.EPOCHS == 1


def test_flags_set_their_keys():
    argv = ["--cfg", config_file("pola_swin_t"), "--batch-size", "7", "--data-path", "/data", "--zip", "--amp"]
    argv += ["--cache-mode", "full", "--use-checkpoint", "--throughput", "--find-unused-params", "--local_rank", "1"]
    merged = parse_command_line(argv)
    assert (merged.DATA.BATCH_SIZE, merged.DATA.DATA_PATH, merged.DATA.CACHE_MODE) == (7, "/data", "full")
    assert merged.DATA.ZIP_MODE and merged.AMP and merged.TRAIN.USE_CHECKPOINT and merged.THROUGHPUT_MODE
    assert merged.TRAIN.FIND_UNUSED_PARAMS and merged.LOCAL_RANK == 1


# ---------------------------------------------------------------------------------------------------------------------
# Declarations
# ---------------------------------------------------------------------------------------------------------------------


def test_every_key_has_a_reader_and_every_read_key_is_declared():
    files = [path for path in ROOT.glob("*.py") if path.name != "config.py"]
    files += [path for folder in ("engine", "data") for path in (ROOT / folder).rglob("*.py")]
    # config.py itself reads what it derives values from
    derived = (ROOT / "config.py").read_text().split("# -- Validation across keys", 1)[1]
    source = "\n".join(path.read_text() for path in files) + derived
    read = set(re.findall(r"config\.((?:[A-Z][A-Z0-9_]*\.)*[A-Z][A-Z0-9_]*)\b", source)) - {"KEYS"}
    read |= set(options.DEFAULTS)  # below models/, as the next test shows
    sections = {key.rsplit(".", 1)[0] for key in config.KEYS if "." in key}
    assert read - set(config.KEYS) - sections == set()
    assert set(config.KEYS) - read == {"BASE"}  # consumed while merging


def test_models_read_the_keys_of_their_table_and_have_the_defaults_of_config(monkeypatch):
    read = set()

    class Noting(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    monkeypatch.setattr(options, "DEFAULTS", Noting(options.DEFAULTS))
    with torch.device("meta"):
        for name in BODIES.keys() - {"timm"}:
            build_model({"MODEL": {"TYPE": name}})
    with pytest.raises(ValueError, match="MODEL.TIMM.NAME is empty, and MODEL.TYPE timm needs"):
        build_model({"MODEL": {"TYPE": "timm"}})
    with pytest.raises(ValueError, match="names no model of this project: MODEL.TYPE is 'swin'"):
        build_model({})
    assert read == set(options.DEFAULTS)
    assert {key: config.KEYS[key].default for key in read} == dict(options.DEFAULTS)


def test_reference_page_is_up_to_date():
    assert (ROOT / "docs" / "configuration.md").read_text() == render(), "run `make reference`"


def test_the_reference_begins_with_ten_keys_and_has_every_key_in_one_section():
    first, *sections = re.split(r"^## ", render(), flags=re.MULTILINE)[1:]
    assert (
        first.startswith("The ten keys that people change\n") and len(re.findall(r"^\| `", first, re.MULTILINE)) == 10
    )
    found = [(s.partition("\n")[0], key) for s in sections for key in re.findall(r"^\| `([\w.]+)` \|", s, re.MULTILINE)]
    assert sorted(key for _, key in found) == sorted(config.KEYS)
    titles = dict.fromkeys(title for title, _ in found)
    assert len(titles) == len(sections) >= 12  # none is empty
    by_key = {key: title for title, key in found}
    assert (
        by_key["TRAIN.OPTIMIZER.NAME"] == "Optimizer"
        and by_key["SEED"] == "Run"
        and by_key["AUG.HFLIP"] == "Augmentation"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "TRAIN.EPOCH 3": "unknown key TRAIN.EPOCH; the nearest valid key is TRAIN.EPOCHS",
    "MODEL.SWIN.KA [7,7,7,7]": "MODEL.SWIN.KA has no effect here and was removed",
    "MODEL.SWIN_HR.ANYTHING 1": "MODEL.SWIN_HR.ANYTHING has no effect here and was removed",
    "TRAIN.EPOCHS 3.5": "TRAIN.EPOCHS is '3.5' (float), expected an integer ≥ 1",
    "TRAIN.EPOCHS 0": "expected an integer ≥ 1",
    "TRAIN.EPOCHS many": "TRAIN.EPOCHS is 'many' (str), expected an integer",
    "TRAIN.EPOCHS None": "expected an integer",
    "TRAIN.EPOCHS True": "expected an integer",
    "TRAIN.BASE_LR nan": "TRAIN.BASE_LR is 'nan'",
    "AMP yes": "AMP is 'yes' (str), expected True or False",
    "MODEL.DROP_PATH_RATE 1.0": "expected a number ≥ 0 and < 1",
    "MODEL.LA.ALPHA -1": "expected a number ≥ 0",
    "MODEL.TYPE pola_vit": "MODEL.TYPE 'pola_vit' is unknown, expected one of lra, nalaformer, pola_pp, pola_pvt_large",
    "TRAIN.OPTIMIZER.NAME lamp": "TRAIN.OPTIMIZER.NAME 'lamp' is unknown; the nearest are lamb",
    "TRAIN.OPTIMIZER.NAME bnbadam": "TRAIN.OPTIMIZER.NAME 'bnbadam' is unknown",
    "TRAIN.OPTIMIZER.NAME lamb TRAIN.OPTIMIZER.KWARGS {'bates':1}": "lamb refuses: ",
    "TRAIN.OPTIMIZER.KWARGS {'betas':[0.9,0.9]}": "TRAIN.OPTIMIZER.KWARGS is for other optimizers than adamw",
    "TRAIN.FREEZE ['head','patch_embd']": "TRAIN.FREEZE 'patch_embd' matches no parameter; their names begin with",
    "TRAIN.FREEZE ['(']": "TRAIN.FREEZE '(' is no regular expression",
    "TRAIN.FREEZE ['.']": "TRAIN.FREEZE ['.'] leaves nothing to train",
    "AUG.SCALE [0.9,0.5]": "AUG.SCALE [0.9, 0.5]: expected the smaller number first",
    "AUG.RATIO [2,1]": "AUG.RATIO [2.0, 1.0]: expected the smaller number first",
    "TRAIN.CLASS_WEIGHTS [0,1]": "expected one of none, balanced, or a list of one or more × a number ≥ 1e-06",
    "DATA.STD [0,1,1]": "DATA.STD is '[0,1,1]' (list), expected a list of 3",
    "TRAIN.LR_SCHEDULER.NAME poly": "expected one of cosine, linear, step",
    "DATA.DATASET cifar": "expected one of imagenet, digits",
    "DATA.INTERPOLATION cubic": "expected one of bicubic, bilinear",
    "AUG.AUTO_AUGMENT rnd-m9": "expected a timm policy",
    "AUG.AUTO_AUGMENT rand-q9": "expected a timm policy",
    "AUG.AUTO_AUGMENT rand-m9-n3-w0": "expected a timm policy",
    "BASE x.yaml": "BASE can only stand in a YAML file",
    "TRAIN.MIN_LR 1": "TRAIN.MIN_LR 1.0 exceeds TRAIN.BASE_LR 0.0005",
    "AUG.CUTMIX_MINMAX [0.8,0.2]": "the smaller fraction first",
    "MODEL.LA.ATTN_TYPE LLX": "ATTN_TYPE 'LLX' has 3 letters, expected one of L, S, M per stage (4)",
    "MODEL.LA.ATTN_TYPE LLSX": "ATTN_TYPE 'LLSX' has the letter X, expected one of L, S, M per stage (4)",
    "MODEL.LA.ATTN_TYPE ll55": "ATTN_TYPE 'll55' has 2 letters",
    "MODEL.LA.ATTN_TYPE LLL": "ATTN_TYPE 'LLL' has 3 letters, expected one of L, S, M per stage (4)",
    "MODEL.LA.ATTN_TYPE MLSS": "has an M stage without a number",
    "MODEL.LA.ATTN_TYPE LLSS4": "has a number but no M stage",
    "MODEL.LA.KERNEL_SIZE 4": "MODEL.LA.KERNEL_SIZE is 4, expected an odd number",
    "DATA.IMG_SIZE 225": "image size 225×225 does not fit PolaSwin: expected multiples of 32 pixels (DATA.IMG_SIZE",
    "TEST.IMG_SIZE 225": "TEST.IMG_SIZE 225: image size 225×225 does not fit PolaSwin: expected multiples of 32",
    "MODEL.LA.ATTENTION sotfmax": "MODEL.LA.ATTENTION (attention) 'sotfmax' is unknown, expected one of",
    "MODEL.LA.BACKEND cuda": "MODEL.LA.BACKEND (backend) 'cuda' is no backend of polarity attention, expected auto",
    "DATA.DATASET lra AUG.MIXUP 0 AUG.CUTMIX 0 AUG.REPROB 0": "MODEL.TYPE pola_swin reads images, and DATA.DATASET lra",
    "DATA.IMG_SIZE [224,100]": "expected multiples of 32",
    "DATA.IMG_SIZE [224,224,224]": "expected an integer ≥ 1, or a list of 2",
    "MODEL.SWIN.NUM_HEADS [3,6,12]": "has 3 stages, MODEL.SWIN.DEPTHS 4",
    "MODEL.SWIN.NUM_HEADS [5,6,12,24]": "the 96 channels of stage 0 do not divide by 5",
    "MODEL.TYPE pola_pvt_tiny MODEL.LA.ATTN_TYPE MLLL2": "Pola-PVT has no M stages",
    "MODEL.TYPE pola_pvt_tiny MODEL.LA.PVT_LA_SR_RATIOS 111": "is not 4 digits",
    "MODEL.TYPE pola_pvt_tiny MODEL.LA.ATTN_TYPE LLLL MODEL.LA.PVT_LA_SR_RATIOS 1114": "the 7×7 map of stage 3"
    " does not divide by 4",
    "TRAIN.START_EPOCH 300": "TRAIN.START_EPOCH 300 is not below the run's 300 epochs",
    "DATA 3": "DATA is a section and needs keys below it",
    "EVAL_MODE True": "--eval needs --resume FILE",
    "TRAIN.EPOCHS": "--opts takes KEY VALUE pairs, and TRAIN.EPOCHS has no value",
    "SEED=1 TRAIN.EPOCHS": "--opts takes KEY VALUE pairs, and TRAIN.EPOCHS has no value: SEED=1 TRAIN.EPOCHS",
    "TRAIN.EPOCHS=many": "TRAIN.EPOCHS is 'many' (str), expected an integer",
    "train.epochs 3": "unknown key train.epochs; the nearest valid key is TRAIN.EPOCHS",
    "TRAIN.FOO 3": "unknown key TRAIN.FOO; docs/configuration.md lists all",
    "MODEL.TYPE swin": "the configuration names no model of this project: MODEL.TYPE is 'swin'",
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.items(), ids=MISTAKES.keys())
def test_mistake_in_opts(options, message):
    with pytest.raises(ConfigError) as caught:
        check(load_config(config_file("pola_swin_t"), options.split()))
    assert message in str(caught.value)


FILES = {
    "TRAIN:\n  EPOCHES: 3\n": "own.yaml: unknown key TRAIN.EPOCHES; the nearest valid key is TRAIN.EPOCHS",
    "TRIAN:\n  EPOCHS: 3\n": "own.yaml: section TRIAN is unknown; the nearest valid section is TRAIN",
    "TRAIN: 3\n": "TRAIN is a section and needs keys below it",
    "SEED:\n  A: 1\n": "section SEED is a value, not a section",
    "MODEL:\n  SWIN:\n    RPB: true\n": "MODEL.SWIN.RPB has no effect here and was removed",
    "TRAIN: [": "own.yaml is not valid YAML",
    "- 3\n": "expected `KEY: value` lines, received a list",
    "BASE: [1.5, [2]]\n": "own.yaml: BASE is [1.5, [2]], expected a list of one or more",
    "BASE: [own.yaml]\n": "BASE files include each other",
    "BASE: [absent.yaml]\n": "absent.yaml does not exist",
    "MODEL: {NAME: mine}\n": "the configuration names no model of this project: MODEL.TYPE is 'swin', as it is where"
    " nothing sets it; expected one of lra, nalaformer, pola_pp, pola_pvt_large",
    "XYZ: {A: 1}\n": "own.yaml: section XYZ is unknown",
}


@pytest.mark.parametrize(("text", "message"), FILES.items(), ids=FILES.keys())
def test_mistake_in_a_file(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check(load_config(str(path)))
    assert message in str(caught.value)


ARGUMENTS = {
    "--cfg configs/absent.yaml": "config file configs/absent.yaml does not exist; configs/ holds many",
    "--cfg configs/pola_swn_t.yaml": "pola_swn_t.yaml does not exist; did you mean configs/pola_swin_t.yaml?",
    "--cfg configs/pola_swin_t.yaml --lr 1e-3 --epochs=9 --disable_amp": "--lr is the key TRAIN.BASE_LR here (peak",
    "--xyz": "unknown argument --xyz; main.py --help lists the flags",
    "--cfg configs/pola_swin_t.yaml PHOTOS": "unexpected word PHOTOS: settings are flags, or keys after --opts",
    "--resume x.pth": "--cfg FILE is required, for example --cfg configs/pola_swin_t.yaml (--eval --resume FILE does",
    "--eval --resume absent.pth": "--resume absent.pth: no such file",
    "--cfg configs/pola_swin_t.yaml --dry-run --throughput": "--throughput and --dry-run exclude each other",
    "--cfg configs/pola_swin_t.yaml --batchsize 3": "unknown argument --batchsize; the nearest valid one is"
    " --batch-size",
    "--cfg configs/pola_swin_t.yaml --batch-size three": "command line: DATA.BATCH_SIZE is 'three'",
    "--cfg configs/pola_swin_t.yaml --eval": "--eval needs --resume FILE",
    "--cfg configs/pola_swin_t.yaml --eval --resume absent.pth": "--resume absent.pth: no such file",
    "--cgf configs/pola_swin_t.yaml": "unknown argument --cgf; the nearest valid one is --cfg",
    "--cfg configs": "config file configs is a folder",
    "--cfg configs/pola_swin_t.yaml --opts TRAIN.EPOCS 3": "unknown key TRAIN.EPOCS; the nearest valid key is"
    " TRAIN.EPOCHS",
    "": "--cfg FILE is required, for example --cfg configs/pola_swin_t.yaml",
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.items(), ids=ARGUMENTS.keys())
def test_mistake_on_the_command_line_is_one_line_without_heavy_imports(arguments, message):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('main.py', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'numpy', 'timm'} & set(sys.modules), 'heavy import'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "world", "expected"),
    [
        ("DATA.BATCH_SIZE 32 TRAIN.ACCUMULATION_STEPS 2", 4, (32, 2, 256)),
        ("DATA.BATCH_SIZE 128 TRAIN.GLOBAL_BATCH 1024", 8, (128, 1, 1024)),
        ("DATA.BATCH_SIZE 128 TRAIN.GLOBAL_BATCH 1024", 4, (128, 2, 1024)),
        ("DATA.BATCH_SIZE 128 TRAIN.GLOBAL_BATCH 1024", 16, (64, 1, 1024)),
        ("DATA.BATCH_SIZE 100 TRAIN.GLOBAL_BATCH 1024", 2, (64, 8, 1024)),  # 512 = 64 × 8: 8 divides, 6 does not
        ("DATA.BATCH_SIZE 4 TRAIN.GLOBAL_BATCH 7", 1, (1, 7, 7)),
    ],
)
def test_global_batch_decides_what_each_process_takes(options, world, expected):
    plan = make_plan(load_config(config_file("pola_swin_t"), options.split()), world)
    assert (plan.per_process, plan.accumulation, plan.global_batch) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6, 7, 12, 24, 1000])
@pytest.mark.parametrize("options", ["", "TRAIN.GLOBAL_BATCH 1006", "TRAIN.GLOBAL_BATCH 1009 DATA.BATCH_SIZE 100"])
def test_a_global_batch_that_does_not_divide_takes_the_nearest_in_few_passes(world, options):
    config = load_config(config_file("pola_swin_t"), options.split())
    plan, wanted = make_plan(config, world), config.TRAIN.GLOBAL_BATCH
    fewest = -(-wanted // (world * config.DATA.BATCH_SIZE))
    assert plan.per_process <= config.DATA.BATCH_SIZE and plan.accumulation <= 4 * fewest
    assert abs(plan.global_batch - wanted) <= world * plan.accumulation / 2 or world > wanted / 2


def test_accumulation_replaces_the_global_batch_of_a_file_and_the_batch_size_keeps_it(tmp_path):
    accumulated = load_config(config_file("pola_swin_t"), "TRAIN.ACCUMULATION_STEPS 2 DATA.BATCH_SIZE 64".split())
    plan = make_plan(accumulated, 2)
    assert (plan.per_process, plan.accumulation, plan.global_batch, plan.recipe_batch) == (64, 2, 256, 1024)
    assert config.notes_of(accumulated) == ["TRAIN.ACCUMULATION_STEPS 2 replaces TRAIN.GLOBAL_BATCH 1024 of the file"]
    smaller = load_config(config_file("pola_swin_t"), ["DATA.BATCH_SIZE", "64"])
    assert make_plan(smaller, 2).global_batch == 1024 == make_plan(smaller, 2).recipe_batch
    assert "DATA.BATCH_SIZE 64 only limits the passes: TRAIN.GLOBAL_BATCH 1024" in config.notes_of(smaller)[0]
    assert config.notes_of(load_config(config_file("pola_swin_t"))) == []
    other = load_config(config_file("pola_swin_t"), ["TRAIN.GLOBAL_BATCH", "512"])
    assert make_plan(other, 2).recipe_batch == 1024 and make_plan(other, 2).global_batch == 512
    path = tmp_path / "stored.yaml"  # as a run without it stores it: then the command line's is what was wanted
    path.write_text("TRAIN: {GLOBAL_BATCH: null}\n")
    asked = make_plan(load_config(str(path), ["TRAIN.GLOBAL_BATCH", "1006"]), 2)
    assert (asked.recipe_batch, asked.global_batch) == (1006, 1008)
    path = tmp_path / "own.yaml"  # what a file says replaces what its BASE says
    path.write_text(f"BASE: [{config_file('pola_swin_t')}]\nTRAIN: {{ACCUMULATION_STEPS: 3}}\n")
    assert make_plan(load_config(str(path)), 1).global_batch == 384
    with pytest.raises(ConfigError, match="TRAIN.GLOBAL_BATCH decides the accumulation"):
        load_config(config_file("pola_swin_t"), "TRAIN.GLOBAL_BATCH 64 TRAIN.ACCUMULATION_STEPS 2".split())


def flags_of_others() -> list[str]:
    """Every flag of the tables, with and without a value."""
    return [*flags.KEYS, *flags.SETTINGS, *flags.FLAGS, *flags.REASONS]


def test_every_flag_of_related_scripts_is_told_once_what_to_write_here():
    own = {name for action in config._parser()._actions for name in action.option_strings}
    assert len(set(flags_of_others())) == len(flags_of_others()) > 200 and not own & set(flags_of_others())
    assert all(re.fullmatch(r"-\w|-vb|--\w+(-\w+)*", flag) for flag in flags_of_others())
    assert set(flags.OF_KEYS) <= set(config.KEYS) and set(flags.OF_FLAGS) <= own
    for setting in flags.OF_SETTINGS:
        load_config(config_file("pola_swin_t"), setting.split())  # can be written as it stands
    asked = "--lr --epochs --workers --seed --optim --disable_amp --amp-opt-level --log-wandb".split()
    assert {flag.replace("_", "-") for flag in (*asked, "--fused_window_process")} <= set(flags_of_others())


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("--lr 0.001 --epochs 9", "--opts TRAIN.BASE_LR 0.001 TRAIN.EPOCHS 9"),
        ("--workers=4 -j 4", "--opts DATA.NUM_WORKERS 4 DATA.NUM_WORKERS 4"),
        ("--disable_amp", "--opts AMP False"),
        ("--amp-opt-level O0", "--opts AMP False"),
        ("--amp-opt-level O1 --fused_window_process", "--opts AMP True MODEL.LA.BACKEND auto"),
        (
            "--input-size 3 256 320 --opt-betas 0.9 0.95",
            "--opts DATA.IMG_SIZE [256,320] TRAIN.OPTIMIZER.BETAS [0.9,0.95]",
        ),
        ("--test-only --output_dir out --seed 3", "--eval --output out --opts SEED 3"),
        ("--optim sgd TRAIN.EPOCHS=3", "--opts TRAIN.OPTIMIZER.NAME sgd TRAIN.EPOCHS 3"),
    ],
)
def test_what_is_told_to_write_in_place_of_a_flag_of_others_can_be_written(words, written, capsys):
    command = ["--cfg", config_file("pola_swin_t"), "--resume", config_file("pola_swin_t")]
    with pytest.raises(SystemExit) as ended:
        parse_command_line([*command, *words.split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1
    assert shlex.split(said.partition(". Write ")[2]) == written.split()
    parse_command_line([*command, *written.split()])


def test_a_flag_that_nothing_stands_for_is_told_why(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--cfg", config_file("pola_swin_t"), "--dist-url", "env://"])
    assert "--dist-url: not needed, torchrun says how many processes there are, and where\n" in capsys.readouterr().err


def test_opts_take_pairs_with_and_without_an_equals_sign():
    merged = load_config(config_file("pola_swin_t"), ["TRAIN.EPOCHS=3", "TAG", "a=b", "OUTPUT=c=d", "SEED", "4"])
    assert (merged.TRAIN.EPOCHS, merged.TAG, merged.OUTPUT, merged.SEED) == (3, "a=b", "c=d", 4)
    accumulated = load_config(config_file("pola_swin_t"), ["TRAIN.ACCUMULATION_STEPS=2"])
    assert accumulated.TRAIN.GLOBAL_BATCH is None
    flag = parse_command_line(["--cfg", config_file("pola_swin_t"), "--accumulation-steps", "2"])
    assert make_plan(flag).accumulation == 2 and flag.TRAIN.GLOBAL_BATCH is None


def test_help_answers_in_under_a_second():
    times = []
    for _ in range(3):
        start = cpu_seconds()
        output = subprocess.run(
            [sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(cpu_seconds() - start)
    assert "--cfg FILE" in output.stdout
    assert min(times) < 1.0
