"""A body added in one place is found by build_model, timm and what lists them; a registered name is not given twice.

pytest tests/test_registry.py
"""

import pytest
import timm
import timm.models._registry as timm_registry
import torch

import models.registry as registry
from models import build_model, list_models, model_arguments
from models.kernels import register_kernel
from models.kernels.linear import EluKernel, ReluKernel
from models.pola_pvt import PolaPVT
from models.registry import Variant, register_body


@pytest.fixture
def body(monkeypatch):
    """A body of one variant, as its own file would declare it."""
    monkeypatch.setattr(registry, "BODIES", dict(registry.BODIES))
    monkeypatch.setattr(registry, "VARIANTS", dict(registry.VARIANTS))

    row = {"depths": (1, 1, 1, 1), "drop_path_rate": 0.0}

    @register_body(["own_body"], variants={"own_body_tiny": Variant("own_t", row, "A body of a test.")})
    class OwnBody(PolaPVT):
        @classmethod
        def config_arguments(cls, config):
            return {"img_size": 32, "depths": (1, 1, 1, 1)}

    yield OwnBody
    timm_registry._clear_model_entries("own_body_tiny")
    timm_registry._model_entrypoints.pop("own_body_tiny")


def test_a_body_is_known_everywhere_by_its_declaration(body):
    config = {"MODEL": {"TYPE": "own_body", "NUM_CLASSES": 4}}
    assert type(build_model(config)) is body and model_arguments(config)["img_size"] == 32
    assert "own_body_tiny" in list_models() and timm.is_model("own_body_tiny")
    model = timm.create_model("own_body_tiny", img_size=32, num_classes=3)
    assert type(model) is body and model(torch.ones(1, 3, 32, 32)).shape == (1, 3)
    assert model.pretrained_cfg["first_conv"] == "patch_embed1.proj"
    assert timm.model_entrypoint("own_body_tiny").__doc__ == "A body of a test."


def test_a_name_is_given_once(body):
    with pytest.raises(ValueError, match="two bodies have MODEL.TYPE 'own_body'"):
        register_body(["own_body"])(PolaPVT)
    assert register_kernel("relu")(ReluKernel) is ReluKernel  # a cell of a notebook, run again
    with pytest.raises(ValueError, match="two kernels are called 'relu'"):
        register_kernel("relu")(EluKernel)
