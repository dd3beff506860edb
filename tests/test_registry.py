"""A body added in one place is found by build_model, timm and what lists them; a registered name is not given twice.

pytest tests/test_registry.py
"""

import pytest
import timm
import timm.models._registry as timm_registry
import torch

import models.registry as registry
from models import CheckpointError, build_model, list_models, load, model_arguments
from models.attention import PolaWindowAttention
from models.kernels import register_kernel
from models.kernels.linear import EluKernel, ReluKernel
from models.options import AttentionOptions
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
    if hasattr(timm_registry, "_clear_model_entries"):  # timm 1.0.31
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


@pytest.mark.parametrize("name", ["relu", "softmax", "polarity"])
def test_a_copy_made_by_class_alone_has_the_kernel_of_the_original(name):
    """As torch.nn.DataParallel makes its replicas."""
    module = PolaWindowAttention(8, 2, (3, 3), AttentionOptions(attention=name, kernel_size=3))
    replica = module._replicate_for_data_parallel()
    replica._parameters, replica._modules = module._parameters, module._modules
    x = torch.randn(2, 9, 8)
    assert type(replica) is type(module) and torch.equal(replica(x), module(x))


def test_text_in_a_stored_configuration_is_read_as_the_value_that_it_means():
    text = {"MODEL": {"TYPE": "pola_swin", "SWIN": {"QK_SCALE": "None", "APE": "False"}}, "DATA": {"IMG_SIZE": "64"}}
    assert model_arguments(text)["qk_scale"] is None and model_arguments(text)["ape"] is False
    assert model_arguments(text)["img_size"] == (64, 64)
    with pytest.raises(ValueError, match=r"MODEL.SWIN.DEPTHS is 'many', expected a value such as \[2, 2, 6, 2\]"):
        model_arguments({"MODEL": {"TYPE": "pola_swin", "SWIN": {"DEPTHS": "many"}}})


@pytest.mark.parametrize(
    "content",
    [
        {"config": "a: [1"},
        {"config": "MODEL: {TYPE: pola_swin, LA: {ATTN_TYPE: 1}}"},
        {"config": "MODEL: {TYPE: pola_swin, SWIN: {PATCH_SIZE: 0}}"},
        {"config": "{MODEL: {TYPE: pola_swin}, DATA: {IMG_SIZE: [32]}}"},
        {"config": "MODEL: {TYPE: pola_swin}", "classes": 3},
        {"config": "MODEL: {TYPE: pola_swin}", "classes": [1, 2, 3]},
    ],
)
def test_a_file_whose_configuration_makes_no_model_is_a_checkpoint_error(content, tmp_path):
    torch.save({"model": {"head.bias": torch.zeros(3)}, **content}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="file.pth|the configuration in the checkpoint"):
        load(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "MODEL.SWIN.PATCH_SIZE"),
        ({"img_size": (32,)}, "DATA.IMG_SIZE"),
        ({"attn_type": 5}, "MODEL.LA.ATTN_TYPE"),
        ({"kernel_size": 0}, "MODEL.LA.KERNEL_SIZE"),
        ({"backend": "cuda", "attention": "relu"}, "MODEL.LA.BACKEND"),
        ({"drop_path_rate": 1.5}, "MODEL.DROP_PATH_RATE"),
        ({"depths": (0, 2, 2, 2)}, "MODEL.SWIN.DEPTHS"),
        ({"num_heads": (3, 6, 12)}, "MODEL.SWIN.NUM_HEADS"),
    ],
)
def test_a_constructor_names_the_key_of_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        timm.create_model("pola_swin_tiny", **arguments)
