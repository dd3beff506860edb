"""The attention modules: polarity-aware linear attention for windows, maps and sequences, and softmax for `S` stages.

Letters: B batch (windows count as batch in Swin), N query tokens, n key tokens, C channels, h heads, d = C/h channels
per head, r spatial reduction ratio.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import ATTENTIONS
from models.layers import Grid, resize_table
from models.ops.linear_attention import KINDS, kernel_attention
from models.ops.polarity_attention import polarity_attention

# they check their input's values and shapes: torch.fx takes each as one operation
torch.fx.wrap("polarity_attention")
torch.fx.wrap("kernel_attention")
assert ("polarity", *KINDS) == ATTENTIONS, "the values of ATTENTION and the kinds of attention that exist differ"


class PolarityKernel(nn.Module):
    """Attention between projected queries and keys by polarity, or for comparison by another kernel.

    PolaFormer, ICLR 2025, arXiv 2501.15061, section 4.1. Parameters: `power` (1, h, 1, d), the raw learnable exponent;
    `scale` (1, 1, C), softplus of which divides q and k.

    Args:
        attention: the kernel between queries and keys: polarity, or for comparison one of models.ops.linear_attention,
            everything around it staying the same. Those have no exponent, so no `power`.
        learn_exponent: False fixes the exponent at 1 + α/2, where a learnable one starts, and there is no `power`.
        learn_scale: False leaves the scale out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        alpha: float,
        backend: str,
        attention: str,
        learn_exponent: bool,
        learn_scale: bool = True,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"ATTENTION {attention!r} is unknown, expected one of {', '.join(ATTENTIONS)}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.alpha = alpha
        self.backend = backend
        self.attention = attention
        learns = attention == "polarity" and learn_exponent
        self.power = nn.Parameter(torch.zeros(1, num_heads, 1, self.head_dim)) if learns else None
        self.scale = nn.Parameter(torch.zeros(1, 1, dim)) if learn_scale else None

    def exponent(self) -> Tensor:
        """p = 1 + α·sigmoid(power), (h, d); without `power` 1 + α/2, its value at power 0."""
        if self.power is None:
            like = next(self.parameters())
            return torch.full((self.num_heads, self.head_dim), 1 + self.alpha / 2, device=like.device, dtype=like.dtype)
        return 1 + self.alpha * torch.sigmoid(self.power[0, :, 0])

    def divisor(self) -> Tensor | None:
        """What queries and keys are divided by, softplus of the scale, (C,); None without a scale."""
        return None if self.scale is None else F.softplus(self.scale[0, 0])

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor | None = None,
        key_mask: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """The values (B, n, C) that q (B, N, C) finds by k (B, n, C): (B, N, C). `position` (n, C) is added to k.

        `key_mask` (B, n) is True for a real key; `dropout` is the probability of leaving a weight of softmax out.
        """
        heads = (self.num_heads, -1)
        queries, keys, values = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        scale = None if (divisor := self.divisor()) is None else divisor.unflatten(-1, heads)
        position = None if position is None else position.unflatten(-1, heads)
        if self.attention == "polarity":
            out = polarity_attention(
                queries,
                keys,
                values,
                self.exponent(),
                scale=scale,
                position=position,
                key_mask=key_mask,
                backend=self.backend,
            )
        else:
            out = kernel_attention(
                self.attention,
                queries,
                keys,
                values,
                scale=scale,
                position=position,
                key_mask=key_mask,
                dropout=dropout,
            )
        return out.flatten(2)


class PolaLinearAttention(PolarityKernel):
    """What both image layouts of polarity-aware linear attention share (section 4 of the paper).

    Subclasses project their tokens to q, k, v and the gate g, then call `attend`. Another parameter is
    `positional_encoding` (1, n, C), added to k.

    Args:
        gate: False leaves the gate out, and its part of the projection with it.
    """

    proj: nn.Linear
    dwc: nn.Conv2d

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_grid: Grid,
        *,
        alpha: float,
        kernel_size: int,
        backend: str,
        attention: str,
        learn_exponent: bool,
        gate: bool,
    ) -> None:
        super().__init__(
            dim, num_heads, alpha=alpha, backend=backend, attention=attention, learn_exponent=learn_exponent
        )
        if kernel_size % 2 == 0:
            raise ValueError(f"KERNEL_SIZE {kernel_size} of the depthwise convolution is even, expected an odd number")
        self.key_grid = key_grid
        self.gate = gate
        self.positional_encoding = nn.Parameter(torch.zeros(1, key_grid[0] * key_grid[1], dim))

    def position(self, key_grid: Grid) -> Tensor:
        """The table added to k, (n, C), resized where the keys are of another grid than it was built for."""
        if key_grid == self.key_grid:
            return self.positional_encoding[0]
        return resize_table(self.positional_encoding[0], self.key_grid, key_grid)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        grid: Grid,
        key_mask: Tensor | None = None,
        key_grid: Grid | None = None,
    ) -> Tensor:
        """Attention over q (B, N, C) and k, v (B, n, C), plus the depthwise branch over v, gated by g: (B, N, C)."""
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, :, None], 0.0)
        out = self.mix(q, k, v, position=self.position(key_grid or self.key_grid), key_mask=key_mask)
        out = out + self.local_branch(v, grid)
        return self.proj(out if g is None else out * g)

    def local_branch(self, v: Tensor, grid: Grid) -> Tensor:
        """Depthwise convolution over v (B, n, C) as a map of N = H·W tokens; all heads share the kernel: (B, N, C)."""
        # repeated as a matrix: its gradient is then laid out like the parameter, as DDP's buckets want it
        kernel = self.dwc.weight.flatten(1).repeat(self.num_heads, 1).unflatten(1, (1, *self.dwc.kernel_size))
        assert self.dwc.bias is not None
        return depthwise_convolution(v, grid, kernel, self.dwc.bias.repeat(self.num_heads))


@torch.fx.wrap
def depthwise_convolution(v: Tensor, grid: Grid, kernel: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel of v (B, n, C), as a map of N = H·W tokens, with its (1, K, K) of `kernel`: (B, N, C)."""
    H, W = grid
    if v.shape[1] != H * W:  # reduced keys: back to N tokens, linearly along the token axis
        v = F.interpolate(v.transpose(1, 2), size=H * W, mode="linear", align_corners=False).transpose(1, 2)
    image = v.unflatten(1, (H, W)).permute(0, 3, 1, 2)  # (B, C, H, W), channels last in memory
    with torch.autocast("cpu", enabled=False):  # its depthwise weight gradient takes twice as long in bfloat16
        if v.device.type == "cpu":
            image = image.to(torch.promote_types(v.dtype, torch.float32))
        out = F.conv2d(image, kernel, bias, padding=kernel.shape[-1] // 2, groups=v.shape[-1])
    return out.permute(0, 2, 3, 1).flatten(1, 2).to(v.dtype)


def _head_convolution(dim: int, num_heads: int, kernel_size: int) -> nn.Conv2d:
    """The depthwise kernel of one head: d×1×K×K, shared by all heads."""
    d = dim // num_heads
    return nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)


class PolaWindowAttention(PolaLinearAttention):
    """Polarity-aware linear attention inside windows (Pola-Swin): one projection gives q, k, v and, if gated, g."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Grid,
        *,
        alpha: float = 4.0,
        kernel_size: int = 5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        attention: str = "polarity",
        learn_exponent: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window,
            alpha=alpha,
            kernel_size=kernel_size,
            backend=backend,
            attention=attention,
            learn_exponent=learn_exponent,
            gate=gate,
        )
        self.qkvg = nn.Linear(dim, (4 if gate else 3) * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = _head_convolution(dim, num_heads, kernel_size)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, window: Grid | None = None) -> Tensor:
        """x (windows·B, N, C); key_mask (windows·B, N) bool, False for padding; window None: the one built for."""
        window = window or self.key_grid
        g = None
        if self.gate:
            q, k, v, g = self.qkvg(x).chunk(4, dim=-1)
        else:
            q, k, v = self.qkvg(x).chunk(3, dim=-1)
        return self.proj_drop(self.attend(q, k, v, g, window, key_mask, window))


class PolaReductionAttention(PolaLinearAttention):
    """Polarity-aware linear attention over a whole map (Pola-PVT): keys and values may come from a reduced map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        *,
        sr_ratio: int = 1,
        alpha: float = 4.0,
        kernel_size: int = 5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        attention: str = "polarity",
        learn_exponent: bool = True,
        gate: bool = True,
    ) -> None:
        key_grid = reduced_grid(grid, sr_ratio)
        super().__init__(
            dim,
            num_heads,
            key_grid,
            alpha=alpha,
            kernel_size=kernel_size,
            backend=backend,
            attention=attention,
            learn_exponent=learn_exponent,
            gate=gate,
        )
        self.qg = nn.Linear(dim, (2 if gate else 1) * dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.reduction = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.dwc = _head_convolution(dim, num_heads, kernel_size)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W), which the reduction ratio divides."""
        q, g = self.qg(x).chunk(2, dim=-1) if self.gate else (self.qg(x), None)
        k, v = self.kv(reduce_tokens(self, x, grid)).chunk(2, dim=-1)
        return self.proj_drop(self.attend(q, k, v, g, grid, key_grid=reduced_grid(grid, self.reduction)))


def reduced_grid(grid: Grid, ratio: int) -> Grid:
    """The grid of keys. Raises ValueError unless the spatial reduction ratio divides the map."""
    if grid[0] % ratio or grid[1] % ratio:
        raise ValueError(f"a {grid[0]}×{grid[1]} map does not divide by the spatial reduction ratio {ratio}")
    return grid[0] // ratio, grid[1] // ratio


def reduce_tokens(module: "PolaReductionAttention | SpatialReductionAttention", x: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, H·W, C) to (B, H·W/r², C) by the module's strided convolution `sr` and LayerNorm `norm`."""
    if module.reduction == 1:
        return x
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return module.norm(module.sr(image).flatten(2).transpose(1, 2))


class PolaSequenceAttention(PolarityKernel):
    """Polarity-aware linear attention over a sequence, some of whose tokens are padding (Long Range Arena).

    Projections and gate as in the image layouts; positions are the model's affair, so keys get none. The depthwise
    branch is a convolution along the sequence with a kernel of its own for each channel.

    Args:
        kernel_size: of the depthwise branch; 0 leaves it out.
        dropout: of softmax's weights, while training; the linear kernels have none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        alpha: float = 4.0,
        kernel_size: int = 0,
        dropout: float = 0.0,
        backend: str = "auto",
        attention: str = "polarity",
        learn_exponent: bool = True,
        learn_scale: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            alpha=alpha,
            backend=backend,
            attention=attention,
            learn_exponent=learn_exponent,
            learn_scale=learn_scale,
        )
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"KERNEL_SIZE {kernel_size} of the depthwise convolution is even, expected an odd number")
        self.gate = gate
        self.dropout = dropout
        self.qkvg = nn.Linear(dim, (4 if gate else 3) * dim)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim) if kernel_size else None

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """x (B, N, C); key_mask (B, N) bool, False for padding, whose tokens influence no other's result."""
        q, k, v, *g = self.qkvg(x).chunk(4 if self.gate else 3, dim=-1)
        out = self.mix(q, k, v, key_mask=key_mask, dropout=self.dropout if self.training else 0.0)
        if self.dwc is not None:
            real = v.masked_fill(~key_mask[:, :, None], 0.0)
            out = out + self.dwc(real.transpose(1, 2)).transpose(1, 2)
        return self.proj(out * g[0] if g else out)


class WindowAttention(nn.Module):
    """Softmax attention inside windows with relative position bias (Swin Transformer, arXiv 2103.14030)."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Grid,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qk_scale = qk_scale
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
        )
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def fit(self, window: Grid) -> None:
        """Index the table for another window; the table is the model's to resize."""
        self.window = window
        self.relative_position_index = relative_position_index(window).to(self.relative_position_index.device)

    def relative_bias(self, window: Grid) -> Tensor:
        """(N, N, h), added to the scores; the table is resized for another window than it was built for."""
        if window == self.window:
            return self.relative_position_bias_table[self.relative_position_index]
        own, other = ((2 * height - 1, 2 * width - 1) for height, width in (self.window, window))
        table = resize_table(self.relative_position_bias_table, own, other)
        return table[relative_position_index(window).to(table.device)]

    def forward(self, x: Tensor, mask: Tensor | None = None, window: Grid | None = None) -> Tensor:
        """x (windows·B, N, C); mask (windows, N, N), added to the scores of each window of an image; window None: the
        one built for."""
        B, N, C = x.shape
        bias = self.relative_bias(window or self.window).permute(2, 0, 1)[None]  # (1, h, N, N)
        windows = 1
        if mask is not None:  # windows join the heads, so that the sum of bias and mask has no batch axis
            windows = mask.shape[0]
            bias = (bias + mask[:, None].to(bias.dtype)).flatten(0, 1)[None]  # (1, windows·h, N, N)
        qkv = self.qkv(x).reshape(B // windows, windows, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # 3 × (B/windows, windows·h, N, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=self.qk_scale)
        out = out.unflatten(1, (windows, self.num_heads)).transpose(2, 3).reshape(B, N, C)
        return self.proj_drop(self.proj(out))


def relative_position_index(window: Grid) -> Tensor:
    """(N, N) row of the bias table for each pair of positions in a window, by their offset."""
    height, width = window
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + height - 1
    column_offset = columns[:, None] - columns[None, :] + width - 1
    return row_offset * (2 * width - 1) + column_offset


class SpatialReductionAttention(nn.Module):
    """Softmax attention whose keys and values come from a map reduced r times (PVT, arXiv 2102.12122)."""

    def __init__(
        self, dim: int, num_heads: int, *, sr_ratio: int = 1, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.reduction = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W)."""
        heads = (self.num_heads, -1)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv(reduce_tokens(self, x, grid)).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
