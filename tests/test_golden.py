"""The models compute what the released models compute.

pytest tests/test_golden.py
"""

import json

import numpy as np
import pytest
import recipe
import torch
from conftest import OFFICIAL, REFERENCE, config_file, fill_with_recipe, largest_deviation, read_json, recipe_input

from config import load_config
from models import build_model
from models.attention import PolaReductionAttention, PolaWindowAttention
from models.files import load_checkpoint
from models.loading import load_weights
from models.options import AttentionOptions
from models.softmax_attention import SpatialReductionAttention, WindowAttention

# Parameters that Pola-PVT's released forward pass never used.
UNUSED = {"norm.weight", "norm.bias"}


def test_recipe_is_used_as_the_fixtures_used_it():
    check = read_json("recipe_check.json")
    for name in ("pola_swin_t", "pola_pvt_t"):
        entries = read_json(f"state_dicts/{name}.json")["entries"]
        shapes = {key: np.empty(shape) for key, shape, *_ in entries}
        assert recipe.digest(recipe.fill(shapes)) == check["digests"][name]


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameter_names_shapes_and_count(name):
    reference = read_json(f"state_dicts/{name}.json")
    is_pvt = name.startswith("pola_pvt")
    with torch.device("meta"):
        model = build_model(load_config(config_file(name)))
    expected = [
        (key, tuple(shape))
        for key, shape, _, kind in reference["entries"]
        if kind == "param" and not (is_pvt and key in UNUSED)
    ]
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == expected
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == reference["total_params"] - (1024 if is_pvt else 0)


@pytest.mark.parametrize("name", ["pola_pvt_t", "pola_swin_t"])
def test_logits_stages_and_gradients_of_the_golden_models(name):
    golden = np.load(REFERENCE / "logits" / f"{name}.npz")
    model = fill_with_recipe(build_model(load_config(config_file(name)))).eval()
    images = recipe_input(224)
    with torch.no_grad():
        assert np.abs(model(images).numpy() - golden["logits_f32"]).max() < 5e-5

    model.double()
    stages = []
    modules = model.layers if name == "pola_swin_t" else [getattr(model, f"block{i}")[-1] for i in (1, 2, 3, 4)]
    for module in modules:
        module.register_forward_hook(lambda module, args, output: stages.append(output.detach()))
    logits = model(images.double())
    assert torch.allclose(torch.stack([s.mean() for s in stages]), torch.tensor(golden["stage_mean_f64"]), atol=1e-10)
    assert torch.allclose(torch.stack([s.norm() for s in stages]), torch.tensor(golden["stage_l2_f64"]), rtol=1e-10)
    assert np.abs(logits.detach().numpy() - golden["logits_f64"]).max() < 1e-10

    reference = read_json(f"grads/{name}.json")
    loss = logits.square().mean()
    assert loss.item() == pytest.approx(reference["loss_f64"], rel=1e-12)
    loss.backward()
    expected = {key: norm for key, norm in reference["grad_l2"].items() if key not in UNUSED or name != "pola_pvt_t"}
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert norms.keys() == expected.keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(expected[key], rel=1e-9), key


def _module_of(meta: dict) -> torch.nn.Module:
    if meta["style"] == "swin":
        window = tuple(meta["window_size"])
        if meta["kind"] == "softmax":
            return WindowAttention(meta["dim"], meta["num_heads"], window)
        return PolaWindowAttention(
            meta["dim"],
            meta["num_heads"],
            window,
            AttentionOptions(alpha=meta["alpha"], kernel_size=meta["kernel_size"]),
        )
    if meta["kind"] == "softmax":
        return SpatialReductionAttention(meta["dim"], meta["num_heads"], sr_ratio=meta["sr_ratio"])
    return PolaReductionAttention(
        meta["dim"],
        meta["num_heads"],
        (meta["H"], meta["W"]),
        AttentionOptions(alpha=meta["alpha"], kernel_size=meta["kernel_size"]),
        sr_ratio=meta["sr_ratio"],
    )


@pytest.mark.parametrize("path", sorted((REFERENCE / "attention").glob("*.npz")), ids=lambda path: path.stem)
def test_attention_module_output_and_every_gradient(path):
    fixture = np.load(path)
    meta = json.loads(str(fixture["meta"]))
    module = _module_of(meta)
    names = [key.removeprefix("param.") for key in fixture.files if key.startswith("param.")]
    assert [name for name, _ in module.named_parameters()] == names
    module.load_state_dict({name: torch.from_numpy(fixture[f"param.{name}"]) for name in names})
    if "buffer.relative_position_index" in fixture:
        assert np.array_equal(module.relative_position_index, fixture["buffer.relative_position_index"])

    arguments = [torch.from_numpy(fixture["input"])]
    if meta["style"] == "pvt":
        arguments.append((meta["H"], meta["W"]))
    elif "mask" in fixture:
        arguments.append(torch.from_numpy(fixture["mask"]))
    with torch.no_grad():
        assert largest_deviation(module(*arguments), fixture["output_f32"]) < 1e-5

    module.double()
    arguments[0] = arguments[0].double().requires_grad_()
    output = module(*arguments)
    assert output.dtype == torch.float64
    assert largest_deviation(output.detach(), fixture["output_f64"]) < 1e-11
    (output * torch.from_numpy(fixture["cotangent"]).double()).sum().backward()
    assert largest_deviation(arguments[0].grad, fixture["grad_f64.input"]) < 1e-11
    for name, parameter in module.named_parameters():
        assert largest_deviation(parameter.grad, fixture[f"grad_f64.{name}"]) < 1e-11, name


def test_released_checkpoint_gives_its_logits():
    described = read_json("checkpoint_official_tiny.json")
    checkpoint = load_checkpoint(REFERENCE / "checkpoint_official_tiny.pth")
    model = build_model(load_config(config_file("pola_swin_t"), described["opts"])).eval()
    load_weights(model, checkpoint["model"], "checkpoint_official_tiny.pth")
    expected = np.load(REFERENCE / "checkpoint_official_tiny.npz")
    with torch.no_grad():
        logits = {f"logits_{name}": model.to(dtype)(recipe_input(64).to(dtype)) for name, dtype in _DTYPES.items()}
    assert np.abs(logits["logits_f32"].numpy() - expected["logits_f32"]).max() < 5e-5
    assert np.abs(logits["logits_f64"].numpy() - expected["logits_f64"]).max() < 1e-10


_DTYPES = {"f32": torch.float32, "f64": torch.float64}
