"""The frame of PolaFormer++ and NaLaFormer: four stages of whole-map attention with rotary positions.

A stem and downsamplings of convolutions with BatchNorm, blocks that a subclass gives, a projection with BatchNorm
before the head. No windows, no position tables and no spatial reduction: every block sees the whole map, of any size.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .classifier import PREVIOUS, Classifier
from .layers import DepthwiseConv2d, DropPath, Grid, Pointwise, RotaryAngles, drop_path_rates
from .options import (
    DEEPEST_STAGE,
    DEFAULTS,
    AttentionOptions,
    attention_keywords,
    image_size,
    parse_attention_types,
    require_heads,
    require_number,
    require_whole,
    value_of,
)


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


class Stem(nn.Module):
    """Image (B, C_in, H, W) to a map (B, C, ⌈H/4⌉, ⌈W/4⌉) by four 3×3 convolutions, each with BatchNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for channels, out, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            layers += [_convolution(channels, out, stride), nn.BatchNorm2d(out), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])  # nothing after the last BatchNorm

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """A map (B, C, H, W) to one of half the size by a 3×3 convolution with BatchNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = _convolution(dim, out_dim, stride=2)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of tokens, under the name that it has in the released files."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class FeedForward(nn.Module):
    """Two linear layers with GELU, and a depthwise 3×3 convolution of the hidden map beside it."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dwconv = DepthwiseConv2d(hidden_dim, 3)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x, grid))


class PyramidBlock(nn.Module):
    """Attention and feed-forward, normalised, scaled and with stochastic depth; subclasses add positions.

    Called with tokens (B, H·W, C) and their grid (H, W).
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, init_value: float, drop_path: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), float(init_value)))
        self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), float(init_value)))
        self.norm1 = ChannelNorm(dim)
        self.attn = attn
        self.norm2 = ChannelNorm(dim)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def attended(self, x: Tensor, grid: Grid) -> Tensor:
        return x + self.drop_path(self.gamma_1.flatten() * self.attn(self.norm1(x), grid))

    def fed_forward(self, x: Tensor, grid: Grid) -> Tensor:
        return x + self.drop_path(self.gamma_2.flatten() * self.ffn(self.norm2(x), grid))


class PyramidStage(nn.Module):
    """Blocks on one token grid, then the downsampling to the next (except in the last stage)."""

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: Downsample | None, angles: Mapping[str, RotaryAngles]
    ) -> None:
        super().__init__()
        for name, each in angles.items():
            self.add_module(name, each)
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Grid, Tensor]:
        """A map (B, C, H, W) to the blocks' tokens (B, H·W, C), their grid, and the map for the next stage."""
        grid = x.shape[-2], x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)
        return x, grid, image if self.downsample is None else self.downsample(image)


class RotaryPyramid(Classifier):
    """Classifier: stem, stages, projection with BatchNorm and SiLU, mean over tokens, head.

    Args:
        img_size: a side or (height, width) in pixels that the model is described with; it takes any size.
        stage_types: one letter a stage: L polarity linear attention, S softmax attention, both with rotary positions.
        projection: channels before the head.
        layer_init_values: of the scales of both branches, one a stage.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block.
        dynamic_img_size, strict_img_size: taken because other models of timm take them; every size fits in any case.
        attention: of AttentionOptions: `backend`, `gate_bias` and `kernel_size`; the rest is fixed.

    Input (B, in_chans, height, width); output (B, num_classes).

    Raises ValueError for a number of heads, a letter or an option that does not fit.
    """

    first_conv = "patch_embed.proj.0"
    function_keys = ()
    kernel: ClassVar[str]  # of the L stages
    block: ClassVar[type[PyramidBlock]]
    linear_attention: ClassVar[type[nn.Module]]  # of channels, heads and options
    softmax_attention: ClassVar[type[nn.Module]]  # of channels, heads and kernel size
    # Of every stage: what its rotary angles are called in the released files, and the heads' widths that they turn.
    angles: ClassVar[Mapping[str, int]] = {"RoPE": 1}
    rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # sizes that a MODEL.TYPE stands for

    def __init__(
        self,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5),
        projection: int = 2048,
        layer_init_values: Sequence[float] = (1, 1, 1, 1),
        stage_types: str = "LLSS",
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = True,
        strict_img_size: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        options = AttentionOptions.of({"attention": self.kernel, **attention})
        if options.attention != self.kernel or not options.gate:
            raise ValueError(
                f"{self.family} has gated {self.kernel} attention (MODEL.LA.ATTENTION, MODEL.LA.GATE) and no other"
            )
        _require_stages(embed_dims, depths, num_heads, mlp_ratios, layer_init_values)
        letters, _ = parse_attention_types(stage_types, len(depths), "MODEL.PPP.STAGE_TYPES", "LS")
        require_whole("MODEL.PPP.PROJECTION (projection)", projection)
        self._begin(img_size, 1, in_chans, True)
        self.patch_embed = Stem(in_chans, embed_dims[0])
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, list(depths))):
            dim, heads = embed_dims[i], num_heads[i]
            blocks = []
            for rate in rates:
                attn: nn.Module
                if letters[i] == "L":
                    attn = self.linear_attention(dim, heads, options)
                else:
                    attn = self.softmax_attention(dim, heads, options.kernel_size)
                blocks.append(self.block(dim, attn, mlp_ratios[i], layer_init_values[i], rate))
            downsample = Downsample(dim, embed_dims[i + 1]) if i + 1 < len(depths) else None
            angles = {name: RotaryAngles(widths * dim // heads) for name, widths in self.angles.items()}
            stages.append(PyramidStage(blocks, downsample, angles))
        self.layers = nn.ModuleList(stages)
        self.proj = self.projection(embed_dims[-1], projection)
        self.norm: nn.Module = nn.BatchNorm2d(projection)
        self.act: nn.Module = nn.SiLU()
        modules = [f"layers.{i}.blocks.{depth - 1}" for i, depth in enumerate(depths)]
        self._finish(embed_dims, modules, 4, num_classes, global_pool, drop_rate)

    @staticmethod
    def projection(channels: int, out_channels: int) -> nn.Module:
        """What tokens (…, C) pass before the head's BatchNorm."""
        return Pointwise(channels, out_channels)

    @classmethod
    def config_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        kind = value_of(config, "MODEL.LA.ATTENTION")
        if kind not in ("polarity", cls.kernel):  # polarity is the key's default, and says nothing
            raise ValueError(f"MODEL.LA.ATTENTION is {kind}: {cls.family} has {cls.kernel} attention and no other")
        names = ["embed_dims", "depths", "num_heads", "mlp_ratios", "projection", "layer_init_values", "stage_types"]
        row = {name: value_of(config, f"MODEL.PPP.{name.upper()}") for name in names}
        if known := cls.rows.get(value_of(config, "MODEL.TYPE")):  # a variant, and what was changed of it
            keys = {name: f"MODEL.PPP.{name.upper()}" for name in row} | {"drop_path_rate": "MODEL.DROP_PATH_RATE"}
            given = {
                name: value_of(config, key) for name, key in keys.items() if value_of(config, key) != DEFAULTS[key]
            }
            row = {**row, **known, **given}
        return {
            "drop_path_rate": value_of(config, "MODEL.DROP_PATH_RATE"),
            **row,
            "img_size": image_size(config),
            "in_chans": value_of(config, "MODEL.SWIN.IN_CHANS"),
            "drop_rate": value_of(config, "MODEL.DROP_RATE"),
            **attention_keywords(config),
            "attention": cls.kernel,
        }

    @classmethod
    def ambiguous_sizes(cls, stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        return {}  # nothing is of a size

    def _initialise(self, module: nn.Module) -> None:
        """Convolutions: normal of std 0.02, no bias. Linear layers and norms keep PyTorch's defaults."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _new_head(self, num_classes: int, **like: Any) -> nn.Module:
        return Pointwise(self.head_hidden_size, num_classes, **like)

    def _set_widths(self, channels: int) -> None:
        super()._set_widths(channels)
        if isinstance(self.proj, nn.Linear | Pointwise):
            self.head_hidden_size = len(self.proj.weight)

    def forward_stages(
        self, x: Tensor, keep: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Grid]]]:
        x = self.patch_embed(x)
        kept: list[tuple[Tensor, Grid]] = []
        tokens = x
        for i, stage in enumerate(self.layers[: len(self.layers) if last is None else last + 1]):
            tokens, grid, x = stage(x)
            if i in keep:
                kept.append((tokens, grid))
        return tokens, kept

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to projected and pooled features (B, P) and, unless `pre_logits`, to logits."""
        x = self.proj(x)
        if not isinstance(self.norm, nn.Identity):
            # tokens as a map of one column; as x.transpose(1, 2)[..., None] PyTorch 2.12's backward is silently wrong
            x = self.norm(x[:, :, None].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :, 0]
        return super().forward_head(self.act(x), pre_logits)

    def _remove_after(self, last: int, *, norm: bool) -> None:
        self.layers = self.layers[: last + 1]
        stage = self.layers[last]
        assert isinstance(stage, PyramidStage)
        stage.downsample = None

    def _remove_head(self) -> None:
        self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()
        super()._remove_head()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            assert isinstance(stage, PyramidStage)
            stage.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Describe the model with another image size; it computes the same, since it has nothing of a size."""
        self.img_size = self._fitting(self.img_size if img_size is None else img_size)
        self._note_arguments()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        after = [(r"^(?:proj|norm)", PREVIOUS)]
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), *after]}
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", PREVIOUS), *after]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def position_grids(self) -> dict[str, Grid]:
        """None: rotary positions need no table."""
        return {}


def _require_stages(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], mlp_ratios: Sequence[float], init: Sequence[float]
) -> None:
    """Raise ValueError unless every stage has whole, fitting sizes."""
    if not isinstance(depths, Sequence) or isinstance(depths, str):
        raise ValueError(
            f"MODEL.PPP.DEPTHS (depths) is {repr(depths)[:80]}, expected a number of blocks for each stage"
        )
    given = {"EMBED_DIMS": dims, "DEPTHS": depths, "NUM_HEADS": heads, "MLP_RATIOS": mlp_ratios}
    for name, values in {**given, "LAYER_INIT_VALUES": init}.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(depths):
            raise ValueError(
                f"MODEL.PPP.{name} ({name.lower()}) is {repr(values)[:80]}, expected one value for each of the"
                f" {len(depths)} stages of MODEL.PPP.DEPTHS (depths)"
            )
    require_whole("MODEL.PPP.EMBED_DIMS (embed_dims), a stage", *dims)
    require_whole("MODEL.PPP.DEPTHS (depths), a stage", *depths, high=DEEPEST_STAGE)
    require_whole("MODEL.PPP.NUM_HEADS (num_heads), a stage", *heads)
    require_heads(dims, heads, "MODEL.PPP.NUM_HEADS (num_heads)")
    for dim, number in zip(dims, heads, strict=True):
        if dim // number % 4:
            raise ValueError(
                f"MODEL.PPP.EMBED_DIMS {list(dims)} and NUM_HEADS {list(heads)} make heads of {dim // number} channels,"
                " expected a multiple of 4, as rotary positions need"
            )
    for dim, ratio in zip(dims, mlp_ratios, strict=True):
        require_number("MODEL.PPP.MLP_RATIOS (mlp_ratios), a stage", ratio, 1 / dim)  # a hidden channel at least
    for value in init:
        require_number("MODEL.PPP.LAYER_INIT_VALUES (layer_init_values), a stage", value)
