"""Compiles every launch of forward and backward for sm_90 on a machine without a GPU: `python compile_only.py [--all]`.

A process of its own, because with TRITON_INTERPRET=1 no kernel can be compiled. The launches are those that run.forward
and run.backward make on meta tensors, with the rows of the committed table. Prints JSON: one entry a kernel.

Without --all it is what continuous integration has the time for: some rows of the table (SUBSET), most in one way to call them,
and some sizes of what has kernels of its own (*_SUBSET). --all compiles everything that is listed here, and every row.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ttr.kernels.triton import configs
from ttr.kernels.triton.decode import run as decoding
from ttr.kernels.triton.least_squares import plan as solving
from ttr.kernels.triton.least_squares import run as least_squares
from ttr.kernels.triton.least_squares_by_channel import matrices
from ttr.kernels.triton.least_squares_by_channel import plan as solving_by_channel
from ttr.kernels.triton.least_squares_by_channel import run as least_squares_by_channel
from ttr.kernels.triton.mini_batch import masks
from ttr.kernels.triton.mini_batch import run as mini_batch
from ttr.kernels.triton.recurrent import run as recurrent
from ttr.kernels.triton.scalar_gate import plan, run
from ttr.kernels.triton.shapes import sizes_of
from ttr.kernels.triton.short_conv import function as short_conv
from ttr.kernels.triton.two_layers import run as two_layers
from ttr.kernels.triton.two_slots import run as two_slots
from ttr.kernels.triton.unit_norm import function as unit_norm
from ttr.kernels.triton.vector_gate import config as vector_config
from ttr.kernels.triton.vector_gate import plan as vector_plan
from ttr.kernels.triton.vector_gate import run as vector_gate

if __package__:
    from .lint_controls import overwritten_operand, transposed_accumulator
    from .ttgir import miscompiled_transposes, overwritten_operands
else:
    from lint_controls import overwritten_operand, transposed_accumulator
    from ttgir import miscompiled_transposes, overwritten_operands

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid", "maxnreg")
# the classes that most have (the first in every way to call it), the widest tiles, float32
SUBSET = ("erase 128 128 2", "add 128 128 2", "erase 64 64 2", "erase 256 256 2", "add 256 256 2", "erase 128 128 4")
# plain: everything given and learned; before: who looks and reads before the token's decay; bare: no state, nothing learned of the decay
CALLS = ("plain", "segments", "packed", "before", "bare")
WIDEST = "erase 256 256 2"  # its segments too: the matrices of size dk are in no other call
# with several steps a token: where the readers of a chunk fill their tile (2) and where they do not (3)
MICRO_STEPS = (("erase 128 128 2", 2), ("erase 128 128 2", 3), ("erase 64 64 2", 2))


def launches(key: configs.ShapeClass, config: configs.Config, call: str, n: int = 1) -> list[tuple]:
    """(kernel, positional arguments, keyword arguments) of one call, forward and backward. n: micro-steps a token."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel, args, kwargs))

    before, learned, packed, segments = call == "before", call != "bare", call == "packed", 2 if call == "segments" else 1
    rule = plan.Rule(key.erase, key.erase and before, before)
    B, T, H = 1 if packed else 8, 4096, 16
    lead = (B, T, n) if n > 1 else (B, T)
    with mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        dtype = {2: torch.bfloat16, 4: torch.float32}[key.itemsize]
        q, k = torch.empty(B, T, H, key.dk, dtype=dtype), torch.empty(*lead, H, key.dk, dtype=dtype)
        v, log_decay, weight = torch.empty(*lead, H, key.dv, dtype=dtype), torch.empty(B, T, H), torch.empty(*lead, H)
        initial = torch.empty(8, H, key.dk, key.dv) if learned else None
        given = (q, k, v, log_decay, weight, initial, torch.empty(9, dtype=torch.int32) if packed else None)
        o, last, saved = run.forward(*given, 0.1, rule, config, segments, True, learned)
        run.backward(o, last if learned else None, *given, saved, 0.1, rule, config, segments, learned)
    return found


def steps() -> list[tuple]:
    """The launches of decoding: one sequence and many, with signals for every token and numbers for all."""
    found = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs))):
        for B, rule, given in ((1, "plain", True), (64, "implicit", True), (8, "nlms", False)):
            q, state = torch.empty(B, 32, 128, dtype=torch.bfloat16), torch.empty(B, 32, 128, 128)
            numbers = torch.empty(B, 32) if given else None
            decoding.step_in_place(q, q, q, numbers, numbers, state, 1.0, 0.0, 1.0, 1e-6, 0.1, given, False, False, rule)
        for n, per, decay_per, rule in ((2, "head", "head", "plain"), (1, "key", "key", "plain"), (1, "value", "number", "implicit")):
            q, k, state = (
                torch.empty(8, 32, 128, dtype=torch.bfloat16),
                torch.empty(8, n, 32, 128, dtype=torch.bfloat16),
                torch.empty(8, 32, 128, 128),
            )
            step, decay = (
                torch.empty(8, n, 32, 128),
                {"head": torch.empty(8, 32), "key": torch.empty(8, 32, 128), "number": None}[decay_per],
            )
            p = k if per == "key" else None
            numbers = 1.0, 0.0, 1.0, 1.0, 1e-6, 0.1
            decoding.events_in_place(
                q, k, k, p, step[..., 0] if per == "head" else step, decay, state, *numbers, True, False, False, rule, per, decay_per
            )
    return found


def norms() -> list[tuple]:
    """The launches of `unit_norm`, forward and backward, of heads of 128 and of the widest row."""
    found = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs))):
        for D in (128, 4096):
            x = torch.empty(1024, D, dtype=torch.bfloat16)
            unit_norm.launch(unit_norm.unit_norm_kernel, x, x, eps=1e-6)
            unit_norm.launch(unit_norm.unit_norm_gradient_kernel, x, x, x, eps=1e-6)
    return found


def convolutions() -> list[tuple]:
    """The launches of `short_conv`, forward and backward, of a batch and of a packed row that goes on, with short and long filters."""
    found = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs))):
        x = torch.empty(1, 512, 1024, dtype=torch.bfloat16)
        for K in (4, 8, 16):
            weight, history = torch.empty(1024, K), torch.empty(8, K - 1, 1024)
            for before, places in ((None, None), (history, torch.empty(512, dtype=torch.int64))):
                short_conv.launch(short_conv.short_conv_kernel, x, weight, before, places, places, x)
                short_conv.launch(short_conv.short_conv_gradient_kernel, x, weight, before, places, places, x, x, weight)
    return found


# dk, dv, tokens of a mini-batch, slots; with a bias, with a norm and the residual: TTT-Linear, its widest head, momentum
MINI_BATCHES = ((64, 64, 16, 1, True, True), (128, 128, 16, 1, True, True), (64, 64, 64, 2, False, True), (128, 128, 64, 1, False, False))


def mini_batches(dk: int, dv: int, size: int, slots: int, biased: bool, normed: bool) -> list[tuple]:
    """The launches over mini-batches, forward and backward, in bfloat16."""
    found = []
    record = mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs)))
    with record, torch.device("meta"):
        B, M, H = 8, 32, 16
        q, v = torch.empty(B, M * size, H, dk, dtype=torch.bfloat16), torch.empty(B, M * size, H, dv, dtype=torch.bfloat16)
        mask, rows, kept = (torch.empty(B, M, H, *shape) for shape in ((size, size), (slots, size), (slots, slots)))
        gamma = torch.empty(H, dv) if normed else None
        first, first_bias = torch.empty(B, H, slots, dk, dv), torch.empty(B, H, slots, dv) if biased else None
        form = mini_batch.Form(size, normed, 1e-6, 1 / dv, 1 / dv, False)
        if biased:  # as TTT: nothing but gradients moves the weights
            numbers = None, None, torch.empty(B, M * size, H), None, torch.empty(H, size)
        else:
            numbers = mask, rows, rows, kept, None
        given = q, q, v, *numbers, gamma, gamma
        o, last, last_bias, *saved = mini_batch.forward(*given, first, first_bias, form)
        for ends in ((last, last_bias), (None, None)):
            mini_batch.backward(o, *ends, *given, first, first_bias, *saved, form)
    return found


# tokens of a mini-batch, slots, warps of a scan; with biases: Titans' memory (and with biases), TTT-MLP; heads of 64, 256 hidden units
TWO_LAYERS = ((64, 2, 4, False), (16, 1, 8, True), (64, 2, 8, False), (16, 1, 4, True), (64, 2, 4, True), (64, 2, 8, True))
TWO_LAYERS_SUBSET = TWO_LAYERS[:2]


def two_layer_launches(size: int, slots: int, warps: int, biased: bool) -> list[tuple]:
    """The launches of mini-batches on two layers, forward and backward, in bfloat16, as on a GPU of 132 multiprocessors."""
    found = []
    record = mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs)))
    parts = mock.patch.object(two_layers, "parts_of", lambda hidden, device: hidden // 64)
    together = mock.patch.object(two_layers, "heads_at_once", lambda hidden, device: 66)
    few = mock.patch.object(two_layers, "group_of", lambda batches, heads, hidden, device: 2)
    own = mock.patch.object(two_layers, "warps_of", lambda heads, hidden, device: warps)
    with record, parts, together, few, own, torch.device("meta"):
        B, M, H, d, hidden = 2, 4, 16, 64, 256
        q = torch.empty(B, M * size, H, d, dtype=torch.bfloat16)
        form = two_layers.Form(size, hidden, biased, "gelu_tanh" if biased else "gelu", True, 1e-6, 1 / d, 1 / d, False)
        if slots == 1:  # as TTT: nothing but gradients moves the weights
            numbers = None, None, torch.empty(B, M * size, H), None, torch.empty(H, size)
        else:
            mask, rows, written, kept = masks.forward(torch.empty(10, B, M * size, H), size, False)
            masks.backward(mask, rows, written, kept, torch.empty(10, B, M * size, H), size, False)
            numbers = mask, rows, written, kept, None
        given = q, q, q, *numbers, torch.empty(H, d), torch.empty(H, d)
        first = torch.empty(B, H, slots, 2 * d * hidden + (hidden + d if biased else 0))
        o, last, checkpoints = two_layers.forward(*given, first, form, True)
        two_layers.backward(o, last, *given, first, checkpoints, form)
    return found


# dk, dv and bytes of a number; the delta rule or the inner product, read before, everything given and packed
TWO_SLOTS = ((128, 128, 2, True, False), (64, 64, 2, True, False), (128, 128, 2, False, True), (128, 128, 4, True, False))
TWO_SLOTS_SUBSET = TWO_SLOTS[1:3]  # both rules


def two_slot_launches(dk: int, dv: int, itemsize: int, erase: bool, packed: bool) -> list[tuple]:
    """The launches of optimizers with one slot beside the weights, forward and backward; heads of 64 are few."""
    found = []
    record = mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs)))
    hopper = mock.patch.object(configs, "multiprocessors", lambda arch: 132)
    with record, hopper, torch.device("meta"):
        B, T, H, dtype = 1 if packed or dk == 64 else 8, 2048, 16, {2: torch.bfloat16, 4: torch.float32}[itemsize]
        q, v = torch.empty(B, T, H, dk, dtype=dtype), torch.empty(B, T, H, dv, dtype=dtype)
        first = torch.empty(8, H, 2, dk, dv) if packed else None
        given = q, q, v, torch.empty(10, B, T, H), first, torch.empty(9, dtype=torch.int32) if packed else None
        o, last, saved = two_slots.forward(*given, 0.1, two_slots.Rule(erase, packed), True)
        two_slots.backward(o, last if packed else None, *given, saved, 0.1, two_slots.Rule(erase, packed))
    return found


# slots, dk and dv; what of the coefficients has key channels (d1) and value channels (d2), of the read as well; keys to write with
RECURRENCES = {
    "slot": (1, 128, 128, 1, 1, True), "slots": (2, 128, 128, 1, 1, False), "columns": (1, 128, 1, 128, 1, False),
    "all": (2, 64, 64, 64, 64, False),
}  # fmt: skip


def scans(r: int, d: int, d1: int, d2: int, read: int, separate: bool) -> list[tuple]:
    """The launches of one event at a time, two a token; the last ones packed, and without some of the gradients."""
    found = []
    record = mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs)))
    with record, torch.device("meta"):
        heads, T, n = 16, 2048, 2
        q, row, number = torch.empty(heads, T, d), torch.empty(heads, T, n, d), torch.empty(r, heads, T, n, d1, d2)
        A, read_by = torch.empty(r, r, heads, T, n, d1, d2), torch.empty(r, heads, T, 1, 1)
        read_by = number[:, :, :, 0] if read > 1 else read_by
        known = (number, row, row) if separate else (None, None, None)
        x = recurrent.Numbers(q, row, None if separate else row, A, number, number, read_by, *known)
        for first, bounds, wanted in (
            (torch.empty(r, heads, d, d), None, True),
            (torch.empty(r, 8 * heads, d, d), torch.empty(9, dtype=torch.int32), False),
        ):
            form = recurrent.Form(True, False, heads)
            o, last = recurrent.forward(x, first, bounds, form)
            recurrent.backward(o, last, x, first, bounds, form, [True, True, True, wanted, *[True] * 6, wanted])
    return found


# dk, the bytes of a number
LEAST_SQUARES = ((64, 2), (128, 2), (256, 2), (128, 4))
LEAST_SQUARES_SUBSET = LEAST_SQUARES[1:2]  # MesaNet's heads


def solves(dk: int, itemsize: int) -> list[tuple]:
    """The launches of the statistics, in one segment and in several, and of both solves, with everything given."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        for B, T, H in ((8, 2048, 16), (1, 65536, 1)):
            dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
            q, numbers, H_0 = torch.empty(B, T, H, dk, dtype=dtype), torch.empty(B, T, H), torch.empty(B, H, dk, dk)
            form = solving.Form(1.0, 30, 0.0, False)
            kind = solving.kind_of(q, q, numbers, numbers, H_0, None, form.before)
            p = solving.plan(kind._replace(arch="sm_90"))
            given, _ = least_squares.statistics(p, q, numbers, numbers, H_0, None)
            for other in (None, q):
                least_squares.solve(p, given, q, q, numbers, numbers, torch.empty(H, dk), other, None, form, 1.0)
    return [launch for launch in found if launch[0].__name__ in ("statistics_kernel", "solve_kernel")]


EXACT = tuple((dk, gate) for dk in (128, 64) for gate in ("none", "head", "channel"))
EXACT_SUBSET = EXACT[:3]


def exact_solves(dk: int, gate: str) -> list[tuple]:
    """All of them in float32."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        B, T, H = 8, 2048, 16
        q, numbers, states = torch.empty(B, T, H, dk), torch.empty(B, T, H), torch.empty(B * T // 32 * H, dk, dk)
        decay = {"none": None, "head": numbers, "channel": q}[gate]
        given = sizes_of(q, q, None), 32, states, None if gate == "channel" else numbers, q, q, decay, numbers, torch.empty(H, dk), None
        least_squares.solve_exactly(*given, solving.Form(1.0, None, 0.0, False), 1.0)
    return found


def solves_by_channel(dk: int, itemsize: int) -> list[tuple]:
    """With a decay a channel, both ways, what `vector_gate` has not alike; of few heads, whose sequences are cut, the scans."""
    scans, alike = ("gram_kernel", "join_kernel", "gram_reverse_kernel"), ("prepare_kernel", "prepare_far_kernel")
    found: list[tuple] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        if kernel.__name__ in scans or (H > 1 and kernel.__name__ not in alike):
            found.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        for B, T, H in ((8, 2048, 16), (1, 65536, 1)):
            dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
            q, decay, numbers, H_0 = torch.empty(B, T, H, dk, dtype=dtype), *(torch.empty(B, *n) for n in ((T, H, dk), (T, H), (H, dk, dk)))
            form = solving.Form(1.0, 30, 0.0, False)
            kind = solving_by_channel.kind_of(q, q, decay, numbers, H_0, None, form.before)
            p = solving_by_channel.plan(kind._replace(arch="sm_90"))
            for other in (None, q):
                given, _ = least_squares_by_channel.statistics(p, q, decay, numbers, H_0, None, other is not None)
                least_squares_by_channel.solve(p, given, q, q, decay, numbers, torch.empty(H, dk), other, None, form, 1.0)
            config = vector_config.config_of(dtype, dk, dk, False, False)
            known = q, q, q, decay, numbers, given.plain, given.made["left"], H_0, H_0, None, True
            matrices.gradients_of_matrices(p, config, *known)
    return found


# what decays by channel: GLA, KDA, RWKV-7, each at dk = dv; the looks and reads before the token's decay with the second
VECTOR_GATES = {
    "gla 128": (vector_plan.Rule(False, False, False, False), 128), "gla 64": (vector_plan.Rule(False, False, False, True), 64),
    "kda 128": (vector_plan.Rule(True, False, False, False), 128), "kda 64": (vector_plan.Rule(True, False, True, True), 64),
    "rwkv7 128": (vector_plan.Rule(True, True, True, False), 128), "rwkv7 64": (vector_plan.Rule(True, True, True, False), 64),
    "kda 128 full": (vector_plan.Rule(True, False, False, False), 128, True),
    "rwkv7 128 full": (vector_plan.Rule(True, True, True, False), 128, True),
}  # fmt: skip
VECTOR_GATES_SUBSET = ("gla 128", "rwkv7 64", "rwkv7 128 full")  # every kernel is in one of them


def vector_gates(rule: vector_plan.Rule, d: int, full: bool = False) -> list[tuple]:
    """The launches of a gate for every key channel, forward and backward, in bfloat16, cut into two segments.

    Or where heads fill the GPU (`full`), of the scans, which alone differ.
    """
    found = []
    record = mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs)))
    with record, torch.device("meta"):
        B, T, H = 8, 4096, 16
        q, initial = torch.empty(B, T, H, d, dtype=torch.bfloat16), torch.empty(B, H, d, d)
        weight = None if not rule.erase else q if rule.added else torch.empty(B, T, H)
        given = q, q, q, q if rule.added else None, torch.empty(B, T, H, d), weight, initial, None
        config, segments = vector_config.config_of(q.dtype, d, d, rule.erase, rule.added, full), 1 if full else 2
        o, last, saved = vector_gate.forward(*given, 0.1, rule, config, segments, True)
        vector_gate.backward(o, last, *given, saved, 0.1, rule, config, segments)
    scans = "forward_kernel", "reverse_kernel"
    return [launch for launch in found if launch[0].__name__ in scans] if full else found


def source(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """What Triton specialises this launch to: pointers on 16 bytes, None as a constant; numbers as far as the kernel lets it."""
    given = dict(zip((p.name for p in kernel.params), args, strict=False)) | kwargs
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        x = given[p.name]
        if isinstance(x, torch.Tensor):
            signature[p.name] = POINTERS[x.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif p.is_constexpr or x is None or (isinstance(x, int) and x == 1 and not p.do_not_specialize):
            signature[p.name], constants[p.name] = "constexpr", x
        elif isinstance(x, int):
            signature[p.name] = "i32"
            if x % 16 == 0 and not p.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


def compiled(src: ASTSource, options: dict) -> dict:
    """Registers, bytes of stack (spills), shared memory, and the transposes that Triton miscompiles."""
    kernel = triton.compile(src, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared, **options,
        "transposes": miscompiled_transposes(kernel.asm["ttgir"]), "overwritten": overwritten_operands(kernel.asm["ttgir"]),
    }  # fmt: skip


def main(everything: bool) -> dict:
    a = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    controls = {name: compiled(*source(transposed_accumulator, (a, a, a, name == "stored"), {})) for name in ("transposed", "stored")}
    b = torch.empty(64, 64, device="meta")
    for name, control in (("summed", (True, False)), ("multiplied", (False, False)), ("multiplied twice", (False, True))):
        controls[name] = compiled(*source(overwritten_operand, (a, a, b, b, *control), {}))
    out, done = [], set()

    def add(what: str, kernel: JITFunction, args: tuple, kwargs: dict, watched: bool = True) -> None:
        """watched: whether a change of what spills is to be noticed."""
        src, options = source(kernel, args, kwargs)
        same = src.hash(), tuple(options.items())
        if same not in done:
            done.add(same)
            out.append(
                {"name": f"{what} {'local ' if kwargs.get('LOCAL') else ''}{kernel.__name__}", "watched": watched, **compiled(src, options)}
            )

    for launch in steps():
        add("decode", *launch)
    for launch in norms():
        add("unit norm", *launch)
    for launch in convolutions():
        add(f"short conv {launch[2]['K']}", *launch)
    for sizes in MINI_BATCHES:
        for launch in mini_batches(*sizes):
            add(f"mini-batch {' '.join(map(str, sizes[:4]))}", *launch)
    for sizes in TWO_LAYERS if everything else TWO_LAYERS_SUBSET:
        for launch in two_layer_launches(*sizes):
            add(f"two layers {' '.join(map(str, sizes[:3]))}{' biased' * sizes[3]}", *launch)
    for sizes in TWO_SLOTS if everything else TWO_SLOTS_SUBSET:
        for launch in two_slot_launches(*sizes):
            add(f"two slots {' '.join(map(str, sizes))}", *launch)
    for name, numbers in RECURRENCES.items():
        for launch in scans(*numbers):
            add(f"recurrent {name}", *launch)
    for sizes in LEAST_SQUARES if everything else LEAST_SQUARES_SUBSET:
        for launch in solves(*sizes):
            add(f"least squares {' '.join(map(str, sizes))}", *launch)
    for sizes in LEAST_SQUARES if everything else LEAST_SQUARES_SUBSET:
        for launch in solves_by_channel(*sizes):
            add(f"least squares by channel {' '.join(map(str, sizes))}", *launch)
    for dk, gate in EXACT if everything else EXACT_SUBSET:
        for launch in exact_solves(dk, gate):
            add(f"exact {dk} {gate}", *launch)
    for name in VECTOR_GATES if everything else VECTOR_GATES_SUBSET:
        for launch in vector_gates(*VECTOR_GATES[name]):
            add(name, *launch)
    for key, config in configs.table()["sm_90"].rows.items():
        some = (
            ()
            if str(key) not in SUBSET
            else CALLS
            if str(key) == SUBSET[0]
            else ("plain", "segments")
            if str(key) == WIDEST
            else ("plain",)
        )
        for call in CALLS if everything else some:
            for launch in launches(key, config, call):
                add(f"{key} {call}", *launch, call in some)
    for name, n in MICRO_STEPS:
        key = configs.ShapeClass.read(name)
        for launch in launches(key, configs.table()["sm_90"].rows[key], "plain", n):
            add(f"{key} {n} steps", *launch)
    return {"controls": controls, "kernels": out}


if __name__ == "__main__":
    print(json.dumps(main("--all" in sys.argv)))
