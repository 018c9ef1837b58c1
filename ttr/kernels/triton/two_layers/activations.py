"""Device functions: the activations of a hidden layer with their first and second derivatives."""

import triton
import triton.language as tl


@triton.jit
def activation(x, NAME: tl.constexpr):
    y, _dy, _ddy = activation_derivatives(x, NAME)
    return y


@triton.jit
def activation_derivatives(x, NAME: tl.constexpr):
    """a(x), a'(x), a''(x); what nobody uses is not computed."""
    if NAME == "gelu":
        # erf by Abramowitz and Stegun, 7.1.26 (within 1.5e-7), whose exponential the derivatives want too
        t = 1.0 / (1.0 + 0.23164190 * tl.abs(x))
        powers = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        bell = tl.exp2(-0.7213475204444817 * x * x)
        tail = 0.5 * powers * bell
        below = tl.where(x >= 0.0, 1.0 - tail, tail)
        density = 0.3989422804014327 * bell
        return x * below, below + x * density, density * (2.0 - x * x)
    elif NAME == "gelu_tanh":
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        s = tl.sigmoid(inner)
        ds = s * (1.0 - s) * slope
        dds = ds * (1.0 - 2.0 * s) * slope + s * (1.0 - s) * 0.4281288976356015 * x
        return x * s, s + x * ds, 2.0 * ds + x * dds
    elif NAME == "silu":
        s = tl.sigmoid(x)
        ds = s * (1.0 - s)
        return x * s, s + x * ds, ds * (2.0 + x * (1.0 - 2.0 * s))
    elif NAME == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        return y, 1.0 - y * y, -2.0 * y * (1.0 - y * y)
    else:
        tl.static_assert(NAME == "relu")
        on = x > 0.0
        return tl.where(on, x, 0.0), tl.where(on, 1.0, 0.0), tl.zeros_like(x)
