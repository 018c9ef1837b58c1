"""Declarations of compositions: spellings, files, compositions of one's own, refusals, and the one door."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pytest
import torch
from composed import SMALL, TOLERANCE, B, D, every, tokens
from omegaconf import OmegaConf

import ttr
from ttr.layers import ComposedLayer, Mixer
from ttr.registry import COMPOSITIONS


def test_the_list_is_complete():
    assert ttr.compositions() == sorted(SMALL)


@every
def test_declarations_round_trip(name, tmp_path):
    composition = ttr.declare(name)
    (tmp_path / "copy.yaml").write_text(composition.to_yaml())
    again = [composition.to_dict(), composition.to_dict(full=True), tmp_path / "copy.yaml", {"base": name}, composition]
    for source in again:
        assert ttr.declare(source) == composition and ttr.declare(source).hash == composition.hash
    assert composition.name == name and ttr.declare({"base": name}).name is None
    assert len({ttr.declare(n).hash for n in SMALL}) == len(SMALL)


def test_parts_merge_replace_and_are_found_beside_their_file(tmp_path):
    changed = ttr.declare("titans_mag", **{"compose.memory.layer.head_dim": 32, "compose.window": "softmax", "compose.persistent": 9})
    assert changed.memory == ttr.spec("titans", **{"layer.head_dim": 32}) and changed.window == ttr.spec("softmax")
    assert changed.persistent == 9 and changed != ttr.declare("titans_mag")
    (tmp_path / "mine.yaml").write_text("base: kda\nlayer: {n_heads: 2}\n")
    (tmp_path / "both.yaml").write_text("compose: {kind: parallel, memory: mine.yaml, window: {base: mine.yaml, layer: {head_dim: 32}}}\n")
    both = ttr.declare(tmp_path / "both.yaml")
    assert both.memory == ttr.spec("kda", **{"layer.n_heads": 2}) and both.window.layer.head_dim == 32


PARALLEL = {"kind": "parallel", "memory": "titans", "window": "softmax_window"}


REFUSED = {
    "kind": ({"kind": "paralel"}, "compose.kind='paralel' is not known; choose from ['mac', 'parallel', 'series']. Did you mean 'parallel'?"),
    "no memory": ({"kind": "mac"}, "compose: MAC needs ['memory']"),
    "field": ({**PARALLEL, "persistant": 3}, "compose.persistant=3: Parallel has no such field", "Did you mean 'persistent'?"),
    "part": ({**PARALLEL, "memory": "titan"}, "compose.memory: spec='titan' is not known", "Did you mean 'titans'?"),
    "field of a part": ({**PARALLEL, "memory": {"base": "titans", "layer": {"heads": 3}}}, "compose.memory: layer.heads=3: Layer has no such"),
    "composition in a part": ({**PARALLEL, "memory": "titans_mag"}, "compose.memory: titans_mag composes layers", "one memory is expected"),
    "persistent": ({**PARALLEL, "persistent": -1}, "compose.persistent=-1: expected at least 0"),
    "combine": ({**PARALLEL, "combine": "product"}, "compose.combine='product': expected one of ['gate', 'sum']"),
    "share": ({**PARALLEL, "share": ["q", "o"]}, "compose.share[1]='o': expected one of ['k', 'q', 'v']"),
    "share twice": ({**PARALLEL, "share": ["q", "q"]}, "compose.share=['q', 'q'] names a stream twice"),
    "share shifted": ({**PARALLEL, "memory": "rwkv7", "share": ["k"]}, "compose.share: memory.layer.k says how it is projected"),
    "prefix": ({**PARALLEL, "persistent": 3, "window": {"base": "softmax_window", "regressor": {"prefix": 2}}},
        "compose.window: regressor.prefix=2, but what this window keeps is the 3 vectors"),
    "segment": ({"kind": "mac", "memory": "titans", "segment": 0}, "compose.segment=0: expected at least 1"),
    "mac on mesa": ({"kind": "mac", "memory": "mesanet"}, "compose.memory: mac reads the memory", "regressor 'least_squares' is trained by no"),
    "mac on mlstm": ({"kind": "mac", "memory": "mlstm"}, "compose.memory: mac reads the memory", "read.normalizer='max1'"),
    "mac on ttt": ({"kind": "mac", "memory": "ttt_linear"}, "compose.memory: mac reads the memory", "optimizer.position='learned'"),
    "mac on a window": ({"kind": "mac", "memory": "titans", "attention": "softmax_window"}, "compose.attention", "got 'kernel' with window=512"),
    "mac on no attention": ({"kind": "mac", "memory": "titans", "attention": "kda"}, "compose.attention", "got 'linear' with window=None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_came_and_what_there_is(name):
    compose, *parts = REFUSED[name]
    with pytest.raises(ttr.SpecError) as error:
        ttr.declare({"compose": compose})
    assert all(part in str(error.value) for part in parts), error.value


def test_a_composition_of_ones_own():
    @ttr.composition("residual")
    @dataclass(frozen=True, kw_only=True)
    class Residual(ttr.Composition):
        parts = ("memory",)
        memory: Any

        def build(self, place):
            return ResidualLayer(self, place)

        def equations(self):
            return ("o = x + memory([P | x])",)

    class ResidualLayer(ComposedLayer):
        def __init__(self, spec, place):
            super().__init__(spec, place)
            self.memory = place.mixer(spec.memory, path=place.path)
            self.reset_persistent()

        def run(self, x, state, cu_seqlens):
            y, memory = self.memory.run(x, self.begin(x, state, cu_seqlens)["memory"], cu_seqlens)
            return x + y, self.state({"memory": memory})

        @property
        def o_proj(self):
            return self.memory.o_proj

    try:
        layer, x = ttr.layer(D, {"compose": {"kind": "residual", "memory": "kda", "persistent": 2}}, n_heads=2).double(), tokens(B, 9)
        first, state = layer.prefill(x[:, :4])
        torch.testing.assert_close(torch.cat([first, layer.prefill(x[:, 4:], state)[0]], 1), layer(x), **TOLERANCE)
        assert "o = x + memory([P | x])" in str(ttr.explain(layer))
    finally:
        del COMPOSITIONS._classes["residual"]


@every
def test_the_files_say_everything_and_where_it_comes_from(name):
    text = resources.files("ttr").joinpath("presets", "compositions", f"{name}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    body = OmegaConf.to_container(OmegaConf.create(text))
    assert 2 <= len(header) <= 8 and "arXiv:" in header[0] + header[1] and body["name"] == name
    assert body["compose"].keys() == {"kind", *(f.name for f in dataclasses.fields(ttr.declare(name)) if f.name != "name")}


def test_one_door():
    for wrong in (ttr.spec, lambda source: Mixer(D, source), lambda source: ttr.regress(*[torch.zeros(1, 1, 1, 4)] * 3, source)):
        with pytest.raises(ttr.SpecError, match=r"titans_mac composes layers .*which ttr\.layer\(d_model, \.\.\.\) makes"):
            wrong("titans_mac")
    with pytest.raises(ttr.SpecError, match=r"gate='scalar' stands beside compose.*as compose\.memory\.gate"):
        ttr.declare("titans_mac", gate="scalar")
    with pytest.raises(ttr.SpecError, match=r"spec='titans_mab' is not known.*Did you mean 'titans_ma"):
        ttr.layer(D, "titans_mab")
    with pytest.raises(ValueError, match=r"layer_idx=2: expected 0 <= layer_idx < n_layers=2"):
        ttr.layer(D, "titans_mac", layer_idx=2, n_layers=2)
    with pytest.raises(ttr.SpecError, match=r"memory's heads give 64, window's 32"):
        ttr.layer(D, {"compose": {**PARALLEL, "memory": {"base": "kda", "layer": {"expand_v": 2}}}})
    with pytest.raises(ttr.SpecError, match=r"compose.share: k is projected to 64 channels for memory, to 32 for window"):
        ttr.layer(D, {"compose": {**PARALLEL, "memory": {"base": "kda", "layer": {"expand_k": 2}}, "share": ["k"]}})
    with pytest.raises(ValueError, match=r"x: got shape \[1, 5, 3\], expected \[B, T, 32\]"):
        ttr.layer(D, "titans_mac")(torch.zeros(1, 5, 3))
