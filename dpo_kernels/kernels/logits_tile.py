"""What every kernel that meets logits shares: tile order, the tile product, the epilogue and its derivative.

Legend: T rows, D hidden size, V vocabulary. One tile is BLOCK_N rows by BLOCK_V columns, its sum over D in fp32.
The logit that enters the softmax is  softcap(scale * (hidden @ weight.T + bias)) / temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_position(tile, num_tiles_n, num_tiles_v, GROUP_N: tl.constexpr):
    """Row and column tile of a linear tile number: GROUP_N row tiles reuse a weight tile while it is in L2."""
    tiles_in_group = GROUP_N * num_tiles_v
    first_n = (tile // tiles_in_group) * GROUP_N
    group_size = tl.minimum(num_tiles_n - first_n, GROUP_N)
    inside = tile % tiles_in_group
    return first_n + inside % group_size, inside // group_size


@triton.jit
def local_labels(labels, first_col):
    """Labels as columns of a slice, int32: -1 before it. Whatever an ignored label is, it matches no column."""
    # Labels of a vocabulary lie below 2^31.
    return tl.minimum(tl.maximum(labels - first_col, -1), 2147483647).to(tl.int32)


@triton.jit
def bias_tile(bias_ptr, cols, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What the product is added to: starting from the bias costs no registers beside the accumulator's."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        return tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32) + bias[None, :]
    return tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)


@triton.jit
def tile_product(
    acc,
    hidden,
    weight,
    hidden_stride,
    weight_stride,
    row_start,
    col_start,
    T,
    col_end,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + hidden @ weight.T in fp32. hidden and weight are tensor descriptors with USE_TMA, else pointers."""
    if USE_TMA:
        for d in range(0, D, BLOCK_D):
            hidden_tile = hidden.load([row_start, d])
            weight_tile = weight.load([col_start, d])
            acc = dot(hidden_tile, weight_tile.T, acc, PRECISION)
    else:
        # Rows and columns past the end read the last valid one: no mask in the loop, and the epilogue drops them.
        rows = tl.minimum(row_start + tl.arange(0, BLOCK_N), T - 1).to(tl.int64)
        cols = tl.minimum(col_start + tl.arange(0, BLOCK_V), col_end - 1).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden + rows[:, None] * hidden_stride + dims[None, :]
        weight_ptrs = weight + cols[None, :] * weight_stride + dims[:, None]
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                hidden_tile = tl.load(hidden_ptrs)
                weight_tile = tl.load(weight_ptrs)
            else:
                hidden_tile = tl.load(hidden_ptrs, mask=dims[None, :] < D - d, other=0.0)
                weight_tile = tl.load(weight_ptrs, mask=dims[:, None] < D - d, other=0.0)
            acc = dot(hidden_tile, weight_tile, acc, PRECISION)
            hidden_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D
    return acc


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if PRECISION == "widen":
        # The interpreter multiplies the bit patterns of bfloat16; in fp32 the products are the same as on tensor cores.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exp(x):
    """e^x as a power of 2: one multiplication and one instruction; what is below 2^-126 is 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(x):
    """tanh to fp32 rounding: libdevice, which has one, is absent from the interpreter."""
    # A series near 0, where 1 - exp(-2 x) would cancel.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    decay = exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and log(1 + u) = log(w) * u / (w - 1) with w = 1 + u, exact where 1 + u would round u away."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    return tl.maximum(x, 0.0) + tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 without the cancellation near 0."""
    u = tl.exp(x)
    exact = (u == 1.0) | (u < 0.5)
    return tl.where(u == 1.0, -x, tl.where(u < 0.5, 1.0 - u, (1.0 - u) * x / tl.where(exact, 1.0, tl.log(u))))


@triton.jit
def final_logits(biased, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr):
    """softcap(scale * biased) / temperature in fp32, where biased = product + bias."""
    if not HAS_SCALE and not HAS_SOFTCAP:
        return biased
    scale = tl.cast(logit_scale, tl.float32)
    if HAS_SOFTCAP:
        cap = tl.cast(softcap, tl.float32)
        return (cap / tl.cast(temperature, tl.float32)) * tanh(biased * (scale / cap))
    return biased * (scale / tl.cast(temperature, tl.float32))


@triton.jit
def logits_slope(z, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Derivative of final_logits with respect to `biased`, from its value z."""
    slope = linear_slope(logit_scale, temperature)
    if HAS_SOFTCAP:
        slope = slope * cap_slope(z, softcap, temperature)
    return slope


@triton.jit
def cap_slope_of(biased, logit_scale, softcap):
    """cap_slope from what final_logits is made of: 1 - tanh^2 keeps its digits where a cap saturates."""
    decay = exp(-2.0 * tl.abs(biased * (tl.cast(logit_scale, tl.float32) / tl.cast(softcap, tl.float32))))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def linear_slope(logit_scale, temperature):
    """What logits_slope is without a softcap."""
    return tl.cast(logit_scale, tl.float32) / tl.cast(temperature, tl.float32)


@triton.jit
def cap_slope(z, softcap, temperature):
    """What a softcap adds to logits_slope: a factor from 0 to 1."""
    ratio = z * (tl.cast(temperature, tl.float32) / tl.cast(softcap, tl.float32))
    return 1.0 - ratio * ratio
