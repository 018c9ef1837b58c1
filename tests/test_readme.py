"""The README's and CONTRIBUTING's Python runs as written."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what they save
    code = blocks(name).replace("two_timescales", f"two_timescales_{name[0].lower()}")  # the walk-through's kind, under a name of its own
    scope: dict = {"__name__": "documentation"}
    with torch.no_grad():
        exec(compile(code, name, "exec"), scope)
    assert "@@" not in (ROOT / name).read_text()
    if name == "README.md":
        assert scope["y"].shape == (2, 100, 512) and scope["y_t"].shape == (2, 512)
        assert scope["o"].shape == (2, 256, 4, 64)
        assert len(scope["lm"].specs) == 12
    else:
        scope["test_conforms"]()
