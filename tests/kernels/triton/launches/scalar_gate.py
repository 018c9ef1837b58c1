"""The launches of one decay a head: the rows of the committed table, and several steps a token."""

import torch

from ttr.kernels.triton import configs
from ttr.kernels.triton.scalar_gate import plan, run

from .recording import Launch, Named, recorded

# the classes that most have (the first in every way to call it), the widest tiles, float32
SUBSET = ("erase 128 128 2", "add 128 128 2", "erase 64 64 2", "erase 256 256 2", "add 256 256 2", "erase 128 128 4")
# plain: everything given and learned; before: who looks and reads before the token's decay; bare: no state, nothing learned of the decay
CALLS = ("plain", "segments", "packed", "before", "bare")
WIDEST = "erase 256 256 2"  # its segments too: the matrices of size dk are in no other call
# with several steps a token: where the readers of a chunk fill their tile (2) and where they do not (3)
MICRO_STEPS = (("erase 128 128 2", 2), ("erase 128 128 2", 3), ("erase 64 64 2", 2))


def launches(everything: bool) -> Named:
    for key, config in configs.table()["sm_90"].rows.items():
        name = str(key)
        some = () if name not in SUBSET else CALLS if name == SUBSET[0] else ("plain", "segments") if name == WIDEST else ("plain",)
        for call in CALLS if everything else some:
            for launch in called(key, config, call):
                yield f"{key} {call}", launch, call in some
    for name, n in MICRO_STEPS:
        key = configs.ShapeClass.read(name)
        for launch in called(key, configs.table()["sm_90"].rows[key], "plain", n):
            yield f"{key} {n} steps", launch, True


def called(key: configs.ShapeClass, config: configs.Config, call: str, n: int = 1) -> list[Launch]:
    """One call, forward and backward. n: micro-steps a token."""
    before, learned, packed, segments = call == "before", call != "bare", call == "packed", 2 if call == "segments" else 1
    rule = plan.Rule(key.erase, key.erase and before, before)
    B, T, H = 1 if packed else 8, 4096, 16
    lead = (B, T, n) if n > 1 else (B, T)
    with recorded() as found:
        dtype = {2: torch.bfloat16, 4: torch.float32}[key.itemsize]
        q, k = torch.empty(B, T, H, key.dk, dtype=dtype), torch.empty(*lead, H, key.dk, dtype=dtype)
        v, log_decay, weight = torch.empty(*lead, H, key.dv, dtype=dtype), torch.empty(B, T, H), torch.empty(*lead, H)
        initial = torch.empty(8, H, key.dk, key.dv) if learned else None
        given = (q, k, v, log_decay, weight, initial, torch.empty(9, dtype=torch.int32) if packed else None)
        o, last, saved = run.forward(*given, 0.1, rule, config, segments, True, learned)
        run.backward(o, last if learned else None, *given, saved, 0.1, rule, config, segments, learned)
    return found
