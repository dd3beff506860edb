"""NaLaFormer written out literally, as its specification is read line by line: an oracle for training in float64.

Pure functions of a state dict and an input, with explicit N×N scores, one head at a time. In training BatchNorm takes
the batch's statistics and moves the running ones in the state. There is no stochastic depth.

Letters: B batch, C channels, H×W map, N = H·W tokens, d channels of a head.
"""

import torch
from literal_models import State, depthwise_conv, layer_norm, linear
from torch import Tensor
from torch.nn import functional as F

SHARPNESS, OFFSET = 3.0, 0.5


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convolution(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """3×3 with padding 1, of maps (B, H, W, C)."""
    image = x.permute(0, 3, 1, 2)
    out = F.conv2d(image, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=1)
    return out.permute(0, 2, 3, 1)


def batch_norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    """Over all but the last axis; eps 1e-5, momentum 0.1."""
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        values = x.reshape(-1, x.shape[-1])
        count, running = len(values), (mean, variance)
        mean = values.mean(dim=0)
        variance = ((values - mean) ** 2).mean(dim=0)
        with torch.no_grad():
            running[0].mul_(0.9).add_(0.1 * mean)
            running[1].mul_(0.9).add_(0.1 * variance * count / (count - 1))
            state[f"{name}.num_batches_tracked"].add_(1)
    return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def turned(u: Tensor, angle: Tensor, grid: tuple[int, int]) -> Tensor:
    """u (B, N, d): pairs of the first half by the row, of the second by the column; `angle` (d/2) has each θ twice."""
    token = torch.arange(grid[0] * grid[1])[:, None]
    turn = torch.cat([token // grid[1] * angle[::2], token % grid[1] * angle[::2]], dim=-1)  # (N, d/2), one a pair
    a, b = u[..., ::2], u[..., 1::2]
    pairs = [a * torch.cos(turn) - b * torch.sin(turn), b * torch.cos(turn) + a * torch.sin(turn)]
    return torch.stack(pairs, dim=-1).flatten(-2)


def norm_aware(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, grid: tuple[int, int]) -> Tensor:
    """Section 3, for one head: (B, N, d) each."""
    norm = torch.sqrt((q * q).sum(dim=-1, keepdim=True))
    power = SHARPNESS * (OFFSET + torch.tanh(norm))
    weights, normaliser = 0.0, 0.0
    for sign in (1, -1):
        queries, keys = torch.relu(sign * q / norm) ** power, torch.relu(sign * k) ** SHARPNESS
        weights = weights + turned(queries, angle, grid) @ turned(keys, angle, grid).mT
        normaliser = normaliser + (queries * keys.mean(dim=1, keepdim=True)).sum(dim=-1, keepdim=True)
    return weights @ v / k.shape[1] / (normaliser + 1e-6)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, grid: tuple[int, int]) -> Tensor:
    scores = torch.exp(turned(q, angle, grid) @ turned(k, angle, grid).mT / q.shape[-1] ** 0.5)
    return scores @ v / scores.sum(dim=-1, keepdim=True)


def attention(state: State, prefix: str, x: Tensor, heads: int, letter: str, angle: Tensor) -> Tensor:
    _, H, W, C = x.shape
    q, k, v, g = linear(state, f"{prefix}qkvg", x).split(C, dim=-1)
    op = norm_aware if letter == "L" else softmax_attention
    parts = []
    for each in zip(*(t.flatten(1, 2).split(C // heads, dim=-1) for t in (q, k, v)), strict=True):
        parts.append(op(*each, angle, (H, W)))
    out = torch.cat(parts, dim=-1).unflatten(1, (H, W)) + depthwise_conv(state, f"{prefix}lepe", v, 5)
    return linear(state, f"{prefix}out_proj", layer_norm(state, f"{prefix}ln", out, 1e-5) * silu(g))


def block(state: State, prefix: str, x: Tensor, heads: int, letter: str, angle: Tensor) -> Tensor:
    x = x + depthwise_conv(state, f"{prefix}cpe1", x, 3)
    normed = layer_norm(state, f"{prefix}norm1.norm", x, 1e-6)
    x = x + state[f"{prefix}gamma_1"].flatten() * attention(state, f"{prefix}attn.", normed, heads, letter, angle)
    x = x + depthwise_conv(state, f"{prefix}cpe2", x, 3)
    hidden = gelu(linear(state, f"{prefix}ffn.fc1", layer_norm(state, f"{prefix}norm2.norm", x, 1e-6)))
    hidden = hidden + depthwise_conv(state, f"{prefix}ffn.dwconv", hidden, 3)
    return x + state[f"{prefix}gamma_2"].flatten() * linear(state, f"{prefix}ffn.fc2", hidden)


def nalaformer_logits(
    state: State,
    images: Tensor,
    *,
    depths: list[int],
    num_heads: list[int],
    training: bool = False,
    stage_types: str = "LLSS",
) -> Tensor:
    """Logits (B, classes) of images (B, 3, H, W)."""
    x = images.permute(0, 2, 3, 1)
    for index, stride in ((0, 2), (3, 1), (6, 1), (9, 2)):
        x = batch_norm(
            state, f"patch_embed.proj.{index + 1}", convolution(state, f"patch_embed.proj.{index}", x, stride), training
        )
        x = x if index == 9 else gelu(x)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            angle = state[f"layers.{stage}.RoPE.angle"]
            x = block(state, f"layers.{stage}.blocks.{i}.", x, num_heads[stage], stage_types[stage], angle)
        if stage + 1 < len(depths):
            name = f"layers.{stage}.downsample"
            x = batch_norm(state, f"{name}.norm", convolution(state, f"{name}.reduction", x, 2), training)
    x = silu(batch_norm(state, "norm", linear(state, "proj", x), training)).mean(dim=(1, 2))
    return x @ state["head.weight"].flatten(1).T + state["head.bias"]
