"""The benchmark around its timings: bytes, plan, record, table and picture; nothing here is timed."""

import json

import pytest
from rich.console import Console

from experiments.bench import __main__ as command
from experiments.bench import measure, output, peers, tables, timing
from experiments.bench.case import Contender
from experiments.bench.cases import CASES
from experiments.bench.linear import Linear
from experiments.bench.plan import KINDS, Choice, plan
from experiments.bench.record import Record
from experiments.bench.shapes import DECODE, DEFAULT, SHAPES, Shape, floor_bytes

RUN = {
    "kind": "run", "command": "python -m experiments.bench", "date": "2026-11-22", "gpu": "a GPU", "bandwidth_tb_s": 4.3,
    "versions": {"torch": "2.11.0", "tilelang": None}, "left_out": ["flash_qla: cannot be imported (no nvcc)"],
}  # fmt: skip
BENCH = measure.Bench(bandwidth=4e12, matmul=7e14, effort=timing.QUICK)


def row(kind, case="gated_delta", shape="8x2048", who="ttr", **figures):
    return {"kind": kind, "case": case, "shape": shape, "who": who, **figures}


RECORDED = [
    RUN,
    {"kind": "route", "text": "common.chunk_bwd_dqkwg -> tilelang"},
    row("forward", who="fla", ms=0.4, floor_ms=0.05, difference=3e-3),
    row("both", who="fla", ms=2.0, floor_ms=0.2, peak_bytes=800 * 2**20, note=peers.CHECK_REMOVED),
    row("forward", ms=0.1, floor_ms=0.05),
    row("both", ms=0.5, floor_ms=0.2, peak_bytes=400 * 2**20),
    row("forward", shape="1x65536", ms=0.3, floor_ms=0.2),
    row("both", shape="1x65536", who="flash_qla", error="AssertionError: a | b"),
    row("forward", case="sdpa", who="torch", ms=0.3, floor_ms=0.05),
    row("decode", shape="B8", eager_us=20.0, graph_us=8.0, floor_us=4.0),
    row("decode", shape="B8", who="fla", eager_us=40.0, graph_us=10.0, floor_us=4.0, difference=2e-3),
    row("cold", first_s=4.0, second_ms=1.0),
]


def cells(title, *at):
    [sheet] = [sheet for sheet in tables.sheets(RECORDED) if sheet.title.startswith(title)]
    [line] = [line for line in sheet.lines if line[:3] == at]
    return line


def test_the_floor_of_equal_heads_is_8_and_22_bytes_a_channel():
    shape = Shape(name="", B=3, T=5, H=2, Hv=2, dk=64, dv=64)
    token_heads = 3 * 5 * 2
    assert floor_bytes(shape, "forward") == token_heads * 8 * 64
    assert floor_bytes(shape, "both") == token_heads * 22 * 64


def test_the_floor_of_grouped_heads_and_unequal_sizes():
    shape = Shape(name="", B=1, T=7, H=2, Hv=6, dk=32, dv=64)
    keys, values = 7 * 2 * 32, 7 * 6 * 64
    assert floor_bytes(shape, "forward") == 2 * (2 * keys + 2 * values)  # q k v o
    assert floor_bytes(shape, "both") == 2 * (2 * keys + 2 * values) + 2 * (4 * keys + 3 * values)  # q k v do dq dk dv
    state = 6 * 32 * 64
    assert floor_bytes(Shape(name="", B=1, T=1, H=2, Hv=6, dk=32, dv=64), "decode") == 2 * (2 * 64 + 2 * 384) + 8 * state
    with pytest.raises(ValueError, match="kind='cold': expected 'forward', 'both' or 'decode'"):
        floor_bytes(shape, "cold")


def test_the_plan_has_the_default_shapes_first_and_says_what_is_left_out():
    choice = Choice(cases=["simple_gla", "gated_delta", "delta", "sdpa"], shapes=list(SHAPES), kinds=KINDS, there=peers.PEERS)
    groups, left_out = plan(choice)
    default = [shape.name for shape in DEFAULT]
    assert [group.shape.name for group in groups[:6]] == [default[0]] * 6
    assert groups[2].whos == ("ttr", "fla", "flash_qla")
    assert {group.whos for group in groups if group.kind == "cold"} == {("ttr",)}
    assert "flash_qla gated_delta 8x2048-d64: takes head size 128 only" in left_out
    assert "fla delta 2x8192-hv32: takes no more value heads than key heads" in left_out

    ours, left_out = plan(Choice(cases=["delta", "sdpa"], shapes=["32x512"], kinds=["both", "decode"], there=[]))
    assert [(group.kind, group.shape.name, group.whos) for group in ours] == [
        *(("decode", shape.name, ("ttr",)) for shape in DECODE),
        ("both", "32x512", ("ttr",)),
    ]
    assert left_out == []


def test_ratios_are_ours_over_the_other():
    assert cells("Sequences", "gated_delta", "8x2048", "fla")[3:] == (
        "0.400", "8.0", "0.25", "2.000", "10.0", "0.25", "800", "0.50", "3.0e-03", "check removed, speed only"
    )  # fmt: skip
    assert cells("Sequences", "gated_delta", "8x2048", "ttr")[3:6] == ("0.100", "2.0", "")
    assert cells("Sequences", "gated_delta", "1x65536", "flash_qla")[-1] == "both: AssertionError: a | b"
    assert cells("Decoding", "gated_delta", "B8", "fla")[3:9] == ("40.0", "0.50", "10.0", "2.5", "0.80", "2.0e-03")
    assert cells("First call", "gated_delta", "8x2048", "ttr")[3:6] == ("4.0", "", "1.0")


def test_a_record_becomes_table_results_and_picture(tmp_path):
    assert output.write(tmp_path, RECORDED) == ["table.md", "results.json", "speed.png"]
    text = (tmp_path / "table.md").read_text()
    assert "a GPU: torch 2.11.0, 2026-11-22" in text and "4.30 TB/s" in text
    assert "common.chunk_bwd_dqkwg -> tilelang" in text and "flash_qla: cannot be imported" in text
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in lines}
    assert widths == {14, 11, 8}  # one per table
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == [RUN] and len(results["rows"]) == len(RECORDED) - 2
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_without_times_there_is_no_picture(tmp_path):
    assert output.write(tmp_path, [RUN, row("both", error="RuntimeError: no")]) == ["table.md", "results.json"]


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    groups, _ = plan(Choice(cases=["gated_delta"], shapes=["8x2048"], kinds=["forward", "both"], there=["fla"]))
    asked = []

    def sequence(bench, kind, case, shape, whos, compare):
        asked.append((kind, whos, compare))
        for who in whos:
            if (kind, who) == stop:
                raise KeyboardInterrupt
            yield row(kind, who=who, ms=1.0, floor_ms=0.5)

    monkeypatch.setattr(measure, "sequence", sequence)
    path, stop = tmp_path / "measurements.jsonl", ("forward", "fla")
    with pytest.raises(KeyboardInterrupt):
        command.run(BENCH, groups, Record(path), Console(quiet=True))
    with path.open("a") as file:
        file.write('{"kind": "forw')  # killed while it wrote
    stop = None
    command.run(BENCH, groups, Record(path), Console(quiet=True))
    assert asked == [("forward", ("ttr", "fla"), False), ("forward", ("fla",), True), ("both", ("ttr", "fla"), False)]
    record = Record(path)
    assert [(r["kind"], r["who"]) for r in record.rows] == [(kind, who) for kind in ("forward", "both") for who in ("ttr", "fla")]
    command.run(BENCH, groups, record, Console(quiet=True))
    assert len(asked) == 3 and len(record.rows) == 4


def test_what_raised_is_not_measured_again_nor_compared_with(tmp_path):
    record = Record(tmp_path / "measurements.jsonl")
    record.append(row("forward", error="RuntimeError: no"))
    assert record.missing("forward", "gated_delta", "8x2048", ("ttr", "fla")) == ("fla",)
    assert record.missing("both", "gated_delta", "8x2048", ("ttr", "fla")) == ("ttr", "fla")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "rwkv6"], "invalid choice: 'rwkv6' (choose from"),
        (["--shapes", "8x2049"], "invalid choice: '8x2049' (choose from"),
        (["--peers", "helion"], "invalid choice: 'helion' (choose from"),
        (["--only", "backward"], "invalid choice: 'backward' (choose from"),
        (["--shapes", "8x2048", "--extended"], "not allowed with argument --shapes"),
    ],
)
def test_wrong_arguments_name_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    text = capsys.readouterr().err
    assert message in text
    if "choose" in message:
        names = {"--cases": CASES, "--shapes": SHAPES, "--peers": peers.PEERS, "--only": KINDS}[arguments[0]]
        assert all(name in text.split("choose from")[1] for name in names)


def test_results_are_not_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "measurements.jsonl").touch()
    with pytest.raises(SystemExit, match="2"):
        command.main(["--output", str(tmp_path)])
    assert "--resume goes on from it" in capsys.readouterr().err


def test_a_peer_that_is_not_there_says_why():
    assert peers.problem("torch") is None
    assert peers.version("surely-not-installed") is None


def test_one_call_that_raises_while_timed_leaves_the_others(monkeypatch):
    def contender(case, who, x):
        return Contender(call=lambda: (_ for _ in ()).throw(ValueError("never warm")) if who == "flash_qla" else x.v, leaves=[])

    def median_ms(run, effort):
        if run is slow[0]:
            raise RuntimeError("out of memory\nmore")
        return 2.0

    slow = []
    original, inputs = measure._run, Linear.inputs
    monkeypatch.setattr(Linear, "contender", contender)
    monkeypatch.setattr(Linear, "inputs", lambda case, shape, requires_grad: inputs(case, tiny, requires_grad=False, device="cpu"))
    monkeypatch.setattr(measure, "_run", lambda *a: slow.append(original(*a)) or slow[-1])
    monkeypatch.setattr(timing, "median_ms", median_ms)
    monkeypatch.setattr(timing, "check_device", lambda: None)
    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda: None)
    tiny = Shape(name="", B=1, T=2, H=1, Hv=1, dk=4, dv=4)
    rows = list(measure.sequence(BENCH, "forward", CASES["gated_delta"], DEFAULT[0], ("ttr", "fla", "flash_qla"), compare=False))
    assert [(r["who"], r.get("error"), r.get("ms")) for r in rows] == [
        ("flash_qla", "ValueError: never warm", None),
        ("ttr", "RuntimeError: out of memory", None),
        ("fla", None, 2.0),
    ]
    assert rows[2]["difference"] == 0
