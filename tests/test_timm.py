"""Every variant under timm's model interface, asked what timm asks of its own models; layer decay; torch.hub.

pytest tests/test_timm.py
"""

import pytest
import timm
import torch
from conftest import config_file, fill_with_recipe

from config import load_config
from models import build_model, list_models

SIZE = 96  # pixels; the smallest at which windows, merging and shifts all occur
CONFIGS = {
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


def create(name: str, **arguments) -> torch.nn.Module:
    return timm.create_model(name, **{"img_size": SIZE, **arguments})


def test_timm_lists_the_variants():
    assert list_models() == list(CONFIGS)
    assert set(list_models()) <= set(timm.list_models("pola_*"))


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


@both_families
def test_weights_of_one_construction_load_into_the_other(name):
    config = load_config(config_file(CONFIGS[name]), ["DATA.IMG_SIZE", str(SIZE)])
    configured, registered = fill_with_recipe(build_model(config)).eval(), create(name).eval()
    registered.load_state_dict(configured.state_dict(), strict=True)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(registered(images), configured(images))


@both_families
def test_head_can_be_replaced(name):
    model = create(name, num_classes=5, drop_path_rate=0.0).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert model(images).shape == (2, 5)
        assert model.get_classifier().out_features == model.num_classes == 5
        model.reset_classifier(3)
        assert model(images).shape == (2, 3)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(images), pooled)
        assert pooled.shape == (2, model.head_hidden_size)
        tokens = model.forward_features(images)
        for pool, expected in {
            "max": tokens.amax(dim=1),
            "avgmax": (tokens.mean(dim=1) + tokens.amax(dim=1)) / 2,
            "": tokens,
        }.items():
            model.reset_classifier(0, pool)
            assert torch.equal(model(images), expected) and model.global_pool == pool
        assert create(name, num_classes=0, global_pool="").eval()(images).shape == tokens.shape
    with pytest.raises(ValueError, match="global_pool 'token' is unknown, expected one of 'avg', 'max', 'avgmax', ''"):
        model.reset_classifier(2, "token")


def test_asking_for_weights_without_a_file_says_where_they_are():
    with pytest.raises(ValueError, match=r"no weights of pola_pvt_tiny can be downloaded.*pretrained_cfg_overlay"):
        create("pola_pvt_tiny", pretrained=True)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("pola_swin_huge")
