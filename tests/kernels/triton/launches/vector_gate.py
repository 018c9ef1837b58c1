"""The launches of a gate for every key channel, forward and backward, in bfloat16, cut into two segments.

Where heads fill the GPU, of the scans, which alone differ.
"""

import torch

from ttr.kernels.triton.vector_gate import config, plan, run

from .recording import Launch, Named, recorded

# GLA, KDA, RWKV-7, each at dk = dv; the looks and reads before the token's decay with the second; whether heads fill the GPU
GATES = {
    "gla 128": (plan.Rule(False, False, False, False), 128), "gla 64": (plan.Rule(False, False, False, True), 64),
    "kda 128": (plan.Rule(True, False, False, False), 128), "kda 64": (plan.Rule(True, False, True, True), 64),
    "rwkv7 128": (plan.Rule(True, True, True, False), 128), "rwkv7 64": (plan.Rule(True, True, True, False), 64),
    "kda 128 full": (plan.Rule(True, False, False, False), 128, True),
    "rwkv7 128 full": (plan.Rule(True, True, True, False), 128, True),
}  # fmt: skip
SUBSET = ("gla 128", "rwkv7 64", "rwkv7 128 full")  # every kernel is in one of them


def launches(everything: bool) -> Named:
    for name in GATES if everything else SUBSET:
        for launch in called(*GATES[name]):
            yield name, launch, True


def called(rule: plan.Rule, d: int, full: bool = False) -> list[Launch]:
    with recorded() as found:
        B, T, H = 8, 4096, 16
        q, initial = torch.empty(B, T, H, d, dtype=torch.bfloat16), torch.empty(B, H, d, d)
        weight = None if not rule.erase else q if rule.added else torch.empty(B, T, H)
        given = q, q, q, q if rule.added else None, torch.empty(B, T, H, d), weight, initial, None
        own, segments = config.config_of(q.dtype, d, d, rule.erase, rule.added, full), 1 if full else 2
        o, last, saved = run.forward(*given, 0.1, rule, own, segments, True)
        run.backward(o, last, *given, saved, 0.1, rule, own, segments)
    scans = "forward_kernel", "reverse_kernel"
    return [launch for launch in found if launch[0].__name__ in scans] if full else found
