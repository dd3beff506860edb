"""What released models compute: comparisons with the fixtures, for the bodies whose files the recipe fills."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_with_recipe, largest_deviation, recipe_input
from torch import nn


def assert_entries(model: nn.Module, manifest: Path) -> None:
    """Names, order, shapes, dtypes, and which are parameters, as in the released files."""
    parameters = dict(model.named_parameters())
    found = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch."), "param" if key in parameters else "buffer"]
        for key, value in model.state_dict().items()
    ]
    described = json.loads(manifest.read_text())
    assert found == described["entries"]
    assert sum(p.numel() for p in parameters.values()) == described["total_params"]


def assert_golden(model: nn.Module, folder: Path, name: str, float32: float) -> None:
    """Logits, stages and gradient norms; `float32`: largest difference over the logits' standard deviation."""
    golden = np.load(folder / "logits" / f"{name}.npz")
    fill_with_recipe(model).eval()
    scale, images = golden["logits_f64"].std(), recipe_input(224)
    with torch.no_grad():
        assert np.abs(model(images).numpy() - golden["logits_f64"]).max() < float32 * scale
    model.double()
    stages = []
    for stage in model.layers:  # the map for the next stage is the last of what a stage returns
        stage.register_forward_hook(lambda module, args, output: stages.append(output[-1].detach()))
    logits = model(images.double())
    assert np.abs(logits.detach().numpy() - golden["logits_f64"]).max() < 1e-10 * scale
    norms = torch.tensor(golden["stage_l2_f64"])
    assert torch.allclose(torch.stack([s.norm() for s in stages]), norms, rtol=1e-10, atol=0)
    sizes = torch.tensor([s.numel() ** 0.5 for s in stages])
    means = torch.stack([s.mean() for s in stages])
    assert ((means - torch.tensor(golden["stage_mean_f64"])).abs() < 1e-10 * norms / sizes).all()
    reference = json.loads((folder / "grads" / f"{name}.json").read_text())
    loss = logits.square().mean()
    assert loss.item() == pytest.approx(reference["loss_f64"], rel=1e-12)
    loss.backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert norms.keys() == reference["grad_l2"].keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(reference["grad_l2"][key], rel=1e-9), key


def assert_attention(module: nn.Module, file: Path, grid: tuple[int, int]) -> None:
    """An attention module's output and every gradient."""
    fixture = np.load(file)
    names = [key.removeprefix("param.") for key in fixture.files if key.startswith("param.")]
    assert [name for name, _ in module.named_parameters()] == names
    module.load_state_dict({name: torch.from_numpy(fixture[f"param.{name}"]) for name in names})

    def tokens(key: str) -> torch.Tensor:
        return torch.from_numpy(fixture[key]).flatten(2).mT

    with torch.no_grad():
        assert largest_deviation(module(tokens("input"), grid), tokens("output_f32")) < 1e-5
    module.double()
    x = tokens("input").double().requires_grad_()
    output = module(x, grid)
    assert largest_deviation(output.detach(), tokens("output_f64")) < 1e-11
    (output * tokens("cotangent").double()).sum().backward()
    assert largest_deviation(x.grad, tokens("grad_f64.input")) < 1e-11
    for name, parameter in module.named_parameters():
        assert largest_deviation(parameter.grad, fixture[f"grad_f64.{name}"]) < 1e-11, name
