"""Pola-PVT: a Pyramid Vision Transformer whose stages use polarity-aware linear attention or softmax attention.

PolaFormer, ICLR 2025, arXiv 2501.15061; Pyramid Vision Transformer, arXiv 2102.12122.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import PolaReductionAttention
from .classifier import Classifier
from .layers import DropPath, Grid, Mlp, PatchEmbed, drop_path_rates, resize_table
from .options import (
    DEEPEST_STAGE,
    AttentionOptions,
    attention_keywords,
    image_size,
    parse_attention_types,
    require_heads,
    require_whole,
    value_of,
)
from .registry import Variant, register_body
from .softmax_attention import SpatialReductionAttention, reduced_grid

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


# Blocks per stage of each Pola-PVT (the rows of the paper's table; `large` is its B).
DEPTHS: dict[str, Sequence[int]] = {
    "pola_pvt_tiny": (2, 2, 2, 2),
    "pola_pvt_small": (3, 4, 6, 3),
    "pola_pvt_medium": (3, 4, 18, 3),
    "pola_pvt_large": (3, 8, 27, 3),
}


def _variant(config: str, name: str, drop_path_rate: float, about: str) -> Variant:
    return Variant(config, {"depths": DEPTHS[name], "drop_path_rate": drop_path_rate}, about)


@register_body(
    list(DEPTHS),
    variants={
        "pola_pvt_tiny": _variant(
            "pola_pvt_t", "pola_pvt_tiny", 0.1, "Pola-PVT-T: 12.9 M parameters, 78.8 % top-1 reported."
        ),
        "pola_pvt_small": _variant(
            "pola_pvt_s", "pola_pvt_small", 0.1, "Pola-PVT-S: 23.2 M parameters, 81.9 % top-1 reported."
        ),
        "pola_pvt_medium": _variant("pola_pvt_m", "pola_pvt_medium", 0.3, "Pola-PVT-M: 40.0 M parameters."),
        "pola_pvt_large": _variant(
            "pola_pvt_b", "pola_pvt_large", 0.3, "Pola-PVT-B, the paper's base: 54.4 M parameters."
        ),
    },
)
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
        attention: of AttentionOptions, what the polarity blocks are made of.

    Raises ValueError for an image size, spatial reduction, letter or option that does not fit.

    Input (B, in_chans, height, width); output (B, num_classes).
    """

    family = "Pola-PVT"
    first_conv = "patch_embed1.proj"
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
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = False,
        strict_img_size: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        options = AttentionOptions.of(attention)
        letters, _ = parse_attention_types(attn_type, len(depths))
        if "M" in letters:
            raise ValueError(f"MODEL.LA.ATTN_TYPE {attn_type!r}: Pola-PVT has no M stages, expected L or S")
        require_whole("depths, a stage", *depths, high=DEEPEST_STAGE)
        if min(sr_ratios) < 1:
            raise ValueError(f"MODEL.LA.PVT_LA_SR_RATIOS (sr_ratios) are {list(sr_ratios)}, expected integers ≥ 1")
        if min(len(sr_ratios), len(embed_dims), len(num_heads), len(mlp_ratios)) < len(depths):
            raise ValueError(
                f"expected {len(depths)} (depths) values of sr_ratios, embed_dims, num_heads and mlp_ratios"
            )
        require_heads(embed_dims[: len(depths)], num_heads[: len(depths)], "num_heads")
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
                    if grid[0] % sr_ratios[i] or grid[1] % sr_ratios[i]:
                        raise ValueError(
                            f"MODEL.LA.PVT_LA_SR_RATIOS (sr_ratios) {''.join(map(str, sr_ratios))}: the"
                            f" {grid[0]}×{grid[1]} map of stage {i} does not divide by {sr_ratios[i]}"
                        )
                    attn = PolaReductionAttention(
                        dim, num_heads[i], grid, options, sr_ratio=sr_ratios[i], proj_drop=proj_drop_rate
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
        self._finish(embed_dims, modules, 4, num_classes, global_pool, drop_rate)

    @classmethod
    def config_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "depths": DEPTHS[value_of(config, "MODEL.TYPE")],
            "img_size": image_size(config),
            "in_chans": value_of(config, "MODEL.SWIN.IN_CHANS"),
            "attn_type": value_of(config, "MODEL.LA.ATTN_TYPE"),
            "sr_ratios": parse_sr_ratios(value_of(config, "MODEL.LA.PVT_LA_SR_RATIOS")),
            "proj_drop_rate": value_of(config, "MODEL.DROP_RATE"),
            "drop_path_rate": value_of(config, "MODEL.DROP_PATH_RATE"),
            **attention_keywords(config),
        }

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


def parse_sr_ratios(ratios: int | str, num_stages: int = 4) -> tuple[int, ...]:
    """Split 8421 into (8, 4, 2, 1). Raises ValueError for a wrong number of digits or a zero."""
    digits = str(ratios)
    if len(digits) != num_stages or not digits.isdecimal() or "0" in digits:
        raise ValueError(
            f"MODEL.LA.PVT_LA_SR_RATIOS {ratios} is not {num_stages} digits from 1 to 9, such as 1111 or 8421"
        )
    return tuple(int(digit) for digit in digits)
