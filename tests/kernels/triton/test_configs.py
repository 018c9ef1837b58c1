"""The table of configurations: committed rows, nearest rows, the user's file, how sequences are cut; `ttr.tune`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import ttr
from ttr.kernels.triton import configs, tune
from ttr.kernels.triton.configs import INTERPRETER, Config, Launch, ShapeClass, config_for, segments


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    file = tmp_path / "kernels.json"
    monkeypatch.setenv("TTR_KERNEL_CONFIGS", str(file))
    configs.forget()
    yield file
    monkeypatch.undo()
    configs.forget()


def test_the_committed_table_is_whole_and_written_as_we_write(user_file, tmp_path):
    table = configs.table()
    classes = {ShapeClass(e, dk, dv, n) for e in (True, False) for dk in (32, 64, 128, 256) for dv in (32, 64, 128, 256) for n in (2, 4)}
    assert table["sm_90"].rows.keys() == classes and table["sm_90"].multiprocessors == 132
    for row in table["sm_90"].rows.values():
        assert row.chunk in (16, 32, 64, 128) and row.every >= 1
        launches = [x for x in vars(row).values() if isinstance(x, Launch)]
        assert all(x.warps in (1, 2, 4, 8) and x.stages >= 1 and x.tile >= 0 for x in launches)
    configs.write_table(table, tmp_path / "again.json")
    assert configs.read_table((tmp_path / "again.json").read_text()) == table


def test_where_there_is_no_row_the_nearest_one_serves(user_file):
    rows = configs.table()["sm_90"].rows
    assert config_for("sm_90", True, 80, 120, torch.float16) == rows[ShapeClass(True, 128, 128, 2)]
    assert config_for("sm_90", False, 16, 256, torch.float32) == rows[ShapeClass(False, 32, 256, 4)]
    for arch in ("sm_80", "sm_100", "sm_120"):
        assert configs.nearest_arch(arch) == "sm_90"
    interpreted = configs.table()[INTERPRETER].rows
    assert config_for(INTERPRETER, True, 256, 64, torch.bfloat16) == interpreted[ShapeClass(True, 32, 32, 4)]


def test_the_user_s_rows_come_first(user_file):
    key = ShapeClass(True, 128, 128, 2)
    mine = replace(config_for("sm_90", True, 128, 128, torch.bfloat16), every=16)
    configs.write_table({"sm_90": configs.Arch(132, {key: mine}), "sm_103": configs.Arch(148, {key: mine})}, user_file)
    configs.forget()
    assert config_for("sm_90", True, 128, 128, torch.bfloat16).every == 16
    assert config_for("sm_90", True, 64, 128, torch.bfloat16).every != 16
    assert config_for("sm_103", False, 64, 64, torch.float32).every == 16, "an architecture of one row has no nearer one"


@pytest.mark.parametrize("change", [{"every": 6}, {"chunk": 48}, {"every": 0}], ids=str)
def test_chunks_and_blocks_are_powers_of_two(change):
    (name, n), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name}={n}: expected a power of two"):
        replace(config_for("sm_90", True, 128, 128, torch.bfloat16), **change)


@pytest.mark.parametrize("text", ["{", "[]", '{"sm_90": {"multiprocessors": 1, "configs": {"erase 64 64 2": {"chunk": 64}}}}'])
def test_a_file_of_another_version_is_left_out_with_a_warning(user_file, text):
    user_file.write_text(text)
    configs.forget()
    with pytest.warns(UserWarning, match=r"kernels\.json is left out: .*ttr\.tune\(\) writes it anew"):
        assert configs.table()["sm_90"].multiprocessors == 132


@pytest.mark.parametrize(
    ("programs", "T", "expected"),
    [
        (256, 65536, 1), (93, 65536, 1), (92, 65536, 1), (91, 65536, 4), (64, 65536, 4), (32, 65536, 8), (1, 1 << 20, 64),
        (32, 512, 1), (32, 960, 1), (32, 1024, 2), (32, 2048, 4), (1, 4096, 8),
    ],
)  # fmt: skip
def test_sequences_are_cut_where_the_heads_do_not_fill_the_gpu(programs, T, expected):
    assert segments(64, 132, programs, T) == expected
    if expected > 1:
        assert -(-T // 64) / expected >= configs.LEAST_CHUNKS


def test_tune_is_refused_where_the_kernels_do_not_serve():
    with pytest.raises(ValueError, match=r"path='triton' cannot serve this call: optimizer.accumulate=true"):
        ttr.tune("lact", B=1, T=64, H=1, dk=16, dv=16)
    with pytest.raises(ValueError, match=r"step is per value; .*: the kernel of one event at a time has no table"):
        ttr.tune("longhorn", B=1, T=64, H=1, dk=16, dv=16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"one decay a key channel have no table of configurations"):
        ttr.tune("kda", B=1, T=64, H=1, dk=16, dv=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="Hv=3: expected a multiple of H=2"):
        ttr.tune("deltanet", B=1, T=64, H=2, Hv=3, dk=16, dv=16, dtype=torch.float32)


def test_tune_keeps_the_fastest_right_configuration(user_file, monkeypatch, interpreter):
    """Times are made up: `every` 8 is the fastest, but gives wrong results; 4 is the next."""
    times = {1: 3.0, 2: 4.0, 4: 2.0, 8: 1.0}
    results = tune._Call.results
    monkeypatch.setattr(tune._Call, "time", lambda self, config: times[config.every])
    monkeypatch.setattr(tune._Call, "results", lambda self, c: [x + 0.5 * (c.every == 8) for x in results(self, c)])
    monkeypatch.setattr(tune, "NUMBERS", {"chunk": (16,), "every": (1, 2, 4, 8)})
    monkeypatch.setattr(tune, "TILES", (16,))
    monkeypatch.setattr(tune, "WARPS", (4,))
    monkeypatch.setattr(tune, "STAGES", (1,))
    lines: list[str] = []
    row = ttr.tune("gated_deltanet", B=1, T=20, H=1, dk=16, dv=16, dtype=torch.float32, report=lines.append)
    assert row["every"] == 4 and config_for(INTERPRETER, True, 16, 16, torch.float32).every == 4
    assert json.loads(user_file.read_text())[INTERPRETER]["configs"]["erase 32 32 4"] == row
    assert len(lines) == 1 + len(Config.__dataclass_fields__)
    assert any("dropped 8: off by" in line for line in lines)
