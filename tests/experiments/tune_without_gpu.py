"""Tunes a kernel for a GPU that is not there, in a process of its own, without an interpreter: prints for each configuration how many
were compiled when it was timed.
"""

from contextlib import suppress

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from experiments.bench.tuning import compiled_ahead


class Device:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Pointer:
    dtype = torch.float32

    def data_ptr(self):
        return 1024


@triton.heuristics({"EVEN": lambda given: given["N"] % 2 == 0})
@triton.autotune([triton.Config({"B": block}, num_warps=warps) for block in (64, 128, 100) for warps in (2, 4)], key=["N"])
@triton.jit
def double(x, N, B: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)  # no arange of 100
    tl.store(x + i, 2 * tl.load(x + i, mask=i < N), mask=i < N)


timed = []


def time_it(tuner, *args, config, **kwargs):
    timed.append(len(double.fn.fn.device_caches[0][0]))
    return [1.0]


driver.set_active(Device())
Autotuner._bench = time_it
with compiled_ahead(), suppress(AttributeError):  # nothing launches
    double[(1,)](Pointer(), 1000)
print(timed)
