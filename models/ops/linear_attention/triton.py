"""Linear attention as Triton kernels: two passes forward, two backward, features in registers only.

README.md beside this file derives what they compute, for the feature maps of triton_maps.py; triton_op.py launches
them. Forward: one pass over k and v sums the state, one over q writes the output. Backward: one pass over q and the
output's gradient writes dq and sums the state's gradient, one over k and v writes dk and dv. A sequence that several
programs share is summed in parts, which the launcher adds in a fixed order.

Letters: B images, N queries, n keys, H heads, D channels per head, DP their next power of two, T tokens of a tile.
In kernels `positive` and `negative` are the two halves of the features, `same` and `opposite` the two streams, of which
the first reads the first BORDER value channels; a map of one stream has D of them.
"""

import triton
import triton.language as tl

from .triton_maps import (
    grown_features,
    key_features,
    load_learned,
    load_rates,
    norm_of,
    pull_back,
    pull_back_directed,
    pull_back_grown,
    turn,
)

# -- Parts of kernels


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums"""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "tf32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _load_rows(first, stride, rows, channels, inside):
    """A tile of tokens in float32, 0 where not inside"""
    return tl.load(first + (rows * stride + channels[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_keys(k, position, first, inverse_scale, offsets, position_offsets, real, HAS_POSITION: tl.constexpr):
    """u = (k + position)/scale of a tile, 0 where not real"""
    u = tl.load(k + offsets, mask=real, other=0.0).to(tl.float32)
    if HAS_POSITION:
        u += tl.load(position + first + position_offsets, mask=real, other=0.0).to(tl.float32)
    return u * inverse_scale[None, :]


@triton.jit
def _state_offsets(channels, D: tl.constexpr):
    """Offsets and mask of one half's D × D sums in a state; its mean is the row after them."""
    offsets = channels[:, None] * D + channels[None, :]
    return offsets, (channels[:, None] < D) & (channels[None, :] < D)


@triton.jit
def _load_sums(state, channels, D: tl.constexpr):
    """Both halves' sums, (DP, DP), one row a feature channel"""
    offsets, inside = _state_offsets(channels, D)
    half: tl.constexpr = (D + 1) * D
    return tl.load(state + offsets, mask=inside, other=0.0), tl.load(state + half + offsets, mask=inside, other=0.0)


@triton.jit
def _load_readout(state, channels, streams, D: tl.constexpr, BORDER: tl.constexpr, SET: tl.constexpr):
    """What a set of query features multiplies, by halves: the sums (DP, DP), of the means (DP, 16) columns 0 and 1.

    The only set of a map, SET None, is read by both streams, and meets the halves exchanged in the opposite-signed one;
    otherwise set 0 is read by the first stream, set 1 by the second, and what the other reads is 0.
    """
    positive, negative = _load_sums(state, channels, D)
    half: tl.constexpr = (D + 1) * D
    offsets = D * D + channels[:, None]
    inside = (channels < D)[:, None] & (streams < 2)[None, :]
    if SET is None:
        positive, negative = _exchange(positive, negative, channels, BORDER)
        positive_columns = tl.load(state + offsets + streams[None, :] * half, mask=inside, other=0.0)
        negative_columns = tl.load(state + offsets + (1 - streams)[None, :] * half, mask=inside, other=0.0)
        return positive, negative, positive_columns, negative_columns
    else:
        own = ((channels < BORDER) == (SET == 0))[None, :]
        inside = inside & (streams == SET)[None, :]
        positive_columns = tl.load(state + offsets + streams[None, :] * 0, mask=inside, other=0.0)
        negative_columns = tl.load(state + half + offsets + streams[None, :] * 0, mask=inside, other=0.0)
        return tl.where(own, positive, 0.0), tl.where(own, negative, 0.0), positive_columns, negative_columns


@triton.jit
def _store_state(state, channels, positive, negative, positive_mean, negative_mean, D: tl.constexpr):
    offsets, inside = _state_offsets(channels, D)
    half: tl.constexpr = (D + 1) * D
    tl.store(state + offsets, positive, mask=inside)
    tl.store(state + half + offsets, negative, mask=inside)
    tl.store(state + D * D + channels, positive_mean, mask=channels < D)
    tl.store(state + half + D * D + channels, negative_mean, mask=channels < D)


@triton.jit
def _exchange(positive, negative, channels, BORDER: tl.constexpr):
    """Exchange the halves in the value channels that the opposite-signed stream reads; its own inverse."""
    same = (channels < BORDER)[None, :]
    return tl.where(same, positive, negative), tl.where(same, negative, positive)


@triton.jit
def _reciprocal(x, PRECISION: tl.constexpr):
    """1/x; as one instruction of relative error 2^-23, beside which a division takes nine more"""
    if PRECISION == "ieee" or PRECISION == "interpreted":
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _column(pair, streams, stream: tl.constexpr):
    """One column of (·, 16)"""
    return tl.sum(tl.where(streams[None, :] == stream, pair, 0.0), axis=1)


@triton.jit
def _turned(positive, negative, cos, sin, start, rows, real, back: tl.constexpr,
            T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Both halves turned by the positions of a tile's tokens, or turned back"""
    pairs = tl.arange(0, DP // 2)[None, :]
    offsets = start * D + (rows * D + pairs)
    inside = real & (pairs < D // 2)
    sign: tl.constexpr = -1.0 if back else 1.0
    positive = turn(positive, tl.load(cos + offsets, mask=inside, other=0.0),
                    sign * tl.load(sin + offsets, mask=inside, other=0.0), T, DP)  # fmt: skip
    offsets += D // 2
    negative = turn(negative, tl.load(cos + offsets, mask=inside, other=0.0),
                    sign * tl.load(sin + offsets, mask=inside, other=0.0), T, DP)  # fmt: skip
    return positive, negative


@triton.jit
def _load_sets(
    state, first, second, head, channels, streams,
    D: tl.constexpr, BORDER: tl.constexpr, ALPHA: tl.constexpr, SETS: tl.constexpr,
):  # fmt: skip
    """Of each set of query features what it multiplies, and the rates that it is made with, if any"""
    if SETS == 1:
        return (_load_readout(state, channels, streams, D, BORDER, None),), (None,)
    else:
        readouts = (
            _load_readout(state, channels, streams, D, BORDER, 0),
            _load_readout(state, channels, streams, D, BORDER, 1),
        )
        rates = (load_rates(first, head, channels, D, ALPHA), load_rates(second, head, channels, D, ALPHA))
        return readouts, rates


@triton.jit
def _query_features(
    u, p, rates, cos, sin, start, rows, real,
    SET: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr, HAS_TURNS: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Both halves of one set, the same turned, where there are turns, and, of maps by powers, slope and logarithm"""
    slope, log = u, u
    if MAP == "growth":
        positive, negative = grown_features(u, rates, SET, PRECISION)
    else:
        positive, negative, slope, log = key_features(u, p, "power", PRECISION)
    met = (positive, negative)
    if HAS_TURNS:
        met = _turned(positive, negative, cos, sin, start, rows, real, False, T, D, DP)
    return positive, negative, met, slope, log


@triton.jit
def _read(positive, negative, met, readout, PRECISION: tl.constexpr):
    """Numerators (T, DP) and normalisers (T, 16) of one set"""
    numerators = _dot(met[0], readout[0], PRECISION) + _dot(met[1], readout[1], PRECISION)
    return numerators, _dot(positive, readout[2], PRECISION) + _dot(negative, readout[3], PRECISION)


@triton.jit
def _grad_features(
    wide, narrow, readout, cos, sin, start, rows, real,
    PRECISION: tl.constexpr, HAS_TURNS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradients of both halves of features, from those of what they meet turned (T, DP) and as they are (T, 16)"""
    positive = _dot(wide, tl.trans(readout[0]), PRECISION)
    negative = _dot(wide, tl.trans(readout[1]), PRECISION)
    if HAS_TURNS:
        positive, negative = _turned(positive, negative, cos, sin, start, rows, real, True, T, D, DP)
    positive += _dot(narrow, tl.trans(readout[2]), PRECISION)
    return positive, negative + _dot(narrow, tl.trans(readout[3]), PRECISION)


@triton.jit
def _reciprocal_normalisers(pair, streams, eps, PRECISION: tl.constexpr):
    """1/(z + eps) of both streams, (T,)"""
    same, opposite = _column(pair, streams, 0) + eps, _column(pair, streams, 1) + eps
    return _reciprocal(same, PRECISION), _reciprocal(opposite, PRECISION)


@triton.jit
def _weight(inverse_count, image, n):
    """One over the number of an image's real keys, all of them without a mask"""
    if inverse_count is None:
        return 1.0 / n
    else:
        return tl.load(inverse_count + image)


@triton.jit
def _program(H: tl.constexpr, parts):
    """This program's head, part of the sequence, and image. Neighbours share the rows of memory that hold all heads.

    Head and image, like tokens, are in 64 bits: times a stride they need not fit 32.
    """
    program = tl.program_id(0)
    head, part, image = program % H, (program // H) % parts, program // H // parts
    return head.to(tl.int64), part, image.to(tl.int64)


# -- Kernels


@triton.jit
def state_kernel(
    k, v, first, second, position, key_mask, inverse_count, cos, sin, state,
    k_image, k_token, k_head, v_image, v_token, v_head,
    n, images, parts, tokens_per_part,
    MAP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    ALPHA: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TURNS: tl.constexpr,
):  # fmt: skip
    """One part of one image's and head's keys → its part of the state, (parts, B, H, 2, D + 1, D)."""
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = load_learned(first, second, head, channels, D, MAP, ALPHA)
    positive_sum = tl.zeros((DP, DP), tl.float32)
    negative_sum = tl.zeros((DP, DP), tl.float32)
    positive_mean = tl.zeros((DP, 16), tl.float32)  # of equal columns: sums over tokens as a product, like the others
    negative_mean = tl.zeros((DP, 16), tl.float32)
    ones = tl.full((T, 16), 1.0, tl.float32)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    if HAS_POSITION:
        position += head * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    begin = part * tokens_per_part
    last = tl.minimum(begin + tokens_per_part, n)
    for start in range(begin, last, T):
        tokens = start + tl.arange(0, T)
        start = tl.cast(start, tl.int64)
        real = tokens < last
        if HAS_MASK:
            real = real & (tl.load(key_mask + image * n + tokens, mask=real, other=0) != 0)
        inside = real[:, None] & (channels < D)[None, :]
        u = _load_keys(
            k + start * k_token, position, start * (H * D), inverse_scale,
            rows * k_token + channels[None, :], rows * (H * D) + channels[None, :], inside, HAS_POSITION,
        )  # fmt: skip
        values = tl.load(v + start * v_token + (rows * v_token + channels[None, :]), mask=inside, other=0.0)
        positive, negative, _, _ = key_features(u, p[None, :], MAP, PRECISION)
        met = (positive, negative)
        if HAS_TURNS:
            met = _turned(positive, negative, cos, sin, start, rows, real[:, None], False, T, D, DP)
        positive_sum += _dot(tl.trans(met[0]), values, PRECISION)
        negative_sum += _dot(tl.trans(met[1]), values, PRECISION)
        positive_mean += _dot(tl.trans(positive), ones, PRECISION)
        negative_mean += _dot(tl.trans(negative), ones, PRECISION)
    weight = _weight(inverse_count, image, n)
    state += ((part * images + image) * H + head) * (2 * (D + 1) * D)
    streams = tl.arange(0, 16)
    _store_state(
        state, channels, positive_sum * weight, negative_sum * weight,
        _column(positive_mean, streams, 0) * weight, _column(negative_mean, streams, 0) * weight, D,
    )  # fmt: skip


@triton.jit
def output_kernel(
    q, first, second, state, cos, sin, out,
    q_image, q_token, q_head,
    N, parts, tokens_per_part, eps,
    MAP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    BORDER: tl.constexpr, ALPHA: tl.constexpr, HAS_TURNS: tl.constexpr,
):  # fmt: skip
    """One part of one image's and head's queries → their rows of the output (B, N, H, D)."""
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = load_learned(first, second, head, channels, D, MAP, ALPHA)
    streams = tl.arange(0, 16)
    state += (image * H + head) * (2 * (D + 1) * D)
    SETS: tl.constexpr = 2 if MAP == "growth" else 1
    readouts, rates = _load_sets(state, first, second, head, channels, streams, D, BORDER, ALPHA, SETS)
    same_channels = (channels < BORDER)[None, :]
    q += image * q_image + head * q_head
    out += (image * N * H + head) * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    begin = part * tokens_per_part
    last = tl.minimum(begin + tokens_per_part, N)
    for start in range(begin, last, T):
        tokens = start + tl.arange(0, T)
        start = tl.cast(start, tl.int64)
        real = (tokens < last)[:, None]
        inside = real & (channels < D)[None, :]
        u = tl.load(q + start * q_token + (rows * q_token + channels[None, :]), mask=inside, other=0.0).to(tl.float32)
        u *= inverse_scale[None, :]
        exponent = p[None, :]
        if MAP == "norm":
            _, u, _, exponent = norm_of(u, PRECISION)
        positive, negative, met, _, _ = _query_features(
            u, exponent, rates[0], cos, sin, start, rows, real, 0, MAP, PRECISION, HAS_TURNS, T, D, DP
        )
        numerators, pair = _read(positive, negative, met, readouts[0], PRECISION)
        if SETS > 1:
            positive, negative, met, _, _ = _query_features(
                u, exponent, rates[1], cos, sin, start, rows, real, 1, MAP, PRECISION, HAS_TURNS, T, D, DP
            )
            further = _read(positive, negative, met, readouts[1], PRECISION)
            numerators, pair = numerators + further[0], pair + further[1]
        same, opposite = _reciprocal_normalisers(pair, streams, eps, PRECISION)
        result = numerators * tl.where(same_channels, same[:, None], opposite[:, None])
        offsets = rows * (H * D) + channels[None, :]
        tl.store(out + start * (H * D) + offsets, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def query_backward_kernel(
    q, first, second, state, inverse_count, cos, sin, grad_out, gate, ungated, grad_gate, gated, grad_q, grad_state,
    moments,
    q_image, q_token, q_head, out_image, out_token, out_head, gate_image, gate_token, gate_head,
    N, n, images, parts, tokens_per_part, eps,
    MAP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    BORDER: tl.constexpr, ALPHA: tl.constexpr, HAS_TURNS: tl.constexpr, HAS_GATE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One part of the queries → their gradients, its part of the gradient of the state's sums, and its moments.

    Rows of the gradients are ROW apart. With HAS_GATE grad_out is that of (output + x)·g: of `ungated`, output + x, it
    makes the gradient of g, and `gated` (B, N, H, D), that of output and x. The moments (parts, B, H, ·, D) are, of
    power, Σ u·∂/∂u·log2|u| without the factor p, of growth the gradients of the rates, by sets and halves.
    """
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = load_learned(first, second, head, channels, D, MAP, ALPHA)
    streams = tl.arange(0, 16)
    state += (image * H + head) * (2 * (D + 1) * D)
    SETS: tl.constexpr = 2 if MAP == "growth" else 1
    readouts, rates = _load_sets(state, first, second, head, channels, streams, D, BORDER, ALPHA, SETS)
    rate_moment = tl.zeros((4, DP), tl.float32)
    moment_rows = tl.arange(0, 4)[:, None]
    same_channels = (channels < BORDER)[None, :]
    grad_positive_read = tl.zeros((DP, DP), tl.float32)
    grad_negative_read = tl.zeros((DP, DP), tl.float32)
    grad_positive_columns = tl.zeros((DP, 16), tl.float32)
    grad_negative_columns = tl.zeros((DP, 16), tl.float32)
    log_moment = tl.zeros((T, DP), tl.float32)
    q += image * q_image + head * q_head
    grad_out += image * out_image + head * out_head
    grad_q += image * N * ROW + head * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    begin = part * tokens_per_part
    last = tl.minimum(begin + tokens_per_part, N)
    for start in range(begin, last, T):
        tokens = start + tl.arange(0, T)
        start = tl.cast(start, tl.int64)
        real = (tokens < last)[:, None]
        inside = real & (channels < D)[None, :]
        u = tl.load(q + start * q_token + (rows * q_token + channels[None, :]), mask=inside, other=0.0).to(tl.float32)
        upstream = _load_rows(grad_out + start * out_token, out_token, rows, channels, inside)
        if HAS_GATE:
            base = image * N + start
            plain = head * D + rows * (H * D) + channels[None, :]
            total = tl.load(ungated + base * (H * D) + plain, mask=inside, other=0.0).to(tl.float32)
            of_gate = (upstream * total).to(grad_gate.dtype.element_ty)
            tl.store(grad_gate + base * ROW + (head * D + rows * ROW + channels[None, :]), of_gate, mask=inside)
            gates = gate + image * gate_image + head * gate_head + start * gate_token
            upstream *= _load_rows(gates, gate_token, rows, channels, inside)
            tl.store(gated + base * (H * D) + plain, upstream.to(gated.dtype.element_ty), mask=inside)
        u *= inverse_scale[None, :]
        exponent = p[None, :]
        if MAP == "norm":
            norm, u, tanh, exponent = norm_of(u, PRECISION)
        positive, negative, met, slope, log = _query_features(
            u, exponent, rates[0], cos, sin, start, rows, real, 0, MAP, PRECISION, HAS_TURNS, T, D, DP
        )
        numerators, pair = _read(positive, negative, met, readouts[0], PRECISION)
        if SETS > 1:
            positive, negative, met, slope, log = _query_features(
                u, exponent, rates[1], cos, sin, start, rows, real, 1, MAP, PRECISION, HAS_TURNS, T, D, DP
            )
            further = _read(positive, negative, met, readouts[1], PRECISION)
            numerators, pair = numerators + further[0], pair + further[1]
        same, opposite = _reciprocal_normalisers(pair, streams, eps, PRECISION)
        grad_numerators = upstream * tl.where(same_channels, same[:, None], opposite[:, None])
        weighted = numerators * grad_numerators
        grad_same = -same * tl.sum(tl.where(same_channels, weighted, 0.0), axis=1)
        grad_opposite = -opposite * tl.sum(tl.where(same_channels, 0.0, weighted), axis=1)
        grad_pair = tl.where(
            streams[None, :] == 0, grad_same[:, None], tl.where(streams[None, :] == 1, grad_opposite[:, None], 0.0)
        )
        result = tl.zeros((T, DP), tl.float32)
        for SET in tl.static_range(SETS):
            own_numerators, own_pair = grad_numerators, grad_pair
            if SETS > 1:
                own_numerators = tl.where(same_channels == (SET == 0), grad_numerators, 0.0)
                own_pair = tl.where((streams == SET)[None, :], grad_pair, 0.0)
                positive, negative, met, slope, log = _query_features(
                    u, exponent, rates[SET], cos, sin, start, rows, real, SET, MAP, PRECISION, HAS_TURNS, T, D, DP
                )
            readout = readouts[SET]
            grad_positive_read += _dot(tl.trans(met[0]), own_numerators, PRECISION)
            grad_negative_read += _dot(tl.trans(met[1]), own_numerators, PRECISION)
            grad_positive_columns += _dot(tl.trans(positive), own_pair, PRECISION)
            grad_negative_columns += _dot(tl.trans(negative), own_pair, PRECISION)
            grad_positive, grad_negative = _grad_features(
                own_numerators, own_pair, readout, cos, sin, start, rows, real, PRECISION, HAS_TURNS, T, D, DP
            )
            if MAP == "growth":
                grad, first_rate, second_rate = pull_back_grown(
                    u, positive, negative, grad_positive, grad_negative, rates[SET], SET
                )
                result += grad
                rate_moment += tl.where(moment_rows == 2 * SET, first_rate[None, :], 0.0)
                rate_moment += tl.where(moment_rows == 2 * SET + 1, second_rate[None, :], 0.0)
            elif MAP == "norm":
                result = pull_back_directed(u, norm, tanh, exponent, slope, log, grad_positive, grad_negative)
            else:
                grad = pull_back(u, slope, grad_positive, grad_negative)
                log_moment += u * grad * log
                result = grad * (p * inverse_scale)[None, :]
        offsets = rows * ROW + channels[None, :]
        tl.store(grad_q + start * ROW + offsets, result.to(grad_q.dtype.element_ty), mask=inside)
    weight = _weight(inverse_count, image, n)
    program = (part * images + image) * H + head
    same_mean = _column(grad_positive_columns, streams, 0)
    opposite_mean = _column(grad_negative_columns, streams, 1)
    same_exchanged = _column(grad_negative_columns, streams, 0)
    opposite_exchanged = _column(grad_positive_columns, streams, 1)
    if SETS > 1:
        tl.store(
            moments + program * (4 * D) + moment_rows * D + channels[None, :], rate_moment,
            mask=(channels < D)[None, :],
        )  # fmt: skip
        opposite_mean, opposite_exchanged = opposite_exchanged, opposite_mean
    else:
        grad_positive_read, grad_negative_read = _exchange(grad_positive_read, grad_negative_read, channels, BORDER)
    _store_state(
        grad_state + program * (2 * (D + 1) * D), channels,
        grad_positive_read * weight, grad_negative_read * weight,
        (same_mean + opposite_mean) * weight, (same_exchanged + opposite_exchanged) * weight, D,
    )  # fmt: skip
    if MAP == "power":
        tl.store(moments + program * D + channels, tl.sum(log_moment, axis=0), mask=channels < D)


@triton.jit
def key_backward_kernel(
    k, v, first, second, position, key_mask, inverse_count, cos, sin, state, grad_state, grad_k, grad_v, moments,
    k_image, k_token, k_head, v_image, v_token, v_head,
    n, images, parts, tokens_per_part,
    MAP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    ALPHA: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TURNS: tl.constexpr,
    HAS_LOCAL: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One part of the keys and values → their gradients and, of power, its moments (parts, B, H, 2, D).

    Rows of the gradients are ROW apart. With HAS_LOCAL that of the values is added to what stands there.

    The moments are, in the first part alone, the whole sequence's Σ u·∂/∂u, the sums' product with their gradient, and
    Σ u·∂/∂u·log2|u|.
    """
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = load_learned(first, second, head, channels, D, MAP, ALPHA)
    grad_state += (image * H + head) * (2 * (D + 1) * D)
    grad_positive_sum, grad_negative_sum = _load_sums(grad_state, channels, D)
    streams = tl.arange(0, 16)
    mean = grad_state + D * D + channels[:, None] + streams[None, :] * 0
    one_column = (channels < D)[:, None] & (streams == 0)[None, :]
    positive_columns = tl.load(mean, mask=one_column, other=0.0)
    negative_columns = tl.load(mean + (D + 1) * D, mask=one_column, other=0.0)
    first_column = tl.zeros((T, 16), tl.float32) + tl.where(streams == 0, 1.0, 0.0)[None, :]
    if MAP == "power":
        log_moment = tl.zeros((T, DP), tl.float32)
        moments += ((part * images + image) * H + head) * (2 * D) + channels
        moment = tl.zeros((DP,), tl.float32)
        if part == 0:
            state += (image * H + head) * (2 * (D + 1) * D)
            positive_sum, negative_sum = _load_sums(state, channels, D)
            moment += tl.sum(positive_sum * grad_positive_sum + negative_sum * grad_negative_sum, axis=1)
            means = state + D * D + channels
            moment += tl.load(means, mask=channels < D, other=0.0) * _column(positive_columns, streams, 0)
            means += (D + 1) * D
            moment += tl.load(means, mask=channels < D, other=0.0) * _column(negative_columns, streams, 0)
            moment /= _weight(inverse_count, image, n)
        tl.store(moments, moment, mask=channels < D)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    if HAS_POSITION:
        position += head * D
    grad_k += image * n * ROW + head * D
    grad_v += image * n * ROW + head * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    begin = part * tokens_per_part
    last = tl.minimum(begin + tokens_per_part, n)
    for start in range(begin, last, T):
        tokens = start + tl.arange(0, T)
        start = tl.cast(start, tl.int64)
        inside = (tokens < last)[:, None] & (channels < D)[None, :]
        real = inside
        if HAS_MASK:
            real = inside & (tl.load(key_mask + image * n + tokens, mask=tokens < last, other=0) != 0)[:, None]
        u = _load_keys(
            k + start * k_token, position, start * (H * D), inverse_scale,
            rows * k_token + channels[None, :], rows * (H * D) + channels[None, :], real, HAS_POSITION,
        )  # fmt: skip
        values = tl.load(v + start * v_token + (rows * v_token + channels[None, :]), mask=real, other=0.0)
        positive, negative, slope, log = key_features(u, p[None, :], MAP, PRECISION)
        if HAS_TURNS:
            positive, negative = _turned(
                positive, negative, cos, sin, start, rows, (tokens < last)[:, None], False, T, D, DP
            )
        if DP > 64 and PRECISION == "tf32":  # too large to stay in shared memory, twice, for all tiles
            grad_positive_sum, grad_negative_sum = _load_sums(grad_state, channels, D)
        grad_values = _dot(positive, grad_positive_sum, PRECISION) + _dot(negative, grad_negative_sum, PRECISION)
        offsets = rows * ROW + channels[None, :]
        if HAS_LOCAL:
            grad_values += tl.load(grad_v + start * ROW + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_v + start * ROW + offsets, grad_values.to(grad_v.dtype.element_ty), mask=inside)
        grad_positive, grad_negative = _grad_features(
            values, first_column, (grad_positive_sum, grad_negative_sum, positive_columns, negative_columns),
            cos, sin, start, rows, (tokens < last)[:, None], PRECISION, HAS_TURNS, T, D, DP,
        )  # fmt: skip
        grad = pull_back(u, slope, grad_positive, grad_negative)
        if MAP == "power":
            log_moment += u * grad * log
        grad *= (p * inverse_scale)[None, :]
        tl.store(grad_k + start * ROW + offsets, grad.to(grad_k.dtype.element_ty), mask=inside)
    if MAP == "power":
        tl.store(moments + D, tl.sum(log_moment, axis=0), mask=channels < D)
