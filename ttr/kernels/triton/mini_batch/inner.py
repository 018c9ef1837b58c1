"""Device functions: the layer's prediction, the loss's gradient at its output, and the derivative of that gradient."""

import triton
import triton.language as tl

from ..tiles import product


@triton.jit
def mean(x, D: tl.constexpr):
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def two_added(a, b, c, d):
    return a + c, b + d


@triton.jit
def means(x, y, D: tl.constexpr):
    """`mean` of both; where a row's columns lie with several warps, these wait for each other once."""
    if x.shape[0] > 16:
        return mean(x, D), mean(y, D)
    else:
        x, y = tl.reduce((x, y), 1, two_added)
        return (x / D)[:, None], (y / D)[:, None]


@triton.jit
def within(x, columns, D: tl.constexpr, BLOCK: tl.constexpr):
    """x, zero behind the last channel."""
    if BLOCK == D:
        return x
    else:
        return tl.where((columns < D)[None, :], x, 0.0)


@triton.jit
def normalized(a, columns, eps, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """Rows of mean 0 and variance 1 and what they were multiplied by, [rows, 1]; without NORM they stay as they are."""
    if NORM:
        centred = within(a - mean(a, D), columns, D, BLOCK)
        rate = tl.rsqrt(mean(centred * centred, D) + eps)
        return centred * rate, rate
    else:
        return a, tl.full([a.shape[0], 1], 1.0, tl.float32)


@triton.jit
def normalized_gradient(dx, x, rate, columns, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """The gradient of a where that of x, rate = `normalized`(a) is dx."""
    if NORM:
        straight, along = means(dx, dx * x, D)
        return within(rate * (dx - straight - x * along), columns, D, BLOCK)
    else:
        return dx


@triton.jit
def layer_input(z, bias, x, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """x z + bias. z: [BK, BV] and bias: [BV] in float32."""
    a = product(x, z.to(x.dtype), PRECISION)
    if BIASED:
        a += bias[None, :]
    return a


@triton.jit
def slope(
    normal, k, v, gamma, beta, curvature, gain, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The loss's derivative by the prediction, curvature f - gain v with f = [k +] [gamma normal + beta]."""
    f = normal
    if NORM:
        f = normal * gamma[None, :] + beta[None, :]
    if RESIDUAL:
        f += k.to(tl.float32)
    return curvature * f - gain * v.to(tl.float32)


@triton.jit
def loss_gradient(e, normal, rate, gamma, columns, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """The loss's gradient at the layer's output, where its derivative by the prediction is e; and, for its own, mean(e gamma normal)."""
    if NORM:
        h = e * gamma[None, :]
        straight, along = means(h, h * normal, D)
        return within(rate * (h - straight - normal * along), columns, D, BLOCK), along
    else:
        return e, rate


@triton.jit
def loss_gradient_gradient(
    dg, g, along, e, normal, rate, gamma, curvature, columns, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr
):
    """Of g, along = `loss_gradient`(e, normal, rate): de, and the gradients of the layer's output a, through normal and e, and, by
    row, of gamma.

    The map from h = e gamma to g is symmetric: it takes dg to dh. Of the rate, g / rate is the derivative.
    """
    if NORM:
        straight, dalong = means(dg, dg * normal, D)
        dh = within(rate * (dg - straight - normal * dalong), columns, D, BLOCK)
        de = dh * gamma[None, :]
        dnormal = curvature * de * gamma[None, :] - rate * (dg * along + e * gamma[None, :] * dalong)
        da = normalized_gradient(dnormal, normal, rate, columns, D, BLOCK, NORM) - rate * normal * mean(dg * g, D)
        return de, da, dh * e + curvature * de * normal
    else:
        return dg, curvature * dg, dg
