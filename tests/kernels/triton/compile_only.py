"""Compiles every launch of forward and backward for sm_90 on a machine without a GPU:

    PYTHONPATH=.:tests python -m kernels.triton.compile_only [--all]

A process of its own, because with TRITON_INTERPRET=1 no kernel can be compiled. The launches are those that run.forward
and run.backward make on meta tensors (`launches`), with the rows of the committed table. Prints JSON: one entry a kernel.

Without --all it is what continuous integration has the time for: some rows of the table, most in one way to call them, and some
sizes of what has kernels of its own (each family's SUBSET). --all compiles everything that is listed there, and every row.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .launches import FAMILIES
from .lint_controls import overwritten_operand, transposed_accumulator
from .ttgir import miscompiled_transposes, overwritten_operands

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
OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")


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

    for family in FAMILIES:
        for what, (kernel, args, kwargs), watched in family.launches(everything):
            src, options = source(kernel, args, kwargs)
            same = src.hash(), tuple(options.items())
            if same not in done:
                done.add(same)
                name = f"{what} {'local ' if kwargs.get('LOCAL') else ''}{kernel.__name__}"
                out.append({"name": name, "watched": watched, **compiled(src, options)})
    return {"controls": controls, "kernels": out}


if __name__ == "__main__":
    print(json.dumps(main("--all" in sys.argv)))
