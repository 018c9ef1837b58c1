"""Names of declarations: one for equal ones, another for any other, in every thread and process."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

import ttr
from ttr.constant import constant
from ttr.gates import NoGate
from ttr.registry import GATES, SpecError, gate


@constant
def scale_of(spec) -> float:
    return spec.read.scale


def test_equal_declarations_share_a_name():
    one, other = ttr.spec("gated_deltanet"), ttr.spec("kda")
    again = pickle.loads(pickle.dumps(one))
    assert again == one and again._known_as == one._known_as != other._known_as
    assert b"_known_as" not in pickle.dumps(one), "another process has other names"


def test_threads_do_not_share_names():
    """Each thread makes declarations of its own; a constant answers for the one it is asked about."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def make(thread: int) -> list:
            return [ttr.spec({"optimizer": "delta", "read": {"scale": 1000.0 * thread + i + 1}}) for i in range(60)]

        with ThreadPoolExecutor(4) as pool:
            specs = [spec for made in pool.map(make, range(4)) for spec in made]
    finally:
        sys.setswitchinterval(before)
    assert len({spec._known_as for spec in specs}) == len(specs)
    assert [scale_of(spec) for spec in specs] == [spec.read.scale for spec in specs]


def test_a_piece_that_cannot_be_hashed_is_named():
    @gate("listed")
    @dataclass(frozen=True, kw_only=True)
    class Listed(NoGate):
        bins: list = None  # type: ignore[assignment]

    try:
        with pytest.raises(SpecError, match=r"gate=.*every field of a piece must be hashable"):
            ttr.Spec(optimizer={"kind": "delta"}, gate=Listed(bins=[1]))
    finally:
        GATES._classes.pop("listed")


COLD = """
import torch, ttr
def call(q): return ttr.regress(q, q, q, {"optimizer": "delta", "objective": {"kind": "l2", "reduce": "mean"}}, step=0.5, path="chunk")[0]
class Module(torch.nn.Module):
    def forward(self, q): return call(q)
q = torch.randn(1, 9, 1, 4)
torch.testing.assert_close(torch.export.export(Module(), (q,)).module()(q), call(q))
"""


def test_an_export_before_any_call_holds_no_probe():
    """What is worked out of a declaration for the first time while torch.export looks on is no part of the program."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COLD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
