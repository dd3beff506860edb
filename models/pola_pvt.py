"""Pola-PVT: a Pyramid Vision Transformer whose stages use polarity-aware linear attention or softmax attention.

PolaFormer, ICLR 2025, arXiv 2501.15061; Pyramid Vision Transformer, arXiv 2102.12122.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import parse_attention_types
from models.attention import PolaReductionAttention, SpatialReductionAttention, reduced_grid
from models.classifier import Classifier
from models.layers import DropPath, Grid, Mlp, PatchEmbed, drop_path_rates, resize_table
from models.registry import create_variant, default_cfg

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
        img_size: a side or (height, width) in pixels, multiples of 32.
        attn_type: one letter a stage: L polarity, S softmax with spatial reduction 8, 4, 2, 1.
        sr_ratios: spatial reduction of the L stages.
        drop_rate: dropout before the head, timm's sense of the word.
        proj_drop_rate: dropout after embeddings and projections and in MLPs (MODEL.DROP_RATE).
        dynamic_img_size: take images of any multiples of 32, resizing position tables as they are read: what the model
            computes after `set_input_size`. `strict_img_size=False` is timm's other word for it. A model without L
            stages always does, bilinearly as PVT does.

    Input (B, in_chans, height, width); output (B, num_classes).
    """

    unused_released_parameters = ("norm.weight", "norm.bias")

    def __init__(
        self,
        *,
        depths: Sequence[int],
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_type: str = "LLLL",
        sr_ratios: Sequence[int] = (1, 1, 1, 1),
        alpha: float = 4.0,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = False,
        strict_img_size: bool = True,
        backend: str = "auto",
        attention: str = "polarity",
        learn_exponent: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        letters, _ = parse_attention_types(attn_type, len(depths))
        if "M" in letters:
            raise ValueError(f"ATTN_TYPE {attn_type!r}: Pola-PVT has no M stages, expected L or S")
        only_softmax = set(letters) == {"S"}
        unit = 4 * 2 ** (len(depths) - 1)
        self._begin(img_size, unit, in_chans, dynamic_img_size or not strict_img_size or only_softmax)
        self.resize_mode = "bilinear" if only_softmax else "bicubic"
        self.num_stages = len(depths)
        self.grad_checkpointing = False
        for i, rates in enumerate(drop_path_rates(drop_path_rate, list(depths))):
            dim, grid = embed_dims[i], _grid(self.img_size, i)
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
                        proj_drop=proj_drop_rate,
                        backend=backend,
                        attention=attention,
                        learn_exponent=learn_exponent,
                        gate=gate,
                    )
                else:
                    attn = SpatialReductionAttention(
                        dim, num_heads[i], sr_ratio=SOFTMAX_SR_RATIOS[i], proj_drop=proj_drop_rate
                    )
                blocks.append(PolaPVTBlock(dim, attn, mlp_ratio=mlp_ratios[i], drop=proj_drop_rate, drop_path=rate))
            channels = in_chans if i == 0 else embed_dims[i - 1]
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(channels, dim, 4 if i == 0 else 2))
            setattr(self, f"pos_embed{i + 1}", table)
            setattr(self, f"pos_drop{i + 1}", nn.Dropout(proj_drop_rate))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
        modules = [f"block{i + 1}.{depth - 1}" for i, depth in enumerate(depths)]
        self._finish(embed_dims, modules, num_classes, global_pool, drop_rate)

    def forward_stages(
        self, x: Tensor, keep: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Grid]]]:
        x, size = self._input_size(x)
        kept = []
        for i in range(self.num_stages if last is None else last + 1):
            if i > 0:
                x = x.transpose(1, 2).unflatten(2, _grid(size, i - 1))
            grid = _grid(size, i)
            x = getattr(self, f"patch_embed{i + 1}")(x)
            x = getattr(self, f"pos_drop{i + 1}")(x + self._position(i, grid))
            for block in getattr(self, f"block{i + 1}"):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, grid, use_reentrant=False)
                else:
                    x = block(x, grid)
            if i in keep:
                kept.append((x, grid))
        return x, kept

    def _position(self, stage: int, grid: Grid) -> Tensor:
        """The position table of a stage, resized where the input differs from `img_size`."""
        table, own = getattr(self, f"pos_embed{stage + 1}"), _grid(self.img_size, stage)
        return table if grid == own else resize_table(table, own, grid, self.resize_mode)

    def _remove_after(self, last: int, *, norm: bool) -> None:
        for i in range(last + 1, self.num_stages):
            for part in ("patch_embed", "pos_embed", "pos_drop", "block"):
                delattr(self, f"{part}{i + 1}")
        self.num_stages = last + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Make the model what its constructor would make for another size, with position tables resized bicubically.

        Resized tables are new parameters: build the optimizer afterwards.
        """
        before = self.position_grids()
        size = self._fitting(self.img_size if img_size is None else img_size)
        key_grids = {
            module: reduced_grid(_grid(size, i), module.reduction)
            for i in range(self.num_stages)
            for module in getattr(self, f"block{i + 1}").modules()
            if isinstance(module, PolaReductionAttention)
        }
        for module, key_grid in key_grids.items():
            module.key_grid = key_grid
        self.img_size = size
        self._resize_tables(before)
        self._note_arguments()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^(?:patch_embed1|pos_embed1)"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:patch_embed|pos_embed|block)(\d+)"}
        blocks = [(r"^block(\d+)\.(\d+)", None), (r"^(?:patch_embed|pos_embed)(\d+)", (0,))]
        return {"stem": stem, "blocks": blocks}

    def position_grids(self) -> dict[str, Grid]:
        grids = {f"pos_embed{i + 1}": _grid(self.img_size, i) for i in range(self.num_stages)}
        for name, module in self.named_modules():
            if isinstance(module, PolaReductionAttention):
                grids[f"{name}.positional_encoding"] = module.key_grid
        return grids


def _grid(size: Grid, stage: int) -> Grid:
    """The token grid of a stage for images of that size."""
    stride = 4 * 2**stage
    return size[0] // stride, size[1] // stride


# ---------------------------------------------------------------------------------------------------------------------
# Variants: the paper's rows, in timm's registry
# ---------------------------------------------------------------------------------------------------------------------

# Blocks per stage of each Pola-PVT (the rows of the paper's table; `large` is its B).
PVT_DEPTHS: dict[str, Sequence[int]] = {
    "pola_pvt_tiny": (2, 2, 2, 2),
    "pola_pvt_small": (3, 4, 6, 3),
    "pola_pvt_medium": (3, 4, 18, 3),
    "pola_pvt_large": (3, 8, 27, 3),
}
default_cfgs = generate_default_cfgs({name: default_cfg("patch_embed1.proj") for name in PVT_DEPTHS})


def _create(name: str, pretrained: bool, drop_path_rate: float, given: dict[str, Any]) -> nn.Module:
    row = {"depths": PVT_DEPTHS[name], "drop_path_rate": drop_path_rate}
    return create_variant(PolaPVT, name, pretrained, row, given)


@register_model
def pola_pvt_tiny(pretrained: bool = False, **given: Any) -> nn.Module:
    """Pola-PVT-T: 12.9 M parameters, 78.8 % top-1 on ImageNet-1K (reported in the paper)."""
    return _create("pola_pvt_tiny", pretrained, 0.1, given)


@register_model
def pola_pvt_small(pretrained: bool = False, **given: Any) -> nn.Module:
    """Pola-PVT-S: 23.2 M parameters, 81.9 % top-1 (reported in the paper)."""
    return _create("pola_pvt_small", pretrained, 0.1, given)


@register_model
def pola_pvt_medium(pretrained: bool = False, **given: Any) -> nn.Module:
    """Pola-PVT-M: 40.0 M parameters."""
    return _create("pola_pvt_medium", pretrained, 0.3, given)


@register_model
def pola_pvt_large(pretrained: bool = False, **given: Any) -> nn.Module:
    """Pola-PVT-B, the paper's base: 54.4 M parameters."""
    return _create("pola_pvt_large", pretrained, 0.3, given)
