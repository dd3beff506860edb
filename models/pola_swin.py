"""Pola-Swin: a Swin Transformer whose stages use polarity-aware linear attention, softmax attention, or both.

PolaFormer, ICLR 2025, arXiv 2501.15061; Swin Transformer, arXiv 2103.14030.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import PolaWindowAttention
from .classifier import PREVIOUS, Classifier
from .layers import (
    Deriving,
    DropPath,
    Grid,
    Mlp,
    PatchEmbed,
    PatchMerging,
    drop_path_rates,
    resize_table,
    window_partition,
    window_reverse,
)
from .options import (
    DEEPEST_STAGE,
    LARGEST_IMAGE,
    AttentionOptions,
    attention_keywords,
    image_size,
    parse_attention_types,
    require_heads,
    require_number,
    require_whole,
    value_of,
)
from .registry import Variant, register_body
from .softmax_attention import WindowAttention

MASKED = -100.0  # score offset between tokens that a cyclic shift brought together
PADDED = -1.0e9  # of keys that are padding: a weight of exactly 0, and finite, so that averaged buffers stay themselves


class Tiling(NamedTuple):
    """How windows cover a token grid: clipped to it, shifted along axes they do not cover, padded to whole windows."""

    grid: Grid
    window: Grid
    shift: Grid
    padding: Grid

    @classmethod
    def of(cls, grid: Grid, window_size: int, shifted: bool) -> "Tiling":
        H, W = grid
        wh, ww = min(window_size, H), min(window_size, W)
        shift = (wh // 2 if shifted and wh < H else 0, ww // 2 if shifted and ww < W else 0)
        return cls(grid, (wh, ww), shift, (-H % wh, -W % ww))

    def _windows_of(self, image: Tensor) -> Tensor:
        """(windows, tokens per window) of a padded, unshifted (H + pad, W + pad) image, after the shift."""
        shifted = torch.roll(image, (-self.shift[0], -self.shift[1]), dims=(0, 1))
        return window_partition(shifted[None, :, :, None], self.window)[:, :, 0]

    def _real_tokens(self) -> Tensor:
        H, W = self.grid
        return self._windows_of(F.pad(torch.ones(H, W), (0, self.padding[1], 0, self.padding[0]))) > 0

    def key_mask(self) -> Tensor | None:
        """(windows, tokens) bool: True for a real token. A shifted polarity window has no other mask."""
        return self._real_tokens() if any(self.padding) else None

    def score_mask(self) -> Tensor | None:
        """(windows, tokens, tokens) added to scores: −100 between shifted regions, −10⁹ for padded keys."""
        if not any(self.shift) and not any(self.padding):
            return None
        regions = torch.zeros(self.grid[0] + self.padding[0], self.grid[1] + self.padding[1])
        # tokens that the shift wraps around form regions of their own; labels are compared after the shift
        regions[: self.shift[0]] += 1
        regions[:, : self.shift[1]] += 2
        labels = self._windows_of(regions)
        mask = torch.where(labels[:, :, None] == labels[:, None, :], 0.0, MASKED)
        return mask.masked_fill(~self._real_tokens()[:, None, :], PADDED)


@torch.fx.wrap
def repeat_for_images(mask: Tensor, windows: Tensor) -> Tensor:
    """A mask's rows, one a window of an image, for the windows (B·windows, …) of a batch."""
    return mask.repeat(windows.shape[0] // mask.shape[0], 1)


class PolaSwinBlock(Deriving):
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
        drop: float,
        drop_path: float,
        options: AttentionOptions,
    ) -> None:
        super().__init__()
        self.linear, self.shifted = linear, shifted
        self.window_size = window_size
        self.tiling = Tiling.of(grid, window_size, shifted)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn: PolaWindowAttention | WindowAttention
        if linear:
            self.attn = PolaWindowAttention(
                dim, num_heads, self.tiling.window, options, qkv_bias=qkv_bias, proj_drop=drop
            )
        else:
            self.attn = WindowAttention(
                dim, num_heads, self.tiling.window, qkv_bias=qkv_bias, qk_scale=qk_scale, proj_drop=drop
            )
        self.register_buffer("attn_mask", None, persistent=False)
        self.init_non_persistent_buffers()
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Tokens (B, H·W, C) of a grid (H, W); None: the one built for. On another one, tables are resized as they are
        read."""
        tiling, mask = self.tiling, self.attn_mask
        if grid is not None and grid != tiling.grid:
            tiling = Tiling.of(grid, self.window_size_for(grid), self.shifted)
            mask = self._mask(tiling)
            mask = None if mask is None else mask.to(x.device)
        x = x + self.drop_path(self._attend(self.norm1(x), tiling, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def window_size_for(self, grid: Grid) -> int:
        """Polarity windows grow with the grid, so that they cover the same share of it; softmax windows stay."""
        if not self.linear:
            return self.window_size
        growth = max(size / own for size, own in zip(grid, self.tiling.grid, strict=True))
        return max(1, round(self.window_size * growth))

    def fit(self, grid: Grid, window_size: int) -> None:
        """Build the windows and their masks anew; position tables are the model's to resize."""
        self.window_size = window_size
        self.tiling = Tiling.of(grid, window_size, self.shifted)
        if isinstance(self.attn, PolaWindowAttention):
            self.attn.key_grid = self.tiling.window
        else:
            self.attn.fit(self.tiling.window)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        mask = self._mask(self.tiling)
        self.attn_mask = None if mask is None else mask.to(self.norm1.weight.device)

    def _mask(self, tiling: Tiling) -> Tensor | None:
        return tiling.key_mask() if self.linear else tiling.score_mask()

    def _attend(self, x: Tensor, tiling: Tiling, mask: Tensor | None) -> Tensor:
        (H, W), window, (shift_h, shift_w), (pad_h, pad_w) = tiling
        x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, pad_w, 0, pad_h))  # (B, H + pad, W + pad, C)
        if shift_h or shift_w:
            x = torch.roll(x, (-shift_h, -shift_w), dims=(1, 2))
        windows = window_partition(x, window)
        if self.linear and mask is not None:
            mask = repeat_for_images(mask, windows)
        x = window_reverse(self.attn(windows, mask, window), window, (H + pad_h, W + pad_w))
        if shift_h or shift_w:
            x = torch.roll(x, (shift_h, shift_w), dims=(1, 2))
        return x[:, :H, :W].flatten(1, 2)


class PolaSwinStage(nn.Module):
    """Blocks on one token grid, then patch merging (except after the last stage)."""

    def __init__(self, blocks: Sequence[PolaSwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor, grid: Grid, kept: list[tuple[Tensor, Grid]] | None = None) -> Tensor:
        """Tokens (B, H·W, C) of `grid` to those of the next stage's; the blocks' own output is appended to `kept`."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        if kept is not None:
            kept.append((x, grid))
        return x if self.downsample is None else self.downsample(x, grid)


_T = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_S = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3}
_B = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}


@register_body(
    ["pola_swin"],
    variants={
        "pola_swin_tiny": Variant("pola_swin_t", _T, "Pola-Swin-T: 29.3 M parameters, 82.6 % top-1 reported."),
        "pola_swin_small": Variant("pola_swin_s", _S, "Pola-Swin-S: 50.6 M parameters, 83.6 % top-1 reported."),
        "pola_swin_base": Variant("pola_swin_b", _B, "Pola-Swin-B: 89.1 M parameters, 83.8 % top-1 reported."),
        "pola_swin_base_384": Variant(
            "pola_swin_b_384",
            _B | {"window_size": 96},
            "Pola-Swin-B at 384×384 with windows of 96 (softmax 12): 91.6 M parameters.",
            {"size": 384, "crop_pct": 1.0},
        ),
    },
)
class PolaSwin(Classifier):
    """Pola-Swin classifier: patch embedding, stages, LayerNorm, mean over tokens, linear head.

    Args:
        img_size: a side or (height, width) in pixels, multiples of patch_size · 2^(stages − 1).
        attn_type: one letter a stage: L polarity, S window softmax, M polarity in the first blocks (``MLSS4``).
        window_size: window of polarity blocks, in tokens.
        softmax_window_size: window of softmax blocks; None: 7 for a window_size up to 56, 12 above.
        drop_rate: dropout before the head, timm's sense of the word.
        proj_drop_rate: dropout after embeddings and projections and in MLPs (MODEL.DROP_RATE).
        dynamic_img_size: take images of any multiples of that unit, resizing position tables as they are read: what the
            model computes after `set_input_size`. `strict_img_size=False` is timm's other word for it.
        attention: of AttentionOptions, what the polarity blocks are made of.

    Input (B, in_chans, height, width); output (B, num_classes).

    Raises ValueError for an image size, number of heads, letter or option that does not fit.
    """

    family = "Pola-Swin"
    first_conv = "patch_embed.proj"
    function_keys = (*Classifier.function_keys, "MODEL.SWIN.QK_SCALE")
    derived_entries = ("relative_position_index", "attn_mask")
    undecayed = ("absolute_pos_embed", "relative_position_bias_table")

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 56,
        softmax_window_size: int | None = None,
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        ape: bool = False,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = False,
        strict_img_size: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        options = AttentionOptions.of(attention)
        letters, first_linear = parse_attention_types(attn_type, len(depths))
        require_whole("MODEL.SWIN.PATCH_SIZE (patch_size)", patch_size, high=LARGEST_IMAGE)
        require_whole("MODEL.SWIN.WINDOW_SIZE (window_size)", window_size, high=LARGEST_IMAGE)
        require_number("MODEL.SWIN.MLP_RATIO (mlp_ratio)", mlp_ratio, 0.01)
        if qk_scale is not None:
            require_number("MODEL.SWIN.QK_SCALE (qk_scale)", qk_scale)
        require_whole("MODEL.SWIN.EMBED_DIM (embed_dim)", embed_dim)
        require_whole("MODEL.SWIN.DEPTHS (depths), a stage", *depths, high=DEEPEST_STAGE)
        unit = patch_size * 2 ** (len(depths) - 1)
        self._begin(img_size, unit, in_chans, dynamic_img_size or not strict_img_size)
        self.patch_size, self.window_size = patch_size, window_size
        self.softmax_window_size = softmax_window_size or (7 if window_size <= 56 else 12)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        require_heads(dims, num_heads, "MODEL.SWIN.NUM_HEADS (num_heads)")
        grid = self.grid
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=patch_norm)
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.ape = ape
        self.pos_drop = nn.Dropout(proj_drop_rate)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, list(depths))):
            linear_blocks = {"L": len(rates), "S": 0, "M": first_linear}[letters[i]]
            blocks = [
                PolaSwinBlock(
                    dims[i],
                    num_heads[i],
                    grid,
                    linear=j < linear_blocks,
                    window_size=window_size if j < linear_blocks else self.softmax_window_size,
                    shifted=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=proj_drop_rate,
                    drop_path=rate,
                    options=options,
                )
                for j, rate in enumerate(rates)
            ]
            last = i == len(depths) - 1
            stages.append(PolaSwinStage(blocks, None if last else PatchMerging(dims[i])))
            grid = _halved(grid)
        self.layers = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-5)
        modules = [f"layers.{i}.blocks.{depth - 1}" for i, depth in enumerate(depths)]
        self._finish(dims, modules, patch_size, num_classes, global_pool, drop_rate)

    @classmethod
    def config_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        names = ["patch_size", "in_chans", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"]
        names += ["qkv_bias", "qk_scale", "ape", "patch_norm"]
        return {
            "img_size": image_size(config),
            "attn_type": value_of(config, "MODEL.LA.ATTN_TYPE"),
            "proj_drop_rate": value_of(config, "MODEL.DROP_RATE"),
            "drop_path_rate": value_of(config, "MODEL.DROP_PATH_RATE"),
            **{name: value_of(config, f"MODEL.SWIN.{name.upper()}") for name in names},
            **attention_keywords(config),
        }

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().sizes(config) | {"window_size": value_of(config, "MODEL.SWIN.WINDOW_SIZE")}

    @property
    def grid(self) -> Grid:
        """Tokens of the first stage at `img_size`."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    def forward_stages(
        self, x: Tensor, keep: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Grid]]]:
        x, size = self._input_size(x)
        grid: Grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        x = self.patch_embed(x)
        if self.ape:
            table = self.absolute_pos_embed
            x = x + (table if grid == self.grid else resize_table(table, self.grid, grid))
        x = self.pos_drop(x)
        kept: list[tuple[Tensor, Grid]] = []
        last = len(self.layers) - 1 if last is None else last
        for i, stage in enumerate(self.layers[: last + 1]):
            x = stage(x, grid, kept if i in keep else None)
            grid = _halved(grid)
        return x, kept

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _remove_after(self, last: int, *, norm: bool) -> None:
        self.layers = self.layers[: last + 1]
        stage = self.layers[last]
        assert isinstance(stage, PolaSwinStage)
        stage.downsample = None
        if norm:
            self.norm = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            assert isinstance(stage, PolaSwinStage)
            stage.grad_checkpointing = enable

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        window_size: int | None = None,
        softmax_window_size: int | None = None,
    ) -> None:
        """Make the model what its constructor would make for another size, with position tables resized bicubically.

        Resized tables are new parameters: build the optimizer afterwards.

        Args:
            img_size: a side or (height, width) in pixels; None: as it is.
            window_size: window of polarity blocks; None: grown with the image, so that it covers the same share of it.
            softmax_window_size: window of softmax blocks; None: as it is.
        """
        before, old_grid = self.position_grids(), self.grid
        self.img_size = self._fitting(self.img_size if img_size is None else img_size)
        grid = self.grid
        growth = max(new / old for new, old in zip(grid, old_grid, strict=True))
        self.window_size = window_size or max(1, round(self.window_size * growth))
        self.softmax_window_size = softmax_window_size or self.softmax_window_size
        for stage in self.layers:
            assert isinstance(stage, PolaSwinStage)
            for block in stage.blocks:
                assert isinstance(block, PolaSwinBlock)
                block.fit(grid, self.window_size if block.linear else self.softmax_window_size)
            grid = _halved(grid)
        self._resize_tables(before)
        self._note_arguments(window_size=self.window_size, softmax_window_size=self.softmax_window_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^(?:patch_embed|absolute_pos_embed)"
        if coarse:
            return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None), (r"^norm", PREVIOUS)]}
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", PREVIOUS),
            (r"^norm", PREVIOUS),
        ]
        return {"stem": stem, "blocks": blocks}

    def position_grids(self) -> dict[str, Grid]:
        grids: dict[str, Grid] = {"absolute_pos_embed": self.grid} if self.ape else {}
        for name, module in self.named_modules():
            if isinstance(module, PolaWindowAttention):
                grids[f"{name}.positional_encoding"] = module.key_grid
            elif isinstance(module, WindowAttention):
                height, width = module.window
                grids[f"{name}.relative_position_bias_table"] = (2 * height - 1, 2 * width - 1)
        return grids


def _halved(grid: Grid) -> Grid:
    return grid[0] // 2, grid[1] // 2
