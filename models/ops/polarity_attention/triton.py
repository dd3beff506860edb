"""Polarity-aware linear attention as Triton kernels: two passes forward, two backward, features in registers only.

README.md beside this file derives what they compute; triton_op.py launches them. Forward: one pass over k and v sums
the state, one over q writes the output. Backward: one pass over q and the output's gradient writes dq and sums the
state's gradient, one over k and v writes dk and dv. A sequence that several programs share is summed in parts, which
the launcher adds in a fixed order.

Letters: B images, N queries, n keys, H heads, D channels per head, DP their next power of two, T tokens of a tile.
In kernels `positive` and `negative` are the features relu(u)^p and relu(−u)^p, `same` and `opposite` the two streams.
"""

import triton
import triton.language as tl

# Stands for log2(0), and the least p − 1 by which a logarithm is multiplied: |0|^(p−1) is 0 then, also for p = 1, and
# no other number's is changed by it.
LOG_OF_ZERO = tl.constexpr(-(2.0**42))
LEAST_POWER = tl.constexpr(2.0**-30)
# Of maximum: NaN stays NaN. It takes no more instructions than the default, which a GPU returns the other argument by.
PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _log_and_slope(u, exponent, PRECISION: tl.constexpr):
    """log2|u| and |u|^(p−1), float32; the latter 0 at 0, also for p = 1, as the derivative is

    Two instructions of the GPU, declared impure so that the compiler does not compute the same features again for the
    layout of each product: declared pure, it did so 5 times in query_backward_kernel at 32 channels, 11 times at 64.
    """
    magnitude = tl.abs(u)
    power = tl.maximum(exponent - 1.0, LEAST_POWER, PROPAGATE_NAN)
    if PRECISION == "interpreted":
        log = tl.maximum(tl.log2(magnitude), LOG_OF_ZERO, PROPAGATE_NAN)
        return log, tl.exp2(power * log)
    else:  # a compile-time branch: without else, both would be compiled
        if PRECISION == "ieee":
            log = tl.log2(magnitude)
        else:  # of absolute error 2^-22
            log = tl.inline_asm_elementwise(
                "lg2.approx.ftz.f32 $0, $1;", "=f,f", [magnitude], dtype=tl.float32, is_pure=False, pack=1
            )
        log = tl.maximum(log, LOG_OF_ZERO, PROPAGATE_NAN)
        slope = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power * log], dtype=tl.float32, is_pure=False, pack=1
        )
        return log, slope


@triton.jit
def _features(u, slope):
    """relu(u)^p and relu(−u)^p, both NaN where u is"""
    signed = slope * u
    return tl.maximum(signed, 0.0, PROPAGATE_NAN), tl.maximum(-signed, 0.0, PROPAGATE_NAN)


@triton.jit
def _grad_tokens(u, slope, grad_positive, grad_negative):
    """Gradient by u, without the factor p; by its slope NaN where u is, 0 at 0"""
    return slope * tl.where(u > 0.0, grad_positive, -grad_negative)


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
def _load_keys(k, position, first, inverse_scale, offsets, position_offsets, real, HAS_POSITION: tl.constexpr):
    """u = (k + position)/scale of a tile, 0 where not real"""
    u = tl.load(k + offsets, mask=real, other=0.0).to(tl.float32)
    if HAS_POSITION:
        u += tl.load(position + first + position_offsets, mask=real, other=0.0).to(tl.float32)
    return u * inverse_scale[None, :]


@triton.jit
def _load_parameters(exponent, scale, head, channels, D: tl.constexpr, HAS_SCALE: tl.constexpr):
    """p and 1/scale of a head; 1 in the channels that only fill up to a power of two

    1/scale is NaN where p or scale is infinite: of |u|^p and u/scale that would be lost at 0 and where |u| < 1.
    """
    p = tl.load(exponent + head * D + channels, mask=channels < D, other=1.0).to(tl.float32)
    divisor = tl.full(channels.shape, 1.0, tl.float32)
    if HAS_SCALE:
        divisor = tl.load(scale + head * D + channels, mask=channels < D, other=1.0).to(tl.float32)
    return p, 1.0 / divisor + 0.0 * (p + divisor)


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
def _load_mean_columns(state, channels, streams, D: tl.constexpr):
    """What each stream's normaliser reads with positive and with negative features, (DP, 16): columns 0 and 1 count."""
    half: tl.constexpr = (D + 1) * D
    offsets = D * D + channels[:, None]
    inside = (channels < D)[:, None] & (streams < 2)[None, :]
    positive = tl.load(state + offsets + streams[None, :] * half, mask=inside, other=0.0)
    return positive, tl.load(state + offsets + (1 - streams)[None, :] * half, mask=inside, other=0.0)


@triton.jit
def _store_state(state, channels, positive, negative, positive_mean, negative_mean, D: tl.constexpr):
    offsets, inside = _state_offsets(channels, D)
    half: tl.constexpr = (D + 1) * D
    tl.store(state + offsets, positive, mask=inside)
    tl.store(state + half + offsets, negative, mask=inside)
    tl.store(state + D * D + channels, positive_mean, mask=channels < D)
    tl.store(state + half + D * D + channels, negative_mean, mask=channels < D)


@triton.jit
def _exchange(positive, negative, channels, D: tl.constexpr):
    """Exchange the halves in the value channels that the opposite-signed stream reads; its own inverse."""
    same = (channels < (D + 1) // 2)[None, :]
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
def _reciprocal_normalisers(
    positive, negative, positive_columns, negative_columns, streams, eps, PRECISION: tl.constexpr
):
    """1/(z + eps) of both streams, (T,)"""
    pair = _dot(positive, positive_columns, PRECISION) + _dot(negative, negative_columns, PRECISION)
    same, opposite = _column(pair, streams, 0) + eps, _column(pair, streams, 1) + eps
    return _reciprocal(same, PRECISION), _reciprocal(opposite, PRECISION)


@triton.jit
def _program(H: tl.constexpr, parts):
    """This program's head, part of the sequence, and image. Neighbours share the rows of memory that hold all heads.

    Head and image, like tokens, are in 64 bits: times a stride they need not fit 32.
    """
    program = tl.program_id(0)
    head, part, image = program % H, (program // H) % parts, program // H // parts
    return head.to(tl.int64), part, image.to(tl.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def state_kernel(
    k, v, exponent, scale, position, key_mask, inverse_count, state,
    k_image, k_token, k_head, v_image, v_token, v_head,
    n, images, parts, tokens_per_part,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One part of one image's and head's keys → its part of the state, (parts, B, H, 2, D + 1, D)."""
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = _load_parameters(exponent, scale, head, channels, D, HAS_SCALE)
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
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, n)
    for start in range(first, last, T):
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
        _, slope = _log_and_slope(u, p[None, :], PRECISION)
        positive, negative = _features(u, slope)
        positive_sum += _dot(tl.trans(positive), values, PRECISION)
        negative_sum += _dot(tl.trans(negative), values, PRECISION)
        positive_mean += _dot(tl.trans(positive), ones, PRECISION)
        negative_mean += _dot(tl.trans(negative), ones, PRECISION)
    weight = tl.load(inverse_count + image)
    state += ((part * images + image) * H + head) * (2 * (D + 1) * D)
    streams = tl.arange(0, 16)
    _store_state(
        state, channels, positive_sum * weight, negative_sum * weight,
        _column(positive_mean, streams, 0) * weight, _column(negative_mean, streams, 0) * weight, D,
    )  # fmt: skip


@triton.jit
def output_kernel(
    q, exponent, scale, state, out,
    q_image, q_token, q_head,
    N, parts, tokens_per_part, eps,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """One part of one image's and head's queries → their rows of the output (B, N, H, D)."""
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = _load_parameters(exponent, scale, head, channels, D, HAS_SCALE)
    streams = tl.arange(0, 16)
    state += (image * H + head) * (2 * (D + 1) * D)
    positive_sum, negative_sum = _load_sums(state, channels, D)
    positive_read, negative_read = _exchange(positive_sum, negative_sum, channels, D)
    positive_columns, negative_columns = _load_mean_columns(state, channels, streams, D)
    same_channels = (channels < (D + 1) // 2)[None, :]
    q += image * q_image + head * q_head
    out += (image * N * H + head) * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, N)
    for start in range(first, last, T):
        tokens = start + tl.arange(0, T)
        start = tl.cast(start, tl.int64)
        inside = (tokens < last)[:, None] & (channels < D)[None, :]
        u = tl.load(q + start * q_token + (rows * q_token + channels[None, :]), mask=inside, other=0.0).to(tl.float32)
        u *= inverse_scale[None, :]
        _, slope = _log_and_slope(u, p[None, :], PRECISION)
        positive, negative = _features(u, slope)
        numerators = _dot(positive, positive_read, PRECISION) + _dot(negative, negative_read, PRECISION)
        same, opposite = _reciprocal_normalisers(
            positive, negative, positive_columns, negative_columns, streams, eps, PRECISION
        )
        result = numerators * tl.where(same_channels, same[:, None], opposite[:, None])
        offsets = rows * (H * D) + channels[None, :]
        tl.store(out + start * (H * D) + offsets, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def query_backward_kernel(
    q, exponent, scale, state, inverse_count, grad_out, grad_q, grad_state, log_moments,
    q_image, q_token, q_head, out_image, out_token, out_head,
    N, images, parts, tokens_per_part, eps,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """One part of the queries → their gradients, its part of the gradient of the state's sums, and its log moment."""
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = _load_parameters(exponent, scale, head, channels, D, HAS_SCALE)
    streams = tl.arange(0, 16)
    state += (image * H + head) * (2 * (D + 1) * D)
    positive_sum, negative_sum = _load_sums(state, channels, D)
    positive_read, negative_read = _exchange(positive_sum, negative_sum, channels, D)
    positive_columns, negative_columns = _load_mean_columns(state, channels, streams, D)
    same_channels = (channels < (D + 1) // 2)[None, :]
    grad_positive_read = tl.zeros((DP, DP), tl.float32)
    grad_negative_read = tl.zeros((DP, DP), tl.float32)
    grad_positive_columns = tl.zeros((DP, 16), tl.float32)
    grad_negative_columns = tl.zeros((DP, 16), tl.float32)
    log_moment = tl.zeros((T, DP), tl.float32)
    q += image * q_image + head * q_head
    grad_out += image * out_image + head * out_head
    grad_q += (image * N * H + head) * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, N)
    for start in range(first, last, T):
        tokens = start + tl.arange(0, T)
        start = tl.cast(start, tl.int64)
        inside = (tokens < last)[:, None] & (channels < D)[None, :]
        u = tl.load(q + start * q_token + (rows * q_token + channels[None, :]), mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(
            grad_out + start * out_token + (rows * out_token + channels[None, :]), mask=inside, other=0.0
        )
        u *= inverse_scale[None, :]
        log, slope = _log_and_slope(u, p[None, :], PRECISION)
        positive, negative = _features(u, slope)
        numerators = _dot(positive, positive_read, PRECISION) + _dot(negative, negative_read, PRECISION)
        same, opposite = _reciprocal_normalisers(
            positive, negative, positive_columns, negative_columns, streams, eps, PRECISION
        )
        grad_numerators = upstream.to(tl.float32) * tl.where(same_channels, same[:, None], opposite[:, None])
        weighted = numerators * grad_numerators
        grad_same = -same * tl.sum(tl.where(same_channels, weighted, 0.0), axis=1)
        grad_opposite = -opposite * tl.sum(tl.where(same_channels, 0.0, weighted), axis=1)
        grad_positive_read += _dot(tl.trans(positive), grad_numerators, PRECISION)
        grad_negative_read += _dot(tl.trans(negative), grad_numerators, PRECISION)
        pair = tl.where(
            streams[None, :] == 0, grad_same[:, None], tl.where(streams[None, :] == 1, grad_opposite[:, None], 0.0)
        )
        grad_positive_columns += _dot(tl.trans(positive), pair, PRECISION)
        grad_negative_columns += _dot(tl.trans(negative), pair, PRECISION)
        grad_positive = _dot(grad_numerators, tl.trans(positive_read), PRECISION)
        grad_positive += _dot(pair, tl.trans(positive_columns), PRECISION)
        grad_negative = _dot(grad_numerators, tl.trans(negative_read), PRECISION)
        grad_negative += _dot(pair, tl.trans(negative_columns), PRECISION)
        grad = _grad_tokens(u, slope, grad_positive, grad_negative)
        log_moment += u * grad * log
        result = grad * (p * inverse_scale)[None, :]
        offsets = rows * (H * D) + channels[None, :]
        tl.store(grad_q + start * (H * D) + offsets, result.to(grad_q.dtype.element_ty), mask=inside)
    weight = tl.load(inverse_count + image)
    grad_positive_sum, grad_negative_sum = _exchange(grad_positive_read, grad_negative_read, channels, D)
    _store_state(
        grad_state + ((part * images + image) * H + head) * (2 * (D + 1) * D), channels,
        grad_positive_sum * weight, grad_negative_sum * weight,
        (_column(grad_positive_columns, streams, 0) + _column(grad_negative_columns, streams, 1)) * weight,
        (_column(grad_positive_columns, streams, 1) + _column(grad_negative_columns, streams, 0)) * weight,
        D,
    )  # fmt: skip
    moments = log_moments + ((part * images + image) * H + head) * D + channels
    tl.store(moments, tl.sum(log_moment, axis=0), mask=channels < D)


@triton.jit
def key_backward_kernel(
    k, v, exponent, scale, position, key_mask, grad_state, grad_k, grad_v, log_moments,
    k_image, k_token, k_head, v_image, v_token, v_head,
    n, images, parts, tokens_per_part,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One part of the keys and values → their gradients, and its log moment."""
    head, part, image = _program(H, parts)
    channels = tl.arange(0, DP)
    p, inverse_scale = _load_parameters(exponent, scale, head, channels, D, HAS_SCALE)
    grad_state += (image * H + head) * (2 * (D + 1) * D)
    grad_positive_sum, grad_negative_sum = _load_sums(grad_state, channels, D)
    streams = tl.arange(0, 16)
    positive_columns, negative_columns = _load_mean_columns(grad_state, channels, streams, D)
    first_column = tl.zeros((T, 16), tl.float32) + tl.where(streams == 0, 1.0, 0.0)[None, :]
    log_moment = tl.zeros((T, DP), tl.float32)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    if HAS_POSITION:
        position += head * D
    grad_k += (image * n * H + head) * D
    grad_v += (image * n * H + head) * D
    rows = tl.arange(0, T).to(tl.int64)[:, None]
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, n)
    for start in range(first, last, T):
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
        log, slope = _log_and_slope(u, p[None, :], PRECISION)
        positive, negative = _features(u, slope)
        if DP > 64 and PRECISION == "tf32":  # too large to stay in shared memory, twice, for all tiles
            grad_positive_sum, grad_negative_sum = _load_sums(grad_state, channels, D)
        grad_values = _dot(positive, grad_positive_sum, PRECISION) + _dot(negative, grad_negative_sum, PRECISION)
        offsets = rows * (H * D) + channels[None, :]
        tl.store(grad_v + start * (H * D) + offsets, grad_values.to(grad_v.dtype.element_ty), mask=inside)
        grad_positive = _dot(values, tl.trans(grad_positive_sum), PRECISION)
        grad_positive += _dot(first_column, tl.trans(positive_columns), PRECISION)
        grad_negative = _dot(values, tl.trans(grad_negative_sum), PRECISION)
        grad_negative += _dot(first_column, tl.trans(negative_columns), PRECISION)
        grad = _grad_tokens(u, slope, grad_positive, grad_negative)
        log_moment += u * grad * log
        grad *= (p * inverse_scale)[None, :]
        tl.store(grad_k + start * (H * D) + offsets, grad.to(grad_k.dtype.element_ty), mask=inside)
    moments = log_moments + ((part * images + image) * H + head) * D + channels
    tl.store(moments, tl.sum(log_moment, axis=0), mask=channels < D)
