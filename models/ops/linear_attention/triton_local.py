"""What surrounds linear attention, as Triton kernels: (out + depthwise convolution of v)·g, and sums over programs.

Letters as in triton.py, besides K the side of the convolution's kernel. Maps are HEIGHT × WIDTH tokens row by row, one
after the other in memory; a tile is T of these tokens. `gated.py` launches them.
"""

import triton
import triton.language as tl

from .triton_maps import LOG_2, load_exponent_and_scale, sigmoid

ROWS_OF_A_SUM = tl.constexpr(64)


@triton.jit
def _load(first, offsets, inside):
    return tl.load(first + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _neighbour(row, column, HEIGHT, WIDTH, place, sign: tl.constexpr, K: tl.constexpr):
    """How far the neighbours of a tile's tokens are by one place of the convolution's kernel, and which have one"""
    down, right = sign * (place // K - K // 2), sign * (place % K - K // 2)
    inside = (row + down >= 0) & (row + down < HEIGHT) & (column + right >= 0) & (column + right < WIDTH)
    return down * WIDTH + right, inside[:, None]


@triton.jit
def local_kernel(
    out, v, gate, weight, bias, result,
    v_token, v_head, gate_token, gate_head,
    tokens, HEIGHT, WIDTH,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    SHARED: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """One tile of one head → out + convolution of v, in place of out (tokens, H, D), and its product with the gate."""
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    channels = tl.arange(0, DP)
    start, rows = (tile * T).to(tl.int64), tl.arange(0, T)
    place_in_map = ((start + rows) % (HEIGHT * WIDTH)).to(tl.int32)
    row, column = place_in_map // WIDTH, place_in_map % WIDTH
    inside = (start + rows < tokens)[:, None] & (channels < D)[None, :]
    v += head * v_head + start * v_token
    weight += (0 if SHARED else head * D * K * K) + channels * (K * K)
    bias += (0 if SHARED else head * D) + channels
    offsets = rows[:, None] * (H * D) + channels[None, :]
    base = start * (H * D) + head * D
    total = _load(out + base, offsets, inside) + _load(bias, 0, channels < D)[None, :]
    for place in range(K * K):
        shift, there = _neighbour(row, column, HEIGHT, WIDTH, place, 1, K)
        value = _load(v, (rows + shift)[:, None] * v_token + channels[None, :], inside & there)
        total += value * _load(weight, place, channels < D)[None, :]
    if HAS_GATE:
        tl.store(out + base + offsets, total.to(out.dtype.element_ty), mask=inside)
        gate += head * gate_head + start * gate_token
        total *= _load(gate, rows[:, None] * gate_token + channels[None, :], inside)
    tl.store(result + base + offsets, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def local_backward_kernel(
    grad, v, weight, grad_v, sums,
    grad_token, grad_head, v_token, v_head,
    tokens, tiles_per_part, HEIGHT, WIDTH,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SHARED: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Some tiles of one head → gradient of v through the convolution, whose result has the gradient `grad`, ROW apart.

    Its part of the gradients of weight and bias goes into sums (parts, H, K·K + 1, D), the bias last.
    """
    head, part = tl.program_id(0) % H, tl.program_id(0) // H
    channels = tl.arange(0, DP)
    places = tl.arange(0, KP)[:, None]
    own = (channels < D)[None, :]
    weight += (0 if SHARED else head * D * K * K) + channels * (K * K)
    rows = tl.arange(0, T)
    total = tl.zeros((KP, DP), tl.float32)
    first = tl.cast(part * tiles_per_part, tl.int64) * T
    for start in range(first, tl.minimum(first + tiles_per_part * T, tokens), T):
        place_in_map = ((start + rows) % (HEIGHT * WIDTH)).to(tl.int32)
        row, column = place_in_map // WIDTH, place_in_map % WIDTH
        inside = (start + rows < tokens)[:, None] & own
        grad_base = grad + head * grad_head + start * grad_token
        v_base = v + head * v_head + start * v_token
        upstream = _load(grad_base, rows[:, None] * grad_token + channels[None, :], inside)
        total += tl.where(places == K * K, tl.sum(upstream, axis=0)[None, :], 0.0)
        grad_values = tl.zeros((T, DP), tl.float32)
        for place in range(K * K):
            shift, there = _neighbour(row, column, HEIGHT, WIDTH, place, 1, K)
            value = _load(v_base, (rows + shift)[:, None] * v_token + channels[None, :], inside & there)
            total += tl.where(places == place, tl.sum(upstream * value, axis=0)[None, :], 0.0)
            shift, there = _neighbour(row, column, HEIGHT, WIDTH, place, -1, K)
            further = _load(grad_base, (rows + shift)[:, None] * grad_token + channels[None, :], inside & there)
            grad_values += further * _load(weight, place, channels < D)[None, :]
        values = grad_v + start * ROW + head * D + rows[:, None] * ROW + channels[None, :]
        tl.store(values, grad_values.to(grad_v.dtype.element_ty), mask=inside)
    sums += (part * H + head) * ((K * K + 1) * D)
    tl.store(sums + places * D + channels[None, :], total, mask=(places <= K * K) & own)


@triton.jit
def _sum_of_rows(first, count, stride, channels, D: tl.constexpr, DP: tl.constexpr):
    """(DP,) of `count` rows that are `stride` apart"""
    rows = tl.arange(0, ROWS_OF_A_SUM)
    total = tl.zeros((ROWS_OF_A_SUM, DP), tl.float32)
    for start in range(0, count, ROWS_OF_A_SUM):
        inside = (start + rows < count)[:, None] & (channels < D)[None, :]
        total += _load(first, (start + rows).to(tl.int64)[:, None] * stride + channels[None, :], inside)
    return tl.sum(total, axis=0)


@triton.jit
def learned_backward_kernel(
    query_moments, key_moments, sums, first, second, grad_first, grad_second, grad_weight, grad_bias,
    query_rows, key_rows, sum_rows,
    MAP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    ALPHA: tl.constexpr,
):  # fmt: skip
    """Of one head, the gradient of one place of the convolution or of what the kernel learns, from sums of programs."""
    job, head = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, DP)
    own = channels < D
    if job <= K * K:
        sums += job * D
        row = (K * K + 1) * D
        if SHARED:  # the first head's program sums them all
            total = _sum_of_rows(sums, tl.where(head == 0, sum_rows * H, 0), row, channels, D, DP)
            own = own & (head == 0)
        else:
            total = _sum_of_rows(sums + head * row, sum_rows, H * row, channels, D, DP)
        maps = (0 if SHARED else head * D) + channels
        tl.store(grad_weight + maps * (K * K) + job, total, mask=own & (job < K * K))
        tl.store(grad_bias + maps, total, mask=own & (job == K * K))
    elif MAP == "power":
        p, scale = load_exponent_and_scale(first, second, head, channels, D, ALPHA)
        key_moments += head * (2 * D)
        log_moment = _sum_of_rows(query_moments + head * D, query_rows, H * D, channels, D, DP)
        log_moment += _sum_of_rows(key_moments + D, key_rows, H * 2 * D, channels, D, DP)
        if first is not None:  # p = 1 + ALPHA·σ, whose derivative is (p − 1)·(1 − σ)
            slope = (p - 1.0) * (1.0 - sigmoid(_load(first + head * D, channels, own)))
            tl.store(grad_first + head * D + channels, log_moment * LOG_2 * slope, mask=own)
        if second is not None:
            moment = _sum_of_rows(key_moments, key_rows, H * 2 * D, channels, D, DP)
            slope = sigmoid(_load(second + head * D, channels, own))
            tl.store(grad_second + head * D + channels, -2.0 * moment * p / scale * slope, mask=own)
    elif MAP == "growth":
        for half in tl.static_range(4):
            rates, grads = (first, grad_first) if half < 2 else (second, grad_second)
            offsets = head * (2 * D) + (half % 2) * D + channels
            rate = sigmoid(_load(rates, offsets, own))
            total = _sum_of_rows(query_moments + (head * 4 + half) * D, query_rows, H * 4 * D, channels, D, DP)
            tl.store(grads + offsets, total * rate * (1.0 - rate), mask=own)
