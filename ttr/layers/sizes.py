"""Head sizes: how the ratios of a declaration become numbers at a given model width."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..spec import Spec


@dataclass(frozen=True)
class Sizes:
    """heads: memories (Hv). key_heads: H. key_width, value_width: of one head, as projected."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int


def head_sizes(spec: Spec, d_model: int, exactly: bool = False) -> Sizes:
    """Sizes of `spec`'s layer at `d_model`.

    Without n_heads, as many heads as bring their keys closest to head_dim while dividing the total key and value
    widths; with it, head_dim follows. Raises ValueError when the widths do not divide. exactly: head_dim was asked for here, not
    declared for any width; ValueError where keys would have another.
    """
    layer = spec.layer
    keys, values = layer.expand_k * d_model, layer.expand_v * d_model
    key_total, value_total = max(1, round(keys)), max(1, round(values))
    common = math.gcd(key_total, value_total)
    divisors = [h for h in range(1, common + 1) if common % h == 0]
    if layer.n_heads is None:
        target = key_total / layer.head_dim
        heads = min(divisors, key=lambda h: abs(math.log(h / target)))
    else:
        heads = layer.n_heads
        for name, total in (("expand_k", keys), ("expand_v", values)):
            if total % heads:
                raise ValueError(f"layer.n_heads={heads} does not divide {name} * d_model = {total:g}; choose from {divisors}")
    if exactly and key_total != heads * layer.head_dim:
        asked, whole = f"head_dim={layer.head_dim}", f"expand_k * d_model = {keys:g}"
        if layer.n_heads is None:
            raise ValueError(f"{asked}: {whole} has no such heads; choose from {sorted(key_total // h for h in divisors)}")
        made = f"{whole} in n_heads={heads} heads makes keys of {key_total / heads:g}"
        raise ValueError(f"{asked}: {made}; leave head_dim out, or give n_heads=None")
    key_heads = heads if layer.n_key_heads is None else layer.n_key_heads
    if heads % key_heads:
        raise ValueError(f"layer.n_key_heads={key_heads} does not divide the {heads} heads of this layer")
    return Sizes(heads, key_heads, key_total // heads, value_total // heads)
