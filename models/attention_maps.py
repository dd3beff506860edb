"""What attention computes, as a map: rows of the N×n matrix that each attention layer applies to its values.

Polarity attention never forms that matrix, but applies one all the same: out = A v, with another A for the value
channels of either stream (PolaFormer, ICLR 2025, arXiv 2501.15061, section 4). `record` runs a model once and keeps
what every layer's A is made of; `LayerRecord` computes chosen rows of it. docs/attention_maps.md has the equations.

Letters: B images, W windows of an image (1 where attention sees the whole map), N queries and n keys of a window,
h heads, d channels per head, K kernel size, Q chosen queries.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import PolaLinearAttention, PolaMapAttention, PolaReductionAttention, PolaWindowAttention
from .classifier import Classifier
from .kernels import Kernel, LinearKernel, kernel_of
from .layers import Grid, turned, turns, window_partition
from .nalaformer import NalaMapAttention, NalaSoftmaxAttention, for_both_halves
from .ops.rotary import Rotary, rotate
from .options import AttentionOptions
from .pola_swin import PolaSwinBlock, Tiling
from .softmax_attention import RotaryAttention, SpatialReductionAttention, WindowAttention, reduce_tokens

# Whole maps with rotary positions: linear and softmax attention.
Turning = PolaMapAttention | NalaMapAttention | RotaryAttention | NalaSoftmaxAttention
Attention = PolaLinearAttention | WindowAttention | SpatialReductionAttention | Turning
COMBINED = "combined"  # the mean of a kernel's streams over the value channels that read them
COMPARISONS = ("softmax", "relu")  # over the queries and keys of a layer of another kind
EPS = 1e-6  # of the normalisers, as in models/ops
QUERY_BLOCK = 256  # rows that are held at once where all of them are averaged


class MapError(ValueError):
    """A layer, head, stream or query that the model does not have: the message lists what there is."""


@dataclass(frozen=True)
class LayerRecord:
    """What one attention layer saw in one forward pass, and rows of the matrix that it applied to its values.

    Queries are numbered over the layer's map, row by row: query y·columns + x of `grid` = (rows, columns). A row has a
    weight for each token of `key_grid`, which is smaller than `grid` where the layer reduces its keys. Windows, shifts
    and padding are undone: keys outside the query's window have weight 0.
    """

    name: str
    kernel: Kernel
    grid: Grid
    key_grid: Grid
    q: Tensor  # (B, W, h, N, d); outside of S blocks shifted and scaled, as features are made of them
    k: Tensor  # (B, W, h, n, d), likewise
    v: Tensor  # (B, W, h, n, d), 0 for padding
    g: Tensor | None  # (B, W, h, N, d), the gate
    query_places: Tensor  # (W, N): where each query of a window is in the map, -1 for padding
    key_places: Tensor  # (W, n)
    convolution: Tensor | None = None  # (h, d, K, K) of the depthwise branch; (1, d, K, K): one for all heads
    window: Grid | None = None  # the grid which that convolution sees
    factor: float | None = None  # of softmax's scores; None: 1/√d
    bias: Tensor | None = None  # (W or 1, h, N, n) added to the scores
    rotary: Rotary | None = None  # turns of the features where they meet the values; weights may then be negative

    @property
    def num_heads(self) -> int:
        return self.q.shape[2]

    @property
    def kind(self) -> str:
        """The kernel's name."""
        return self.kernel.name

    @property
    def own_streams(self) -> tuple[str, ...]:
        """The maps that the layer applied to its values; the first is the default of `rows`."""
        return own_streams(self.kernel)

    @property
    def comparisons(self) -> tuple[str, ...]:
        """Attention of other kinds over the same queries and keys: what the layer would look at if it were one."""
        return tuple(kind for kind in COMPARISONS if kind != self.kind)

    @property
    def streams(self) -> tuple[str, ...]:
        """What `rows` can be asked for."""
        return self.own_streams + self.comparisons

    @torch.no_grad()
    def rows(
        self,
        queries: Sequence[int] | Tensor,
        *,
        head: int | None = None,
        stream: str | None = None,
        depthwise: bool = False,
    ) -> Tensor:
        """Rows of the attention matrix of chosen queries, (B, h, Q, keys), keys row by row over `key_grid`.

        Args:
            head: one head only (h is then 1).
            stream: one of `streams`. Those of a kernel (polarity has `same` and `opposite`) are each applied to their
                own of a head's value channels; `combined` is their mean over these channels.
            depthwise: add what the depthwise branch applies to the values, averaged over the channels of the stream.
                Its weights may be negative, and a row does not sum to 1 then; nor does it where features are turned.

        Raises:
            MapError: a query, head or stream that the layer does not have, or a depthwise branch where there is none.
        """
        stream, heads = self._stream(stream), self._heads(head)
        index = self._queries(queries)
        if depthwise and (self.convolution is None or stream not in self.own_streams):
            raise MapError(f"{self.name}: the {stream} map has no depthwise branch")
        keys = self.key_grid[0] * self.key_grid[1]
        out = self.q.new_zeros(len(self.q), heads.stop - heads.start, len(index), keys)
        for window, chosen, positions in self._by_window(index):
            real = self.key_places[window] >= 0
            rows = self._window_rows(stream, window, positions, heads)[..., real]
            out[:, :, chosen[:, None], self.key_places[window, real]] = rows
        if depthwise:
            branch = self.depthwise_rows(index, self.channels(stream))
            out += branch if len(branch) == 1 else branch[heads]
        return out

    @torch.no_grad()
    def received(self, *, head: int | None = None, stream: str | None = None) -> Tensor:
        """The mean row over all queries, (B, h, keys): how much attention each key receives; it sums to 1, unless
        features are turned.

        In linear time for linear attention: mean_i(a_i) = mean_i(left_i) · rightᵀ.
        """
        stream, heads = self._stream(stream), self._heads(head)
        rows, columns = self.key_grid
        out = self.q.new_zeros(len(self.q), heads.stop - heads.start, rows * columns)
        for window, places in enumerate(self.query_places):
            positions, real = (places >= 0).nonzero()[:, 0], self.key_places[window] >= 0
            if not isinstance(self._kernel(stream), LinearKernel):
                blocks = positions.split(QUERY_BLOCK)
                total = sum(self._window_rows(stream, window, block, heads).sum(dim=2) for block in blocks)
            else:
                left, right = self._factors(stream, window, positions, heads)
                total = (left.sum(dim=2, keepdim=True) @ right.transpose(-2, -1))[:, :, 0]
            assert isinstance(total, Tensor)
            out[:, :, self.key_places[window, real]] = total[..., real]
        return out / (self.grid[0] * self.grid[1])

    @torch.no_grad()
    def depthwise_rows(self, queries: Sequence[int] | Tensor, channels: Iterable[int] | None = None) -> Tensor:
        """Rows of the depthwise branch's matrix, the same for all images, (h, Q, keys), or (1, Q, keys) where heads
        share it: the convolution's weights where they fall, and with reduced keys through the linear interpolation back
        to the queries' map.

        The kernel differs from channel to channel of a head: the rows are the mean over `channels` (None: all).
        """
        if self.convolution is None or self.window is None:
            raise MapError(f"{self.name}: its {self.kind} attention has no depthwise branch")
        index = self._queries(queries)
        chosen_channels = slice(None) if channels is None else list(channels)
        kernel = self.convolution[:, chosen_channels].mean(dim=1)  # (h or 1, K, K)
        H, W = self.window
        n, size = self.k.shape[3], kernel.shape[-1]
        reach = torch.arange(size, device=index.device) - size // 2
        out = kernel.new_zeros(len(kernel), len(index), self.key_grid[0] * self.key_grid[1])
        for window, chosen, positions in self._by_window(index):
            y = (positions // W)[:, None, None] + reach[:, None]  # (Q, K, 1)
            x = (positions % W)[:, None, None] + reach  # (Q, 1, K)
            inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
            weights = kernel[:, None] * inside  # (h or 1, Q, K, K), 0 outside of the window
            neighbours = (y * W + x).clamp(0, H * W - 1)
            lower, upper, fraction = _interpolation(neighbours, H * W, n)
            rows = kernel.new_zeros(len(kernel), len(positions), n)
            for place, share in ((lower, 1 - fraction), (upper, fraction)):
                added = (weights * share).to(rows.dtype).flatten(2)
                rows.scatter_add_(2, place.flatten(1).expand(len(kernel), -1, -1), added)
            real = self.key_places[window] >= 0
            out[:, chosen[:, None], self.key_places[window, real]] = rows[:, :, real]
        return out

    def channels(self, stream: str) -> range:
        """The value channels of a head that a stream is applied to."""
        d = self.v.shape[-1]
        return self.kernel.channels(stream, d) if stream in self.kernel.streams else range(d)

    # -----------------------------------------------------------------------------------------------------------------
    # One window
    # -----------------------------------------------------------------------------------------------------------------

    def _window_rows(self, stream: str, window: int, positions: Tensor, heads: slice) -> Tensor:
        """(B, h, Q, n) of the queries at `positions` in a window."""
        kernel = self._kernel(stream)
        if isinstance(kernel, LinearKernel):
            left, right = self._factors(stream, window, positions, heads)
            return left @ right.transpose(-2, -1)
        q, k = self.q[:, window, :, positions], self.k[:, window]
        try:
            scores = kernel.scores(q.transpose(1, 2), k.transpose(1, 2), self.factor)[:, heads]
        except NotImplementedError:
            raise MapError(f"{self.name}: the kernel {kernel.name!r} gives neither features nor scores") from None
        if self.bias is not None:
            scores = scores + self.bias[window % len(self.bias), heads][:, positions]
        return scores.masked_fill(self.key_places[window] < 0, -torch.inf).softmax(dim=-1)

    def _kernel(self, stream: str) -> Kernel:
        """The layer's own kernel, or that of a comparison, which learns nothing."""
        if stream in self.own_streams:
            return self.kernel
        heads, channels = self.num_heads, self.q.shape[-1]
        options = AttentionOptions(attention=stream, learn_scale=False)
        return kernel_of(stream)(heads * channels, heads, options)

    def _factors(self, stream: str, window: int, positions: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """left (B, h, Q, f) and right (B, h, n, f) with rows = left rightᵀ: linear attention with its normaliser."""
        own = stream in self.own_streams
        queries, keys = self._features if own else _features_of(self._kernel(stream), self.q, self.k, self.key_places)
        right = keys[:, window, heads]
        left = {name: self._normalised(q[:, window, heads, positions], right, window) for name, q in queries.items()}
        if own and self.rotary is not None:
            at = Rotary(*(table[positions] for table in self.rotary))
            left, right = {name: rotate(side, at) for name, side in left.items()}, rotate(right, self.rotary)
        if stream in left:
            return left[stream], right
        shares = {name: len(self.channels(name)) / self.v.shape[-1] for name in left}
        return torch.stack([shares[name] * side for name, side in left.items()]).sum(dim=0), right

    def _normalised(self, query_features: Tensor, key_features: Tensor, window: int) -> Tensor:
        count = max(1, int((self.key_places[window] >= 0).sum()))
        mean = key_features.sum(dim=2, keepdim=True) / count
        return query_features / ((query_features @ mean.transpose(-2, -1) + EPS) * count)

    @cached_property
    def _features(self) -> tuple[dict[str, Tensor], Tensor]:
        return _features_of(self.kernel, self.q, self.k, self.key_places)

    def _by_window(self, index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For every window with one of the queries: its number, which queries they are, and their positions in it."""
        where = index.new_empty(2, self.grid[0] * self.grid[1])
        window, position = (self.query_places >= 0).nonzero(as_tuple=True)
        where[:, self.query_places[window, position]] = torch.stack([window, position])
        windows, positions = where[:, index]
        for number in windows.unique().tolist():
            chosen = (windows == number).nonzero()[:, 0]
            yield number, chosen, positions[chosen]

    # -----------------------------------------------------------------------------------------------------------------
    # What was asked for
    # -----------------------------------------------------------------------------------------------------------------

    def _stream(self, stream: str | None) -> str:
        if stream is None:
            return self.own_streams[0]
        if stream not in self.streams:
            raise MapError(f"{self.name} has no map {stream!r}, expected one of {', '.join(self.streams)}")
        return stream

    def _heads(self, head: int | None) -> slice:
        if head is None:
            return slice(0, self.num_heads)
        if not 0 <= head < self.num_heads:
            raise MapError(f"{self.name} has no head {head}, expected 0 to {self.num_heads - 1}")
        return slice(head, head + 1)

    def _queries(self, queries: Sequence[int] | Tensor) -> Tensor:
        index = torch.as_tensor(queries, device=self.query_places.device)
        count = self.grid[0] * self.grid[1]
        if len(index) and not 0 <= index.min() <= index.max() < count:
            raise MapError(f"{self.name} has queries 0 to {count - 1}, received {index.tolist()}")
        return index


def own_streams(kernel: Kernel) -> tuple[str, ...]:
    """The maps that a kernel applies to its values: its streams after their mean, or the one that it has."""
    return (COMBINED, *kernel.streams) if kernel.streams else (kernel.name,)


def _features_of(kernel: Kernel, q: Tensor, k: Tensor, key_places: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Query features (B, W, h, N, f) of each stream, and key features (B, W, h, n, f), 0 for padding."""
    assert isinstance(kernel, LinearKernel)
    queries = {name: t.transpose(2, 3) for name, t in kernel.query_features(q.transpose(2, 3)).items()}
    keys = kernel.features(k.transpose(2, 3)).transpose(2, 3)
    return queries, keys.masked_fill((key_places < 0)[:, None, :, None], 0.0)


def _interpolation(places: Tensor, size: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of n tokens interpolated linearly to `size` (align_corners=False): the two that each of `places` lies between,
    and its distance from the first, 0 to 1."""
    position = ((places.double() + 0.5) * (n / size) - 0.5).clamp(min=0)
    lower = position.long()
    return lower, (lower + 1).clamp(max=n - 1), position - lower


# -- Recording


class Recording(NamedTuple):
    """A model's output and its attention layers, in the order of computation."""

    output: Tensor
    layers: dict[str, LayerRecord]


def attention_layers(model: nn.Module) -> dict[str, Attention]:
    """The attention modules by the name of their block (`layers.0.blocks.1`, `block3.0`), in order of computation.

    Raises MapError for a model that has none of ours.
    """
    found = {
        name.removesuffix(".attn"): module for name, module in model.named_modules() if isinstance(module, Attention)
    }
    if not found:
        raise MapError(
            f"{type(model).__name__} has no attention of this project, whose maps can be computed: name a checkpoint of"
            " another MODEL.TYPE than timm"
        )
    return found


def kernel_in(attention: Attention) -> Kernel:
    """The kernel of a module of `attention_layers`; an S block has that of softmax, which learns nothing."""
    if isinstance(attention, Kernel):
        return attention
    projection = attention.out_proj if isinstance(attention, NalaSoftmaxAttention) else attention.proj
    dim, heads = projection.in_features, attention.num_heads
    return kernel_of("softmax")(dim, heads, AttentionOptions(attention="softmax", learn_scale=False))


def choose_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names, after a look whether the model has them. Raises MapError that lists its layers."""
    known, names = attention_layers(model), list(names)
    for name in names:
        if name not in known:
            raise MapError(f"the model has no attention layer {name!r}, expected some of {', '.join(known)}")
    return names


@torch.no_grad()
def record(model: nn.Module, images: Tensor, layers: Iterable[str] | None = None) -> Recording:
    """Run `model` on normalised images (B, 3, H, W) as it is, and keep what its attention layers saw.

    Args:
        layers: names from `attention_layers`; None: all.

    Raises:
        MapError: a layer that the model does not have, or images of a size for which its position tables are resized.
    """
    sized = isinstance(model, Classifier) and bool(model.position_grids())
    if sized and (size := tuple(images.shape[-2:])) != model.img_size:
        raise MapError(
            f"maps are recorded at the size that a model is made for, {model.img_size}, and the images are {size}:"
            f" call model.set_input_size({size}) first"
        )
    chosen = list(attention_layers(model)) if layers is None else choose_layers(model, layers)
    records: dict[str, LayerRecord] = {}
    with _watched(model, chosen, records):
        output = model(images)
    return Recording(output, records)


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], records: dict[str, LayerRecord]) -> Iterator[None]:
    modules = attention_layers(model)
    handles = []
    watched: list[PolaLinearAttention] = []

    def watch(module: PolaLinearAttention, name: str) -> None:
        attend = module.attend

        def recorded(
            x: Tensor, kv: Tensor | None, grid: Grid, key_grid: Grid, key_mask: Tensor | None = None
        ) -> Tensor:
            *tokens, g = module.split(x, kv)
            records[name] = _kernel_record(model, name, module, tokens, g, grid)
            return attend(x, kv, grid, key_grid, key_mask)

        module.attend = recorded  # type: ignore[method-assign]
        watched.append(module)

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        make = next(make for kind, make in RECORDERS.items() if isinstance(module, kind))
        records[name] = make(model, name, module, *inputs)

    try:
        for name in names:
            module = modules[name]
            if isinstance(module, PolaLinearAttention):
                watch(module, name)
            else:
                handles.append(module.register_forward_pre_hook(partial(note, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in watched:
            del module.attend


def _kernel_record(
    model: nn.Module,
    name: str,
    module: PolaLinearAttention,
    tokens: Sequence[Tensor],
    g: Tensor | None,
    grid: Grid,
) -> LayerRecord:
    h = module.num_heads
    dtype = torch.promote_types(tokens[0].dtype, torch.float32)
    q, k, v = (token.detach().to(dtype) for token in tokens)
    q, k = (prepared.flatten(-2) for prepared in module.prepare(q, k, module.positional_encoding[0]))
    if isinstance(module, PolaWindowAttention):
        block = model.get_submodule(name)
        assert isinstance(block, PolaSwinBlock)
        full, keys, places = block.tiling.grid, block.tiling.grid, _window_places(block.tiling).to(q.device)
        key_places = places
    else:
        assert isinstance(module, PolaReductionAttention)
        full, keys = grid, module.key_grid
        places, key_places = _whole_map(grid, q.device), _whole_map(keys, q.device)
    windows = len(places)
    padding = (key_places < 0)[:, None, :, None]
    return LayerRecord(
        name=name,
        kernel=module,
        grid=full,
        key_grid=keys,
        q=_split(q, windows, h),
        k=_split(k, windows, h),
        v=_split(v, windows, h).masked_fill(padding, 0.0),
        g=None if g is None else _split(g.detach().to(dtype), windows, h),
        query_places=places,
        key_places=key_places,
        convolution=module.dwc.weight[None, :, 0].to(dtype),
        window=grid,
    )


def _window_softmax_record(
    model: nn.Module, name: str, module: WindowAttention, x: Tensor, mask: Tensor | None, window: Grid
) -> LayerRecord:
    block = model.get_submodule(name)
    assert isinstance(block, PolaSwinBlock)
    dtype = torch.promote_types(x.dtype, torch.float32)
    q, k, v = module.qkv(x).detach().to(dtype).chunk(3, dim=-1)
    bias = module.relative_bias(window).permute(2, 0, 1)[None].to(dtype)
    if mask is not None:
        bias = bias + mask[:, None].to(dtype)
    places = _window_places(block.tiling).to(x.device)
    padding = (places < 0)[:, None, :, None]
    return LayerRecord(
        name=name,
        kernel=kernel_in(module),
        grid=block.tiling.grid,
        key_grid=block.tiling.grid,
        q=_split(q, len(places), module.num_heads),
        k=_split(k, len(places), module.num_heads),
        v=_split(v, len(places), module.num_heads).masked_fill(padding, 0.0),
        g=None,
        query_places=places,
        key_places=places,
        factor=module.qk_scale,
        bias=bias,
    )


def _reduction_softmax_record(
    model: nn.Module, name: str, module: SpatialReductionAttention, x: Tensor, grid: Grid
) -> LayerRecord:
    dtype = torch.promote_types(x.dtype, torch.float32)
    q = module.q(x).detach().to(dtype)
    k, v = module.kv(reduce_tokens(module, x, grid)).detach().to(dtype).chunk(2, dim=-1)
    keys = (grid[0] // module.reduction, grid[1] // module.reduction)
    return LayerRecord(
        name=name,
        kernel=kernel_in(module),
        grid=grid,
        key_grid=keys,
        q=_split(q, 1, module.num_heads),
        k=_split(k, 1, module.num_heads),
        v=_split(v, 1, module.num_heads),
        g=None,
        query_places=_whole_map(grid, x.device),
        key_places=_whole_map(keys, x.device),
    )


def _rotary_record(model: nn.Module, name: str, module: Turning, x: Tensor, grid: Grid) -> LayerRecord:
    projection = module.qkvo if isinstance(module, RotaryAttention) else module.qkvg
    q, k, v, g = projection(x).detach().to(torch.promote_types(x.dtype, torch.float32)).chunk(4, dim=-1)
    heads, rotary = module.num_heads, None
    q, k = _split(q, 1, heads), _split(k, 1, heads)
    if isinstance(module, PolaMapAttention):
        rotary = turns(x, grid, 2 * module.head_dim)
    elif isinstance(module, NalaMapAttention):
        rotary = for_both_halves(turns(x, grid, module.head_dim))
    else:  # softmax attention turns what it compares
        own = turns(x, grid, q.shape[-1])
        q, k = turned(q, own), turned(k, own)
    return LayerRecord(
        name=name,
        kernel=kernel_in(module),
        grid=grid,
        key_grid=grid,
        q=q,
        k=k,
        v=_split(v, 1, heads),
        g=_split(g, 1, heads),
        query_places=_whole_map(grid, x.device),
        key_places=_whole_map(grid, x.device),
        convolution=module.lepe.weight[:, 0].unflatten(0, (heads, -1)).to(q.dtype),
        window=grid,
        rotary=rotary,
    )


RECORDERS: dict[Any, Any] = {
    WindowAttention: _window_softmax_record,
    SpatialReductionAttention: _reduction_softmax_record,
    Turning: _rotary_record,
}


def _split(tokens: Tensor, windows: int, heads: int) -> Tensor:
    """(B·W, N, C) to (B, W, h, N, d)."""
    return tokens.unflatten(0, (-1, windows)).unflatten(-1, (heads, -1)).transpose(2, 3)


def _whole_map(grid: Grid, device: torch.device) -> Tensor:
    return torch.arange(grid[0] * grid[1], device=device)[None]


def _window_places(tiling: Tiling) -> Tensor:
    """(W, N): the place in the block's map of each token of its (shifted, padded) windows, -1 for padding."""
    H, W = tiling.grid
    places = torch.arange(H * W).reshape(H, W)
    places = F.pad(places, (0, tiling.padding[1], 0, tiling.padding[0]), value=-1)
    places = torch.roll(places, (-tiling.shift[0], -tiling.shift[1]), dims=(0, 1))
    return window_partition(places[None, :, :, None], tiling.window)[:, :, 0]
