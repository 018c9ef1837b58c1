"""What the scans share: where an event's numbers lie, and what it does to the slots. All tiles are [slots, keys, values]."""

import triton
import triton.language as tl


@triton.jit
def numbers(base, slot, event, events, keys, values, D1: tl.constexpr, D2: tl.constexpr):
    """Where an event's coefficients lie, [slots, 1 or keys, 1 or values]; base: [slots, events, D1, D2]."""
    here = base + (slot * events + event) * (D1 * D2)
    if D1 > 1:
        here = here + keys * D2
    if D2 > 1:
        here = here + values
    return here


@triton.jit
def there(slot, keys, values, D1: tl.constexpr, D2: tl.constexpr):
    """Which of them there are."""
    inside = slot >= 0
    if D1 > 1:
        inside = inside & (keys < D1)
    if D2 > 1:
        inside = inside & (values < D2)
    return inside


@triton.jit
def load_numbers(base, slot, event, events, keys, values, D1: tl.constexpr, D2: tl.constexpr):
    here = numbers(base, slot, event, events, keys, values, D1, D2)
    return tl.load(here, mask=there(slot, keys, values, D1, D2), other=0.0)


@triton.jit
def store_numbers(base, x, again, slot, event, events, keys, values, D1: tl.constexpr, D2: tl.constexpr):
    """x: a gradient over all keys and a tile's values, summed over what its coefficient is one for. again: behind another tile."""
    if D1 == 1:
        x = tl.sum(x, 1, keep_dims=True)
    here, inside = numbers(base, slot, event, events, keys, values, D1, D2), there(slot, keys, values, D1, D2)
    if D2 == 1:
        add(here, tl.sum(x, 2, keep_dims=True), inside, again)
    else:
        tl.store(here, x, mask=inside)


@triton.jit
def add(here, x, inside, again):
    """Store x or, `again`, add it to what the same thread has stored there."""
    tl.store(here, x + tl.load(here, mask=inside & again, other=0.0), mask=inside)


@triton.jit
def row_of_tokens(memory, first, T, H: tl.constexpr, PACKED: tl.constexpr):
    """Where a memory's tokens begin; packed, one row a head holds all sequences, of which this is the one that begins at `first`."""
    if PACKED:
        return memory % H * T + first
    else:
        return memory * T


@triton.jit
def checkpoint_of(
    slot, memory, first, piece, T, every, keys, values, DK: tl.constexpr, DV: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr
):
    """Where a piece's first slots lie: [pieces of all sequences, slots, H, DK, DV]. first // every + n leaves room for all before."""
    before = first // every + memory // H if PACKED else memory // H * tl.cdiv(T, every)
    return (((before + piece) * slot.shape[0] + slot) * H + memory % H) * (DK * DV) + keys * DV + values


@triton.jit
def load_row(base, row, channels, D: tl.constexpr):
    """The row of [rows, D] as `channels` lie: [1, keys, 1] or [1, 1, values]."""
    return tl.load(base + row * D + channels, mask=channels < D, other=0.0)


@triton.jit
def one_of(x, slot, j):
    """Slot j of x: [1, keys, values]."""
    if slot.shape[0] == 1:
        return x
    else:
        return tl.sum(tl.where(slot == j, x, 0.0), 0, keep_dims=True)


@triton.jit
def row_of(x, AXIS: tl.constexpr):
    """x, summed over slots and over AXIS: [1, keys, 1] for the values' axis (2), [1, 1, values] for the keys' (1)."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), AXIS, keep_dims=True)


@triton.jit
def advance(
    z, k, v, A, b, c, known, known_key, known_value, event, events, slot, keys, values,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """The slots after an event: A z + b k E + known known_key known_value."""
    error = error_of(z, k, v, c, event, events, slot, keys, values, DK, DV, C1, C2, SOLVE)
    moved = load_numbers(b, slot, event, events, keys, values, B1, B2) * (load_row(k, event, keys, DK) * error)
    for j in tl.static_range(R):
        moved += load_numbers(A, slot * R + j, event, events, keys, values, A1, A2) * one_of(z, slot, j)
    if known is not None:
        pair = load_row(known_key, event, keys, DK) * load_row(known_value, event, values, DV)
        moved += load_numbers(known, slot, event, events, keys, values, K1, K2) * pair
    return moved


@triton.jit
def error_of(
    z, k, v, c, event, events, slot, keys, values,
    DK: tl.constexpr, DV: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """E = k (sum_s c_s z_s) - v, of which one or the other may be missing: [1, 1, values]."""
    error = tl.zeros_like(values).to(tl.float32)
    if SOLVE:
        looked = load_numbers(c, slot, event, events, keys, values, C1, C2) * z
        error += tl.sum(tl.sum(looked, 0, keep_dims=True) * load_row(k, event, keys, DK), 1, keep_dims=True)
    if v is not None:
        error -= load_row(v, event, values, DV)
    return error
