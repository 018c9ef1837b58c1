"""The kernels compiled for sm_90, on any machine: nothing spills, and nothing holds a pattern that Triton miscompiles.

What is compiled is trimmed for continuous integration: six rows of the committed table stand for all of it, two declarations of one
slot beside the weights, one size of least squares, by head, by channel and solved exactly, and three gates a channel for theirs (the
SUBSETs in `launches`). TTR_COMPILE_ALL=1 compiles the rest as well (`compile_only` --all): every row, cut into segments and packed
too, in half an hour to an hour. SPILLS knows of the rest too, but for the table's other rows and calls: of those nobody watches what
spills (float32 and heads of 256 much).
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ttr.kernels.triton.two_layers.parts import TWO_PROGRAMS

pytestmark = pytest.mark.xdist_group("compile")  # one worker: the kernels are compiled once

ROOT = Path(__file__).parents[3]

# kernel -> bytes of stack that are known and accepted, to the byte: fewer are entered anew, so that they stay fewer
SPILLS: dict[str, int] = {
    # a row's pairs, its reads and two partial sums for the gradient of the log decay
    "add 128 128 2 plain keys_kernel": 56,
    # a weight per token without erase (Mamba-2)
    "add 128 128 2 plain forward_kernel": 80,
    # what the readers find written and how it is weighted, beside a state of 64 x 128 and masks for rows that read nothing
    "erase 128 128 2 3 steps readers_kernel": 8,
    "erase 128 128 2 3 steps keys_kernel": 8,
    # heads of 256: a state of 64 x 256 takes half of the registers
    "erase 256 256 2 plain forward_kernel": 56,
    "erase 256 256 2 plain reverse_kernel": 48,
    "erase 256 256 2 plain readers_kernel": 496,
    "erase 256 256 2 plain keys_kernel": 64,
    "erase 256 256 2 plain decay_gradient_kernel": 16,
    "erase 256 256 2 segments local forward_kernel": 16,
    "erase 256 256 2 segments local reverse_kernel": 32,
    "add 256 256 2 plain forward_kernel": 464,
    "add 256 256 2 plain reverse_kernel": 272,
    "add 256 256 2 plain readers_kernel": 192,
    "add 256 256 2 plain keys_kernel": 408,
    # mini-batches of 64 tokens: two carried matrices of 64 x 64, or one of 128 x 128, beside four blocks of tokens
    "mini-batch 64 64 64 2 retreat_kernel": 704,
    "mini-batch 128 128 16 1 retreat_kernel": 104,
    "mini-batch 128 128 64 1 advance_kernel": 24,
    "mini-batch 128 128 64 1 retreat_kernel": 104,
    # a decay a channel: tiles of 64 of them, for Triton 3.6 compiles narrower ones to wrong numbers
    "gla 128 prepare_far_kernel": 40,
    "gla 128 gradients_far_kernel": 736,
    "gla 64 prepare_far_kernel": 8,
    "gla 64 gradients_far_kernel": 1096,
    "kda 128 prepare_kernel": 128,
    "kda 128 prepare_far_kernel": 64,
    "kda 128 gradients_kernel": 32,
    "kda 128 gradients_far_kernel": 1056,
    "kda 64 prepare_far_kernel": 176,
    "kda 64 gradients_kernel": 32,
    "kda 64 gradients_far_kernel": 1528,
    "rwkv7 128 prepare_far_kernel": 224,
    "rwkv7 128 gradients_kernel": 152,
    "rwkv7 128 gradients_far_kernel": 1776,
    "rwkv7 128 prepare_kernel": 8,
    "rwkv7 64 prepare_kernel": 64,
    "rwkv7 64 prepare_far_kernel": 224,
    "rwkv7 64 gradients_kernel": 80,
    "rwkv7 64 gradients_far_kernel": 1712,
    # two layers: what is put away are mostly addresses; four warps with these were faster than eight without
    "two layers 64 2 4 readers_kernel": 320,
    "two layers 64 2 4 writers_kernel": 208,
    "two layers 64 2 4 written_gradient_kernel": 88,
    # with eight warps, a multiprocessor for each, 0 and 336; two of four warps on one take less time
    "two layers 64 2 4 advance_kernel": 352,
    "two layers 64 2 4 retreat_kernel": 832,
    "two layers 64 2 8 readers_kernel": 320,
    "two layers 64 2 8 writers_kernel": 208,
    "two layers 64 2 8 written_gradient_kernel": 88,
    "two layers 64 2 8 retreat_kernel": 336,
    # and their sums for the biases
    "two layers 64 2 4 biased readers_kernel": 312,
    "two layers 64 2 4 biased writers_kernel": 200,
    "two layers 64 2 4 biased written_gradient_kernel": 256,
    "two layers 64 2 4 biased advance_kernel": 1024,
    "two layers 64 2 4 biased retreat_kernel": 1104,
    "two layers 64 2 8 biased readers_kernel": 312,
    "two layers 64 2 8 biased writers_kernel": 200,
    "two layers 64 2 8 biased written_gradient_kernel": 256,
    "two layers 64 2 8 biased advance_kernel": 280,
    "two layers 64 2 8 biased retreat_kernel": 520,
    # two states of 128 x 64 take half of the registers; what is put away are addresses that do not change from chunk to chunk
    "two slots 128 128 2 True False forward_kernel": 144,
    "two slots 128 128 2 True False reverse_kernel": 64,
    "two slots 128 128 2 True False tokens_kernel": 40,
    "two slots 128 128 2 False True forward_kernel": 24,
    "two slots 128 128 2 False True reverse_kernel": 24,
    # packed and with what came before: a partial sum for every lag
    "short conv 4 short_conv_gradient_kernel": 8,
    "short conv 8 short_conv_gradient_kernel": 24,
    "short conv 16 short_conv_gradient_kernel": 80,
    "short conv 16 short_conv_kernel": 32,
    # two slots of 128 x 32 and the gradients of both, one event at a time
    "recurrent slots backward_kernel": 144,
    # least squares: residual, solution and product of 64 x 128 in float32, the direction in 16 bits, in one warpgroup; it
    # fills a multiprocessor with two programs, where eight warps spill nothing and leave room for one
    "least squares 128 2 solve_kernel": 240,
    "least squares 256 2 solve_kernel": 784,
    # solved exactly: H, and what elimination makes of it
    "exact 128 none solve_exactly_kernel": 176,
    "exact 128 head solve_exactly_kernel": 176,
    "exact 128 channel solve_exactly_kernel": 176,
    # a decay a channel: a factor a token and channel beside that, and where its chunks are far, the rounds; gradients as of gla
    "least squares by channel 128 2 gram_kernel": 16,
    "least squares by channel 128 2 solve_near_kernel": 536,
    "least squares by channel 128 2 solve_far_kernel": 560,
    "least squares by channel 128 2 gradients_kernel": 24,
    "least squares by channel 128 2 gradients_far_kernel": 784,
    "least squares by channel 64 2 solve_far_kernel": 40,
    "least squares by channel 64 2 gradients_kernel": 24,
    "least squares by channel 64 2 gradients_far_kernel": 888,
    "least squares by channel 256 2 operands_kernel": 96,
    "least squares by channel 256 2 solve_near_kernel": 1024,
    "least squares by channel 256 2 solve_far_kernel": 2288,
    "least squares by channel 256 2 gradients_kernel": 32,
    "least squares by channel 256 2 gradients_far_kernel": 680,
    # float32 inputs: right, not fast
    "least squares by channel 128 4 operands_kernel": 32,
    "least squares by channel 128 4 solve_near_kernel": 936,
    "least squares by channel 128 4 solve_far_kernel": 1064,
    "two slots 128 128 4 True False prepare_kernel": 184,
    "two slots 128 128 4 True False forward_kernel": 264,
    "two slots 128 128 4 True False reverse_kernel": 168,
    "two slots 128 128 4 True False pairs_kernel": 1872,
    "two slots 128 128 4 True False tokens_kernel": 3680,
    "least squares 128 4 solve_kernel": 696,
    "erase 128 128 4 plain inverse_kernel": 1480,
    "erase 128 128 4 plain forward_kernel": 1360,
    "erase 128 128 4 plain reverse_kernel": 1112,
    "erase 128 128 4 plain pairs_kernel": 1368,
    "erase 128 128 4 plain readers_kernel": 1032,
    "erase 128 128 4 plain keys_kernel": 1032,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with open(shared / "compile_only.lock", "w") as lock:  # without --dist=loadgroup a second worker waits instead of compiling
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = shared / "compile_only.json"
        if not file.exists():
            file.write_text(compile_only())
        return json.loads(file.read_text())


def compile_only() -> str:
    everything = ["--all"] if os.environ.get("TTR_COMPILE_ALL") == "1" else []
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    script = [sys.executable, "-m", "kernels.triton.compile_only", *everything]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def test_every_kernel_was_compiled(report):
    sources = (ROOT / "ttr" / "kernels" / "triton").glob("*/*.py")
    names = {name for file in sources for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert {entry["name"].split()[-1] for entry in report["kernels"]} == names


def test_nothing_spills(report):
    found: dict[str, int] = {}
    for entry in filter(lambda entry: entry["watched"], report["kernels"]):  # a call may compile a kernel in two ways; the worse counts
        found[entry["name"]] = max(found.get(entry["name"], 0), entry["stack"])
    wrong = {name: stack for name, stack in found.items() if stack != SPILLS.get(name, 0)}
    assert not wrong, f"bytes of stack, where 0 or SPILLS was expected: {json.dumps(wrong, indent=1)}"


def test_shared_memory_fits(report):
    largest = max(report["kernels"], key=lambda entry: entry["shared"])
    assert largest["shared"] <= 227 * 1024, largest
    pairs = [entry for entry in report["kernels"] if entry.get("launch_cooperative_grid") and entry["num_warps"] == 4]
    assert pairs and all(2 * (entry["shared"] + 1024) <= TWO_PROGRAMS for entry in pairs), "two of a scan's programs on a multiprocessor"


def test_no_transposed_accumulator_becomes_an_operand(report):
    found = {entry["name"]: entry["transposes"] for entry in report["kernels"] if entry["transposes"]}
    assert not found


def test_no_operand_is_overwritten_while_it_is_multiplied(report):
    found = {entry["name"]: entry["overwritten"] for entry in report["kernels"] if entry["overwritten"]}
    assert not found


def test_the_lints_see_their_patterns_and_nothing_else(report):
    controls = report["controls"]
    assert {name for name, x in controls.items() if x["transposes"]} == {"transposed"}
    assert {name for name, x in controls.items() if x["overwritten"]} == {"summed"}
