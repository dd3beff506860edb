"""What every model owes its users, apart from its numbers.

pytest tests/test_models.py
"""

import pytest
import torch
from conftest import config_file, fill_with_recipe

from config import load_config
from models import build_model
from models.attention import PolaReductionAttention, PolaWindowAttention
from models.files import CheckpointError
from models.layers import drop_path_rates
from models.loading import adapt_position_tables, load_pretrained
from models.options import AttentionOptions
from models.pola_pvt import PolaPVT
from models.pola_swin import PolaSwin
from models.registry import BODIES, IMAGES

SMALL = "MODEL.NUM_CLASSES 7 DATA.IMG_SIZE 64 MODEL.SWIN.EMBED_DIM 12 MODEL.SWIN.NUM_HEADS [1,2,2,4]".split()
SMALL += ["MODEL.TIMM.NAME", "pvt_v2_b0"]  # of MODEL.TYPE timm


def small(type_name: str, *options: str) -> torch.nn.Module:
    return build_model(load_config(config_file("pola_swin_t"), ["MODEL.TYPE", type_name, *SMALL, *options]))


@pytest.mark.parametrize("type_name", [name for name, body in BODIES.items() if body.reads == IMAGES])
def test_every_parameter_receives_a_gradient(type_name):
    model = small(type_name, "MODEL.LA.ATTN_TYPE", "LLSS", "MODEL.DROP_PATH_RATE", "0")
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny"])
def test_classifier_interface(type_name):
    model = small(type_name).eval()
    images = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 4, model.num_features)
    assert torch.equal(model.forward_head(tokens), model(images))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert (model.head.bias == 0).all()
    assert 0.01 < model.head.weight.std() < 0.03
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny", "polab0", "nalaformer"])
def test_checkpointing_changes_memory_not_numbers(type_name):
    gradients = []
    for use_checkpoint in ("False", "True"):
        torch.manual_seed(0)
        model = small(type_name, "TRAIN.USE_CHECKPOINT", use_checkpoint, "MODEL.DROP_RATE", "0.2")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            model(torch.ones(2, 3, 64, 64)).square().sum().backward()
        gradients.append((sum(saved), [parameter.grad for parameter in model.parameters()]))
    (plain, expected), (recomputed, actual) = gradients
    assert recomputed < plain / 2
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny", "polab0", "nalaformer"])
def test_drop_rates_act_in_training_only(type_name):
    for options in (("MODEL.DROP_RATE", "0.3", "MODEL.DROP_PATH_RATE", "0"), ("MODEL.DROP_PATH_RATE", "0.5")):
        model = small(type_name, *options)
        images = torch.randn(2, 3, 64, 64)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_drop_path_grows_linearly_over_all_blocks():
    model = build_model(load_config(config_file("pola_swin_t")))
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert drop_path_rates(0.3, [1]) == [[0.0]]


@pytest.mark.parametrize("name", ["pola_swin_t", "pola_pvt_t"])
def test_initial_values(name):
    model = build_model(load_config(config_file(name)))
    seen = set()
    for key, value in model.named_parameters():
        leaf = key.rsplit(".", 1)[-1]
        if leaf in ("power", "scale", "positional_encoding"):
            assert (value == 0).all(), key
        elif "pos_embed" in key or leaf == "relative_position_bias_table":
            assert 0.017 < value.std() < 0.023, key
        elif value.ndim == 2:
            assert 0.018 < value.std() < 0.022, key
        elif "norm" in key:
            assert (value == (1 if leaf == "weight" else 0)).all(), key
        elif value.ndim == 4:  # PyTorch's default: uniform in ±1/sqrt(fan-in)
            bound = value[0].numel() ** -0.5
            assert value.abs().max() <= bound and value.std() > bound / 3, key
        seen.add(leaf)
    assert {"power", "scale", "weight", "bias"} <= seen


def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="built for 64×64 pixels and received 96×64"):
        small("pola_swin")(torch.randn(1, 3, 96, 64))
    with pytest.raises(ValueError, match="built for 64×64 pixels and received 96×64"):
        small("pola_pvt_tiny")(torch.randn(1, 3, 96, 64))
    with pytest.raises(ValueError, match="96×65 does not fit PolaPVT: expected multiples of 32"):
        small("pola_pvt_tiny", "MODEL.LA.ATTN_TYPE", "SSSS")(torch.randn(1, 3, 96, 65))
    with pytest.raises(ValueError, match="expected multiples of 32"):
        PolaSwin(img_size=(224, 220))
    with pytest.raises(ValueError, match="expected multiples of 32"):
        PolaPVT(depths=(1, 1, 1, 1), img_size=(100, 224))
    with pytest.raises(ValueError, match="no M stages"):
        PolaPVT(depths=(1, 1, 1, 1), attn_type="MLLL2")
    with pytest.raises(ValueError, match="MODEL.LA.KERNEL_SIZE is 4, expected an odd number"):
        PolaWindowAttention(8, 2, (4, 4), AttentionOptions(kernel_size=4))
    with pytest.raises(ValueError, match="does not divide by the spatial reduction ratio 3"):
        PolaReductionAttention(8, 2, (4, 4), sr_ratio=3)
    config = load_config(config_file("pola_swin_t")).clone()
    config.defrost()
    config.MODEL.TYPE = "swin"
    with pytest.raises(
        ValueError, match="names no model of this project: MODEL.TYPE is 'swin'.*expected one of lra, nala"
    ):
        build_model(config)


# ---------------------------------------------------------------------------------------------------------------------
# Weights of another size or class count
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny"])
@pytest.mark.parametrize("size", ["128", "[96, 160]"])
def test_position_tables_are_resized_bicubically(type_name, size, caplog):
    options = ("MODEL.LA.ATTN_TYPE", "LLSS", "MODEL.SWIN.APE", "True", "MODEL.LA.PVT_LA_SR_RATIOS", "2111")
    source = fill_with_recipe(small(type_name, *options))
    target = small(type_name, *options, "DATA.IMG_SIZE", size)
    load_pretrained(target, {"model": source.state_dict()}, "file.pth")
    _, notes = adapt_position_tables(target, source.state_dict(), {}, "file.pth")
    own, theirs = target.state_dict(), source.state_dict()
    resized = [name for name in own if own[name].shape != theirs[name].shape]
    assert len(resized) == len(notes) >= 4
    for name, value in own.items():
        if name not in resized:
            assert torch.equal(value, theirs[name]), name
    height, width = (32, 32) if size == "128" else (24, 40)
    name = "absolute_pos_embed" if type_name == "pola_swin" else "pos_embed1"
    image = theirs[name].reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", align_corners=False)
    assert torch.equal(own[name][0], expected[0].flatten(1).T)


def test_relative_position_tables_are_resized_with_the_window():
    source = fill_with_recipe(small("pola_swin", "DATA.IMG_SIZE", "128", "MODEL.LA.ATTN_TYPE", "LLSS"))  # window 7
    options = ("DATA.IMG_SIZE", "192", "MODEL.LA.ATTN_TYPE", "LLSS", "MODEL.SWIN.WINDOW_SIZE", "96")  # window 12
    target = small("pola_swin", *options)
    load_pretrained(target, {"model": source.state_dict()}, "file.pth")
    name = "layers.2.blocks.0.attn.relative_position_bias_table"
    table = source.state_dict()[name]
    assert table.shape == (169, 2)
    image = table.T.reshape(1, 2, 13, 13)
    expected = torch.nn.functional.interpolate(image, (23, 23), mode="bicubic", align_corners=False)
    assert torch.equal(target.state_dict()[name], expected[0].flatten(1).T)


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny"])
@pytest.mark.parametrize(("old", "new"), [("[64, 256]", "128"), ("[64, 128]", "[128, 64]"), ("[64, 128]", "96")])
def test_tables_of_a_rectangular_file_are_resized_from_its_own_grid(type_name, old, new):
    """[64, 256] and 128 have tables of equal shapes: only the file's configuration tells them apart."""
    config = load_config(config_file("pola_swin_t"), ["MODEL.TYPE", type_name, *SMALL, "DATA.IMG_SIZE", old])
    source = fill_with_recipe(build_model(config))
    target = small(type_name, "DATA.IMG_SIZE", new)
    load_pretrained(target, {"model": source.state_dict(), "config": config.dump()}, "file.pth")
    stage = "layers.0.blocks.0" if type_name == "pola_swin" else "block1.0"
    name = f"{stage}.attn.positional_encoding"
    grids = [model.position_grids()[name] for model in (source, target)]
    image = source.state_dict()[name].unflatten(1, grids[0]).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, grids[1], mode="bicubic", align_corners=False)
    assert torch.equal(target.state_dict()[name][0], expected[0].flatten(1).T)


def test_a_rectangular_file_without_configuration_is_refused():
    source = small("pola_pvt_tiny", "DATA.IMG_SIZE", "[64, 128]")
    with pytest.raises(CheckpointError, match="the 512 rows of pos_embed1 are not a 22×22 grid"):
        load_pretrained(small("pola_pvt_tiny"), {"model": source.state_dict()}, "file.pth")


@pytest.mark.parametrize("type_name", ["pola_swin", "pola_pvt_tiny", "polab0", "nalaformer"])
def test_new_class_count_gets_a_fresh_head(type_name):
    source = fill_with_recipe(small(type_name))
    target = small(type_name, "MODEL.NUM_CLASSES", "4")
    fresh = target.head.weight.clone()
    load_pretrained(target, {"model": source.state_dict()}, "file.pth")
    assert torch.equal(target.head.weight, fresh)
    images = torch.randn(1, 3, 64, 64)
    source.eval(), target.eval()
    assert torch.equal(source.forward_features(images), target.forward_features(images))


def test_pretrained_weights_of_another_architecture_are_refused():
    with pytest.raises(CheckpointError, match=r"does not fit PolaPVT(.|\n)*missing \((.|\n)*unexpected \("):
        load_pretrained(small("pola_pvt_tiny"), {"model": small("pola_swin").state_dict()}, "swin.pth")
    with pytest.raises(CheckpointError, match="other shape"):
        load_pretrained(
            small("pola_swin"), {"model": small("pola_swin", "MODEL.LA.KERNEL_SIZE", "3").state_dict()}, "kernel.pth"
        )


@pytest.mark.parametrize("value", [None, 1.0])
def test_the_gate_begins_with_the_bias_that_is_given(value):
    """Only the gate's: the last quarter of the projection in Pola-Swin and sequences, the second half in Pola-PVT."""
    option = ["MODEL.LA.GATE_BIAS", str(value)]
    small = "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE LLLL".split()
    for name, part in (("pola_swin_t", "qkvg"), ("pola_pvt_t", "qg"), ("lra/listops", "qkvg")):
        torch.manual_seed(0)
        plain = dict(build_model(load_config(config_file(name), small), 10).named_parameters())
        torch.manual_seed(0)
        given = dict(build_model(load_config(config_file(name), [*small, *option]), 10).named_parameters())
        biases = {key for key in given if key.endswith(f"attn.{part}.bias")}
        assert biases
        for key, parameter in given.items():
            if key in biases and value is not None:
                gate = parameter.shape[0] // {"qkvg": 4, "qg": 2}[part]
                assert (parameter[-gate:] == value).all() and torch.equal(parameter[:-gate], plain[key][:-gate])
            else:
                assert torch.equal(parameter, plain[key]), key
    with pytest.raises(ValueError, match="GATE_BIAS .* needs the projections' bias"):
        build_model(
            load_config(config_file("pola_swin_t"), ["MODEL.LA.GATE_BIAS", "1", "MODEL.SWIN.QKV_BIAS", "False"])
        )
