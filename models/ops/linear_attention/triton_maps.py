"""The feature maps of the Triton kernels: from tokens to features, and from the gradient of features to that of tokens.

Each is two halves of D features for a head's D channels. MAP names the map, a compile-time constant:

power     relu(±u)^p of queries and keys, p learned (PolaFormer); the opposite-signed stream meets the halves exchanged
growth    exp(a ⊙ relu(±u)) − 1, a = 1 for keys and learned for queries, which have a set for each of the two streams
          (PolaFormer++)
norm      relu(±u)³ of keys and relu(±u/‖u‖)^p of queries, p of the norm (NaLaFormer); one stream

Letters: D channels per head, DP their next power of two, T tokens of a tile; tiles of tokens are (T, DP), float32.
"""

import triton
import triton.language as tl

# Stands for log2(0), and the least p − 1 by which a logarithm is multiplied: |0|^(p−1) is 0 then, also for p = 1, and
# no other number's is changed by it.
LOG_OF_ZERO = tl.constexpr(-(2.0**42))
LEAST_POWER = tl.constexpr(2.0**-30)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
LOG_2_HIGH = tl.constexpr(0.693145751953125)  # of 16 bits, whose product with a small integer is exact
LOG_2_LOW = tl.constexpr(1.428606820309417e-06)
# Below it exp(x) − 1 is a polynomial, whose next term is 2e-8 of it; above it the difference loses at most two bits.
SMALL_GROWTH = tl.constexpr(0.35)
LEAST_NORM = tl.constexpr(2.0**-126)
# Of maximum: NaN stays NaN. It takes no more instructions than the default, which a GPU returns the other argument by.
PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def exp2(x, PRECISION: tl.constexpr):
    """One instruction of the GPU, declared impure so that the compiler does not compute the same features again for the
    layout of each product: declared pure, it did so 5 times in query_backward_kernel at 32 channels, 11 times at 64."""
    if PRECISION == "interpreted":
        return tl.exp2(x)
    else:  # a compile-time branch: without else, both would be compiled
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def log2(magnitude, PRECISION: tl.constexpr):
    """Of absolute error 2^-22, or exact in float32; of 0 so small that no power of it is anything but 0."""
    if PRECISION == "interpreted" or PRECISION == "ieee":
        log = tl.log2(magnitude)
    else:
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [magnitude], dtype=tl.float32, is_pure=False, pack=1
        )
    return tl.maximum(log, LOG_OF_ZERO, PROPAGATE_NAN)


@triton.jit
def split(signed):
    """relu(s) and relu(−s), both NaN where s is"""
    return tl.maximum(signed, 0.0, PROPAGATE_NAN), tl.maximum(-signed, 0.0, PROPAGATE_NAN)


@triton.jit
def expm1(x, PRECISION: tl.constexpr):
    """exp(x) − 1 of x ≥ 0 with the digits of small x"""
    series = 1.0 + x * (1.0 / 6.0)
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = x + x * x * 0.5 * series
    if PRECISION == "ieee" or PRECISION == "interpreted":  # float32, which would notice the rounding of a large product
        whole = tl.floor(x * LOG2_E + 0.5)
        rest = (x - whole * LOG_2_HIGH) - whole * LOG_2_LOW
        power = exp2(whole, PRECISION) * exp2(rest * LOG2_E, PRECISION)
    else:
        power = exp2(x * LOG2_E, PRECISION)
    return tl.where(x < SMALL_GROWTH, series, power - 1.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with the digits of small exp(x)"""
    small = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0, PROPAGATE_NAN) + tl.where(small < 1e-3, small - small * small * 0.5, tl.log(1.0 + small))


@triton.jit
def load_exponent_and_scale(first, second, head, channels, D: tl.constexpr, ALPHA: tl.constexpr):
    """p and scale of a head, of power; as they are learned, 1 + ALPHA·sigmoid and softplus, where there is an ALPHA"""
    p = tl.full(channels.shape, 1.0, tl.float32)
    if first is not None:
        p = tl.load(first + head * D + channels, mask=channels < D, other=1.0).to(tl.float32)
        if ALPHA is not None:
            p = 1.0 + sigmoid(p) * ALPHA
    elif ALPHA is not None:
        p += ALPHA * 0.5
    scale = tl.full(channels.shape, 1.0, tl.float32)
    if second is not None:
        scale = tl.load(second + head * D + channels, mask=channels < D, other=1.0).to(tl.float32)
        if ALPHA is not None:
            scale = softplus(scale)
    return p, scale


@triton.jit
def load_learned(first, second, head, channels, D: tl.constexpr, MAP: tl.constexpr, ALPHA: tl.constexpr):
    """p of the keys and 1/scale of a head; 1 in the channels that only fill up to a power of two

    1/scale is NaN where p or scale is infinite: of |u|^p and u/scale that would be lost at 0 and where |u| < 1.
    """
    if MAP == "power":
        p, scale = load_exponent_and_scale(first, second, head, channels, D, ALPHA)
        return p, 1.0 / scale + 0.0 * (p + scale)
    else:
        one = tl.full(channels.shape, 1.0, tl.float32)
        return one * (3.0 if MAP == "norm" else 1.0), one


@triton.jit
def load_rates(rates, head, channels, D: tl.constexpr, ALPHA: tl.constexpr):
    """a of both halves of one set of query features, (H, 2·D); as they are learned, sigmoid, where there is an ALPHA"""
    rates += head * (2 * D) + channels
    positive = tl.load(rates, mask=channels < D, other=1.0).to(tl.float32)
    negative = tl.load(rates + D, mask=channels < D, other=1.0).to(tl.float32)
    if ALPHA is not None:
        positive, negative = sigmoid(positive), sigmoid(negative)
    return positive[None, :], negative[None, :]


@triton.jit
def key_features(u, p, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """Both halves, their slope (their derivative by |u| over p; 0 at u = 0) and, of power, log2|u|"""
    if MAP == "growth":
        positive, negative = split(u)
        positive, negative = expm1(positive, PRECISION), expm1(negative, PRECISION)
        return positive, negative, tl.where(u == 0.0, 0.0, positive + negative + 1.0), u
    elif MAP == "norm":
        positive, negative = split(u * u * u)
        return positive, negative, u * u, u
    else:
        log = log2(tl.abs(u), PRECISION)
        slope = exp2(tl.maximum(p - 1.0, LEAST_POWER, PROPAGATE_NAN) * log, PRECISION)
        positive, negative = split(slope * u)
        return positive, negative, slope, log


@triton.jit
def grown_features(u, rates, SET: tl.constexpr, PRECISION: tl.constexpr):
    """Both halves of one set of queries of growth, the second of −u"""
    positive, negative = split(-u if SET else u)
    return expm1(positive * rates[0], PRECISION), expm1(negative * rates[1], PRECISION)


@triton.jit
def norm_of(u, PRECISION: tl.constexpr):
    """‖u‖ (T, 1) ≥ 2^-126, u/‖u‖, tanh‖u‖ and the exponent; by way of the largest channel: squares of small ones are 0.

    A NaN anywhere is in all of them: tl.max returns the other argument.
    """
    largest = tl.maximum(tl.max(tl.abs(u), axis=1), LEAST_NORM)
    scaled = u / largest[:, None]
    length = tl.maximum(tl.sqrt(tl.sum(scaled * scaled, axis=1)), 1.0, PROPAGATE_NAN)
    norm = (largest * length)[:, None]
    tanh = 1.0 - 2.0 / (1.0 + exp2(norm * LOG2_E * 2.0, PRECISION))
    return norm, scaled / length[:, None], tanh, 1.5 + 3.0 * tanh


@triton.jit
def pull_back(u, slope, grad_positive, grad_negative):
    """From the gradients of both halves to that of u, without the factor p; by its slope NaN where u is, 0 at 0"""
    return slope * tl.where(u > 0.0, grad_positive, -grad_negative)


@triton.jit
def pull_back_grown(u, positive, negative, grad_positive, grad_negative, rates, SET: tl.constexpr):
    """The same of one set of growth, and the gradients of its rates, (DP,) each"""
    first, second = split(-u if SET else u)
    grad_positive *= positive + 1.0
    grad_negative *= negative + 1.0
    grad_first, grad_second = tl.sum(first * grad_positive, axis=0), tl.sum(second * grad_negative, axis=0)
    by_sign = tl.where((u > 0.0) == (SET == 0), grad_positive * rates[0], -grad_negative * rates[1])
    return tl.where(u == 0.0, 0.0, -by_sign if SET else by_sign), grad_first, grad_second


@triton.jit
def pull_back_directed(direction, norm, tanh, p, slope, log, grad_positive, grad_negative):
    """The same of norm: what changes the direction, and the norm, in the exponent and in the direction"""
    signed = pull_back(direction, slope, grad_positive, grad_negative)
    weighted = signed * direction
    slope_of_exponent = (1.0 - tanh * tanh) * LOG_2 * 3.0
    through_norm = slope_of_exponent * norm * tl.sum(weighted * log, axis=1)[:, None]
    return (signed * p + direction * (through_norm - p * tl.sum(weighted, axis=1)[:, None])) / norm


@triton.jit
def turn(x, cos, sin, T: tl.constexpr, DP: tl.constexpr):
    """Neighbouring pairs of channels turned by (T, DP/2) angles: (a, b) to (a cos − b sin, b cos + a sin)"""
    a, b = tl.split(tl.reshape(x, (T, DP // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (T, DP))
