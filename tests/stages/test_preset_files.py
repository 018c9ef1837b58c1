"""The preset files themselves: written out in full, with their source, and read back as they were written."""

from __future__ import annotations

from importlib import resources

import pytest
from omegaconf import OmegaConf

import ttr

FILES = {p.name.removesuffix(".yaml"): p for p in resources.files("ttr").joinpath("presets").iterdir() if p.name.endswith(".yaml")}


@pytest.mark.parametrize("name", sorted(FILES))
def test_written_out_with_its_source(name):
    text = FILES[name].read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and 2 <= len(header) <= 8 and "arXiv:" in text
    body = OmegaConf.to_container(OmegaConf.create(text))
    slots = {"name", "regressor", "read", "layer"} | ({"objective", "optimizer", "gate"} if not name.startswith("softmax") else set())
    assert body.keys() == slots and body["name"] == name
    assert {"expand_k", "expand_v", "v", "output"} <= body["layer"].keys() and body["layer"].keys() & {"head_dim", "n_heads"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_round_trips(name, tmp_path):
    spec = ttr.spec(name)
    (tmp_path / "copy.yaml").write_text(spec.to_yaml())
    for again in (ttr.spec(spec.to_dict()), ttr.spec(spec.to_dict(full=True)), ttr.spec(tmp_path / "copy.yaml"), ttr.spec({"base": name})):
        assert again == spec and again.hash == spec.hash
    assert ttr.spec(tmp_path / "copy.yaml").name == name


def test_no_two_presets_declare_the_same_layer():
    assert len({ttr.spec(name).hash for name in FILES}) == len(FILES) == 28


@pytest.mark.parametrize(
    "overrides",
    [
        {"gate": {"kind": "vector", "rank": None}},  # the field's default is head_dim, a signal's is null
        {"gate": {"kind": "vector", "rank": None, "map": {"kind": "mamba", "A": [1, 2]}}},
        {"gate": {"kind": "scalar", "map": "logsigmoid"}},
        {"optimizer": {"kind": "adam", "step": {"scale": 1.0}}},
        {"optimizer": {"kind": "delta", "step": {"value": 0.5, "per": "value"}}},
        {"layer": {"output": [{"kind": "gate", "per": "head"}]}},
        {"layer.qk": ["conv", {"kind": "dpfp", "nu": 2}, "l2"]},
        {"layer.output": [{"kind": "gate", "bias": [-1, 1]}, {"kind": "layer", "affine": "none"}]},
    ],
)
def test_what_differs_from_a_fields_own_default_is_written(overrides):
    spec = ttr.spec("deltanet", **overrides)
    for again in (ttr.spec(spec.to_dict()), ttr.spec(spec.to_dict(full=True))):
        assert again == spec and again.hash == spec.hash
