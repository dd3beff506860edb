"""Pola-Swin: a Swin Transformer whose stages use polarity-aware linear attention, softmax attention, or both.

PolaFormer, ICLR 2025, arXiv 2501.15061; Swin Transformer, arXiv 2103.14030.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import parse_attention_types
from models.attention import PolaWindowAttention, WindowAttention
from models.classifier import Classifier
from models.layers import (
    Grid,
    Mlp,
    PatchEmbed,
    PatchMerging,
    drop_path_rates,
    init_weights,
    window_partition,
    window_reverse,
)

MASKED = -100.0  # score offset between tokens that a cyclic shift brought together


class PolaSwinBlock(nn.Module):
    """Attention in (shifted) windows and an MLP, each behind LayerNorm, stochastic depth and a residual connection.

    The window is clipped to the map, and an axis that it covers is not shifted. A map that is not a multiple of the
    window is padded at the bottom and right; padded tokens are no keys.
    """

    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        *,
        linear: bool,
        window_size: int,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        alpha: float,
        kernel_size: int,
        drop: float,
        drop_path: float,
        backend: str,
        attention: str,
        learn_exponent: bool,
        gate: bool,
    ) -> None:
        super().__init__()
        self.grid = grid
        H, W = grid
        self.window: Grid = (min(window_size, H), min(window_size, W))
        wh, ww = self.window
        self.shift: Grid = (wh // 2 if shifted and wh < H else 0, ww // 2 if shifted and ww < W else 0)
        self.padding: Grid = (-H % wh, -W % ww)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn: PolaWindowAttention | WindowAttention
        if linear:
            self.attn = PolaWindowAttention(
                dim,
                num_heads,
                self.window,
                alpha=alpha,
                kernel_size=kernel_size,
                qkv_bias=qkv_bias,
                proj_drop=drop,
                backend=backend,
                attention=attention,
                learn_exponent=learn_exponent,
                gate=gate,
            )
            mask = self._key_mask()
        else:
            self.attn = WindowAttention(
                dim, num_heads, self.window, qkv_bias=qkv_bias, qk_scale=qk_scale, proj_drop=drop
            )
            mask = self._score_mask()
        self.register_buffer("attn_mask", mask, persistent=False)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        H, W = self.grid
        (pad_h, pad_w), (shift_h, shift_w) = self.padding, self.shift
        x = F.pad(x.unflatten(1, self.grid), (0, 0, 0, pad_w, 0, pad_h))  # (B, H + pad, W + pad, C)
        if shift_h or shift_w:
            x = torch.roll(x, (-shift_h, -shift_w), dims=(1, 2))
        mask = self.attn_mask
        if isinstance(self.attn, PolaWindowAttention) and mask is not None:
            mask = mask.repeat(x.shape[0], 1)  # one row per window of the batch
        windows = self.attn(window_partition(x, self.window), mask)
        x = window_reverse(windows, self.window, (H + pad_h, W + pad_w))
        if shift_h or shift_w:
            x = torch.roll(x, (shift_h, shift_w), dims=(1, 2))
        return x[:, :H, :W].flatten(1, 2)

    def _windows_of(self, image: Tensor) -> Tensor:
        """(windows, tokens per window) of a padded, unshifted (H + pad, W + pad) image, after the shift."""
        shifted = torch.roll(image, (-self.shift[0], -self.shift[1]), dims=(0, 1))
        return window_partition(shifted[None, :, :, None], self.window)[:, :, 0]

    def _real_tokens(self) -> Tensor:
        H, W = self.grid
        return self._windows_of(F.pad(torch.ones(H, W), (0, self.padding[1], 0, self.padding[0]))) > 0

    def _key_mask(self) -> Tensor | None:
        """(windows, tokens) bool: True for a real token. A shifted polarity window has no other mask."""
        return self._real_tokens() if any(self.padding) else None

    def _score_mask(self) -> Tensor | None:
        """(windows, tokens, tokens) added to scores: −100 between shifted regions, −inf for padded keys."""
        if not any(self.shift) and not any(self.padding):
            return None
        regions = torch.zeros(self.grid[0] + self.padding[0], self.grid[1] + self.padding[1])
        # tokens that the shift wraps around form regions of their own; labels are compared after the shift
        regions[: self.shift[0]] += 1
        regions[:, : self.shift[1]] += 2
        labels = self._windows_of(regions)
        mask = torch.where(labels[:, :, None] == labels[:, None, :], 0.0, MASKED)
        return mask.masked_fill(~self._real_tokens()[:, None, :], -torch.inf)


class PolaSwinStage(nn.Module):
    """Blocks on one token grid, then patch merging (except after the last stage)."""

    def __init__(self, blocks: Sequence[PolaSwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PolaSwin(Classifier):
    """Pola-Swin classifier: patch embedding, stages, LayerNorm, mean over tokens, linear head.

    Args:
        img_size: (height, width) in pixels, multiples of patch_size · 2^(stages − 1).
        attn_type: one letter a stage: L polarity, S window softmax, M polarity in the first blocks (``MLSS4``).
        window_size: window of polarity blocks; softmax windows are 7 up to 56 and 12 above.

    Input (B, in_chans, height, width); output (B, num_classes).
    """

    derived_entries = ("relative_position_index", "attn_mask")
    undecayed = ("absolute_pos_embed", "relative_position_bias_table")

    def __init__(
        self,
        *,
        img_size: Grid = (224, 224),
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 56,
        attn_type: str = "LLSS",
        alpha: float = 4.0,
        kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        ape: bool = False,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        backend: str = "auto",
        attention: str = "polarity",
        learn_exponent: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        letters, first_linear = parse_attention_types(attn_type, len(depths))
        unit = patch_size * 2 ** (len(depths) - 1)
        if img_size[0] % unit or img_size[1] % unit:
            raise ValueError(f"image size {img_size[0]}×{img_size[1]} is not a multiple of {unit} in both directions")
        self.img_size = img_size
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        grid: Grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=patch_norm)
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.grid, self.ape = grid, ape
        self.pos_drop = nn.Dropout(drop_rate)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, list(depths))):
            dim = embed_dim * 2**i
            linear_blocks = {"L": len(rates), "S": 0, "M": first_linear or 0}[letters[i]]
            blocks = [
                PolaSwinBlock(
                    dim,
                    num_heads[i],
                    grid,
                    linear=j < linear_blocks,
                    window_size=window_size if j < linear_blocks else (7 if window_size <= 56 else 12),
                    shifted=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    alpha=alpha,
                    kernel_size=kernel_size,
                    drop=drop_rate,
                    drop_path=rate,
                    backend=backend,
                    attention=attention,
                    learn_exponent=learn_exponent,
                    gate=gate,
                )
                for j, rate in enumerate(rates)
            ]
            last = i == len(depths) - 1
            stages.append(PolaSwinStage(blocks, None if last else PatchMerging(grid, dim)))
            if not last:
                grid = (grid[0] // 2, grid[1] // 2)
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-5)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            assert isinstance(stage, PolaSwinStage)
            stage.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) to normalised tokens (B, N, C) of the last stage."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"PolaSwin was built for {self.img_size[0]}×{self.img_size[1]} pixels and received"
                f" {x.shape[-2]}×{x.shape[-1]}: set IMG_SIZE to the input's size"
            )
        x, _ = self.patch_embed(x)
        if self.ape:
            x = x + self.absolute_pos_embed
        x = self.pos_drop(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def position_grids(self) -> dict[str, Grid]:
        grids: dict[str, Grid] = {"absolute_pos_embed": self.grid} if self.ape else {}
        for name, module in self.named_modules():
            if isinstance(module, PolaWindowAttention):
                grids[f"{name}.positional_encoding"] = module.key_grid
            elif isinstance(module, WindowAttention):
                height, width = module.window
                grids[f"{name}.relative_position_bias_table"] = (2 * height - 1, 2 * width - 1)
        return grids
