"""`ttr.explain` and the command line on compositions: what they say is so."""

from __future__ import annotations

import pytest
import torch

import ttr
from ttr.__main__ import main
from ttr.explanation.sources import COMPOSITIONS, entries

D, T = 64, 131  # the end of no segment but one token behind two


@pytest.mark.parametrize("name", ttr.compositions())
def test_every_composition_explains(name):
    e = ttr.explain(name, d_model=256, T=T)
    page = str(e)
    assert e.name == name and repr(e) == page and set(e.sources) >= set(COMPOSITIONS[name])
    assert all(line in page for line in e.equations) and all(entries()[key] in e.bibtex for key in e.sources)
    for part, one in e.parts.items():
        assert one.spec == ttr.declare(name).remembered()[part] and one.path in page and f"{part} {one.name or 'unnamed'}" in page
    assert page.count("Sources\n") == 1


@pytest.mark.parametrize("name", ttr.compositions())
def test_state_bytes_are_those_of_a_real_state(name):
    """At its largest: in MAC where the second segment is about to end."""
    layer = ttr.layer(D, name, n_heads=2).eval()
    e, segment = ttr.explain(layer, T=T), getattr(layer.spec, "segment", None)
    tokens = T if segment is None else 2 * segment - 1
    _, state = layer.prefill(torch.randn(1, tokens, D))
    held = {part: s.memory.nbytes for part, s in state.parts.items()}
    if segment is not None:  # the pairs of the token that ends it are dropped as they come
        held["attention"] += 2 * e.parts["attention"].costs.bytes_per_pair
    assert e.state == held and e.state_bytes == sum(held.values())


def test_what_is_said_of_the_parts():
    mag = ttr.explain("titans_mag")
    assert "prefix" not in ttr.declare("titans_mag").to_yaml() and "i < 4" in mag.parts["window"].recurrence[0]
    assert mag.equations[0].startswith("m = memory([P | x]),  y = window([P | x])")
    lact = ttr.explain("lact_layer")
    assert "one projection for both of q, k, v" in lact.equations[0] and lact.equations[1] == "o = Wₒ (y + m)"
    assert ttr.explain("titans_mal").equations == ("y = memory([P | x])", "o = window(y)")
    mac = ttr.explain("titans_mac", T=10)
    assert mac.parts["attention"].T == 4 + 20 and mac.parts["memory"].T == 10
    with pytest.raises(ValueError, match="T=0"):
        ttr.explain("titans_mac", T=0)


def test_command_line(capsys):
    assert main(["list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "mac       memory titans, attention softmax, persistent 4" in rows["titans_mac"] and "arXiv:2501.00663" in rows["titans_mac"]
    assert (
        "memory lact, window kernel window 2048" in rows["lact_layer"] and rows["compose"].split(maxsplit=1)[1] == "mac, parallel, series"
    )
    assert main(["explain", "titans_mac", "compose.segment=32", "compose.memory.optimizer.mini_batch=16", "--d-model", "128"]) == 0
    out = capsys.readouterr().out
    assert "segments of 32 tokens" in out and "the mini-batch of 16 tokens" in out and "d_model = 128" in out
    assert main(["explain", "titans_mac", "compose.segmnt=32"]) == 2
    assert "Did you mean 'segment'?" in capsys.readouterr().err
