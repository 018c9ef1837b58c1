"""The scan over mini-batches: where each begins, and its gradients."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, store_rows
from .inner import layer_input, loss_gradient, normalized, slope
from .places import load_affine, load_mixing, load_written, place_of, store_block
from .slots import load_slots, store_slots


@kernel("T batches eps curvature gain")
def advance_kernel(
    k, v, mask, written, kept, factor, gamma, beta, first, first_bias, starts, start_biases, gradient, last, last_bias,
    T, batches, eps, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one sequence a program.

        G = dl/da at a = K Z_0 + c_0,     Z_s <- sum_l phi_sl Z_l + K^T (F_s * G),     c_s likewise with K = 1

    written, kept: F and phi. first, last: [N, Hv, r, dk, dv], float32, their biases [N, Hv, r, dv]. starts, start_biases: the
    slots before every mini-batch, [N, batches, Hv, r, ...]. gradient: G, [tokens, Hv, dv].
    """
    n = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
    at = (n * HV + head).to(tl.int64) * SLOTS
    z, c, n_z, n_c = load_slots(first, first_bias, at, keys, values, DK, DV, BV, SLOTS, BIASED)
    for batch in tl.range(0, batches, num_stages=STAGES):
        token = n.to(tl.int64) * T + batch * SIZE
        valid = t < SIZE
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        place = place_of(n, batch, batches, head, HV)
        store_block(starts + place * SLOTS * DK * DV, z, keys, values, DK, DV)
        if BIASED:
            tl.store(start_biases + place * SLOTS * DV + values, c, mask=values < DV)
        normal, rate = normalized(layer_input(z, c, key, BIASED, PRECISION), values, eps, DV, BV, NORM)
        e = slope(normal, key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
        g = loss_gradient(e, normal, rate, scale, values, DV, BV, NORM)[0].to(key.dtype)
        store_rows(gradient + head * DV, token, g, t, valid, values, HV * DV, DV, BV)
        g = g.to(tl.float32)
        f = load_written(mask, written, factor, place * SLOTS, head, token, t, valid, HV, SIZE)
        write = f[:, None] * g
        if SLOTS == 2:
            store_block(starts + (place * SLOTS + 1) * DK * DV, n_z, keys, values, DK, DV)
            own, across, back, moved = load_mixing(kept, place)
            n_f = load_written(mask, written, factor, place * SLOTS + 1, head, token, t, valid, HV, SIZE)
            n_write = n_f[:, None] * g
            z, n_z = own * z + across * n_z, back * z + moved * n_z
            n_z = tl.dot(tl.trans(key), n_write.to(key.dtype), acc=n_z, input_precision=PRECISION)
            if BIASED:
                tl.store(start_biases + (place * SLOTS + 1) * DV + values, n_c, mask=values < DV)
                c, n_c = own * c + across * n_c, back * c + moved * n_c
                n_c += tl.sum(n_write, 0)
        elif kept is not None:
            own = tl.load(kept + place)
            z *= own
            c *= own
        z = tl.dot(tl.trans(key), write.to(key.dtype), acc=z, input_precision=PRECISION)
        if BIASED:
            c += tl.sum(write, 0)
    store_slots(last, last_bias, at, z, c, n_z, n_c, keys, values, DK, DV, SLOTS, BIASED)
