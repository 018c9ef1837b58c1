"""Any combination of the pieces works: declarations drawn at random are computed alike along every path they have."""

from __future__ import annotations

import pytest
from sampling import Sampler

import ttr
from ttr import testing


def small(spec: ttr.Spec) -> ttr.Spec:
    """The same mathematics at sizes that a loop can run."""
    spec = ttr.spec(spec, layer={})
    if spec.gate.kind == "fixed" and isinstance(spec.gate.decay, tuple):
        spec = ttr.spec(spec, **{"gate.decay": [-0.1, -0.2]})
    return ttr.spec(spec, **{"regressor.expansion": 1.0}) if spec.regressor.kind == "mlp" else spec


@pytest.mark.parametrize("seed", range(16))
def test_paths_agree(seed):
    """Outputs, final state and every gradient; and a state handed on in the middle of it all."""
    spec = small(Sampler(seed, rate=0.3).spec())
    case = testing.random_inputs(spec, T=6, B=1, dk=3, dv=3, extreme=False, seed=seed)
    expected = testing.evaluate(case, "definition")
    for path in testing.targets(spec):
        if path != "definition":
            testing.assert_close(testing.evaluate(case, path), expected, 1e-9, f"{spec.to_dict()} on {path}")
    testing.assert_close(testing.evaluate(case, splits=[2, 3]), expected, 1e-9, f"{spec.to_dict()} split")
