"""Files that were made to do harm, or that other trainers wrote: one line about what is wrong, or the right weights.

pytest tests/test_hostile_files.py
"""

import argparse
import collections
import contextlib
import json
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import config_file

from config import ConfigError, config_from_tree, load_config
from engine.state import configuration_in
from models import CheckpointError, build_model, create_model, load
from models.files import load_checkpoint, stored_config, weights_of
from models.loading import load_pretrained
from utils.files import file_digest

OPTIONS = "DATA.IMG_SIZE 32 MODEL.SWIN.EMBED_DIM 12 MODEL.SWIN.DEPTHS [1,1,1,1] MODEL.SWIN.NUM_HEADS [1,2,2,2]"
OPTIONS += " MODEL.NUM_CLASSES 4"


@pytest.fixture(scope="module")
def config():
    return load_config(config_file("pola_swin_t"), OPTIONS.split())


@pytest.fixture(scope="module")
def state(config):
    return build_model(config).state_dict()


@pytest.fixture(autouse=True)
def soon():
    """Whatever a file holds, the answer is not worked for: seconds of CPU time, however busy the machine is."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 5


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------

LEVELS = range(1, 12)
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 11)}]\n" for i in LEVELS)
MERGES = "m0: &m0 {k0: 1, l0: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], k{i}: 1}}\n" for i in LEVELS
)
TEXTS = {
    "alias bomb as a value": (ALIASES + "TRAIN: {EPOCHS: *a11}\n", "own.yaml"),
    "alias bomb as BASE": (ALIASES + "BASE: *a11\n", "BASE is"),
    "merges": (MERGES, "own.yaml"),
    "date": ("TAG: 2020-99-99\n", "own.yaml is not valid YAML: month must be in 1..12"),
    "no number": ("SEED: !!int abc\n", "own.yaml is not valid YAML: invalid literal"),
    "400 digits": (f"SEED: {'9' * 400}\nTRAIN: {{BASE_LR: {'9' * 400}}}\n", "TRAIN.BASE_LR is 9999"),
    "5000 digits": (f"DATA: {{NUM_WORKERS: -0x{'f' * 5000}}}\n", "DATA.NUM_WORKERS is a number of thousands of digits"),
    "decimal 5000 digits": (f"SEED: {'9' * 5000}\n", "own.yaml is not valid YAML"),
    "nested": ("TRAIN: " + "[" * 5000, "own.yaml is not valid YAML"),
    "nested mapping": ("{a: " * 3000, "own.yaml is not valid YAML"),
    "unhashable key": ("{[1]: 2}: 3\n", "own.yaml is not valid YAML"),
    "python object": ("TAG: !!python/object/apply:os.system ['touch X']\n", "own.yaml is not valid YAML"),
    "long key": (f"{'K' * 1000}: 1\n", "unknown key KKKK"),
    "no text": (b"\xff\xfe\x00", "no UTF-8 text"),
    "literal nested": ("TAG: x\nSEED: '" + "(" * 3000 + "'\n", "SEED is"),
    "literal unhashable": ("SEED: '{[]: 1}'\n", "SEED is"),
    "section twice": ("TRAIN: {EPOCHS: 3}\nDATA: {}\nTRAIN: {BASE_LR: 1}\n", "TRAIN stands twice in a section"),
    "key twice": ("TRAIN: {EPOCHS: 3, EPOCHS: 4}\n", "EPOCHS stands twice in a section"),
    "tag of the output": ("TAG: .\n", "TAG is '.'"),
    "tag above": ("TAG: ../../escape\n", "TAG is '../../escape'"),
    "absolute name": ("MODEL: {NAME: /etc/x}\n", "MODEL.NAME is '/etc/x'"),
    "tag of two lines": ('TAG: "a\\nb"\n', "TAG is 'a\\nb'"),
    "tag with a zero byte": ('TAG: "a\\0b"\n', "TAG is 'a\\x00b'"),
    "path with a zero byte": ('OUTPUT: "a\\0b"\n', "OUTPUT is 'a\\x00b'"),
    "path of 5000 characters": (f"OUTPUT: {'x' * 5000}\n", "OUTPUT is 'xxx"),
    "huge": ("# " + "x" * 2**20 + "\n", "expected at most 1048576"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS.keys())
def test_a_configuration_that_is_none_is_one_short_line(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_what_a_foreign_file_holds_is_not_printed(tmp_path):
    (tmp_path / "secret").write_text("user: {password: [hunter2\n\tx\n")
    (tmp_path / "own.yaml").write_text("BASE: [secret]\n")
    with pytest.raises(ConfigError, match=r"secret is not valid YAML, line \d") as caught:
        load_config(str(tmp_path / "own.yaml"))
    assert "hunter2" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe")
    for base, problem in {"pipe": "pipe or device", "/dev/zero": "pipe or device", ".": "is a folder"}.items():
        (tmp_path / "own.yaml").write_text(f"BASE: ['{base}']\n")
        with pytest.raises(ConfigError, match=problem):
            load_config(str(tmp_path / "own.yaml"))
    for absent in ("x" * 5000, "y" * 300):
        with pytest.raises(ConfigError, match="config file [xy]{200} (cannot be read|does not exist)"):
            load_config(absent)


def test_each_base_is_merged_once_the_first_time(tmp_path):
    """Thirty files that name the next one twice are 2^30 merges otherwise; and a diamond keeps what came after it."""
    for i in range(15):
        (tmp_path / f"{i}.yaml").write_text(f"BASE: [{i + 1}.yaml, {i + 1}.yaml]\n" if i < 14 else "SEED: 7\n")
    assert load_config(str(tmp_path / "0.yaml")).SEED == 7
    (tmp_path / "b.yaml").write_text("BASE: [14.yaml]\nSEED: 8\n")
    (tmp_path / "c.yaml").write_text("BASE: [14.yaml]\nTAG: c\n")
    (tmp_path / "diamond.yaml").write_text("BASE: [b.yaml, c.yaml]\n")
    merged = load_config(str(tmp_path / "diamond.yaml"))
    assert (merged.SEED, merged.TAG) == (8, "c")
    for i in range(60):
        (tmp_path / f"{i}.yaml").write_text(f"BASE: [{i + 1}.yaml]\n")
    with pytest.raises(ConfigError, match="more than 20 in a row"):
        load_config(str(tmp_path / "0.yaml"))


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("OUTPUT: ~/runs\n")
    (tmp_path / "own.yaml").write_text("BASE: [~/base.yaml]\nDATA: {DATA_PATH: ~/images}\n")
    config = load_config("~/own.yaml", "MODEL.RESUME ~/a.pth MODEL.PRETRAINED ~/b.pth TEST.REAL_LABELS ~/c".split())
    paths = config.OUTPUT, config.DATA.DATA_PATH, config.MODEL.RESUME, config.MODEL.PRETRAINED, config.TEST.REAL_LABELS
    assert paths == tuple(str(tmp_path / name) for name in ("runs", "images", "a.pth", "b.pth", "c"))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations in checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def _shared(levels: int) -> dict:
    tree: dict = {"EPOCHS": 1}
    for _ in range(levels):
        tree = {f"K{i}": tree for i in range(11)}
    return {"TRAIN": tree, "MODEL": {"TYPE": "pola_swin"}}


def _deep(levels: int) -> dict:
    tree: dict = {}
    for _ in range(levels):
        tree = {"A": tree}
    return tree


STORED = {
    "shared dictionaries": _shared(9),
    "deep dictionaries": _deep(200),
    "aliases": ALIASES,
    "merges": MERGES,
    "nested text": "[" * 5000,
    "date": "TAG: 2020-99-99",
    "wide": {"TRAIN": {str(i): i for i in range(20_000)}},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED.keys())
def test_a_stored_configuration_that_is_none_is_refused(stored, state, tmp_path):
    torch.save({"model": state, "config": stored}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "file.pth")
    assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError):
        stored_config(load_checkpoint(tmp_path / "file.pth"))


SIZES = {
    "MODEL.SWIN.EMBED_DIM": [10**7, 60_000, 0, "x", 1.5],
    "MODEL.SWIN.DEPTHS": [[10**6] * 4, [200, 1, 1, 1], [0, 1, 1, 1], 3],
    "DATA.IMG_SIZE": [2**22, [2**13, 2**22], -32],
    "MODEL.SWIN.WINDOW_SIZE": [10**9, 0],
    "MODEL.SWIN.PATCH_SIZE": [10**9],
    "MODEL.SWIN.NUM_HEADS": [[10**6] * 4],
    "MODEL.SWIN.MLP_RATIO": [10**9],
    "MODEL.LA.KERNEL_SIZE": [10**7 + 1],
    "MODEL.LA.ALPHA": ["4 apples", float("nan")],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SIZES.items() for value in values])
def test_sizes_that_a_file_declares_are_compared_with_it_before_memory_is_taken(key, value, config, state, tmp_path):
    tree = yaml.safe_load(config.dump())
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[leaf] = value
    torch.save({"model": state, "config": yaml.safe_dump(tree)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth"):
        load(tmp_path / "file.pth")


def test_a_stored_value_that_the_model_does_not_accept_is_named_and_others_are_left_out():
    tree = {"MODEL": {"SWIN": {"EMBED_DIM": "many"}}}
    with pytest.raises(CheckpointError, match=r"MODEL.SWIN.EMBED_DIM is 'many' .*expected an integer"):
        configuration_in({"config": tree}, "file.pth")
    _, ignored = config_from_tree({"TRAIN": {"EPOCHS": "many"}, "NEWS": 3}, "file.pth")
    assert ignored == ["TRAIN.EPOCHS", "NEWS"]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and malicious checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class _Allocates:
    def __reduce__(self):
        return bytearray, (8 * 2**30,)


class _Sets:
    def __reduce__(self):
        return setattr, (1, "name", 1)  # begins like `set`, which is plain


def _inflated(path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/99", bytes(2**26))


def _legacy_storage_of_a_terabyte(path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(3)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    position = content.index(b"cpu") + 3
    assert content[position : position + 4].count(b"K\x03")
    path.write_bytes(content[:position] + content[position:].replace(b"K\x03", b"J\xff\xff\xff\x7f", 1))


REFUSED = {
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "pipe or device"),
    "link loop": (lambda path: path.symlink_to(path), "cannot be opened"),
    "dangling link": (lambda path: path.symlink_to(path.with_name("absent")), "does not exist"),
    "allocation": (lambda path: torch.save({"model": {}, "x": _Allocates()}, path), "asks for builtins.bytearray"),
    "legacy allocation": (
        lambda path: torch.save({"model": {}, "x": _Allocates()}, path, _use_new_zipfile_serialization=False),
        "asks for builtins.bytearray",
    ),
    "setattr": (lambda path: torch.save({"model": {}, "x": _Sets()}, path), "asks for builtins.setattr"),
    "inflation": (_inflated, "would unpack to"),
    "legacy storage": (_legacy_storage_of_a_terabyte, "damaged"),
    "object": (lambda path: torch.save(argparse.Namespace(a=1), path), "holds a"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_checkpoint_is_named(make, message, tmp_path):
    make(tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "file.pth")
    assert "file.pth" in str(caught.value)


def test_names_that_no_file_can_have_are_answered():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            load_checkpoint(name)


WEIGHTS = {
    "scalar": (torch.tensor(4.0), r"head.bias has shape \(\)"),
    "matrix": (torch.zeros(4, 1), "head.bias has shape"),
    "empty": (torch.zeros(0), "head.bias has shape"),
    "complex": (torch.zeros(4, dtype=torch.complex64), "head.bias is a complex tensor"),
    "sparse": (torch.zeros(4).to_sparse(), "head.bias is a sparse tensor"),
    "quantized": (torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "head.bias is a quantized tensor"),
    "meta": (torch.zeros(4, device="meta"), "head.bias is a meta tensor"),
    "integer": (torch.zeros(4, dtype=torch.int64), "head.bias torch.int64 instead of torch.float32"),
    "missing": (None, "has no head.bias"),
}


@pytest.mark.parametrize(("bias", "message"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_head_of_another_kind_is_named(bias, message, config, state, tmp_path):
    weights = {name: value for name, value in state.items() if name != "head.bias"}
    if bias is not None:
        weights["head.bias"] = bias
    torch.save({"model": weights, "config": config.dump()}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "file.pth")


@pytest.mark.parametrize("classes", [3, "abcd", {"a": 1}, [1, 2, 3, 4], ["a", "b"], [["a"]] * 4])
def test_classes_of_another_kind_or_number_are_named(classes, config, state, tmp_path):
    torch.save({"model": state, "config": config.dump(), "classes": classes}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"`classes`"):
        load(tmp_path / "file.pth")


def test_classes_of_a_safetensors_file_that_are_no_json_are_named(config, state, tmp_path):
    for text in ("no json", "[" * 100_000):
        metadata = {"config": config.dump(), "classes": text}
        safetensors.torch.save_file(state, tmp_path / "file.safetensors", metadata)
        with pytest.raises(CheckpointError, match=r"file\.safetensors: its `classes` are no JSON"):
            load(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"files": [{"size": 1e999, "sha256": ""}]}', "[]", '{"files": 3}', "\0"]
)
def test_a_damaged_sidecar_does_not_keep_its_file_from_being_read(text, state, tmp_path, caplog):
    torch.save({"model": state}, tmp_path / "file.pth")
    (tmp_path / "file.pth.json").write_text(text)
    with caplog.at_level("WARNING", logger="polaformer"):
        assert load_checkpoint(tmp_path / "file.pth")["model"].keys() == state.keys()
    assert "file.pth.json is damaged" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Files of other trainers
# ---------------------------------------------------------------------------------------------------------------------


def _prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


OTHERS = {
    "state_dict": (lambda state: {"state_dict": state}, "`state_dict`"),
    "model_state_dict": (lambda state: {"model_state_dict": state, "epoch": 3}, "`model_state_dict`"),
    "compiled": (lambda state: {"model": _prefixed(state, "_orig_mod.")}, "prefix `_orig_mod.` removed"),
    "compiled and distributed": (lambda state: _prefixed(state, "module._orig_mod."), "prefix `module._orig_mod.`"),
    "lightning": (lambda state: {"state_dict": _prefixed(state, "model.")}, "prefix `model.` removed"),
    "backbone": (lambda state: {"state_dict": _prefixed(state, "backbone.")}, "prefix `backbone.` removed"),
    "namespace": (
        lambda state: {"model": state, "args": argparse.Namespace(lr=1, path=Path("/x"))},
        "left out .*: args",
    ),
    "numpy": (lambda state: {"model": state, "best": np.float64(3.5), "a": np.arange(3)}, "left out .*: best, a"),
    "deque": (lambda state: {"model": state, "kind": collections.deque}, "left out .*: kind"),
    "default dictionary": (lambda state: {"model": state, "log": collections.defaultdict(list, a=[1])}, ""),
}


@pytest.mark.parametrize(("made", "message"), OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_other_trainers_load_and_what_was_taken_is_said(
    made, message, legacy, config, state, tmp_path, caplog
):
    path = tmp_path / "file.pth"
    torch.save(made(state), path, _use_new_zipfile_serialization=not legacy)
    with caplog.at_level("INFO", logger="polaformer"):
        model = load(path, config=config)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not message or re.search(message, caplog.text)
    created = create_model(
        "pola_swin_tiny", checkpoint=path, img_size=32, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)
    )
    assert torch.equal(created.get_classifier().bias, state["head.bias"])


def test_weights_and_average_are_chosen_by_a_word(config, state, tmp_path):
    averaged = {name: value + 1 for name, value in state.items()}
    path = tmp_path / "file.pth"
    for names in (("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model_state_dict", "model_ema")):
        torch.save({names[0]: state, names[1]: _prefixed(averaged, "module.")}, path)
        assert list(weights_of(load_checkpoint(path), "auto", "file")) == ["model", "ema"]
        for word, expected in {"auto": state, "model": state, "ema": averaged}.items():
            assert torch.equal(load(path, word, config=config).head.bias, expected["head.bias"])
        fresh = build_model(config)
        load_pretrained(fresh, load_checkpoint(path), "file.pth", "ema")
        assert torch.equal(fresh.head.bias, averaged["head.bias"])
    for none in ({}, "none", {"decay": 0.9, "module": averaged}):
        torch.save({"model": state, "model_ema": none}, path)
        assert list(weights_of(load_checkpoint(path), "auto", "file")) == ["model"]
    torch.save({"state_dict_ema": averaged}, path)
    assert torch.equal(load(path, config=config).head.bias, averaged["head.bias"])
    with pytest.raises(CheckpointError, match=r"holds averaged weights alone; MODEL.WEIGHTS ema"):
        load(path, "model", config=config)
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"no averaged weights .*MODEL.WEIGHTS model"):
        load(path, "ema", config=config)


def test_the_backbone_of_a_detector_starts_a_classifier(config, state, tmp_path, caplog):
    body = {name: value for name, value in state.items() if not name.startswith("head.")}
    detector = {**_prefixed(body, "backbone."), "neck.lateral.weight": torch.zeros(3), "rpn.bias": torch.zeros(2)}
    torch.save({"state_dict": detector, "meta": {"time": "now"}}, tmp_path / "file.pth")
    model = build_model(config)
    with caplog.at_level("INFO", logger="polaformer"):
        load_pretrained(model, load_checkpoint(tmp_path / "file.pth"), "file.pth")
    assert all(torch.equal(value, body[name]) for name, value in model.state_dict().items() if name in body)
    assert "without 2 entries such as neck.lateral.weight" in caplog.text and "starts anew" in caplog.text


def test_a_file_of_weights_alone_is_never_run(state, tmp_path, monkeypatch):
    """Whatever stands beside the weights, in any protocol, no function of it is called."""
    monkeypatch.chdir(tmp_path)

    class Harmless:
        def __reduce__(self):
            return json.JSONDecoder, ()

    class Writes:
        def __reduce__(self):
            return Path.touch, (Path("EXECUTED"),)

    torch.save({"model": state, "extra": [Harmless()]}, "file.pth")
    assert "extra" not in load_checkpoint("file.pth")
    for protocol in range(6):
        torch.save({"model": state, "extra": Writes()}, "file.pth", pickle_protocol=protocol)
        Path("raw.pth").write_bytes(pickle.dumps({"model": {}, "extra": Writes()}, protocol))
        for name in ("file.pth", "raw.pth"):
            with contextlib.suppress(CheckpointError):  # protocols that torch does not read
                assert "extra" not in load_checkpoint(name)
    assert not Path("EXECUTED").exists()


def test_a_flipped_bit_is_noticed_where_a_sidecar_is(config, state, tmp_path):
    from tools.export import main as export

    torch.save({"model": state, "config": config.dump()}, tmp_path / "run.pth")
    arguments = ["--checkpoint", tmp_path / "run.pth", "--output", tmp_path / "out", "--name", "tiny"]
    assert export([*map(str, arguments), "--format", "safetensors", "hub", "--release"]) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pth", ".safetensors")]
    assert len(files) == 3
    for path in files:
        sidecar = json.loads(path.with_name(path.name + ".json").read_text())
        assert sidecar["files"][0]["sha256"] == file_digest(path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="does not match the SHA-256|does not match its checksum"):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match="does not match the SHA-256"):
            create_model("pola_swin_tiny", checkpoint=path)
