"""Pola-Swin and Pola-PVT written out literally: a slow oracle for tests.

Every function here is a pure function of a state dict (name -> tensor) and an input and follows the equations of the
model specification one after the other: explicit N x n score matrices, one head at a time, one window at a time,
convolutions as sums over kernel taps. Nothing is imported from the package under test and none of its shortcuts is
used, so an agreement of the two means something. Any floating dtype works (tests use float64), and autograd
differentiates with respect to every tensor of the state. The models are those of evaluation: there is no dropout and
no stochastic depth.

Letters in shapes:
    B  images in the batch        C  channels                 H, W  rows and columns of a token grid
    N  query tokens               h  heads                    Hp, Wp  the same after padding to whole windows
    n  key tokens                 d  channels per head, C/h   T  tokens of one window
    K  depthwise kernel size      r  spatial reduction ratio
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Size = tuple[int, int]

NORMALISER_EPS = 1e-6
REGION_PENALTY = -100.0
PVT_PATCH_SIZES = (4, 2, 2, 2)
PVT_SOFTMAX_SR_RATIOS = (8, 4, 2, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Elementary layers
# ---------------------------------------------------------------------------------------------------------------------


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x Wᵀ + b; the bias is left out where the state has none."""
    y = x @ state[f"{name}.weight"].transpose(0, 1)
    if f"{name}.bias" in state:
        y = y + state[f"{name}.bias"]
    return y


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last axis, with the biased variance."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    """Two linear maps with the exact (erf) GELU between them."""
    hidden = linear(state, f"{name}.fc1", x)
    hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return linear(state, f"{name}.fc2", hidden)


def patch_conv(state: State, name: str, x: Tensor, size: int) -> Tensor:
    """Convolution with kernel = stride = size and a bias, (B,H,W,C) -> (B,H//size,W//size,C'), summed tap by tap."""
    weight = state[f"{name}.weight"]
    rows, cols = x.shape[1] // size, x.shape[2] // size
    x = x[:, : rows * size, : cols * size]
    y = state[f"{name}.bias"]
    for i in range(size):
        for j in range(size):
            y = y + x[:, i::size, j::size] @ weight[:, :, i, j].transpose(0, 1)
    return y


def depthwise_conv(state: State, name: str, v: Tensor, kernel_size: int) -> Tensor:
    """Depthwise convolution of one head's (B,H,W,d) map, zero-padded by K//2 (K odd), summed tap by tap."""
    weight = state[f"{name}.weight"]
    batch, rows, cols, channels = v.shape
    margin = kernel_size // 2
    padded = pad_map(v, top=margin, bottom=margin, left=margin, right=margin)
    y = state[f"{name}.bias"].expand(batch, rows, cols, channels)
    for i in range(kernel_size):
        for j in range(kernel_size):
            y = y + padded[:, i : i + rows, j : j + cols] * weight[:, 0, i, j]
    return y


def pad_map(x: Tensor, *, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0) -> Tensor:
    """Surround a (B,H,W,C) map with that many rows and columns of zeros."""
    batch, _, cols, channels = x.shape
    x = torch.cat([x.new_zeros(batch, top, cols, channels), x, x.new_zeros(batch, bottom, cols, channels)], dim=1)
    rows = x.shape[1]
    return torch.cat([x.new_zeros(batch, rows, left, channels), x, x.new_zeros(batch, rows, right, channels)], dim=2)


def linear_resize(x: Tensor, dim: int, size: int) -> Tensor:
    """1-D linear interpolation along one axis, align_corners=False: output i reads position (i+1/2)·old/new - 1/2."""
    old = x.shape[dim]
    pieces = []
    for i in range(size):
        position = max((i + 0.5) * old / size - 0.5, 0.0)
        low = int(position)
        high = min(low + 1, old - 1)
        share = position - low
        pieces.append(x.select(dim, low) * (1.0 - share) + x.select(dim, high) * share)
    return torch.stack(pieces, dim=dim)


# ---------------------------------------------------------------------------------------------------------------------
# Polarity attention
# ---------------------------------------------------------------------------------------------------------------------


def polarity_core(q: Tensor, k: Tensor, v: Tensor, exponent: Tensor, real: Tensor | None = None) -> Tensor:
    """The core for one head: q (B,N,d), k and v (B,n,d), exponent (d); `real` (n) marks the keys that count.

    φ±(u) = relu(±u)^p. The same-signed scores are φ₊(q)φ₊(k)ᵀ + φ₋(q)φ₋(k)ᵀ and weigh the first ⌈d/2⌉ value channels;
    the opposite-signed scores are φ₋(q)φ₊(k)ᵀ + φ₊(q)φ₋(k)ᵀ and weigh the others. Each row of scores gives the mean of
    score x value over the keys, divided by (mean of the scores over the keys + 1e-6). Keys that are not real are
    dropped, so that they enter neither mean and both divide by the number of real keys.
    """
    if real is not None:
        k, v = k[:, real], v[:, real]
    keys = k.shape[1]
    half = (v.shape[-1] + 1) // 2
    q_pos, q_neg = torch.relu(q) ** exponent, torch.relu(-q) ** exponent
    k_pos, k_neg = torch.relu(k) ** exponent, torch.relu(-k) ** exponent
    same = q_pos @ k_pos.transpose(1, 2) + q_neg @ k_neg.transpose(1, 2)
    opposite = q_neg @ k_pos.transpose(1, 2) + q_pos @ k_neg.transpose(1, 2)
    out = []
    for scores, values in ((same, v[..., :half]), (opposite, v[..., half:])):
        normaliser = scores.sum(dim=-1, keepdim=True) / keys + NORMALISER_EPS
        out.append(scores @ values / keys / normaliser)
    return torch.cat(out, dim=-1)


def polarity_module(
    state: State,
    prefix: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    grid: Size,
    num_heads: int,
    alpha: float,
    kernel_size: int,
    real: Tensor | None = None,
) -> Tensor:
    """What both polarity layouts do after their first linear maps: q, g (B,N,C), k, v (B,n,C) -> (B,N,C).

    The positional encoding is added to k; q and k are divided by softplus(scale); p = 1 + alpha * sigmoid(power).
    The core runs head by head, and the depthwise convolution of v, whose kernel all heads share, is added; the sum is
    multiplied by g and projected. The values of tokens that are not real are 0 for the convolution too. When there
    are fewer keys than tokens, v is first interpolated linearly along its flattened token axis to N tokens.
    """
    batch, tokens, channels = q.shape
    width = channels // num_heads
    k = k + state[f"{prefix}positional_encoding"]
    scale = torch.log1p(torch.exp(state[f"{prefix}scale"]))
    q, k = q / scale, k / scale
    exponent = 1.0 + alpha * torch.sigmoid(state[f"{prefix}power"])
    if real is not None:
        v = v * real[:, None].to(v.dtype)
    local_v = v if v.shape[1] == tokens else linear_resize(v, 1, tokens)
    heads = []
    for i in range(num_heads):
        part = slice(i * width, (i + 1) * width)
        attended = polarity_core(q[..., part], k[..., part], v[..., part], exponent[0, i, 0], real)
        image = local_v[..., part].reshape(batch, *grid, width)
        local = depthwise_conv(state, f"{prefix}dwc", image, kernel_size).reshape(batch, tokens, width)
        heads.append(attended + local)
    return linear(state, f"{prefix}proj", torch.cat(heads, dim=-1) * g)


def swin_polarity_attention(
    state: State,
    prefix: str,
    x: Tensor,
    *,
    window: Size,
    num_heads: int,
    alpha: float,
    kernel_size: int,
    real: Tensor | None = None,
) -> Tensor:
    """Swin layout, one window, x (B,T,C): a single linear map C -> 4C gives q, k, v, g in that order."""
    q, k, v, g = linear(state, f"{prefix}qkvg", x).chunk(4, dim=-1)
    return polarity_module(
        state, prefix, q, k, v, g, grid=window, num_heads=num_heads, alpha=alpha, kernel_size=kernel_size, real=real
    )


def pvt_polarity_attention(
    state: State,
    prefix: str,
    x: Tensor,
    *,
    grid: Size,
    num_heads: int,
    sr_ratio: int,
    alpha: float,
    kernel_size: int,
) -> Tensor:
    """PVT layout, x (B,N,C): C -> 2C gives q, g of the tokens, C -> 2C gives k, v of the (reduced) tokens."""
    q, g = linear(state, f"{prefix}qg", x).chunk(2, dim=-1)
    k, v = linear(state, f"{prefix}kv", reduce_tokens(state, prefix, x, grid, sr_ratio)).chunk(2, dim=-1)
    return polarity_module(
        state, prefix, q, k, v, g, grid=grid, num_heads=num_heads, alpha=alpha, kernel_size=kernel_size
    )


def reduce_tokens(state: State, prefix: str, x: Tensor, grid: Size, sr_ratio: int) -> Tensor:
    """Spatial reduction of (B,N,C) for r > 1: convolution with kernel = stride = r, then LayerNorm with eps 1e-5."""
    if sr_ratio == 1:
        return x
    batch, _, channels = x.shape
    x = patch_conv(state, f"{prefix}sr", x.reshape(batch, *grid, channels), sr_ratio)
    return layer_norm(state, f"{prefix}norm", x.reshape(batch, -1, channels), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention
# ---------------------------------------------------------------------------------------------------------------------


def softmax_core(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v for one head: q (B,N,d), k and v (B,n,d), bias (N,n)."""
    scores = (q * scale) @ k.transpose(1, 2)
    if bias is not None:
        scores = scores + bias
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def relative_position_index(window: Size) -> list[list[int]]:
    """Row of the bias table for each (query, key) of a window: row offset and column offset, both shifted to >= 0."""
    rows, cols = window
    tokens = [(i, j) for i in range(rows) for j in range(cols)]
    return [[(qi - ki + rows - 1) * (2 * cols - 1) + (qj - kj + cols - 1) for ki, kj in tokens] for qi, qj in tokens]


def swin_softmax_attention(
    state: State,
    prefix: str,
    x: Tensor,
    *,
    window: Size,
    num_heads: int,
    qk_scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention with relative position bias in one window, x (B,T,C), with an additive mask (T,T) or none."""
    q, k, v = linear(state, f"{prefix}qkv", x).chunk(3, dim=-1)
    width = x.shape[-1] // num_heads
    scale = width**-0.5 if qk_scale is None else qk_scale
    index = torch.tensor(relative_position_index(window), device=x.device)
    heads = []
    for i in range(num_heads):
        part = slice(i * width, (i + 1) * width)
        bias = state[f"{prefix}relative_position_bias_table"][:, i][index]
        if mask is not None:
            bias = bias + mask
        heads.append(softmax_core(q[..., part], k[..., part], v[..., part], scale, bias))
    return linear(state, f"{prefix}proj", torch.cat(heads, dim=-1))


def pvt_softmax_attention(state: State, prefix: str, x: Tensor, *, grid: Size, num_heads: int, sr_ratio: int) -> Tensor:
    """PVT's softmax attention, x (B,N,C): queries of all tokens, keys and values of the spatially reduced ones."""
    q = linear(state, f"{prefix}q", x)
    k, v = linear(state, f"{prefix}kv", reduce_tokens(state, prefix, x, grid, sr_ratio)).chunk(2, dim=-1)
    width = x.shape[-1] // num_heads
    heads = []
    for i in range(num_heads):
        part = slice(i * width, (i + 1) * width)
        heads.append(softmax_core(q[..., part], k[..., part], v[..., part], width**-0.5))
    return linear(state, f"{prefix}proj", torch.cat(heads, dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# Pola-Swin
# ---------------------------------------------------------------------------------------------------------------------


def axis_regions(length: int, window: int, shift: int) -> list[int]:
    """Swin's region number of each position of a rolled axis: before the last window, in it, wrapped around."""
    if shift == 0:
        return [0] * length
    return [0 if i < length - window else 1 if i < length - shift else 2 for i in range(length)]


def window_mask(rows: Sequence[int], cols: Sequence[int], like: Tensor) -> Tensor:
    """Additive (T,T) mask of one window from the regions of its rows and columns: -100 between different regions."""
    tokens = [(i, j) for i in rows for j in cols]
    return like.new_tensor([[0.0 if a == b else REGION_PENALTY for b in tokens] for a in tokens])


def swin_window_attention(
    state: State,
    prefix: str,
    x: Tensor,
    *,
    kind: str,
    window: Size,
    shift: Size,
    num_heads: int,
    alpha: float,
    kernel_size: int,
    qk_scale: float | None,
) -> Tensor:
    """Attention of one block over a normalised (B,H,W,C) map, window by window.

    The map is padded with zeros, bottom and right, to whole windows, then rolled up and left by the shift. Padded
    tokens are no keys: minus infinity for softmax, a key mask for polarity. Only shifted softmax windows (`S`) get
    the -100 mask between regions, which are those of the padded map; shifted polarity windows (`L`) get none.
    """
    batch, height, width, channels = x.shape
    padded_height = math.ceil(height / window[0]) * window[0]
    padded_width = math.ceil(width / window[1]) * window[1]
    x = pad_map(x, bottom=padded_height - height, right=padded_width - width)
    # Position i of the rolled map holds row_from[i] (col_from[i]) of the padded map.
    row_from = [(i + shift[0]) % padded_height for i in range(padded_height)]
    col_from = [(j + shift[1]) % padded_width for j in range(padded_width)]
    x = x[:, row_from][:, :, col_from]
    row_regions = axis_regions(padded_height, window[0], shift[0])
    col_regions = axis_regions(padded_width, window[1], shift[1])
    bands = []
    for top in range(0, padded_height, window[0]):
        band = []
        for left in range(0, padded_width, window[1]):
            rows, cols = slice(top, top + window[0]), slice(left, left + window[1])
            tokens = x[:, rows, cols].reshape(batch, window[0] * window[1], channels)
            real = torch.tensor(
                [i < height and j < width for i in row_from[rows] for j in col_from[cols]], device=x.device
            )
            if kind == "L":
                y = swin_polarity_attention(
                    state,
                    prefix,
                    tokens,
                    window=window,
                    num_heads=num_heads,
                    alpha=alpha,
                    kernel_size=kernel_size,
                    real=real,
                )
            else:
                mask = window_mask(row_regions[rows], col_regions[cols], x)
                mask = mask.masked_fill(~real, -math.inf)
                y = swin_softmax_attention(
                    state, prefix, tokens, window=window, num_heads=num_heads, qk_scale=qk_scale, mask=mask
                )
            band.append(y.reshape(batch, *window, channels))
        bands.append(torch.cat(band, dim=2))
    y = torch.cat(bands, dim=1)
    row_back = [(i - shift[0]) % padded_height for i in range(height)]
    col_back = [(j - shift[1]) % padded_width for j in range(width)]
    return y[:, row_back][:, :, col_back]


def patch_merging(state: State, name: str, x: Tensor) -> Tensor:
    """(B,H,W,C) -> (B,H/2,W/2,2C): concatenate 2 x 2 neighbours (down the columns first), normalise, project."""
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return linear(state, f"{name}.reduction", layer_norm(state, f"{name}.norm", torch.cat(parts, dim=-1), 1e-5))


def swin_block_kind(attn_type: str, stage: int, block: int) -> str:
    """`L` or `S`: in an `M` stage the first k blocks are `L`, k being the number after the four letters."""
    letter = attn_type[stage]
    if letter == "M":
        return "L" if block < int(attn_type[4:]) else "S"
    if letter not in "LS":
        raise ValueError(f"unknown attention type {letter!r} in {attn_type!r}")
    return letter


def pola_swin_logits(
    state: State,
    x: Tensor,
    *,
    img_size: Size,
    patch_size: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
    attn_type: str,
    alpha: float,
    kernel_size: int,
    qk_scale: float | None = None,
    ape: bool = False,
    patch_norm: bool = True,
) -> Tensor:
    """Logits of Pola-Swin for images x (B,3,*img_size); every LayerNorm has eps 1e-5.

    An `L` block's window is window_size, an `S` block's is 7 where window_size <= 56 and else 12; both are clipped,
    axis by axis, to the stage's map. In odd blocks the axes that the window does not cover are shifted by half of it.
    """
    if tuple(x.shape[2:]) != tuple(img_size):
        raise ValueError(f"input of size {tuple(x.shape[2:])} for a model of img_size {tuple(img_size)}")
    x = patch_conv(state, "patch_embed.proj", x.permute(0, 2, 3, 1), patch_size)
    if patch_norm:
        x = layer_norm(state, "patch_embed.norm", x, 1e-5)
    if ape:
        x = x + state["absolute_pos_embed"].reshape(1, *x.shape[1:])
    for stage, depth in enumerate(depths):
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}."
            kind = swin_block_kind(attn_type, stage, block)
            side = window_size if kind == "L" else 7 if window_size <= 56 else 12
            height, width = x.shape[1:3]
            window = (min(side, height), min(side, width))
            shift = (
                window[0] // 2 if block % 2 == 1 and window[0] < height else 0,
                window[1] // 2 if block % 2 == 1 and window[1] < width else 0,
            )
            x = x + swin_window_attention(
                state,
                f"{prefix}attn.",
                layer_norm(state, f"{prefix}norm1", x, 1e-5),
                kind=kind,
                window=window,
                shift=shift,
                num_heads=num_heads[stage],
                alpha=alpha,
                kernel_size=kernel_size,
                qk_scale=qk_scale,
            )
            x = x + mlp(state, f"{prefix}mlp", layer_norm(state, f"{prefix}norm2", x, 1e-5))
        if stage < len(depths) - 1:
            x = patch_merging(state, f"layers.{stage}.downsample", x)
    return linear(state, "head", layer_norm(state, "norm", x, 1e-5).mean(dim=(1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Pola-PVT
# ---------------------------------------------------------------------------------------------------------------------


def pola_pvt_logits(
    state: State,
    x: Tensor,
    *,
    depths: Sequence[int],
    num_heads: Sequence[int],
    attn_type: str,
    sr_ratios: str | int | Sequence[int],
    alpha: float,
    kernel_size: int,
    img_size: Size | None = None,
) -> Tensor:
    """Logits of Pola-PVT for images x (B,3,height,width).

    Four stages of patch embedding (LayerNorm eps 1e-5), learned position table and blocks (LayerNorm eps 1e-6); the
    head reads the plain mean over the tokens. `L` stages reduce keys by sr_ratios, which is written 1111, "1111" or
    (1, 1, 1, 1); `S` stages always reduce them by 8, 4, 2, 1.

    img_size is the size the position tables were made for, by default that of x. For an input of another size the
    tables are resized bilinearly; polarity blocks accept no such input.
    """
    img_size = tuple(x.shape[2:]) if img_size is None else img_size
    reductions = [int(r) for r in (str(sr_ratios) if isinstance(sr_ratios, int) else sr_ratios)]
    x = x.permute(0, 2, 3, 1)
    table_grid = img_size
    for stage, depth in enumerate(depths):
        kind = attn_type[stage]
        if kind not in "LS":
            raise ValueError(f"unknown attention type {kind!r} in {attn_type!r}")
        name = f"patch_embed{stage + 1}"
        x = layer_norm(state, f"{name}.norm", patch_conv(state, f"{name}.proj", x, PVT_PATCH_SIZES[stage]), 1e-5)
        batch, height, width, channels = x.shape
        table_grid = (table_grid[0] // PVT_PATCH_SIZES[stage], table_grid[1] // PVT_PATCH_SIZES[stage])
        if kind == "L" and (height, width) != table_grid:
            raise ValueError(f"stage {stage + 1}: polarity blocks for a {table_grid} grid, got {(height, width)}")
        table = state[f"pos_embed{stage + 1}"].reshape(1, *table_grid, channels)
        if (height, width) != table_grid:
            table = linear_resize(linear_resize(table, 1, height), 2, width)
        tokens = (x + table).reshape(batch, height * width, channels)
        for block in range(depth):
            prefix = f"block{stage + 1}.{block}."
            normed = layer_norm(state, f"{prefix}norm1", tokens, 1e-6)
            if kind == "L":
                attended = pvt_polarity_attention(
                    state,
                    f"{prefix}attn.",
                    normed,
                    grid=(height, width),
                    num_heads=num_heads[stage],
                    sr_ratio=reductions[stage],
                    alpha=alpha,
                    kernel_size=kernel_size,
                )
            else:
                attended = pvt_softmax_attention(
                    state,
                    f"{prefix}attn.",
                    normed,
                    grid=(height, width),
                    num_heads=num_heads[stage],
                    sr_ratio=PVT_SOFTMAX_SR_RATIOS[stage],
                )
            tokens = tokens + attended
            tokens = tokens + mlp(state, f"{prefix}mlp", layer_norm(state, f"{prefix}norm2", tokens, 1e-6))
        x = tokens.reshape(batch, height, width, channels)
    return linear(state, "head", x.mean(dim=(1, 2)))
