"""Attention with a kernel, for windows, maps and sequences: project, kernel, local branch, gate, project.

The layouts inherit from the kernel that they are built with (models/kernels), so that what a kernel learns stands in a
file beside the projections, under the names of the released files: `PolaWindowAttention(64, 2, (7, 7))` is an instance
of PolaWindowAttention and of PolarityKernel.

Letters: B batch (windows count as batch in Swin), N query tokens, n key tokens, C channels, h heads, d = C/h channels
per head, r spatial reduction ratio.
"""

from functools import cache
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .kernels import Kernel, LinearKernel, kernel_of
from .layers import DepthwiseConv2d, Grid, as_many_tokens, depthwise_convolution, resize_table, turns
from .ops.linear_attention import is_symbolic
from .ops.rotary import Rotary
from .options import AttentionOptions
from .softmax_attention import reduce_tokens, reduced_grid

torch.fx.wrap("depthwise_convolution")  # each an operation, in the names of this file too
torch.fx.wrap("turns")


class KernelAttention(Kernel):
    """Base of the layouts: makes an instance of the layout and of the kernel that the options name.

    Why not a kernel as a submodule: its parameters would be called `attn.kernel.power`, and in every released file of
    this family they are called `attn.power`.
    """

    def __new__(cls, *arguments: Any, **keywords: Any) -> "KernelAttention":
        if "name" in dir(cls):  # it has a kernel: copies are made by class alone
            return object.__new__(cls)
        given = [a for a in (*arguments, *keywords.values()) if isinstance(a, AttentionOptions)]
        return _blank(cls, (given[0] if given else AttentionOptions()).attention)

    def in_one_piece(
        self,
        x: Tensor,
        kv: Tensor | None,
        convolution: nn.Conv2d,
        grid: Grid,
        *,
        gate: bool = True,
        position: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor | None:
        """(mix + depthwise convolution of the values)·g, (B, N, C), of what the projections give, by Triton.

        x (B, N, ·) holds q, without kv (B, n, 2C) k and v, and the gate. None where something else has to compute, or
        `mix` and the convolution are watched.
        """
        raw = self.raw() if isinstance(self, LinearKernel) else None
        if raw is None or is_symbolic(x) or convolution.weight.device != x.device:  # offloaded
            return None
        if "mix" in vars(self) or convolution._forward_hooks or convolution._forward_pre_hooks:
            return None
        assert isinstance(self, LinearKernel)
        others = (position, convolution.weight, raw.first, raw.second)
        backend = self.options.backend
        if self.implementation_of(backend, self.head_dim, x, x if kv is None else kv, *others) != "triton":
            return None
        from .ops.linear_attention.gated import gated_linear_attention  # not every platform has Triton

        local = None  # v itself
        if kv is not None and kv.shape[1] != x.shape[1]:
            local = as_many_tokens(kv.chunk(2, dim=-1)[1], grid)
        return gated_linear_attention(x, kv, local, raw, convolution, self.num_heads, gate, grid, position, rotary)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made when it is asked for: a pickle names the layout and the kernel instead
        return _blank, (type(self).__mro__[1], self.options.attention), self.__dict__


@cache
def _with_kernel(layout: Any, kernel: Any) -> type[KernelAttention]:
    return type(layout.__name__, (layout, kernel), {"__module__": __name__, "__doc__": layout.__doc__})


def _blank(layout: type[KernelAttention], name: str) -> KernelAttention:
    """An instance that is not initialised."""
    return object.__new__(_with_kernel(layout, kernel_of(name)))  # type: ignore[arg-type]  # classes can be hashed


@torch.no_grad()
def open_gate(module: nn.Module) -> None:
    """Give the gate of an attention layout the bias that the options begin with: the last channels of a projection."""
    if isinstance(module, KernelAttention) and module.options.gate and module.options.gate_bias is not None:
        projection = module.qg if isinstance(module, PolaReductionAttention) else module.qkvg
        assert isinstance(projection, nn.Linear)
        if projection.bias is None:
            raise ValueError(
                "MODEL.LA.GATE_BIAS (gate_bias) needs the projections' bias (MODEL.SWIN.QKV_BIAS, qkv_bias)"
            )
        projection.bias[-projection.in_features :] = module.options.gate_bias


class PolaLinearAttention(KernelAttention):
    """What both image layouts of polarity-aware linear attention share (PolaFormer, arXiv 2501.15061, section 4).

    Subclasses project their tokens to q, k, v and the gate g, then call `attend`. A parameter beside the kernel's is
    `positional_encoding` (1, n, C), added to k.
    """

    proj: nn.Linear
    dwc: "HeadConvolution"

    def __init__(self, dim: int, num_heads: int, key_grid: Grid, options: AttentionOptions) -> None:
        if options.kernel_size < 1 or options.kernel_size % 2 == 0:
            raise ValueError(f"MODEL.LA.KERNEL_SIZE is {options.kernel_size}, expected an odd number (kernel_size)")
        super().__init__(dim, num_heads, options)
        self.key_grid = key_grid
        self.positional_encoding = nn.Parameter(torch.zeros(1, key_grid[0] * key_grid[1], dim))

    def position(self, key_grid: Grid) -> Tensor:
        """The table added to k, (n, C), resized where the keys are of another grid than it was built for."""
        if key_grid == self.key_grid:
            return self.positional_encoding.squeeze(0)
        return resize_table(self.positional_encoding[0], self.key_grid, key_grid)

    def split(self, x: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and the gate of what the projections give (`attend`)."""
        gate = self.options.gate
        parts = x.chunk((3 if kv is None else 1) + gate, dim=-1)  # torch.fx takes them by their number alone
        k, v = (parts[1], parts[2]) if kv is None else kv.chunk(2, dim=-1)
        return parts[0], k, v, parts[-1] if gate else None

    def attend(
        self, x: Tensor, kv: Tensor | None, grid: Grid, key_grid: Grid, key_mask: Tensor | None = None
    ) -> Tensor:
        """Attention plus the depthwise branch over the values, gated and projected: (B, N, C).

        x (B, N, ·) holds q, without kv (B, n, 2C) k and v, and the gate if there is one.
        """
        position = self.position(key_grid)
        if key_mask is None:
            out = self.in_one_piece(x, kv, self.dwc, grid, gate=self.options.gate, position=position)
            if out is not None:
                return self.proj(out)
        q, k, v, g = self.split(x, kv)
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, :, None], 0.0)
        out = self.mix(q, k, v, position=position, key_mask=key_mask) + self.dwc(v, grid)
        return self.proj(out if g is None else out * g)


class HeadConvolution(nn.Conv2d):
    """Depthwise convolution over values as a map, with a kernel (d, 1, K, K) that all heads share.

    A module that is called, so that what hooks modules (offloading, pruning, ZeRO) finds its parameters in use.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int) -> None:
        d = dim // num_heads
        super().__init__(d, d, kernel_size, padding=kernel_size // 2, groups=d)
        self.num_heads = num_heads

    def forward(self, v: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]  # tokens with their grid, not a map
        """v (B, n, C) as a map of N = H·W tokens: (B, N, C)."""
        # repeated as a matrix: its gradient is then laid out like the parameter, as DDP's buckets want it
        kernel = self.weight.flatten(1).repeat(self.num_heads, 1).unflatten(1, (1, *self.kernel_size))
        assert self.bias is not None
        return depthwise_convolution(v, grid, kernel, self.bias.repeat(self.num_heads))


class PolaWindowAttention(PolaLinearAttention):
    """Polarity-aware linear attention inside windows (Pola-Swin): one projection gives q, k, v and, if gated, g."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Grid,
        options: AttentionOptions = AttentionOptions(),
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, window, options)
        self.qkvg = nn.Linear(dim, (4 if options.gate else 3) * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = HeadConvolution(dim, num_heads, options.kernel_size)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, window: Grid | None = None) -> Tensor:
        """x (windows·B, N, C); key_mask (windows·B, N) bool, False for padding; window None: the one built for."""
        window = window or self.key_grid
        return self.proj_drop(self.attend(self.qkvg(x), None, window, window, key_mask))


class PolaReductionAttention(PolaLinearAttention):
    """Polarity-aware linear attention over a whole map (Pola-PVT): keys and values may come from a reduced map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        options: AttentionOptions = AttentionOptions(),
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, reduced_grid(grid, sr_ratio), options)
        self.qg = nn.Linear(dim, (2 if options.gate else 1) * dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.reduction = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.dwc = HeadConvolution(dim, num_heads, options.kernel_size)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W), which the reduction ratio divides."""
        kv = self.kv(reduce_tokens(self, x, grid))
        return self.proj_drop(self.attend(self.qg(x), kv, grid, reduced_grid(grid, self.reduction)))


class PolaSequenceAttention(KernelAttention):
    """Polarity-aware linear attention over a sequence, some of whose tokens are padding (Long Range Arena).

    Projections and gate as in the image layouts; positions are the model's affair, so keys get none. The depthwise
    branch is a convolution along the sequence with a kernel of its own for each channel; KERNEL_SIZE 0 leaves it out.
    """

    def __init__(self, dim: int, num_heads: int, options: AttentionOptions = AttentionOptions(kernel_size=0)) -> None:
        size = options.kernel_size
        if size < 0 or (size and size % 2 == 0):
            raise ValueError(f"MODEL.LRA.KERNEL_SIZE is {size}, expected 0 or an odd number (kernel_size)")
        super().__init__(dim, num_heads, options)
        self.qkvg = nn.Linear(dim, (4 if options.gate else 3) * dim)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv1d(dim, dim, size, padding=size // 2, groups=dim) if size else None

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """x (B, N, C); key_mask (B, N) bool, False for padding, whose tokens influence no other's result."""
        q, k, v, *g = self.qkvg(x).chunk(4 if self.options.gate else 3, dim=-1)
        out = self.mix(q, k, v, key_mask=key_mask)
        if self.dwc is not None:
            real = v.masked_fill(~key_mask[:, :, None], 0.0)
            out = out + self.dwc(real.transpose(1, 2)).transpose(1, 2)
        return self.proj(out * g[0] if g else out)


class PolaMapAttention(KernelAttention):
    """Linear attention over a whole map whose features are turned by their tokens' rows and columns (PolaFormer++).

    The local branch is a depthwise convolution over the values with a kernel of its own for each channel.
    """

    def __init__(self, dim: int, num_heads: int, options: AttentionOptions = AttentionOptions("polarity_pp")) -> None:
        super().__init__(dim, num_heads, options)
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.lepe = DepthwiseConv2d(dim, options.kernel_size)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W)."""
        x = self.qkvg(x)
        rotary = turns(x, grid, 2 * self.head_dim)
        out = self.in_one_piece(x, None, self.lepe, grid, rotary=rotary)
        if out is None:
            q, k, v, g = x.chunk(4, dim=-1)
            out = (self.mix(q, k, v, rotary=rotary) + self.lepe(v, grid)) * g
        return self.proj(out)
