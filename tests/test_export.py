"""Exported files compute what their checkpoint computes, and say what they are.

pytest tests/test_export.py
"""

import json
import re
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import RELEASED, config_file, fill_with_recipe, run_tool
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config
from torch.hub import HASH_REGEX, load_state_dict_from_url

import tools.export
from config import config_from_tree, image_size, load_config
from data.transforms import Normalise, evaluation_transform
from models import build_model
from models.files import load_checkpoint
from models.registry import VARIANTS
from tools.checkpoints import load_model
from tools.export import deviation_from_eager, main, open_exportable
from tools.hub_folder import architecture_of, hub_config
from utils.checkpoints.writing import save_checkpoint
from utils.files import file_digest

# Padded windows of both kinds in three blocks, and a shift: 12×12 windows of polarity attention on a 16×16 map, 7×7
# windows of softmax attention on an 8×8 map.
SMALL = (
    "MODEL.TYPE pola_swin MODEL.NAME small-ls DATA.IMG_SIZE 64 MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,2]"
    " MODEL.SWIN.NUM_HEADS [1,2] MODEL.SWIN.WINDOW_SIZE 12 MODEL.LA.ATTN_TYPE LS DATA.DATA_PATH /home/somebody/images"
)
SMALL_PP = (
    "MODEL.NAME small-pp DATA.IMG_SIZE 64 MODEL.PPP.EMBED_DIMS [8,16] MODEL.PPP.DEPTHS [1,1] MODEL.PPP.NUM_HEADS [1,2]"
    " MODEL.PPP.STAGE_TYPES LS MODEL.PPP.PROJECTION 24 MODEL.PPP.MLP_RATIOS [2,2] MODEL.PPP.LAYER_INIT_VALUES [1,1]"
)
CLASSES = ["ant", "bee", "cat"]


def write_checkpoint(path, options, *, cfg="pola_swin_t", classes=CLASSES, **more):
    """A checkpoint as a run writes it, with the recipe's weights, and half of them as its average."""
    config = load_config(config_file(cfg), options.split())
    model = fill_with_recipe(build_model(config, len(classes)))
    weights = model.state_dict()
    content = {"model": weights, "classes": classes, "config": config.dump(), "epoch": 3, **more}
    content["model_ema"] = {name: v / 2 if v.is_floating_point() else v for name, v in weights.items()}
    save_checkpoint(content, path)
    return path


def images(batch, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(100 + batch))


@torch.no_grad()
def logits_of(path, x, **options):
    return load_model(path, **options).model(x)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "max_acc.pth", SMALL)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The folder with every format of the small checkpoint."""
    folder = tmp_path_factory.mktemp("export")
    arguments = ["--checkpoint", checkpoint, "--output", folder, "--name", "small", "--opset", "20", "--release"]
    assert main([*map(str, arguments), "--format", "onnx", "torch-export", "safetensors", "hub"]) == 0
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return folder


# -- what each format holds


def test_onnx_takes_any_batch_and_says_what_it_is(exported, checkpoint):
    session = onnxruntime.InferenceSession(exported / "small.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        (logits,) = session.run(["logits"], {"images": images(batch).numpy()})
        assert np.abs(logits - logits_of(checkpoint, images(batch)).numpy()).max() < 1e-5
    stored = onnx.load(exported / "small.onnx")
    assert [(entry.domain, entry.version) for entry in stored.opset_import] == [("", 20)]
    shape = stored.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch" and [side.dim_value for side in shape[1:]] == [3, 64, 64]
    about = {entry.key: entry.value for entry in stored.metadata_props}
    assert about["model_type"] == "pola_swin" and json.loads(about["classes"]) == CLASSES
    assert json.loads(about["mean"]) == [0.485, 0.456, 0.406]


def test_torch_export_takes_any_batch_and_needs_no_operator_of_ours(exported, checkpoint):
    extra = {"metadata.json": ""}
    program = torch.export.load(exported / "small.pt2", extra_files=extra)
    for batch in (1, 4):
        assert torch.allclose(program.module()(images(batch)), logits_of(checkpoint, images(batch)), atol=1e-5)
    assert json.loads(extra["metadata.json"])["source_sha256"] == file_digest(checkpoint)
    operators = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}


def test_safetensors_alone_rebuild_the_model(exported, checkpoint):
    path = exported / "small.safetensors"
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert about["model_type"] == "pola_swin" and about["version"] == "0.1.0" and about["weights"] == "model"
    assert load_model(path).classes == CLASSES
    assert torch.equal(logits_of(path, images(2)), logits_of(checkpoint, images(2)))


def test_released_weights_are_named_after_their_hash_and_hold_nothing_else(exported, checkpoint):
    (path,) = exported.glob("small-*.pth")
    assert HASH_REGEX.search(path.name)[1] == file_digest(path)[:8]
    content = load_checkpoint(path)
    assert set(content) == {"model", "classes", "config", "version"}
    assert "/home/somebody" not in content["config"]
    assert torch.equal(logits_of(path, images(2)), logits_of(checkpoint, images(2)))


def test_torch_hub_verifies_the_hash_of_released_weights(exported, tmp_path):
    (path,) = exported.glob("small-*.pth")
    content = load_state_dict_from_url(path.as_uri(), tmp_path / "cache", progress=False, check_hash=True)
    assert content["classes"] == CLASSES
    damaged = tmp_path / path.name
    damaged.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RuntimeError, match="invalid hash value"):
        load_state_dict_from_url(damaged.as_uri(), tmp_path / "other", progress=False, check_hash=True)


def test_the_same_weights_are_released_as_the_same_file(exported, checkpoint, tmp_path):
    assert main(["--checkpoint", str(checkpoint), "--release", "--name", "small", "--output", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.pth")] == [path.name for path in exported.glob("small-*.pth")]


def test_averaged_weights_are_exported_by_option(checkpoint, tmp_path):
    assert main(["--checkpoint", str(checkpoint), "--ema", "--release", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.pth")
    assert path.name.startswith("small_ls-")  # MODEL.NAME without the hyphen, which would be torch.hub's
    expected = logits_of(checkpoint, images(1), ema=True)
    assert torch.equal(logits_of(path, images(1)), expected)
    assert not torch.allclose(logits_of(checkpoint, images(1)), expected, atol=1e-3)


@pytest.mark.parametrize(
    "kind", ["softmax", *(pytest.param(k, marks=pytest.mark.slow) for k in ("relu", "elu", "focused"))]
)
def test_other_kinds_of_attention_are_traced_as_they_compute(tmp_path, kind):
    options = f"{SMALL} MODEL.LA.ATTENTION {kind} MODEL.SWIN.DEPTHS [1,1] MODEL.LA.GATE {kind != 'elu'}"
    source = open_exportable(write_checkpoint(tmp_path / "model.pth", options))
    assert deviation_from_eager(source, source.program.module()).relative < 1e-5


@pytest.mark.parametrize("name, family", [("pola_pp_b0", "PolaFormer++"), ("nalaformer_xt", "NaLaFormer")])
def test_a_small_rotary_pyramid_is_exported_by_its_average(name, family, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "model.pth", SMALL_PP, cfg=name)
    arguments = ["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--ema", "--release", "--format"]
    assert main([*arguments, "torch-export", "safetensors", "hub"]) == 0, capsys.readouterr().out
    expected = logits_of(path, images(2), ema=True)
    (released,) = (tmp_path / "out").glob("*.pth")
    for file in (released, tmp_path / "out" / "small_pp.safetensors"):
        assert torch.equal(logits_of(file, images(2)), expected)
    folder = tmp_path / "out" / "small_pp"
    assert json.loads((folder / "config.json").read_text())["architecture"] == name
    assert f"A {family} image classifier" in (folder / "README.md").read_text()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images(2)), expected)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, in_chans=1, img_size=96)
    assert other(images(1, 96)[:, :1]).shape == (1, 7)


# -- the Hub folder


def test_timm_loads_the_hub_folder_of_a_model_of_ones_own(exported, checkpoint):
    folder = exported / "small"
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "pola_swin_tiny" and config["model_args"]["attn_type"] == "LS"
    assert config["num_classes"] == 3 and config["label_names"] == CLASSES
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images(3)), logits_of(checkpoint, images(3)))


def test_a_hub_folder_can_be_fine_tuned_and_gives_features(exported):
    folder = exported / "small"
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)(images(1)).shape == (1, 7)
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(0, 1))(images(1))
    assert [tuple(x.shape) for x in maps] == [(1, 8, 16, 16), (1, 16, 8, 8)]


@pytest.mark.parametrize(
    "options", ["", "TEST.RESIZE shorter TEST.CROP_RATIO 0.9", "TEST.CROP False DATA.INTERPOLATION bilinear"]
)
def test_a_hub_folder_names_the_evaluation_transform(options):
    config = load_config(config_file("pola_swin_t"), f"{SMALL} {options}".split())
    described = hub_config(config, 16, None)["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(described))
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = Normalise(torch.device("cpu"))(evaluation_transform(config, image_size(config))(image)[None])[0]
    assert torch.allclose(transform(image), expected, atol=1e-5)


def test_imagenet_classes_are_described_in_a_hub_folder():
    config = load_config(config_file("pola_pvt_s"), ["MODEL.NUM_CLASSES", "2"])
    content = hub_config(config, 512, ["n01440764", "n02099601"])
    assert content["architecture"] == "pola_pvt_small" and "model_args" not in content
    assert content["label_descriptions"] == {"n01440764": "tench, Tinca tinca", "n02099601": "golden retriever"}


@pytest.mark.parametrize("name", ["b0", "b4"])
def test_an_official_type_of_a_released_file_carries_timms_name(name):
    config, _ = config_from_tree({"MODEL": {"TYPE": f"pola{name}"}}, "released file")
    assert architecture_of(config) == (f"pola_pp_{name}", {})


@pytest.mark.parametrize("name", VARIANTS)
def test_official_configurations_carry_timms_name_and_no_arguments(name):
    config = load_config(config_file(VARIANTS[name].config))
    assert architecture_of(config) == (name, {})
    described = hub_config(config, 1, None)["pretrained_cfg"]
    registered = timm.get_pretrained_cfg(name).to_dict()
    for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "first_conv", "classifier"):
        assert np.array_equal(described[key], registered[key]), key


def test_the_weights_of_a_hub_folder_stand_alone(exported, checkpoint):
    path = exported / "small" / "model.safetensors"
    assert torch.equal(logits_of(path, images(2)), logits_of(checkpoint, images(2)))


def test_the_model_card_says_what_the_model_was_made_from(exported, checkpoint):
    card = (exported / "small" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: timm" in front and "license: mit" in front
    assert file_digest(checkpoint) in card and "`pola_swin_tiny` with `model_args`" in card
    parameters = sum(parameter.numel() for parameter in load_model(checkpoint).model.parameters())
    assert f"{parameters / 1e6:.2f} M" in card


# -- what is wrong does not stay


def test_an_output_that_deviates_is_not_left(checkpoint, tmp_path, monkeypatch, capsys):
    real = tools.export.write_safetensors

    def write(source, path):
        with torch.no_grad():
            source.model.head.bias[0] += 1e-3
        real(source, path)
        with torch.no_grad():
            source.model.head.bias[0] -= 1e-3

    monkeypatch.setattr(tools.export, "write_safetensors", write)
    arguments = ["--checkpoint", checkpoint, "--format", "safetensors", "--release", "--output", tmp_path]
    assert main([*map(str, arguments)]) == 1
    output = capsys.readouterr().out
    assert re.search(
        r"safetensors: WRONG, \S+ was not written: logits deviate from PyTorch's by at most 1\.0e-03", output
    )
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".json",
        ".pth",
    ]  # the others are written all the same


def test_logits_that_are_not_finite_are_wrong(checkpoint, tmp_path, monkeypatch):
    def read(path):
        return lambda x: torch.full((len(x), len(CLASSES)), torch.nan)

    monkeypatch.setattr(tools.export, "read_checkpoint", read)
    assert main(["--checkpoint", str(checkpoint), "--release", "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


# -- mistakes


def refusal(capsys, *arguments):
    """The last line of the answer to a command line that is refused."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and "Traceback" not in captured.err and captured.out == ""
    return captured.err.strip().splitlines()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--format", "onx"],
            r"invalid choice: 'onx' \(choose from '?onnx'?, '?torch-export'?, '?safetensors'?, '?hub",
        ),
        (["--format", "onnx", "--opset", "12"], "'12' is not supported: expected 18 to 23"),
        (["--format", "onnx", "--opset", "99"], "'99' is not supported: expected 18 to 23"),
        (["--format", "onnx", "--tolerance", "much"], "'much' is not a number from 0 to below 1"),
        ([], "nothing to write: --format takes onnx, torch-export, safetensors, hub, or add --release"),
        (["--release", "--name", "a-b"], "--name 'a-b': expected letters, digits and underscores"),
        (["--release", "--opts", "MODEL.LA.ALPHA", "3"], "--opts belongs to --cfg"),
        (["--release", "--cfg", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_answered_in_a_line(capsys, tmp_path, checkpoint, arguments, expected):
    lines = refusal(capsys, "--checkpoint", checkpoint, "--output", tmp_path, *arguments)
    assert re.search(expected, lines[-1])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_anything_is_written(capsys, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(tools.export, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    lines = refusal(capsys, "--checkpoint", checkpoint, "--output", tmp_path, "--format", "safetensors", "onnx")
    assert lines == ["error: --format onnx needs onnxruntime, which is not installed: pip install onnxruntime"]
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_checkpoint_are_refused(capsys, tmp_path):
    lacking = refusal(capsys, "--checkpoint", tmp_path / "no.pth", "--release")
    assert lacking == [f"error: checkpoint {tmp_path / 'no.pth'} does not exist"]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "broken.safetensors is truncated or damaged" in refusal(capsys, "--checkpoint", broken, "--release")[0]


def test_another_architecture_names_the_mismatch(capsys, checkpoint, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--release", "--output", tmp_path, "--cfg", config_file("pola_pvt_t")]
    text = "\n".join(refusal(capsys, *arguments))
    assert "does not fit PolaPVT of this configuration" in text and "unexpected (" in text


def test_an_average_that_is_not_there_is_asked_for_in_vain(capsys, tmp_path):
    (line,) = refusal(capsys, "--checkpoint", RELEASED, "--ema", "--release", "--output", tmp_path)
    assert "holds no averaged weights (it was trained without EMA.ENABLE)" in line


def test_an_output_folder_that_cannot_be_made_is_named(capsys, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = refusal(capsys, "--checkpoint", checkpoint, "--release", "--output", tmp_path / "file")
    assert str(tmp_path / "file") in line


def test_a_bare_state_dict_needs_a_configuration(capsys, checkpoint, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(load_checkpoint(checkpoint)["model"], bare)
    (line,) = refusal(capsys, "--checkpoint", bare, "--release", "--output", tmp_path)
    assert "carries no configuration" in line
    arguments = ["--checkpoint", bare, "--release", "--output", tmp_path / "out", "--cfg", config_file("pola_swin_t")]
    assert main([*map(str, arguments), "--opts", *SMALL.split()]) == 0
    (path,) = (tmp_path / "out").glob("*.pth")
    assert torch.equal(logits_of(path, images(1)), logits_of(checkpoint, images(1)))


@pytest.mark.slow  # starting a process that imports all of this takes as long as most of the tests above together
def test_it_runs_as_a_script_whose_help_shows_an_example():
    result = run_tool("tools/export.py", "--help")
    assert result.returncode == 0, result.stderr
    assert "example: python tools/export.py --checkpoint" in result.stdout


# -- the models that are published


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "options"),
    [
        ("pola_swin_t", ""),
        ("pola_pvt_t", ""),
        ("pola_swin_b_384", ""),
        ("pola_pp_b0", ""),
        ("pola_pp_b0", "MODEL.PPP.STAGE_TYPES SLSL DATA.IMG_SIZE [256,192]"),
        ("nalaformer_xt", ""),
        ("nalaformer_xt", "MODEL.PPP.STAGE_TYPES SLSL DATA.IMG_SIZE [256,192]"),
        ("pola_swin_t", "MODEL.LA.ATTN_TYPE MLSS1 DATA.IMG_SIZE [192,256] MODEL.SWIN.WINDOW_SIZE 32"),
        ("pola_pvt_t", "MODEL.LA.ATTN_TYPE LSLS MODEL.LA.PVT_LA_SR_RATIOS 8421 DATA.IMG_SIZE [256,192]"),
    ],
)
def test_official_models_export_in_every_format(cfg, options, tmp_path, capsys):
    classes = [f"class {i}" for i in range(1000)]
    path = write_checkpoint(tmp_path / "model.pth", options, cfg=cfg, classes=classes)
    names = ["onnx", "torch-export", "safetensors", "hub"]
    code = main(["--checkpoint", str(path), "--output", str(tmp_path), "--release", "--format", *names])
    output = capsys.readouterr().out
    assert code == 0 and len(output.splitlines()) == 5, output
    (config,) = tmp_path.glob("*/config.json")
    assert ("model_args" in json.loads(config.read_text())) == bool(options)
    sys.stdout.write(output)


# ---------------------------------------------------------------------------------------------------------------------
# Exporters of other programs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pola_swin_tiny", "pola_pvt_tiny", "pola_pp_b0", "nalaformer_xt"])
def test_torchscript_graphs_follow_their_input_at_any_batch(name, tmp_path):
    """torch.jit.trace, and the ONNX exporter that builds on it, which timm's own onnx_export.py uses."""
    model = timm.create_model(name, img_size=64, num_classes=4).eval()
    example = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing about sizes that are constants, and of deprecation
        traced = torch.jit.trace(model, example)
        arguments = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "b"}, "y": {0: "b"}}}
        torch.onnx.export(model, (example,), tmp_path / "model.onnx", dynamo=False, **arguments)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 64, 64)
        expected = model(x).detach()
        assert (traced(x) - expected).abs().max() < 1e-5
        assert (torch.from_numpy(session.run(None, {"x": x.numpy()})[0]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["pola_swin_tiny", "pola_pvt_tiny", "pola_pp_b0", "nalaformer_xt"])
def test_an_exported_program_has_the_gradients_of_the_model(name):
    model = timm.create_model(name, img_size=64, num_classes=4, drop_path_rate=0.0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    gradients = []
    for each in (model, exported):
        image = x.clone().requires_grad_()
        each(image).square().sum().backward()
        gradients.append(image.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()
