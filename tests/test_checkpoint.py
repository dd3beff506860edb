"""Reading checkpoints: nothing in them is executed, and what is damaged or does not fit is named.

pytest tests/test_checkpoint.py
"""

import collections
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE, config_file, read_json, recipe_input

from config import load_config
from data.transforms import Images
from engine.state import configuration_in, differing_function
from main import place
from models import build_model
from models.files import CheckpointError, load_checkpoint
from models.loading import load_weights
from optimizer import build_optimizer, load_optimizer_state, parameter_groups
from tools.checkpoints import load_model
from utils.files import file_digest

RELEASED = REFERENCE / "checkpoint_official_tiny.pth"
DESCRIBED = read_json("checkpoint_official_tiny.json")


@pytest.fixture
def config():
    return load_config(config_file("pola_swin_t"), DESCRIBED["opts"])


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_released_file_loads_without_executing_anything():
    checkpoint = load_checkpoint(RELEASED)
    assert list(checkpoint) == DESCRIBED["top_level_keys"]
    assert checkpoint["epoch"] == DESCRIBED["epoch"] and checkpoint["max_accuracy"] == DESCRIBED["max_accuracy"]
    assert type(checkpoint["config"]) is collections.OrderedDict
    assert file_digest(RELEASED) == DESCRIBED["sha256"]


def test_stored_configuration_of_a_released_file_drops_dead_keys_with_one_line(caplog):
    with caplog.at_level("INFO", logger="polaformer"):
        stored = configuration_in(load_checkpoint(RELEASED), "file.pth")
    assert stored.MODEL.SWIN.EMBED_DIM == 12 and stored.MODEL.NUM_CLASSES == 10
    assert stored.TRAIN.OPTIMIZER.BETAS == (0.9, 0.999)
    assert len(caplog.records) == 1
    assert "ignored" in caplog.text and "MODEL.SWIN.KA" in caplog.text


class Evil:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


class Builtin:
    def __reduce__(self):
        return eval, ("open('EXECUTED', 'w')",)


class Nested:
    def __reduce__(self):
        return collections.OrderedDict, ([("a", Evil())],)


@pytest.mark.parametrize("payload", [Evil(), {"model": {}, "config": Evil()}, {"model": {"a": Nested()}}, Builtin()])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_tries_to_run_code_is_refused_by_name(payload, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(payload, "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"evil\.pth refused: it asks for (posix\.system|builtins\.eval),"):
        load_checkpoint("evil.pth")
    for protocol in range(6):
        Path("raw.pth").write_bytes(pickle.dumps(payload, protocol))
        torch.save(payload, "zip.pth", pickle_protocol=protocol)
        for name in ("raw.pth", "zip.pth"):
            with pytest.raises(CheckpointError, match=rf"{name} refused: it asks for \S*(system|eval),") as caught:
                load_checkpoint(name)
            assert "weights_only" not in str(caught.value)  # torch's advice to load it all the same
    assert not Path("EXECUTED").exists()


def _saved(path: Path) -> bytes:
    torch.save({"model": {"weight": torch.arange(5000.0)}, "epoch": 1}, path)
    return path.read_bytes()


def test_damaged_files_are_explained(tmp_path):
    path = tmp_path / "file.pth"
    with pytest.raises(CheckpointError, match=r"file\.pth does not exist"):
        load_checkpoint(path)
    content = _saved(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"file\.pth is empty"):
        load_checkpoint(path)
    for kept in (1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match=r"file\.pth is (truncated|damaged)"):
            load_checkpoint(path)
    path.write_bytes(b"no checkpoint at all, but text")
    with pytest.raises(CheckpointError, match=r"file\.pth is (truncated or )?damaged"):
        load_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "file.pth"
    content = bytearray(_saved(path))
    position = content.index(np.arange(1000.0, 1004.0, dtype="<f4").tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.pth is damaged: .* does not match its checksum"):
        load_checkpoint(path)


def test_no_damage_escapes_as_another_error(tmp_path):
    """Every flipped byte is a CheckpointError or reads back as what was written."""
    path = tmp_path / "file.pth"
    for legacy in (False, True):
        state = {"model": {"weight": torch.arange(4.0)}, "epoch": 1}
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        content = path.read_bytes()
        generator = np.random.default_rng(0)
        refused = 0
        for _ in range(400):
            damaged = bytearray(content)
            damaged[generator.integers(len(content))] ^= 1 << generator.integers(8)
            path.write_bytes(damaged)
            try:
                load_checkpoint(path)
            except CheckpointError:
                refused += 1
        assert refused > 50


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": 3}, {"model": {"a": 1}}, {"model": {1: 2}}, {}])
def test_a_file_without_weights_is_explained(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth holds (a list|no `model` of named tensors)"):
        load_checkpoint(tmp_path / "file.pth")


def test_a_bare_state_dict_and_a_module_prefix_are_accepted(config, tmp_path):
    model, other = build_model(config), build_model(config)
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "file.pth")
    load_weights(other, load_checkpoint(tmp_path / "file.pth")["model"], "file.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Strictness
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_is_rebuilt_from_its_file_alone(config, tmp_path):
    model, stored, classes = load_model(RELEASED)
    assert stored.MODEL.SWIN.EMBED_DIM == 12 and classes is None and not model.training
    with np.load(RELEASED.with_suffix(".npz")) as expected, torch.no_grad():
        assert torch.allclose(model(recipe_input(64)), torch.from_numpy(expected["logits_f32"]), atol=1e-5)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_model(RELEASED, ema=True)
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    path = tmp_path / "own.pth"
    torch.save(
        {"model": model.state_dict(), "model_ema": averaged, "config": stored.dump(), "classes": tuple("abcdefghij")},
        path,
    )
    loaded = load_model(path, ema=True)
    assert torch.equal(loaded.model.head.bias, model.head.bias + 1) and loaded.classes == list("abcdefghij")
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="carries no configuration"):
        load_model(path)
    assert torch.equal(load_model(path, config=config).model.head.bias, model.head.bias)


def test_missing_unexpected_and_misshaped_entries_are_listed_together(config):
    model = build_model(config)
    state = model.state_dict()
    del state["head.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, "file.pth")
    message = str(caught.value)
    assert "file.pth does not fit PolaSwin of this configuration:" in message
    assert "missing (1): head.bias" in message
    assert "unexpected (1): extra.weight" in message
    assert "other shape (1): norm.weight (3,) instead of (96,)" in message


def test_only_the_named_allowances_are_dropped(config):
    model = build_model(config)
    state = model.state_dict()
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(1)
    state["layers.2.blocks.1.attn.relative_position_index"] = torch.zeros(1)
    load_weights(model, state, "file.pth")
    pvt = build_model(load_config(config_file("pola_pvt_t"), ["DATA.IMG_SIZE", "32"]))
    load_weights(pvt, {**pvt.state_dict(), "norm.weight": torch.ones(512), "norm.bias": torch.zeros(512)}, "file.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): block1.0.attn_mask"):
        load_weights(pvt, {**pvt.state_dict(), "block1.0.attn_mask": torch.ones(1)}, "file.pth")


def test_another_alpha_is_named_although_every_shape_fits(config):
    checkpoint = load_checkpoint(RELEASED)
    assert differing_function(checkpoint, config, Images(), "file.pth") == []
    other = load_config(config_file("pola_swin_t"), [*DESCRIBED["opts"], "MODEL.LA.ALPHA", "3"])
    (line,) = differing_function(checkpoint, other, Images(), "file.pth")
    assert "trained with MODEL.LA.ALPHA 4.0, this configuration has 3.0" in line
    assert "--opts MODEL.LA.ALPHA 4.0" in line


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer state
# ---------------------------------------------------------------------------------------------------------------------


def test_optimizer_state_of_a_released_file_reaches_its_parameters(config):
    model = build_model(config)
    checkpoint = load_checkpoint(RELEASED)
    load_weights(model, checkpoint["model"], "file.pth")
    optimizer = build_optimizer(config, model, lr_scale=2.0)
    load_optimizer_state(optimizer, model, checkpoint["optimizer"], "file.pth")
    names = [name for group in parameter_groups(model) for name in group]
    parameters = dict(model.named_parameters())
    for position, name in enumerate(names):
        entry = checkpoint["optimizer"]["state"][position]
        assert torch.equal(optimizer.state[parameters[name]]["exp_avg"], entry["exp_avg"]), name
        assert optimizer.state[parameters[name]]["step"] == DESCRIBED["step_value"]
    # the file's rates are scaled by its batch size and its schedule: the configuration's stay in force
    assert all(group["lr"] == 2 * config.TRAIN.BASE_LR for group in optimizer.param_groups)


def test_one_step_after_restoring_moments_is_that_of_an_unplaced_model(config):
    """main.place changes the memory layout of convolutions; the file's moments have to follow it."""
    steps = []
    for placed in (False, True):
        model = build_model(config)
        checkpoint = load_checkpoint(RELEASED)
        load_weights(model, checkpoint["model"], "file.pth")
        if placed:
            place(model, torch.device("cpu"))
        optimizer = build_optimizer(config, model, lr_scale=20.0)
        load_optimizer_state(optimizer, model, checkpoint["optimizer"], "file.pth")
        for i, parameter in enumerate(model.parameters()):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
        steps.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_unused_parameters_of_released_pola_pvt_files_are_skipped():
    config = load_config(config_file("pola_pvt_t"), ["DATA.IMG_SIZE", "32", "MODEL.NUM_CLASSES", "5"])
    model = build_model(config)
    parameters = dict(model.named_parameters())
    released = read_json("schedule.json")["configs"]["pola_pvt_t"]["param_groups"]
    names = [name for group in released for name in group["names"]]
    state = {
        i: {"step": 7, "exp_avg": torch.full_like(parameters[name], i), "exp_avg_sq": torch.ones_like(parameters[name])}
        for i, name in enumerate(names)
        if name in parameters  # norm.* have a position but never had a state
    }
    assert len(names) == len(parameters) + 2
    sizes = [len(group["names"]) for group in released]
    groups = [{"params": list(range(sizes[0]))}, {"params": list(range(sizes[0], sum(sizes)))}]
    optimizer = build_optimizer(config, model)
    load_optimizer_state(optimizer, model, {"state": state, "param_groups": groups}, "file.pth")
    for i, name in enumerate(names):
        if name in parameters:
            assert (optimizer.state[parameters[name]]["exp_avg"] == i).all(), name
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert optimizer.state[parameters["head.bias"]]["step"] == 8


def test_optimizer_state_of_another_kind_is_refused(config):
    model = build_model(config)
    with pytest.raises(CheckpointError, match=r"file\.pth has no optimizer state"):
        load_optimizer_state(build_optimizer(config, model), model, None, "file.pth")
    stored = load_checkpoint(RELEASED)["optimizer"]
    sgd = load_config(config_file("pola_swin_t"), [*DESCRIBED["opts"], "TRAIN.OPTIMIZER.NAME", "sgd"])
    with pytest.raises(CheckpointError, match="optimizer state .* is not that of SGD"):
        load_optimizer_state(build_optimizer(sgd, model), model, stored, "file.pth")
    deeper = load_config(config_file("pola_swin_t"), [*DESCRIBED["opts"], "MODEL.SWIN.DEPTHS", "[1,1,3,1]"])
    with pytest.raises(CheckpointError, match="its optimizer has groups of"):
        load_optimizer_state(build_optimizer(deeper, build_model(deeper)), build_model(deeper), stored, "file.pth")


def test_files_of_the_same_shape_but_another_rectangle_are_named():
    options = "DATA.IMG_SIZE [64,256] MODEL.LA.ATTN_TYPE LLLL".split()
    stored = {"config": load_config(config_file("pola_pvt_t"), options).dump()}
    other = load_config(config_file("pola_pvt_t"), ["DATA.IMG_SIZE", "128"])
    (line,) = differing_function(stored, other, Images(), "file.pth")
    assert "trained with DATA.IMG_SIZE [64, 256], this configuration has [128, 128]" in line
    same = load_config(config_file("pola_pvt_t"), ["DATA.IMG_SIZE", "[128,128]"])
    assert differing_function({"config": other.dump()}, same, Images(), "file.pth") == []


def test_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
