"""The sizes that are measured, and the bytes that a call cannot avoid to move."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """q, k: [B, T, H, dk]; v: [B, T, Hv, dv]. Of a whole layer, whose width is H dk, the heads."""

    name: str
    B: int
    T: int
    H: int = 16
    Hv: int = 16
    dk: int = 128
    dv: int = 128

    @property
    def grouped(self) -> bool:
        return self.Hv != self.H

    @property
    def plain(self) -> bool:
        """Whether it differs from the default ones in B and T alone."""
        return (self.H, self.Hv, self.dk, self.dv) == (16, 16, 128, 128)


DEFAULT = (
    Shape(name="8x2048", B=8, T=2048),
    Shape(name="1x16384", B=1, T=16384),
    Shape(name="1x65536", B=1, T=65536),
)
EXTENDED = (
    Shape(name="32x512", B=32, T=512),
    Shape(name="2x8192-hv32", B=2, T=8192, Hv=32),
    Shape(name="2x8192-hv64", B=2, T=8192, Hv=64),
    Shape(name="8x2048-d64", B=8, T=2048, dk=64, dv=64),
    Shape(name="1x16384-d64", B=1, T=16384, dk=64, dv=64),
    Shape(name="8x2048-d256", B=8, T=2048, dk=256, dv=256),
    Shape(name="1x16384-d256", B=1, T=16384, dk=256, dv=256),
)
NONLINEAR = tuple(shape for shape in EXTENDED if shape.name in ("8x2048-d64", "1x16384-d64"))  # width 1024
NONLINEAR_MORE = (  # with these the length grows at as many tokens in all
    Shape(name="32x512-d64", B=32, T=512, dk=64, dv=64),
    Shape(name="2x8192-d64", B=2, T=8192, dk=64, dv=64),
)
LACT = (Shape(name="1x16384-h4-d256", B=1, T=16384, H=4, Hv=4, dk=256, dv=256),)  # width 1024
DECODE = tuple(Shape(name=f"B{B}", B=B, T=1, H=32, Hv=32) for B in (1, 8, 64))
SHAPES = {shape.name: shape for shape in (*DEFAULT, *EXTENDED, *NONLINEAR_MORE, *LACT)}


def floor_bytes(shape: Shape, kind: str, *, pairs: int = 1, write_key: bool = False, per_key: int = 0) -> int:
    """Bytes of q, k, v and o in 16 bits, each moved once: read and written by `forward`; `both` reads q, k, v and do
    again and writes dq, dk, dv. Of `decode`: these of one token, and the float32 state read and written.

    With Hv = H and dk = dv = D that is 8 D a token-head for `forward` and 22 D for `both`. Counted with them: all `pairs`
    k, v of a token, its `write_key`s, and `per_key` gates and steps that have a float32 number a key channel. Numbers per
    head (8 bytes beside 8 D) and the final state are left out.
    """
    keys = 2 * shape.B * shape.T * shape.H * shape.dk  # one of q, k
    values = 2 * shape.B * shape.T * shape.Hv * shape.dv  # one of v, o
    signals = per_key * 4 * shape.B * shape.T * shape.Hv * shape.dk
    inputs = (1 + pairs * (2 if write_key else 1)) * keys + pairs * values + signals
    forward = inputs + values
    if kind == "forward":
        return forward
    if kind == "both":
        return forward + inputs + values + inputs
    if kind == "decode":
        return forward + 2 * 4 * shape.B * shape.Hv * shape.dk * shape.dv
    raise ValueError(f"kind={kind!r}: expected 'forward', 'both' or 'decode'")
