"""Models of timm in the same loop: trained, resumed, evaluated, exported, predicted with, and what they cannot is said.

pytest tests/test_baselines.py
"""

import json
import shutil

import pytest
import timm
import torch
from conftest import ROOT, config_file, folder_of, run, write_tiny
from run_files import epoch_file
from safetensors.torch import save_file

import main
import tools.analyze
import tools.export
import tools.predict
import tools.report
import tools.visualize_attention
from config import ConfigError, load_config
from models import build_model, load
from models.files import CheckpointError, load_checkpoint
from models.loading import load_pretrained
from optimizer import layer_groups, parameter_groups

SWIN = "{embed_dim: 8, depths: [1, 1], num_heads: [1, 2], window_size: 4}"
TINY_TIMM = f"""
DATA: {{DATASET: digits, IMG_SIZE: 32, BATCH_SIZE: 64, NUM_WORKERS: 0, TRAIN_FRACTION: 0.3}}
MODEL:
  TYPE: timm
  NAME: tiny
  TIMM: {{NAME: swin_tiny_patch4_window7_224, KWARGS: {SWIN}}}
TRAIN: {{EPOCHS: 2, WARMUP_EPOCHS: 1, BASE_LR: 8.0e-3, LAYER_DECAY: 0.7}}
EMA: {{ENABLE: True, DECAY: 0.9}}
AUG: {{AUTO_AUGMENT: none, COLOR_JITTER: 0.0}}
PRINT_FREQ: 5
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of two epochs of a small Swin of timm."""
    path = write_tiny(tmp_path_factory.mktemp("baseline"), TINY_TIMM)
    run(path)
    return folder_of(path)


def configuration(name, options="", **keywords):
    pairs = ["MODEL.TYPE", "timm", "MODEL.TIMM.NAME", name, "MODEL.TIMM.KWARGS", str(keywords), *options.split()]
    return load_config(config_file("pola_swin_t"), pairs)


def test_a_baseline_trains_and_resumes_to_the_same_bits(trained, tmp_path):
    content = load_checkpoint(epoch_file(trained, 2))
    assert "layers.0.blocks.0.attn.qkv.weight" in content["model"] and "head.fc.bias" in content["model_ema"]
    assert "timm's own attention" in (trained / "log.txt").read_text()
    path = write_tiny(tmp_path, TINY_TIMM)
    again = folder_of(path)
    again.mkdir(parents=True)
    first = epoch_file(trained, 1)
    for file in (first, first.with_name(first.name + ".json")):
        shutil.copy(file, again)
    run(path)
    other = load_checkpoint(epoch_file(again, 2))
    for kind in ("model", "model_ema"):
        assert all(torch.equal(value, other[kind][name]) for name, value in content[kind].items())
    assert "continues from" in (again / "log.txt").read_text()


def test_its_file_is_timms_own(trained):
    loaded = load(trained / "max_acc.pth")
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=10,
        img_size=32,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
    ).eval()
    theirs.load_state_dict(load_checkpoint(trained / "max_acc.pth")["model"], strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), theirs(x))
    assert loaded.classes == [str(digit) for digit in range(10)]


def test_it_is_evaluated_at_another_size_exported_and_predicted_with(trained, tmp_path, capsys):
    path = trained / "max_acc.pth"
    options = f"EVAL_MODE True MODEL.RESUME {path} OUTPUT {tmp_path} TEST.IMG_SIZE 48"
    main.main(load_config(str(trained / "config.yaml"), options.split()))
    (result,) = tmp_path.rglob("eval_val.json")
    assert json.loads(result.read_text())["result"]["images"] == 355
    formats = ["torch-export", "safetensors", "hub"]
    assert (
        tools.export.main(["--checkpoint", str(path), "--format", *formats, "--release", "--output", str(tmp_path)])
        == 0
    )
    hub = timm.create_model(f"local-dir:{tmp_path / 'tiny'}", pretrained=True)
    assert hub.num_classes == 10 and "baseline" in (tmp_path / "tiny" / "README.md").read_text()
    assert tools.predict.main(["--checkpoint", str(path), str(ROOT / "docs" / "images" / "polaformer.png")]) == 0
    assert "%" in capsys.readouterr().out


@pytest.mark.parametrize("tool", [tools.analyze, tools.visualize_attention])
def test_tools_that_need_our_attention_say_so(trained, tool, capsys):
    image = str(ROOT / "docs" / "images" / "polaformer.png")
    assert tool.main(["--checkpoint", str(trained / "max_acc.pth"), image]) == 2
    assert "SwinTransformer has no attention of this project" in capsys.readouterr().err


def test_a_report_is_made_of_it(trained, tmp_path):
    assert tools.report.main([str(trained), "--output", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize("name", ["swin_tiny", "pvt_v2_b1", "deit_small"])
def test_the_configurations_of_baselines_differ_from_ours_by_the_model_alone(name):
    base = {"swin_tiny": "pola_swin_t", "pvt_v2_b1": "pola_pvt_t", "deit_small": "pola_pvt_s"}[name]
    own, theirs = load_config(config_file(f"baselines/{name}")), load_config(config_file(base))
    assert {key for key in own if own[key] != theirs[key]} == {"MODEL"}
    assert {key for key in own.MODEL if own.MODEL[key] != theirs.MODEL[key]} == {"TYPE", "NAME", "TIMM"}
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in build_model(own).parameters()) / 1e6
    assert round(millions, 2) == {"swin_tiny": 28.29, "pvt_v2_b1": 14.01, "deit_small": 22.05}[name]


@pytest.mark.parametrize("name", ["resnet18", "pvt_v2_b0", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_weights_of_timm_start_a_run_of_other_classes(name, tmp_path, caplog):
    path = tmp_path / "timm.safetensors"
    save_file(timm.create_model(name, num_classes=7).state_dict(), path)
    config = configuration(name, "DATA.IMG_SIZE 64")
    model = build_model(config, 3)
    decay, no_decay = parameter_groups(model)
    assert {*decay, *no_decay} == {parameter for parameter, _ in model.named_parameters()}
    assert len(layer_groups(model, 0.5)) > 4
    stored = load_checkpoint(path)["model"]
    with caplog.at_level("INFO", logger="polaformer"):
        load_pretrained(model, {"model": stored}, str(path))
    assert "head: 7 classes in the file, 3 here; starts anew" in caplog.text
    assert ("pos_embed: (1, 197, 192) became (1, 17, 192)" in caplog.text) == name.startswith("vit")
    own = model.state_dict()
    kept = [entry for entry in stored if stored[entry].shape == own[entry].shape]
    assert all(torch.equal(stored[entry], own[entry]) for entry in kept) and len(kept) >= len(own) - 3
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(model, {"model": {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}}, "file.pth")


MISTAKES = {
    ("", ""): "MODEL.TIMM.NAME is empty, and MODEL.TYPE timm needs a model",
    ("swin_tiny", ""): "is no model of timm; there are swin_tiny_patch4_window7_224",
    ("resnet5O", ""): "is no model of timm; there are resnet5",
    ("pola_swin_tiny", ""): "MODEL.TIMM.NAME pola_swin_tiny is of this project: --cfg configs/pola_swin_t.yaml",
    ("swin_tiny_patch4_window7_224.none", ""): "Invalid pretrained tag (none)",
    ("vgg11", "MODEL.DROP_PATH_RATE 0.1"): "MODEL.DROP_PATH_RATE 0 leaves it out",
    ("resnet18", "MODEL.TIMM.KWARGS {'depht':3}"): "timm does not build it with",
    ("resnet18", "MODEL.TIMM.KWARGS {'pretrained':True}"): "KWARGS names pretrained, which is decided by --pretrained",
    ("maxvit_pico_rw_256", "DATA.IMG_SIZE 230"): "MaxxVit of timm takes no images of size 230×230",
    ("vgg11", "MODEL.DROP_PATH_RATE 0 TRAIN.USE_CHECKPOINT True"): "TRAIN.USE_CHECKPOINT: VGG recomputes nothing",
}


@pytest.mark.parametrize(("name", "options"), MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(name, options):
    with pytest.raises(ConfigError) as caught:
        main.check(configuration(name, f"DATA.DATASET digits {options}"))
    assert MISTAKES[name, options] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[1]", "{1: 2}", "{'a': {'b': 1}}", "{'a-b': 1}", "swin"])
def test_keywords_are_names_with_plain_values(value):
    with pytest.raises(ConfigError, match="MODEL.TIMM.KWARGS is .* expected names with values"):
        load_config(config_file("pola_swin_t"), ["MODEL.TIMM.KWARGS", value])


def test_layer_decay_needs_layers_that_timm_names():
    model = build_model(configuration("caformer_s18", "MODEL.DROP_PATH_RATE 0"), 3)
    with pytest.raises(ValueError, match=r"timm names no layers of MetaFormer: TRAIN.LAYER_DECAY has to be 1.0"):
        layer_groups(model, 0.5)
