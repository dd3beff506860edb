"""Print size and cost of every official configuration as a Markdown table: python -m tools.model_table.

FLOPs are those torch.utils.flop_counter sees in one forward pass of one image, a multiply-add counted as two; softmax
attention is counted by its matrix products. Memory is what autograd holds for the backward pass of one float32 image.
"""

import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import image_size, load_config
from models import build_model
from utils.memory import saved_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def measure(name: str) -> tuple[int, float, float]:
    """(image side, parameters in millions, FLOPs in billions) of configs/`name`.yaml."""
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):  # shapes are all that is counted
        model = build_model(config).eval()
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
            model(torch.zeros(1, 3, *image_size(config)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return image_size(config)[0], parameters / 1e6, counter.get_total_flops() / 1e9


def memory(name: str) -> float:
    """MiB that training configs/`name`.yaml holds of an image for the backward pass, parameters not counted."""
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    model = build_model(config)
    image = torch.zeros(1, 3, *image_size(config))
    return saved_bytes(lambda: model(image), excluded=model.parameters()) / 2**20


if __name__ == "__main__":
    sys.stdout.write("| config | size | parameters (M) | FLOPs (G) | memory (MiB) |\n|---|---|---|---|---|\n")
    for path in sorted([*CONFIGS.glob("pola_*.yaml"), *CONFIGS.glob("nalaformer_*.yaml")]):
        side, parameters, flops = measure(path.stem)
        sys.stdout.write(f"| `{path.stem}` | {side} | {parameters:.2f} | {flops:.2f} | {memory(path.stem):.0f} |\n")
