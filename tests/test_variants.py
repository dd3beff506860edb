"""Configurations without golden numbers are held to an independent, literal implementation of the specification.

pytest tests/test_variants.py
"""

from functools import partial

import pytest
import recipe
import torch
from conftest import OFFICIAL, config_file, fill_with_recipe, recipe_input
from literal_models import pola_pvt_logits, pola_swin_logits

from config import image_size, load_config
from models import build_model
from models.pola_pvt import DEPTHS, parse_sr_ratios

SMALL_SWIN = "MODEL.SWIN.EMBED_DIM 12 MODEL.SWIN.DEPTHS [2,2,2,1] MODEL.SWIN.NUM_HEADS [1,2,2,4] MODEL.NUM_CLASSES 7 "
SMALL_PVT = "MODEL.NUM_CLASSES 7 "

SWIN = {
    "polarity everywhere": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE LLLL",
    "softmax everywhere, shifted": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE SSSS",
    "mixed stage, one linear block": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE MLSS1",
    "two mixed stages": "DATA.IMG_SIZE 96 MODEL.LA.ATTN_TYPE MMSS1",
    "mixed stage without linear blocks": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE MSSS0",
    "small window, shifted and padded L": "DATA.IMG_SIZE 96 MODEL.LA.ATTN_TYPE LLLL MODEL.SWIN.WINDOW_SIZE 5",
    "small window, shifted, no padding": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE LLSS MODEL.SWIN.WINDOW_SIZE 4",
    "non-square": "DATA.IMG_SIZE [64,96] MODEL.LA.ATTN_TYPE LLSS",
    "non-square, window covers one axis": "DATA.IMG_SIZE [32,160] MODEL.LA.ATTN_TYPE LSSS MODEL.SWIN.WINDOW_SIZE 9",
    "padded S windows of 7": "DATA.IMG_SIZE [160,96] MODEL.LA.ATTN_TYPE SSLL",
    "S windows of 12": "DATA.IMG_SIZE 128 MODEL.LA.ATTN_TYPE SSLS MODEL.SWIN.WINDOW_SIZE 57",
    "alpha and kernel": "DATA.IMG_SIZE 64 MODEL.LA.ALPHA 2.5 MODEL.LA.KERNEL_SIZE 3 MODEL.LA.ATTN_TYPE LLSS",
    "alpha 0, kernel 7": "DATA.IMG_SIZE 64 MODEL.LA.ALPHA 0 MODEL.LA.KERNEL_SIZE 7 MODEL.LA.ATTN_TYPE LLLS",
    "no bias, score scale, position table": "DATA.IMG_SIZE 64 MODEL.SWIN.QKV_BIAS False MODEL.SWIN.QK_SCALE 0.3"
    " MODEL.SWIN.APE True MODEL.LA.ATTN_TYPE LLSS",
    "no patch norm, patch 2, MLP ratio 2.5": "DATA.IMG_SIZE 32 MODEL.SWIN.PATCH_NORM False MODEL.SWIN.PATCH_SIZE 2"
    " MODEL.SWIN.MLP_RATIO 2.5 MODEL.LA.ATTN_TYPE LLSS",
    "odd head dimension": "DATA.IMG_SIZE 64 MODEL.SWIN.EMBED_DIM 9 MODEL.SWIN.NUM_HEADS [3,6,4,8]"
    " MODEL.LA.ATTN_TYPE LLLL",
    "grey input": "DATA.IMG_SIZE 32 MODEL.SWIN.IN_CHANS 1 MODEL.LA.ATTN_TYPE LLSS",
}
PVT = {
    "spatial reduction 8421": "DATA.IMG_SIZE 64 MODEL.LA.PVT_LA_SR_RATIOS 8421",
    "spatial reduction 4211, non-square": "DATA.IMG_SIZE [64,96] MODEL.LA.PVT_LA_SR_RATIOS 4211",
    "mixed stages": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE LSLS MODEL.LA.PVT_LA_SR_RATIOS 2111",
    "softmax everywhere": "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE SSSS",
    "alpha and kernel": "DATA.IMG_SIZE 32 MODEL.LA.ALPHA 3 MODEL.LA.KERNEL_SIZE 9",
}


def _literal(config):
    """The literal model of a configuration, as a function of its state dict and images."""
    attention = {
        "attn_type": config.MODEL.LA.ATTN_TYPE,
        "alpha": config.MODEL.LA.ALPHA,
        "kernel_size": config.MODEL.LA.KERNEL_SIZE,
    }
    if config.MODEL.TYPE == "pola_swin":
        return partial(
            pola_swin_logits,
            img_size=image_size(config),
            patch_size=config.MODEL.SWIN.PATCH_SIZE,
            depths=config.MODEL.SWIN.DEPTHS,
            num_heads=config.MODEL.SWIN.NUM_HEADS,
            window_size=config.MODEL.SWIN.WINDOW_SIZE,
            qk_scale=config.MODEL.SWIN.QK_SCALE,
            ape=config.MODEL.SWIN.APE,
            patch_norm=config.MODEL.SWIN.PATCH_NORM,
            **attention,
        )
    return partial(
        pola_pvt_logits,
        img_size=image_size(config),
        depths=DEPTHS[config.MODEL.TYPE],
        num_heads=(1, 2, 5, 8),
        sr_ratios=parse_sr_ratios(config.MODEL.LA.PVT_LA_SR_RATIOS),
        **attention,
    )


def _compare(config) -> None:
    model = fill_with_recipe(build_model(config)).eval().double()
    height, width = image_size(config)
    images = torch.from_numpy(recipe.gaussian("input", (2, config.MODEL.SWIN.IN_CHANS, height, width))).double()
    state = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    logits, expected = model(images), _literal(config)(state, images)
    assert (logits - expected).abs().max() < 1e-10
    logits.square().mean().backward()
    expected.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-13), name


@pytest.mark.parametrize("options", SWIN.values(), ids=SWIN.keys())
def test_pola_swin_equals_the_literal_model(options):
    _compare(load_config(config_file("pola_swin_t"), (SMALL_SWIN + options).split()))


@pytest.mark.parametrize("options", PVT.values(), ids=PVT.keys())
def test_pola_pvt_equals_the_literal_model(options):
    _compare(load_config(config_file("pola_pvt_t"), (SMALL_PVT + options).split()))


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_model_equals_the_literal_model(name):
    """At full size, logits of one image in float64; test_golden.py has the two tiny ones, and their gradients."""
    config = load_config(config_file(name))
    model = fill_with_recipe(build_model(config)).eval().double()
    images = recipe_input(image_size(config)[0])[:1].double()
    with torch.inference_mode():
        assert (model(images) - _literal(config)(model.state_dict(), images)).abs().max() < 1e-10


def test_softmax_only_pola_pvt_takes_another_size_and_resizes_its_position_tables():
    config = load_config(config_file("pola_pvt_t"), "DATA.IMG_SIZE 64 MODEL.LA.ATTN_TYPE SSSS".split())
    model = fill_with_recipe(build_model(config)).eval().double()
    images = torch.from_numpy(recipe.gaussian("input", (1, 3, 96, 128))).double()
    with torch.no_grad():
        logits = model(images)
        expected = _literal(config)(model.state_dict(), images)
    assert (logits - expected).abs().max() < 1e-10
