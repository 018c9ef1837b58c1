"""`import ttr` is light: torch, einops and nothing that only some uses need."""

from __future__ import annotations

import json
import subprocess
import sys

ABSENT = ("triton", "lightning", "transformers")  # ttr must do without them
HEAVY = ("lightning", "pytorch_lightning", "transformers", "matplotlib", "rich", "torchmetrics", "omegaconf", "experiments")
SCRIPT = f"""
import json, sys, time
sys.modules.update(dict.fromkeys({ABSENT!r}))  # importing one of them now raises ImportError
import torch
before = set(sys.modules)
start = time.perf_counter()
import ttr
seconds = time.perf_counter() - start
compiler = "torch._dynamo" in sys.modules
ttr.spec({{"optimizer": "delta", "gate": "scalar"}})
print(json.dumps({{"seconds": seconds, "compiler": compiler, "heavy": [name for name in {HEAVY!r} if sys.modules.get(name) and name not in before]}}))
"""


def test_import_is_light(record_property, capsys):
    """The time beyond torch's own is reported, not asserted: it is the machine's as much as ours."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["heavy"] == [] and not report["compiler"]
    record_property("seconds of import ttr beyond torch", report["seconds"])
    with capsys.disabled():
        print(f"\nimport ttr: {report['seconds']:.2f} s beyond import torch")
