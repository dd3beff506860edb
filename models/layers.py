"""Building blocks that bodies share.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath as TimmDropPath
from timm.layers import drop_path
from torch import Tensor, nn
from torch.nn import functional as F

from .ops.rotary import Grid, Rotary, frequencies, rotary_table, rotate

# torch.fx takes each as one operation: `rearrange` asks for the type of its input, `drop_path` changes values in place
torch.fx.wrap("rearrange")
torch.fx.wrap("drop_path")


class Deriving(nn.Module):
    """A module whose buffers follow from its arguments and stand in no file.

    They are made again whenever the module is moved, converted or loaded, so that they are right after a start on the
    meta device too (`to_empty`, `load_state_dict(assign=True)`, FSDP, accelerate), and by the method that transformers
    and timm call after loading.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_derive)

    def init_non_persistent_buffers(self) -> None:
        """Make them, on the device of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it derives")

    def _apply(self, fn: Any, recurse: bool = True) -> "Deriving":
        for name in self._non_persistent_buffers_set:
            self._buffers[name] = None  # it may still be without values, which cannot be moved
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self


def _derive(module: Any, incompatible_keys: Any) -> None:
    module.init_non_persistent_buffers()


class RotaryAngles(nn.Module):
    """θ of rotary positions as the released files hold it, each number twice; the forward pass does not read it.

    It is made again whenever the module is moved, converted or loaded, so that a cast that rounds it, an average, or a
    start without values leave nothing behind.
    """

    angle: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("angle", torch.empty(channels // 2))
        self._derive()

    def _derive(self) -> None:
        self.angle = frequencies(self.channels).repeat_interleave(2).to(self.angle)

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryAngles":
        super()._apply(fn, recurse)
        self._derive()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._derive()


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(TimmDropPath):
    """timm's stochastic depth, in a form that keeps its scale when torch.fx removes operations without a reader."""

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


def as_many_tokens(v: Tensor, grid: Grid) -> Tensor:
    """(B, n, C) to the (B, H·W, C) of a grid: those of a reduced map linearly along the token axis."""
    N = grid[0] * grid[1]
    if v.shape[1] == N:
        return v
    return F.interpolate(v.transpose(1, 2), size=N, mode="linear", align_corners=False).transpose(1, 2)


@torch.fx.wrap
def depthwise_convolution(v: Tensor, grid: Grid, kernel: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel of v (B, n, C), as a map of N = H·W tokens, with its (1, K, K) of `kernel`: (B, N, C)."""
    image = as_many_tokens(v, grid).unflatten(1, grid).permute(0, 3, 1, 2)  # (B, C, H, W), channels last in memory
    with torch.autocast("cpu", enabled=False):  # its depthwise weight gradient takes twice as long in bfloat16
        if v.device.type == "cpu":
            image = image.to(torch.promote_types(v.dtype, torch.float32))
        kernel, bias = kernel.to(image.dtype), bias.to(image.dtype)  # of a model in half precision on a CPU
        out = F.conv2d(image, kernel, bias, padding=kernel.shape[-1] // 2, groups=v.shape[-1])
    return out.permute(0, 2, 3, 1).flatten(1, 2).to(v.dtype)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of tokens (B, H·W, C) of a grid (H, W), to as many."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        """Raises ValueError unless the kernel has a middle."""
        if type(kernel_size) is not int or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"MODEL.LA.KERNEL_SIZE is {kernel_size!r}, expected an odd number (kernel_size)")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]  # a token map needs its grid
        assert self.bias is not None
        # by way of a matrix: its gradient is then laid out like the parameter, as DDP's buckets want it
        kernel = self.weight.flatten(1).unflatten(1, (1, *self.kernel_size))
        return depthwise_convolution(x, grid, kernel, self.bias)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution, on tokens or pooled features (…, C)."""

    def __init__(self, in_channels: int, out_channels: int, **keywords: Any) -> None:
        super().__init__(in_channels, out_channels, 1, **keywords)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


@torch.fx.wrap
def turns(like: Tensor, grid: Grid, channels: int) -> Rotary:
    """The turns of a map's tokens, in float32, or float64 for float64."""
    return rotary_table(grid, channels, torch.promote_types(like.dtype, torch.float32), like.device)


@torch.fx.wrap
def turned(x: Tensor, rotary: Rotary) -> Tensor:
    """x (…, N, d) turned in the dtype of the turns, in its own dtype."""
    return rotate(x.to(rotary.cos.dtype), rotary).to(x.dtype)


class PatchEmbed(nn.Module):
    """Image (B, C_in, H·p, W·p) to tokens (B, H·W, C) by a convolution whose kernel is its stride p."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, *, norm: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-5) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PatchMerging(nn.Module):
    """Halve the token grid and double the channels: LayerNorm and a linear layer over 2×2 neighbours (Swin)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        H, W = grid
        # channel order: neighbours down the columns first, as the released weights expect
        x = rearrange(x, "B (H dh W dw) C -> B (H W) (dw dh C)", H=H // 2, dh=2, W=W // 2, dw=2)
        return self.reduction(self.norm(x))


def window_partition(x: Tensor, window: Grid) -> Tensor:
    """(B, H, W, C) to (B·windows, tokens per window, C); H and W are multiples of the window."""
    return rearrange(x, "B (nh wh) (nw ww) C -> (B nh nw) (wh ww) C", wh=window[0], ww=window[1])


def window_reverse(windows: Tensor, window: Grid, grid: Grid) -> Tensor:
    """The inverse of `window_partition`."""
    nh, nw = grid[0] // window[0], grid[1] // window[1]
    return rearrange(windows, "(B nh nw) (wh ww) C -> B (nh wh) (nw ww) C", nh=nh, nw=nw, wh=window[0])


def init_weights(module: nn.Module) -> None:
    """Linear: truncated normal of std 0.02 and zero bias. LayerNorm and convolutions keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_table(table: Tensor, source: Grid, target: Grid, mode: str = "bicubic") -> Tensor:
    """Resize a position table (…, rows · columns, C) from one grid to another; differentiable."""
    image = table.reshape(*source, -1).permute(2, 0, 1)[None]
    image = image.to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(image, size=target, mode=mode, align_corners=False)
    return resized[0].flatten(1).T.reshape(*table.shape[:-2], -1, table.shape[-1]).to(table.dtype)


def drop_path_rates(rate: float, depths: list[int] | tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth per stage and block, linear from 0 at the first block to `rate` at the last.

    Raises ValueError for a rate that is no probability below 1, and for a stage without blocks.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"MODEL.DROP_PATH_RATE (drop_path_rate) is {rate}, expected a number from 0 to below 1")
    if min(depths) < 1:
        raise ValueError(f"MODEL.SWIN.DEPTHS (depths) {list(depths)}: every stage needs a block")
    total = sum(depths)
    flat = [rate * i / max(1, total - 1) for i in range(total)]
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [flat[end - depth : end] for end, depth in zip(ends, depths, strict=True)]
