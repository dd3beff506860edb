"""What every model of this framework is: stages that give a pyramid of feature maps, pooling, and a linear head.

`Classifier` is timm's model interface, written once for all bodies. docs/models.md shows it in use.

Letters: B batch, C channels, H×W token grid, N = H·W tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .attention import open_gate
from .layers import Grid, init_weights, resize_table
from .options import LARGEST_IMAGE, image_size, require_whole

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(dim=1),
    "max": lambda x: x.amax(dim=1),
    "avgmax": lambda x: 0.5 * (x.mean(dim=1) + x.amax(dim=1)),
    "": lambda x: x,  # every token
}
# In a `group_matcher`: what matches joins the layer before it (a number that timm reserves).
PREVIOUS = (99999,)
OUTPUT_FORMATS = ("NCHW", "NHWC", "NLC")


@torch.fx.wrap
def require_size(x: Tensor, img_size: Grid, model: str) -> Tensor:
    """`x` itself. Raises ValueError unless it is `img_size` large; torch.fx keeps the call in the graphs it traces."""
    if tuple(x.shape[-2:]) != img_size:
        raise ValueError(
            f"{model} was built for {img_size[0]}×{img_size[1]} pixels and received {x.shape[-2]}×{x.shape[-1]}: set"
            " IMG_SIZE (img_size) to the input's size, call set_input_size, or build with dynamic_img_size=True"
        )
    return x


def chosen_stages(stages: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Stages counted from the first, and the last of them. Arguments as in `forward_intermediates`.

    Raises ValueError for none, or for one that does not exist.
    """
    if indices is None:
        indices = stages
    if isinstance(indices, int):
        if not 1 <= indices <= stages:
            raise ValueError(f"the last {indices} stages were asked for, expected 1 to {stages}")
        indices = range(stages - indices, stages)
    if not indices or any(not -stages <= index < stages for index in indices):
        raise ValueError(
            f"stages {list(indices)} were asked for, expected some of 0 to {stages - 1}, or −{stages} to −1"
        )
    chosen = sorted({index % stages for index in indices})
    return chosen, chosen[-1]


class TrainableModel(nn.Module, ABC):
    """What optimising and loading need to know about a model."""

    # Ends of the names of entries in this family's files that the model derives instead of storing.
    derived_entries: tuple[str, ...] = ()
    # Parameters in this family's files that the released forward pass never used, and that stood before the head.
    unused_released_parameters: tuple[str, ...] = ()
    # Ends of the names of parameters that are not decayed although they have several dimensions.
    undecayed: tuple[str, ...] = ()
    # Keys that change what the model computes but no shape, beside those of its kernel: compared on loading.
    function_keys: tuple[str, ...] = ()
    # Names of the last layers, which have an output for each class.
    classifiers: tuple[str, ...] = ("head",)

    family = ""  # what models of this body are called in prose
    released = "fetch them from https://huggingface.co/ZachMeng/PolaFormer"  # how to come by released weights

    num_classes: int
    num_features: int  # channels that the head reads, of models of images
    classes: list[str] | None = None  # names of the outputs, where the file that it was loaded from knows them
    config: dict[str, Any]  # the configuration in that file; without a file absent, as peft expects, and not None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed although they have several dimensions."""
        return {name for name, _ in self.named_parameters() if self.undecayed and name.endswith(self.undecayed)}

    @classmethod
    def create(cls, **arguments: Any) -> "TrainableModel":
        """The model of `config_arguments` and a number of classes."""
        return cls(**arguments)

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this architecture, perhaps of another size or writer, in this model's names and shapes, as
        far as the model itself knows how to."""
        return state

    @classmethod
    @abstractmethod
    def config_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a configuration says to the constructor, apart from the number of classes. Raises ValueError."""

    @classmethod
    def ambiguous_sizes(cls, stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys, with both values, of sizes that differ and yet give tables of the same shape."""
        return {}

    @property
    @abstractmethod
    def input_size(self) -> str:
        """The size of what the model reads, in words."""

    @abstractmethod
    def example_input(self, batch: int) -> Tensor:
        """A random batch of what the model reads, on its device."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of storing them."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers from stem to head by parameter names; `coarse`: a layer is a stage."""

    @abstractmethod
    def position_grids(self) -> dict[str, Grid]:
        """(rows, columns) of each position table that can be resized, by parameter name."""


class Classifier(TrainableModel):
    """Base of all bodies that read images: timm's interface.

    Subclasses call `_begin` first and `_finish` last in their constructor and define the abstract methods.
    """

    # Layout of `forward_features`, in timm's words: batch, tokens, channels.
    output_fmt = "NLC"
    first_conv: str  # name of the first convolution
    function_keys: tuple[str, ...] = ("MODEL.LA.ATTENTION", "MODEL.LA.GATE")

    img_size: Grid
    dynamic_img_size: bool
    in_chans: int
    head_hidden_size: int
    global_pool: str
    feature_info: list[dict[str, Any]]
    head: nn.Module

    # -- construction

    def _begin(self, img_size: int | Sequence[int], unit: int, in_chans: int, dynamic_img_size: bool) -> None:
        require_whole("MODEL.SWIN.IN_CHANS (in_chans)", in_chans)
        self.unit = unit  # pixels that one token of the last stage covers in each direction
        self.img_size = self._fitting(img_size)
        self.in_chans = in_chans
        self.dynamic_img_size = dynamic_img_size

    def _finish(
        self,
        channels: Sequence[int],
        modules: Sequence[str],
        first: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        """Describe the stages (channels and module name of each, pixels of a token of the first), initialise all
        weights, and build the head."""
        self.feature_info = [
            {"num_chs": dim, "reduction": first * 2**i, "module": module}
            for i, (dim, module) in enumerate(zip(channels, modules, strict=True))
        ]
        self._set_widths(channels[-1])
        self.apply(self._initialise)
        self.apply(open_gate)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def _initialise(self, module: nn.Module) -> None:
        """Initial values of one module."""
        init_weights(module)

    def _set_widths(self, channels: int) -> None:
        """Note the channels of the last stage, and of what the head reads."""
        self.num_features = self.head_hidden_size = channels

    def _new_head(self, num_classes: int, **like: Any) -> nn.Module:
        return nn.Linear(self.num_features, num_classes, **like)

    def _fitting(self, img_size: int | Sequence[int]) -> Grid:
        """An image size as a pair. Raises ValueError unless the stages divide it."""
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2:
            raise ValueError(f"image size {size}: expected a side or (height, width) (DATA.IMG_SIZE, img_size)")
        require_whole("image size (DATA.IMG_SIZE, img_size)", *size, high=LARGEST_IMAGE)
        height, width = size
        if height % self.unit or width % self.unit:
            raise ValueError(
                f"image size {height}×{width} does not fit {type(self).__name__}: expected multiples of {self.unit}"
                " pixels (DATA.IMG_SIZE, img_size)"
            )
        return height, width

    # -- configuration

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments that decide the sizes of position tables."""
        return {"img_size": image_size(config)}

    @classmethod
    def ambiguous_sizes(cls, stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        theirs, ours = image_size(stored), image_size(config)
        if theirs != ours and prod(theirs) == prod(ours):  # 64×256 and 128×128 have tables of the same shape
            return {"DATA.IMG_SIZE": (list(theirs), list(ours))}
        return {}

    @property
    def input_size(self) -> str:
        height, width = self.img_size
        return f"size {height}" if height == width else f"size {height}×{width}"

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.in_chans, *self.img_size, device=next(self.parameters()).device)

    # -- forward

    def _input_size(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Images and the size that the position tables have to fit. Raises ValueError for a size that is not accepted.

        torch.fx traces a model for its own `img_size`, whatever sizes it accepts otherwise.
        """
        if isinstance(x, Proxy) or not self.dynamic_img_size:
            return require_size(x, self.img_size, type(self).__name__), self.img_size
        return x, self._fitting(x.shape[-2:])

    @abstractmethod
    def forward_stages(
        self, x: Tensor, keep: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Grid]]]:
        """Images (B, in_chans, height, width) through the stages up to `last` (None: all of them).

        Returns the tokens (B, N, C) that these leave, not normalised, and tokens and grid of the stages in `keep`, each
        before a reduction to the next stage's grid.
        """

    def final_norm(self, x: Tensor) -> Tensor:
        """What follows the last stage, on its tokens; only Pola-Swin has something there."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to tokens (B, N, num_features) of the last stage."""
        return self.final_norm(self.forward_stages(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to pooled features (B, C) and, unless `pre_logits`, to logits."""
        x = self.head_drop(POOLS[self.global_pool](x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of chosen stages, beside what `forward_features` returns.

        Args:
            indices: stages, negative ones counted from the last; a number n: the last n; None: all.
            norm: put the model's final normalisation on the last stage's map.
            stop_early: compute no stage after the last one chosen; the tokens returned are then that stage's.
            output_fmt: of the maps: NCHW, NHWC or NLC (tokens).
            intermediates_only: return the maps alone.
        """
        if output_fmt not in OUTPUT_FORMATS:
            raise ValueError(f"output_fmt {output_fmt!r} is unknown, expected one of {', '.join(OUTPUT_FORMATS)}")
        stages = len(self.feature_info)
        keep, last = chosen_stages(stages, indices)
        x, kept = self.forward_stages(x, keep, last if stop_early else None)
        normalised = kept[-1][0] if stop_early and last < stages - 1 else self.final_norm(x)
        if norm and stages - 1 in keep:
            kept[-1] = (normalised, kept[-1][1])
        maps = [_formatted(tokens, grid, output_fmt) for tokens, grid in kept]
        return maps if intermediates_only else (normalised, maps)

    # -- changing a model

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` does not need for these stages; returns them counted from the first."""
        keep, last = chosen_stages(len(self.feature_info), indices)
        shortened = last < len(self.feature_info) - 1
        self._remove_after(last, norm=prune_norm or shortened)
        if shortened:
            del self.feature_info[last + 1 :]
            self.unit = min(self.unit, self.feature_info[last]["reduction"])
        if prune_head or shortened:
            self._remove_head()
            self._set_widths(self.feature_info[last]["num_chs"])
        return keep

    def _remove_head(self) -> None:
        """Leave nothing behind the last stage."""
        self.reset_classifier(0, "")

    @abstractmethod
    def _remove_after(self, last: int, *, norm: bool) -> None:
        """Remove the stages after `last`, the reduction that leads to them, and the final normalisation if `norm`."""

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a freshly initialised one; 0 classes: features only.

        Args:
            global_pool: avg, max, avgmax, or an empty string for every token unpooled; None: as it was.
        """
        if global_pool is not None:
            if global_pool not in POOLS:
                names = ", ".join(repr(name) for name in POOLS)
                raise ValueError(f"global_pool {global_pool!r} is unknown, expected one of {names}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        like = next(self.parameters())
        self.head = self._new_head(num_classes, device=like.device, dtype=like.dtype)
        self._initialise(self.head)

    def _resize_tables(self, before: dict[str, Grid]) -> None:
        """Replace the position tables whose grid differs from `before` by resized ones."""
        for name, grid in self.position_grids().items():
            if grid != before[name]:
                owner, _, leaf = name.rpartition(".")
                table = self.get_parameter(name)
                resized = resize_table(table.detach(), before[name], grid).contiguous()
                setattr(self.get_submodule(owner), leaf, nn.Parameter(resized, table.requires_grad))

    def _note_arguments(self, **changed: Any) -> None:
        """Record changed constructor arguments where timm looks for them when it describes a model in a file."""
        self._traits = {**getattr(self, "_traits", {}), "img_size": self.img_size}
        self._model_args = {**getattr(self, "_model_args", {}), "img_size": self.img_size, **changed}


def _formatted(tokens: Tensor, grid: Grid, output_fmt: str) -> Tensor:
    """Tokens (B, N, C) as a map of that format."""
    if output_fmt == "NLC":
        return tokens
    image = tokens.unflatten(1, grid)
    return image if output_fmt == "NHWC" else image.permute(0, 3, 1, 2).contiguous()
