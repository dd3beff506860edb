"""Every variant under timm's model interface, asked what timm asks of its own models; torch.hub.

pytest tests/test_timm.py
"""

import copy
import json

import pytest
import timm
import torch
from conftest import RELEASED, ROOT, config_file, fill_with_recipe, read_json
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import _registry as timm_registry
from timm.models import create_feature_extractor, group_parameters, save_for_hf
from torch import Tensor
from torchvision.models import feature_extraction

from config import image_size, load_config
from data.transforms import Normalise, evaluation_transform
from engine.training import place
from models import build_model, list_models
from models.files import CheckpointError, load_checkpoint
from models.kernels import KERNELS
from models.loading import create_model

SIZE = 96  # pixels; the smallest at which windows, merging and shifts all occur
CONFIGS = {
    **{f"pola_pp_b{i}": f"pola_pp_b{i}" for i in range(6)},
    **{name: name for name in (f"nalaformer_{size}" for size in ("xt", "xt_8m", "t", "s", "b", "l"))},
    "pola_swin_tiny": "pola_swin_t",
    "pola_swin_small": "pola_swin_s",
    "pola_swin_base": "pola_swin_b",
    "pola_swin_base_384": "pola_swin_b_384",
    "pola_pvt_tiny": "pola_pvt_t",
    "pola_pvt_small": "pola_pvt_s",
    "pola_pvt_medium": "pola_pvt_m",
    "pola_pvt_large": "pola_pvt_b",
}
every_model = pytest.mark.parametrize("name", list_models())
both_families = pytest.mark.parametrize("name", ["pola_swin_tiny", "pola_pvt_tiny"])
ROTARY = ("pola_pp_b0", "nalaformer_xt")  # a projection before the head, no position tables, no dropout inside
FAMILIES = ("pola_swin_tiny", "pola_pvt_tiny", *ROTARY)
every_family = pytest.mark.parametrize("name", FAMILIES)

# Small enough for tests of behaviour that does not depend on width or depth.
PYRAMID = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 2, 1, 2), "projection": 40}
SMALL = {
    "pola_swin_tiny": {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)},
    "pola_pvt_tiny": {"embed_dims": (8, 16, 20, 24), "num_heads": (1, 2, 2, 2), "depths": (1, 2, 1, 2)},
    **dict.fromkeys(ROTARY, PYRAMID),
}


def create(name: str, **arguments) -> torch.nn.Module:
    return timm.create_model(name, **{"img_size": SIZE, "drop_path_rate": 0.0, **arguments})


def small(name: str, **arguments) -> torch.nn.Module:
    """With position tables that are not zero, so that a wrong resize is seen."""
    return fill_with_recipe(create(name, **SMALL[name], num_classes=7, **arguments)).eval()


def images(height: int = SIZE, width: int = SIZE, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.fixture(scope="module", params=list_models())
def model(request):
    """Each variant at 96 pixels, in evaluation mode; tests leave it as it is."""
    return create(request.param).eval()


def test_timm_lists_the_variants():
    assert sorted(list_models()) == sorted(CONFIGS)
    assert set(list_models()) <= {*timm.list_models("pola_*"), *timm.list_models("nalaformer_*")}


@every_model
def test_a_registered_model_is_that_of_its_configuration(name):
    config = load_config(config_file(CONFIGS[name]))
    with torch.device("meta"):
        registered, configured = timm.create_model(name), build_model(config)
    shapes = [[(key, value.shape) for key, value in m.state_dict().items()] for m in (registered, configured)]
    assert shapes[0] == shapes[1]
    assert str(registered) == str(configured)  # dropout and stochastic depth too
    assert registered.default_cfg["input_size"] == (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
    assert (registered.default_cfg["crop_pct"] < 1) == config.TEST.CROP


@every_family
def test_weights_of_one_construction_load_into_the_other(name):
    options, arguments = f"DATA.IMG_SIZE {SIZE} MODEL.LA.ALPHA 3", {"alpha": 3}
    if name in ROTARY:
        options = f"DATA.IMG_SIZE {SIZE} MODEL.PPP.STAGE_TYPES SLLS MODEL.PPP.DEPTHS [1,1,2,1]"
        arguments = {"stage_types": "SLLS", "depths": (1, 1, 2, 1)}
    elif name == "pola_swin_tiny":  # Pola-PVT's widths are no keys
        options += " MODEL.SWIN.EMBED_DIM 12 MODEL.SWIN.DEPTHS [2,2,2,2] MODEL.SWIN.NUM_HEADS [1,2,2,4]"
        arguments |= SMALL[name]
    config = load_config(config_file(CONFIGS[name]), options.split())
    configured, registered = fill_with_recipe(build_model(config)).eval(), create(name, **arguments).eval()
    registered.load_state_dict(configured.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(registered(images()), configured(images()))


@every_family
def test_head_can_be_replaced(name):
    model, x = small(name), images(batch=2)
    with torch.no_grad():
        assert len(model.get_classifier().weight) == model.num_classes == model(x).shape[1] == 7
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert pooled.shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "")
        tokens = model(x)
        assert tokens.shape[2] == model.head_hidden_size
        if name not in ROTARY:  # which project their tokens before they are pooled
            assert torch.equal(tokens, model.forward_features(x))
        for pool, expected in {
            "max": tokens.amax(dim=1),
            "avgmax": (tokens.mean(dim=1) + tokens.amax(dim=1)) / 2,
            "": tokens,
        }.items():
            model.reset_classifier(0, pool)
            assert torch.equal(model(x), expected) and model.global_pool == pool
        assert small(name, global_pool="max").global_pool == "max"
        assert create(name, **SMALL[name], num_classes=0, global_pool="").eval()(x).shape == tokens.shape
    with pytest.raises(ValueError, match="global_pool 'token' is unknown, expected one of 'avg', 'max', 'avgmax', ''"):
        model.reset_classifier(2, "token")


def test_asking_for_weights_without_a_file_says_where_they_are():
    with pytest.raises(ValueError, match=r"no weights of pola_pvt_tiny can be downloaded.*pretrained_cfg_overlay"):
        create("pola_pvt_tiny", pretrained=True)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("pola_swin_huge")


# ---------------------------------------------------------------------------------------------------------------------
# Every variant
# ---------------------------------------------------------------------------------------------------------------------


def test_forward_and_backward_reach_every_parameter(model):
    model = copy.deepcopy(model).train()
    logits = model(images())
    assert logits.shape == (1, 1000) and logits.isfinite().all()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_default_configuration_describes_the_model(model):
    cfg, state = model.default_cfg, model.state_dict()
    assert state[f"{cfg['first_conv']}.weight"].ndim == 4
    assert state[f"{cfg['classifier']}.weight"].shape[:2] == (cfg["num_classes"], model.head_hidden_size)
    assert cfg["pool_size"] == tuple(side // model.feature_info[-1]["reduction"] for side in cfg["input_size"][1:])
    assert cfg["fixed_input_size"] == bool(model.position_grids()) and cfg["input_size"][0] == model.in_chans
    data = timm.data.resolve_model_data_config(model)
    assert data["interpolation"] == "bicubic" and data["crop_mode"] == (
        "center" if model.family == "NaLaFormer" else "squash"
    )


@every_model
def test_timms_transform_makes_the_pixels_of_the_configuration(name):
    config = load_config(config_file(CONFIGS[name]))
    with torch.device("meta"):
        described = resolve_model_data_config(timm.create_model(name))
    theirs = create_transform(**described)
    ours, normalise = evaluation_transform(config, image_size(config)), Normalise(torch.device("cpu"))
    for shape in ((330, 470), (301, 200), (256, 256)):
        image = Image.fromarray(torch.randint(256, (*shape, 3), dtype=torch.uint8).numpy())
        assert torch.allclose(theirs(image), normalise(ours(image)[None])[0], atol=1e-5)


def test_intermediates_are_the_stages_of_the_forward_pass(model):
    x = images()
    with torch.no_grad():
        features = model.forward_features(x)
        output, maps = model.forward_intermediates(x)
        assert torch.equal(output, features)
        assert [tuple(m.shape) for m in maps] == [
            (1, info["num_chs"], SIZE // info["reduction"], SIZE // info["reduction"]) for info in model.feature_info
        ]
        assert all(m.is_contiguous() for m in maps)
        assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
        last = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert torch.equal(last[0].flatten(2).transpose(1, 2), features)
    named = dict(model.named_modules())
    assert all(info["module"] in named for info in model.feature_info)


def test_traced_graph_computes_what_the_model_computes(model):
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(images()), model(images()))
        if not model.position_grids():  # nothing is of a size
            assert torch.equal(traced(images(64, 80)), model(images(64, 80)))
            return
        with pytest.raises(ValueError, match="built for 96×96 pixels and received 64×96"):
            traced(images(64, SIZE))


def test_layers_of_the_group_matcher_follow_the_computation(model):
    """Of every parameter: stem first, then the blocks in order, the head alone at the end."""
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    parameters = dict(model.named_parameters())
    assert layers.keys() == parameters.keys()
    order = [layers[name] for name in _in_order_of_computation(model)]
    assert order == sorted(order)
    blocks = len(
        [
            m
            for m in model.modules()
            if type(m).__name__ in ("PolaSwinBlock", "PolaPVTBlock", "PolaPPBlock", "NalaBlock")
        ]
    )
    assert max(order) == blocks + 1  # stem, blocks, head
    assert {name for name, layer in layers.items() if layer == max(order)} == {"head.weight", "head.bias"}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse.values()) == {0, 1, 2, 3, 4, 5}
    stages = [coarse[name] for name in sorted(layers, key=layers.__getitem__)]
    assert stages == sorted(stages)


def _in_order_of_computation(model: torch.nn.Module) -> list[str]:
    """Parameter names in the order in which the forward pass calls their modules; tables come with their stage."""
    order, tables = [], {}
    for name, _ in model.named_parameters():
        if "." not in name:  # absolute_pos_embed, pos_embed1
            tables["patch_embed" + name.removeprefix("pos_embed").removeprefix("absolute_pos_embed")] = name

    def note(name, module):
        order.extend(f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda module, _, name=name: note(name, module)))
    with torch.no_grad():
        model(images())
    for handle in handles:
        handle.remove()
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in order and name not in tables.values()]
    for name in missing:  # read by their parent, such as the depthwise kernel: they belong to its block
        parent = name.rsplit(".", 2)[0] + "."
        order.insert(next(i for i, other in enumerate(order) if other.startswith(parent)), name)
    for stage, table in tables.items():
        order.insert(next(i for i, other in enumerate(order) if other.startswith(stage + ".")), table)
    assert sorted(order) == sorted(names)
    return order


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


@every_family
def test_features_only_gives_a_pyramid(name):
    backbone = create(name, features_only=True, out_indices=(1, 3)).eval()
    with torch.no_grad():
        shapes = [tuple(m.shape) for m in backbone(images(batch=2))]
    info = backbone.feature_info
    assert info.out_indices in ((1, 3), [1, 3])
    assert shapes == [(2, c, SIZE // r, SIZE // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    assert info.reduction() == [8, 32]
    assert not any(key.startswith(("model.head.", "model.norm.")) for key in backbone.state_dict())
    assert [m.shape[1] for m in create(name, **SMALL[name], features_only=True)(images())] == list(
        SMALL[name].get("embed_dims", (12, 24, 48, 96))
    )


@every_family
def test_pyramid_holds_what_the_classifier_computes(name):
    classifier = small(name)
    backbone = create(name, **SMALL[name], features_only=True, out_indices=(0, 2)).eval()
    backbone.model.load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        expected = classifier.forward_intermediates(images(), (0, 2), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(backbone(images()), expected, strict=True))


@every_family
@pytest.mark.parametrize("kind", ["fx", "hook"])
def test_feature_info_names_the_module_that_ends_a_stage(name, kind):
    classifier = small(name)
    backbone = create(name, **SMALL[name], features_only=True, feature_cls=kind).eval()
    (backbone.graph_module if kind == "fx" else backbone["body"]).load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        expected = classifier.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(backbone(images()), expected, strict=True))


@every_family
def test_formats_and_choices_of_intermediates(name):
    model, x = small(name), images(64, 160)
    model.set_input_size((64, 160))
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert maps[0].shape[2:] == (16, 40)
        for fmt, view in {"NHWC": lambda m: m.permute(0, 2, 3, 1), "NLC": lambda m: m.flatten(2).mT}.items():
            others = model.forward_intermediates(x, output_fmt=fmt, intermediates_only=True)
            assert all(torch.equal(a, view(b)) for a, b in zip(others, maps, strict=True))
        chosen = model.forward_intermediates(x, [-1, 0], intermediates_only=True)
        assert torch.equal(chosen[0], maps[0]) and torch.equal(chosen[1], maps[3])
        seen = []
        handle = (model.block3 if name == "pola_pvt_tiny" else model.layers[2]).register_forward_hook(seen.append)
        tokens, (first, second) = model.forward_intermediates(x, [0, 1], stop_early=True, output_fmt="NLC")
        handle.remove()
    assert torch.equal(tokens, second) and torch.equal(first, maps[0].flatten(2).mT) and not seen
    with pytest.raises(ValueError, match="output_fmt 'CHW' is unknown, expected one of NCHW, NHWC, NLC"):
        model.forward_intermediates(x, output_fmt="CHW")
    with pytest.raises(ValueError, match=r"stages \[4\] were asked for, expected some of 0 to 3"):
        model.forward_intermediates(x, [4])
    with pytest.raises(ValueError, match="the last 5 stages were asked for, expected 1 to 4"):
        model.forward_intermediates(x, 5)


@every_family
def test_pruning_leaves_what_the_intermediates_need(name):
    whole = small(name)
    with torch.no_grad():
        expected = whole.forward_intermediates(images(), [1, 2], intermediates_only=True)
        for indices, kept in (([1, 2], [1, 2]), ([-3, -2], [1, 2])):
            model = copy.deepcopy(whole)
            assert model.prune_intermediate_layers(indices) == kept
            tokens, maps = model.forward_intermediates(images(), kept)
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
            assert torch.equal(tokens, maps[-1].flatten(2).mT)
            assert model.num_features == model.head_hidden_size == maps[-1].shape[1] and len(model.feature_info) == 3
            assert torch.equal(model(images()), tokens)  # no head, no pooling
            used = {key for key in whole.state_dict() if not key.startswith(("head", "norm", "proj"))}
            fourth = ("layers.3", "layers.2.downsample", "patch_embed4", "pos_embed4", "block4")
            assert model.state_dict().keys() == {key for key in used if not key.startswith(fourth)}
            model.reset_classifier(5, "avg")
            assert model(images()).shape == (1, 5)
        model = copy.deepcopy(whole)
        model.prune_intermediate_layers(1, prune_norm=False, prune_head=False)
        assert torch.equal(model(images()), whole(images()))
        model.prune_intermediate_layers(1)
        assert torch.equal(model(images()), whole.forward_features(images()))


@every_family
@pytest.mark.parametrize("make", [create_feature_extractor, feature_extraction.create_feature_extractor])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (64, 160)])
def test_feature_extractors_by_torch_fx(name, make, shape):
    options = {
        "pola_swin_tiny": {"window_size": 5},
        "pola_pvt_tiny": {"attn_type": "LSLL", "sr_ratios": (2, 1, 1, 1)},
        **{key: {"stage_types": "LSLS"} for key in ROTARY},
    }
    model = small(name, img_size=shape, **options[name])
    stage = model.feature_info[1]["module"]
    traced = make(model, {stage: "stage", "head": "logits"})
    x = images(*shape)
    with torch.no_grad():
        found, expected = traced(x), model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)[0]
        assert torch.equal(found["stage"], expected)
        assert torch.equal(found["logits"], model(x))


@every_family
def test_traced_training_graph_keeps_dropout_and_stochastic_depth(name):
    inside = {} if name in ROTARY else {"proj_drop_rate": 0.1}
    model = create(name, **SMALL[name], drop_path_rate=0.5, drop_rate=0.2, **inside).train()
    traced = feature_extraction.create_feature_extractor(model, train_return_nodes=["head"], eval_return_nodes=["head"])
    outputs = []
    for each in (model, traced.train()):
        torch.manual_seed(0)
        outputs.append(each(images(batch=4)))
    assert torch.equal(outputs[0], outputs[1]["head"])


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and channels
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = [(64, 64), (64, 160), (128, 96), (192, 192)]


@both_families
@pytest.mark.parametrize("shape", SHAPES)
def test_resized_model_is_the_one_built_for_that_size(name, shape):
    options = {"ape": True, "window_size": 12} if name == "pola_swin_tiny" else {"sr_ratios": (2, 1, 1, 1)}
    model, before = small(name, **options), small(name, **options).state_dict()
    model.set_input_size(shape)
    if name == "pola_swin_tiny":  # 12 of 24 tokens: half of the map stays half of the map
        assert model.window_size == max(shape) // 4 // 2
        options["window_size"] = model.window_size
    built = small(name, img_size=shape, **options)
    built.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model(images(*shape)), built(images(*shape)))
    resized = [key for key, value in model.state_dict().items() if value.shape != before[key].shape]
    assert len(resized) >= 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in resized)
    assert model.img_size == shape
    with pytest.raises(ValueError, match="built for"):
        model(images())


@pytest.mark.parametrize("shape", [*SHAPES, (37, 90), (1, 1)])
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_need_no_size(name, shape):
    """Any image whose maps are not empty, as the model stands: what it was described with computes nothing."""
    model, built = small(name), small(name, img_size=shape)
    assert built.state_dict().keys() == model.state_dict().keys() and not model.position_grids()
    with torch.no_grad():
        maps = model.forward_intermediates(images(*shape), intermediates_only=True)
        assert torch.equal(model(images(*shape)), built(images(*shape)))
        model.set_input_size(shape)
        assert model.img_size == shape and torch.equal(model(images()), small(name)(images()))
    height, width = shape
    for stage, found in enumerate(maps):  # sides are rounded up
        assert found.shape[2:] == (-(-height // 2 ** (stage + 2)), -(-width // 2 ** (stage + 2)))


@both_families
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_size_computes_what_the_resized_model_computes(name, shape):
    options = {"ape": True, "window_size": 9} if name == "pola_swin_tiny" else {"sr_ratios": (2, 1, 1, 1)}
    dynamic = small(name, dynamic_img_size=True, **options)
    resized = copy.deepcopy(dynamic)
    resized.set_input_size(shape)
    with torch.no_grad():
        assert torch.equal(dynamic(images(*shape)), resized(images(*shape)))
        maps = dynamic.forward_intermediates(images(*shape), intermediates_only=True)
        assert [m.shape[2:] for m in maps] == [(shape[0] // 4 // 2**i, shape[1] // 4 // 2**i) for i in range(4)]
        assert torch.equal(dynamic(images()), small(name, **options)(images()))
    with pytest.raises(ValueError, match="image size 100×96 does not fit Pola(Swin|PVT): expected multiples of 32"):
        dynamic(images(100, SIZE))


@both_families
def test_position_tables_learn_from_other_sizes(name):
    model = small(name, strict_img_size=False).train()  # timm's other word for it
    model(images(128, 64)).square().sum().backward()
    for parameter in model.position_grids():
        assert model.get_parameter(parameter).grad.abs().sum() > 0, parameter


def test_base_resized_to_384_is_the_384_variant():
    with torch.device("meta"):
        model, expected = timm.create_model("pola_swin_base"), timm.create_model("pola_swin_base_384")
    model = model.to_empty(device="cpu")
    model.set_input_size(384, softmax_window_size=12)
    assert [v.shape for v in model.state_dict().values()] == [v.shape for v in expected.state_dict().values()]
    assert [v.shape for v in model.buffers()] == [v.shape for v in expected.buffers()]


@both_families
def test_sizes_that_do_not_fit_change_nothing(name):
    model = small(name, **({} if name == "pola_swin_tiny" else {"sr_ratios": (3, 1, 1, 1)}))
    for size in (100, (96, 80)):
        with pytest.raises(ValueError, match="expected multiples of 32 pixels"):
            model.set_input_size(size)
    if name == "pola_pvt_tiny":
        with pytest.raises(ValueError, match="a 24×16 map does not divide by the spatial reduction ratio 3"):
            model.set_input_size((96, 64))
    assert model.img_size == (SIZE, SIZE)
    with torch.no_grad():
        assert model(images()).isfinite().all()


@every_family
def test_input_channels(name):
    model = small(name, in_chans=1)
    assert model.in_chans == 1
    with torch.no_grad():
        assert model(images()[:, :1]).shape == (1, 7)


@every_family
def test_drop_rate_acts_before_the_head_only(name):
    model = create(name, **SMALL[name], drop_rate=0.5).train()
    tokens = model.forward_features(images())
    assert torch.equal(tokens, model.forward_features(images()))
    assert (model.forward_head(tokens, pre_logits=True) == 0).float().mean() > 0.2
    if name not in ROTARY:
        inner = create(name, **SMALL[name], proj_drop_rate=0.3).train()
        assert not torch.equal(inner.forward_features(images()), inner.forward_features(images()))
    deep = create(name, **SMALL[name], drop_path_rate=0.5).train()
    assert not torch.equal(deep.forward_features(images(batch=8)), deep.forward_features(images(batch=8)))


@every_family
def test_checkpointed_blocks_give_the_same_gradients(name):
    gradients = []
    for enable in (False, True):
        model = small(name, dynamic_img_size=True)
        model.set_grad_checkpointing(enable)
        model.forward_intermediates(images(64, SIZE), intermediates_only=True)[-1].square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if not n.startswith(("head", "norm", "proj."))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_family
def test_gradients_are_laid_out_like_their_parameters(name):
    """As DDP's buckets are, which warns of others and copies them in every step."""
    model = place(create(name, **SMALL[name], num_classes=7).train(), torch.device("cpu"))
    model(images()).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), parameter_name


def test_undecayed_parameters_are_named():
    model = create("pola_swin_tiny", **SMALL["pola_swin_tiny"], ape=True)
    assert model.no_weight_decay() == {
        name for name in model.state_dict() if name.endswith(("absolute_pos_embed", "relative_position_bias_table"))
    }
    assert len(model.no_weight_decay()) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_pretrained_file_is_adapted_to_what_was_asked_for(name, suffix, tmp_path):
    source, path = small(name), tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"model": source.state_dict(), "model_ema": None}, path)
    else:
        save_file(source.state_dict(), path)
    overlay = {"file": str(path), **({"num_classes": 7} if suffix == "safetensors" else {})}
    same = create(name, **SMALL[name], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert torch.equal(same(images()), source(images()))
        assert "state_dict" not in same.pretrained_cfg
    asked = {"num_classes": 3, "in_chans": 1, "img_size": (64, 128)}
    other = create(name, **SMALL[name], **asked, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    source.set_input_size((64, 128))
    grey = images(64, 128)[:, :1]
    with torch.no_grad():
        # timm sums the filter over the colours: a grey image gives what the same image in three channels gives
        tokens = source.forward_features(grey.expand(-1, 3, -1, -1))
        assert torch.allclose(other.forward_features(grey), tokens, rtol=1e-4, atol=1e-4)
        assert other(grey).shape == (1, 3)
    backbone = create(
        name, **SMALL[name], features_only=True, out_indices=(2,), pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    source.set_input_size(SIZE)
    with torch.no_grad():
        expected = small(name).forward_intermediates(images(), [2], intermediates_only=True)[0]
        assert torch.equal(backbone(images())[0], expected)


def test_file_trained_for_another_function_is_refused(tmp_path):
    config = load_config(config_file("pola_pvt_t"), ["DATA.IMG_SIZE", "[64, 160]", "MODEL.LA.ALPHA", "3"])
    source = small("pola_pvt_tiny", img_size=(64, 160), alpha=3)
    torch.save({"model": source.state_dict(), "config": config.dump()}, tmp_path / "file.pth")
    arguments = {**SMALL["pola_pvt_tiny"], "pretrained_cfg_overlay": {"file": str(tmp_path / "file.pth")}}
    with pytest.raises(CheckpointError, match=r"file.pth was trained with alpha=3.0, not 4.0: pass what"):
        create("pola_pvt_tiny", pretrained=True, **arguments)
    loaded = create("pola_pvt_tiny", pretrained=True, alpha=3, **arguments).eval()  # its tables come from 64×160
    source.set_input_size(SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(images()), source(images()))


def test_file_without_a_head_gives_a_model_without_one(tmp_path):
    source = small("pola_pvt_tiny")
    source.reset_classifier(0)
    torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "backbone.pth")
    overlay = {"file": str(tmp_path / "backbone.pth")}
    loaded = create("pola_pvt_tiny", **SMALL["pola_pvt_tiny"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), source(images()))


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "swin.pth"
    torch.save({"model": small("pola_swin_tiny").state_dict()}, path)
    for call in (
        lambda: create("pola_pvt_tiny", num_classes=3, pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
        lambda: create_model("pola_pvt_tiny", checkpoint=path, img_size=SIZE),
    ):
        with pytest.raises(
            CheckpointError, match=r"swin.pth does not fit PolaPVT(.|\n)*missing \((.|\n)*unexpected \("
        ):
            call()


@pytest.mark.skipif(not hasattr(timm_registry, "_clear_model_entries"), reason="timm < 1.0.31 stores no arguments")
@every_family
@pytest.mark.parametrize("size", [SIZE, (64, 160)])
def test_hugging_face_folder_loads_back(name, size, tmp_path):
    source = small(name)
    source.set_input_size(size)
    save_for_hf(source, tmp_path, safe_serialization=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architecture"] == name and stored["num_classes"] == 7
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    height, width = source.img_size
    with torch.no_grad():
        assert torch.equal(loaded(images(height, width)), source(images(height, width)))
    resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(128, 64), num_classes=2).eval()
    source.set_input_size((128, 64))
    with torch.no_grad():
        tokens = source.forward_features(images(128, 64))
        assert torch.equal(resized.forward_features(images(128, 64)), tokens)


@every_family
def test_checkpoint_path_loads_a_bare_state_dict(name, tmp_path):
    source = small(name)
    torch.save({"model": source.state_dict()}, tmp_path / "ours.pth")
    loaded = create(name, **SMALL[name], num_classes=7, checkpoint_path=str(tmp_path / "ours.pth")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), source(images()))


def test_released_file_loads_by_timm_and_by_torch_hub(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(config_file("pola_swin_t"), read_json("checkpoint_official_tiny.json")["opts"])
    swin = config.MODEL.SWIN
    shape = {
        "img_size": config.DATA.IMG_SIZE,
        "embed_dim": swin.EMBED_DIM,
        "depths": tuple(swin.DEPTHS),
        "num_heads": tuple(swin.NUM_HEADS),
        "window_size": swin.WINDOW_SIZE,
        "attn_type": config.MODEL.LA.ATTN_TYPE,
    }
    weights = load_checkpoint(RELEASED)["model"]
    classes = len(weights["head.bias"])
    overlay = {"file": str(RELEASED)}
    by_timm = timm.create_model("pola_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    by_hub = torch.hub.load(str(ROOT), "pola_swin_tiny", source="local", checkpoint=str(RELEASED), **shape)
    for model in (by_timm, by_hub):
        assert model.num_classes == classes
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="model 'pola_swin' is unknown, expected one of .*pola_swin_tiny, "):
        create_model("pola_swin")


# ---------------------------------------------------------------------------------------------------------------------
# Other dtypes, devices and beginnings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, attention",
    [
        *((name, kernel) for name in ("pola_swin_tiny", "pola_pvt_tiny") for kernel in KERNELS),
        ("pola_pp_b0", "polarity_pp"),
        ("nalaformer_xt", "norm_aware"),
    ],
)
def test_every_module_with_parameters_is_called(name, attention):
    """What offloads, prunes or gathers a module's parameters does it by hooks on its call."""
    model = timm.create_model(name, img_size=64, num_classes=4, attention=attention)
    owners = {path for path, module in model.named_modules() if [*module.parameters(recurse=False)]}
    called = set()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    model(torch.randn(1, 3, 64, 64))
    assert owners and owners <= called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_family
def test_a_model_in_half_precision_computes_and_trains_on_a_cpu(name, dtype):
    model, images = timm.create_model(name, img_size=64, num_classes=4), torch.randn(2, 3, 64, 64)
    expected = model.eval()(images)
    halved = timm.create_model(name, dtype=dtype, img_size=64, num_classes=4)
    halved.load_state_dict(model.state_dict())
    out = halved.eval()(images.to(dtype))
    assert out.dtype == dtype and (out.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
    halved.train()(images.to(dtype)).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in halved.parameters())


@pytest.mark.parametrize(
    "begin", ["to_empty", "device argument", "weights assigned", "nothing after that", "buffers lost"]
)
@every_family
def test_buffers_that_no_file_holds_are_right_after_any_beginning(name, begin):
    size = {"img_size": 96, "num_classes": 4}  # maps that windows do not divide: masks for padding and shift
    model, images = timm.create_model(name, **size).eval(), torch.randn(1, 3, 96, 96)
    if begin == "to_empty":
        with torch.device("meta"):
            other = timm.create_model(name, **size)
        other = other.to_empty(device="cpu")
    elif begin == "device argument":
        other = timm.create_model(name, device="meta", **size)
        assert {parameter.device.type for parameter in other.parameters()} == {"meta"}
        assert other(images.to("meta")).shape == (1, 4)
        other = other.to_empty(device="cpu")
    elif begin in ("weights assigned", "nothing after that"):
        with torch.device("meta"):
            other = timm.create_model(name, **size)
        other.load_state_dict(model.state_dict(), assign=True)
        if begin == "nothing after that":
            assert torch.equal(other.eval()(images), model(images))
        for module in other.modules():  # as accelerate leaves them
            for key, buffer in module.named_buffers(recurse=False):
                if key in module._non_persistent_buffers_set:
                    module.register_buffer(key, buffer.to("meta"), persistent=False)
        other = other.to("cpu")
    else:  # as transformers leaves them, which then calls what timm's modules have too
        other = timm.create_model(name, **size)
        for module in other.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key in module._non_persistent_buffers_set:
                    module.register_buffer(key, torch.ones_like(buffer), persistent=False)
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images), model(images))
