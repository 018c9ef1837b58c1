"""`python -m ttr`: what it prints, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ttr
from ttr.__main__ import main, overrides
from ttr.explanation.kinds import REGISTRIES
from ttr.schema import hints

HEAVY = ("lightning", "triton", "rich", "transformers", "matplotlib")


def run(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own where heavy packages cannot be imported."""
    lines = ["import runpy, sys", f"for name in {HEAVY}: sys.modules[name] = None", f"sys.argv[1:] = {list(arguments)}"]
    code = "\n".join([*lines, "runpy.run_module('ttr', run_name='__main__')"])
    return subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_explain_runs_without_heavy_packages():
    done = run("explain", "gated_deltanet", "optimizer=momentum", "--d-model", "256")
    assert done.returncode == 0, done.stderr
    assert "gated_deltanet with momentum instead of delta" in done.stdout and "d_model = 256" in done.stdout


def test_list(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "regressor", "objective", "optimizer", "gate", "path", "source"]
    rows = {line.split()[0]: line for line in lines[2:] if line}
    assert set(rows) >= set(ttr.presets())
    assert "delta x3" in rows["deltaproduct"] and "arXiv:2412.06464" in rows["gated_deltanet"] and "fixed retnet" in rows["retnet"]
    kinds = "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("Registered kinds")) :])
    assert all(word in kinds for word in ("least_squares", "huber", "averaged", "implicit", "vector", "mamba", "hedgehog"))


@pytest.mark.parametrize("slot", REGISTRIES)
def test_list_a_kind(slot, capsys):
    """Of every kind all fields, and none twice; what stands there as a default is one."""
    registry = REGISTRIES[slot]
    for kind in registry.kinds():
        assert main(["list", kind]) == 0
        text = capsys.readouterr().out
        page = text[text.index(f"{slot} {kind}") :]
        fields = page.split("default", 1)[1].split("\n\n")[0].splitlines()[1:] if "field " in page else []
        names = [line.split()[0] for line in fields]
        cls = registry.get(kind)
        wanted = set(hints(cls)) - {getattr(cls, "inline_signal", None)}
        assert set(names) >= wanted and len(names) == len(set(names)), kind


def test_list_a_kind_in_words(capsys):
    assert main(["list", "implicit"]) == 0
    out = capsys.readouterr().out
    assert "optimizer implicit: delta with step_rule implicit, step softplus" in out and "optimizer.step_rule implicit" in out
    table = out[out.index("field ") :].split("\n\n")[0].splitlines()[1:]
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in table}
    assert rows["step"] == ["softplus", "a signal"] and rows["mini_batch"] == ["1", "a whole number or sequence"]
    assert rows["accumulate"] == ["false", "true or false"] and rows["position"] == ["none", "one of none, mean, learned"]
    assert out.count("Every optimizer:\nA first-order rule.\n") == 1 and "accumulate: one update per mini-batch" in " ".join(out.split())


@pytest.mark.parametrize("slot", REGISTRIES)
def test_list_a_slot(slot, capsys):
    assert main(["list", slot]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"{slot}: one of {', '.join(REGISTRIES[slot].kinds())} (what one takes: list KIND)")
    assert ("a layer's stages gate" in out) == (slot == "gate"), "a kind too"


def test_list_a_kind_that_is_none(capsys):
    assert main(["list", "momentun"]) == 2
    assert "Did you mean 'momentum'?" in capsys.readouterr().err
    assert main(["list", "kda"]) == 2
    assert "python -m ttr explain kda" in capsys.readouterr().err


def test_explain_with_changes(capsys):
    assert main(["explain", "kda", "optimizer=momentum", "--length", "4", "optimizer.nesterov=true"]) == 0
    out = capsys.readouterr().out
    assert "Wₜ = Diag(αₜ) Wₜ₋₁ + Mₜ" in out and "(Diag(αₜ) Wₜ₋₁ + ηₜ Mₜ₋₁)ᵀ kₜ" in out and "4 tokens" in out


def test_explain_a_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\noptimizer: {kind: delta, steps: 2}\ngate: vector\n")
    assert main(["explain", str(path)]) == 0
    assert capsys.readouterr().out.startswith("mine: regressor linear")


MISTAKES = {
    "unknown preset": (["kdaa"], "Did you mean 'kda'?"),
    "unknown key": (["kda", "optimzer=delta"], "Did you mean 'optimizer'?"),
    "unknown kind": (["kda", "optimizer=dleta"], "Did you mean 'delta'?"),
    "no value": (["kda", "optimizer"], "expected key=value"),
    "wrong type": (["kda", "optimizer.steps=two"], "optimizer.steps"),
    "no YAML": (["kda", "gate={kind"], "no YAML value"),
    "no file": (["missing.yaml"], "missing.yaml"),
    "no meaning": (["softmax", "gate=scalar"], "regressor=kernel"),
    "sizes": (["kda", "layer.n_heads=3", "--d-model", "64"], "n_heads=3"),
    "length": (["kda", "--length", "0"], "T=0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, capsys):
    arguments, words = MISTAKES[mistake]
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("ttr: ") and captured.err.count("\n") == 1 and words in captured.err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["explain"], ["explain", "kda", "--heads", "3"], ["list", "momentum", "steps=2"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_overrides_are_yaml_values():
    given = overrides(
        ["optimizer=momentum", "optimizer.nesterov=true", "layer.n_heads=4", "gate={kind: vector, order: coupled}", "read.scale=1.5"]
    )
    assert given == {"optimizer": {"kind": "momentum"}, "optimizer.nesterov": True, "layer.n_heads": 4,
                     "gate": {"kind": "vector", "order": "coupled"}, "read.scale": 1.5}  # fmt: skip
