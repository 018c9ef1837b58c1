"""The definition's loop, with weight tensors of one shape updated together: as few large products as there can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from ...inner_loop import InnerLoop
from ...inner_optim import Signals


class Together(InnerLoop):
    """On a GPU the launches of Muon's many small products take longer than the products (LaCT has three matrices of a size)."""

    def updated(self, z: dict, gradients: dict[str, Tensor], signals: dict[str, Signals]) -> dict:
        alike: dict[torch.Size, list[str]] = {}
        for name, (w, *_) in z.items():
            alike.setdefault(w.shape, []).append(name)
        updated = {}
        for names in alike.values():
            if len(names) == 1:
                updated |= super().updated({names[0]: z[names[0]]}, gradients, signals)
                continue
            slots = tuple(torch.stack(each) for each in zip(*(z[name] for name in names), strict=True))
            values = {key: torch.stack([signals[name].by_name()[key] for name in names]) for key in signals[names[0]].by_name()}
            like = signals[names[0]]

            def update(slots, gradient, values, like=like):
                return self.optimizer.updated(slots, gradient, like.replace(**values))

            new = vmap(update)(slots, torch.stack([gradients[name] for name in names]), values)
            updated |= {name: tuple(x[i] for x in new) for i, name in enumerate(names)}
        return {name: updated[name] for name in z}
