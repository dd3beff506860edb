"""Pola-PVT: a Pyramid Vision Transformer whose stages use polarity-aware linear attention or softmax attention.

PolaFormer, ICLR 2025, arXiv 2501.15061; Pyramid Vision Transformer, arXiv 2102.12122.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import parse_attention_types
from models.attention import PolaReductionAttention, SpatialReductionAttention
from models.classifier import Classifier
from models.layers import Grid, Mlp, PatchEmbed, drop_path_rates, init_weights

SOFTMAX_SR_RATIOS = (8, 4, 2, 1)  # of the S stages, as in PVT


class PolaPVTBlock(nn.Module):
    """Attention over the whole map and an MLP, each behind LayerNorm, stochastic depth and a residual connection."""

    def __init__(
        self,
        dim: int,
        attn: PolaReductionAttention | SpatialReductionAttention,
        *,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PolaPVT(Classifier):
    """Pola-PVT classifier: four stages of patch embedding, position table and blocks; mean over tokens, linear head.

    Args:
        img_size: (height, width) in pixels, multiples of 32.
        attn_type: one letter a stage: L polarity, S softmax with spatial reduction 8, 4, 2, 1.
        sr_ratios: spatial reduction of the L stages.

    Input (B, in_chans, height, width); output (B, num_classes).
    """

    unused_released_parameters = ("norm.weight", "norm.bias")

    def __init__(
        self,
        *,
        depths: Sequence[int],
        img_size: Grid = (224, 224),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_type: str = "LLLL",
        sr_ratios: Sequence[int] = (1, 1, 1, 1),
        alpha: float = 4.0,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        backend: str = "auto",
        attention: str = "polarity",
        learn_exponent: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        letters, _ = parse_attention_types(attn_type, len(depths))
        if "M" in letters:
            raise ValueError(f"ATTN_TYPE {attn_type!r}: Pola-PVT has no M stages, expected L or S")
        if img_size[0] % 32 or img_size[1] % 32:
            raise ValueError(f"image size {img_size[0]}×{img_size[1]} is not a multiple of 32 in both directions")
        self.img_size = img_size
        self.num_features = embed_dims[-1]
        self.num_stages = len(depths)
        self.grad_checkpointing = False
        for i, rates in enumerate(drop_path_rates(drop_path_rate, list(depths))):
            dim, grid = embed_dims[i], self._grid(i)
            table = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
            nn.init.trunc_normal_(table, std=0.02)
            blocks = []
            for rate in rates:
                attn: PolaReductionAttention | SpatialReductionAttention
                if letters[i] == "L":
                    attn = PolaReductionAttention(
                        dim,
                        num_heads[i],
                        grid,
                        sr_ratio=sr_ratios[i],
                        alpha=alpha,
                        kernel_size=kernel_size,
                        proj_drop=drop_rate,
                        backend=backend,
                        attention=attention,
                        learn_exponent=learn_exponent,
                        gate=gate,
                    )
                else:
                    attn = SpatialReductionAttention(
                        dim, num_heads[i], sr_ratio=SOFTMAX_SR_RATIOS[i], proj_drop=drop_rate
                    )
                blocks.append(PolaPVTBlock(dim, attn, mlp_ratio=mlp_ratios[i], drop=drop_rate, drop_path=rate))
            channels = in_chans if i == 0 else embed_dims[i - 1]
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(channels, dim, 4 if i == 0 else 2))
            setattr(self, f"pos_embed{i + 1}", table)
            setattr(self, f"pos_drop{i + 1}", nn.Dropout(drop_rate))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _grid(self, stage: int) -> Grid:
        """The token grid of a stage at IMG_SIZE."""
        stride = 4 * 2**stage
        return self.img_size[0] // stride, self.img_size[1] // stride

    def _position(self, stage: int, grid: Grid) -> Tensor:
        """The position table of a stage, resized bilinearly where the input differs from IMG_SIZE."""
        table, own = getattr(self, f"pos_embed{stage + 1}"), self._grid(stage)
        if grid == own:
            return table
        image = table.reshape(1, *own, -1).permute(0, 3, 1, 2)
        return F.interpolate(image, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) to tokens (B, N, C) of the last stage."""
        if x.shape[-2] % 32 or x.shape[-1] % 32:
            raise ValueError(f"input of {x.shape[-2]}×{x.shape[-1]} pixels: expected multiples of 32")
        for i in range(self.num_stages):
            x, grid = getattr(self, f"patch_embed{i + 1}")(x)
            x = getattr(self, f"pos_drop{i + 1}")(x + self._position(i, grid))
            for block in getattr(self, f"block{i + 1}"):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, grid, use_reentrant=False)
                else:
                    x = block(x, grid)
            if i < self.num_stages - 1:
                x = x.transpose(1, 2).unflatten(2, grid)
        return x

    def position_grids(self) -> dict[str, Grid]:
        grids = {f"pos_embed{i + 1}": self._grid(i) for i in range(self.num_stages)}
        for name, module in self.named_modules():
            if isinstance(module, PolaReductionAttention):
                grids[f"{name}.positional_encoding"] = module.key_grid
        return grids
