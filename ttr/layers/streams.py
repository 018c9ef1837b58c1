"""Streams of a layer: what stands before a projection, the projection, and what stands after it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..registry import SpecError
from ..spec import Spec
from ..stages import Call, Proj, Stage, StageModule, StreamSize
from ..stages.conv import with_silu
from .signals import LowRank
from .sizes import Sizes


def build(stages: tuple[Stage, ...], size: StreamSize, first: int = 0) -> tuple[nn.ModuleList, int]:
    """The modules of consecutive stages, and the head width behind the last."""
    modules = nn.ModuleList()
    for i, stage in enumerate(stages, start=first):
        modules.append(stage.build(replace(size, key=f"{size.name}_{i}")))
        size = replace(size, width=stage.width(size.width))
    return modules, size.width


def run(stages: nn.ModuleList, x: Tensor, call: Call) -> Tensor:
    """One stage after the other. A stream keeps its dtype: under autocast, learned constants in float32 would widen it."""
    rest = list(stages)
    while rest:
        stage = rest.pop(0)
        if rest and with_silu(stage, rest[0]):
            del rest[0]
            x = stage(x, call, silu=True).to(x.dtype)
        else:
            x = stage(x, call).to(x.dtype)
    return x


class Stream(nn.Module):
    """The stages around one projection, which itself belongs to the layer (`q_proj`, ...).

    size: of the projected stream; `width` is that of a head when all stages are done.
    """

    def __init__(self, stages: tuple[Stage, ...], size: StreamSize):
        super().__init__()
        at = [i for i, s in enumerate(stages) if isinstance(s, Proj)]
        if len(at) > 1:
            raise SpecError(f"layer.{size.name} names proj {len(at)} times; a stream is projected once")
        before, after = (stages[: at[0]], stages[at[0] + 1 :]) if at else ((), stages)
        self.proj: Proj = stages[at[0]] if at else Proj()  # type: ignore[assignment]
        if before and (self.proj.share is not None or self.proj.source != "x"):
            raise SpecError(f"layer.{size.name}: stages before proj act on the layer's input; this proj reads another")
        self.heads, self.projected_width = size.heads, size.width
        self.before, width = build(before, replace(size, heads=1, width=size.d_model, micro_steps=1))
        if width != size.d_model:
            raise SpecError(f"layer.{size.name}: a stage before proj changes the width from {size.d_model} to {width}")
        self.after, self.width = build(after, size, len(stages) - len(after))

    @property
    def total(self) -> int:
        """Numbers per token, all heads."""
        return self.heads * self.width

    def stage_modules(self) -> list[StageModule]:
        return [*self.before, *self.after]  # type: ignore[list-item]

    def input(self, call: Call) -> Tensor:
        """What the projection reads: [B, T, d_in]."""
        if self.proj.source == "v":
            return call.streams["v"].flatten(2)
        return run(self.before, call.x[:, :, None], call)[:, :, 0]

    def forward(self, projected: Tensor, call: Call) -> Tensor:
        """[B, T, heads, projected width] -> [B, T, heads, width]."""
        return run(self.after, projected, call)


def build_streams(spec: Spec, sizes: Sizes, pairs: int, place: StreamSize) -> dict[str, Stream]:
    """v, k, q and, where declared, write_key; `pairs` per token, each with heads of its own."""
    layer = spec.layer
    keys = replace(place, heads=sizes.key_heads * pairs, width=sizes.key_width, micro_steps=pairs)
    values = replace(place, heads=sizes.heads * pairs, width=sizes.value_width, micro_steps=pairs)
    declared = {
        "v": (layer.v, values),
        "k": (layer.k, keys),
        "q": (layer.q, replace(keys, heads=sizes.key_heads, micro_steps=1)),
    }
    if spec.separate_write_key:
        declared["write_key"] = (layer.k if layer.write_key is None else layer.write_key, keys)
    streams = {name: Stream(stages or (), replace(size, name=name)) for name, (stages, size) in declared.items()}
    widths = {name: stream.width for name, stream in streams.items() if name != "v"}
    if len(set(widths.values())) > 1:
        raise SpecError(f"layer: queries and keys meet in the memory and must be equally wide; stages give {widths}")
    return streams


def build_projection(name: str, streams: dict[str, Stream], d_model: int) -> nn.Module | None:
    """The linear map of one stream into its heads, or None where it shares another's."""
    stream = streams[name]
    proj, d_out = stream.proj, stream.heads * stream.projected_width
    if proj.share is not None:
        other = streams.get(proj.share)
        if other is None or other.proj.share is not None or other is stream:
            raise SpecError(f"layer.{name}: proj.share={proj.share!r} must name another stream with a projection of its own")
        if (other.heads, other.projected_width) != (stream.heads, stream.projected_width):
            raise SpecError(
                f"layer.{name}: proj.share={proj.share!r} has {other.heads} heads of {other.projected_width}, "
                f"this stream {stream.heads} of {stream.projected_width}"
            )
        return None
    if proj.source == "v" and name == "v":
        raise SpecError("layer.v: proj.source='v' would project itself")
    d_in = d_model if proj.source == "x" else streams["v"].total
    return nn.Linear(d_in, d_out, bias=False) if proj.rank is None else LowRank(d_in, proj.rank, d_out)
