"""What takes minutes: every official model against the literal implementation, and whole-model compilation.

make test-slow
"""

import pytest
import torch
from conftest import OFFICIAL, config_file, fill_with_recipe, recipe_input
from literal_models import pola_pvt_logits, pola_swin_logits

import main
from config import image_size, load_config, parse_sr_ratios
from logger import read_metrics
from models import PVT_DEPTHS, build_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_model_equals_the_literal_model_in_float64(name):
    config = load_config(config_file(name))
    model = fill_with_recipe(build_model(config)).eval().double()
    images = recipe_input(image_size(config)[0])[:1].double()
    with torch.inference_mode():
        logits, state = model(images), model.state_dict()
        attention = {"attn_type": config.MODEL.LA.ATTN_TYPE, "alpha": config.MODEL.LA.ALPHA}
        attention["kernel_size"] = config.MODEL.LA.KERNEL_SIZE
        if config.MODEL.TYPE == "pola_swin":
            expected = pola_swin_logits(
                state,
                images,
                img_size=image_size(config),
                patch_size=config.MODEL.SWIN.PATCH_SIZE,
                depths=config.MODEL.SWIN.DEPTHS,
                num_heads=config.MODEL.SWIN.NUM_HEADS,
                window_size=config.MODEL.SWIN.WINDOW_SIZE,
                **attention,
            )
        else:
            expected = pola_pvt_logits(
                state,
                images,
                depths=PVT_DEPTHS[config.MODEL.TYPE],
                num_heads=(1, 2, 5, 8),
                sr_ratios=parse_sr_ratios(config.MODEL.LA.PVT_LA_SR_RATIOS),
                **attention,
            )
    assert (logits - expected).abs().max() < 1e-10


def test_a_compiled_run_trains_like_an_eager_one(tiny):
    options = "TRAIN.EPOCHS 1 EMA.ENABLE True PRINT_FREQ 1 DATA.BATCH_SIZE 200"
    for compiled in ("False", "True"):
        main.main(load_config(str(tiny), f"{options} COMPILE {compiled} TAG {compiled}".split()))
    root = tiny.parent / "out" / "tiny"
    eager, compiled = (read_metrics(root / tag / "metrics.jsonl") for tag in ("False", "True"))
    assert len(eager) == len(compiled) == 9
    for expected, record in zip(eager, compiled, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
