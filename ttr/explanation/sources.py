"""Which papers a declaration comes from. The entries are in references.bib, one per paper, by key."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from ..inner_optim import Optimizer
from ..spec import Spec
from .place import Place

FRAMEWORK = "wang2025regression"

PRESETS: dict[str, tuple[str, ...]] = {
    "atlas": ("behrouz2025atlas",),
    "deltanet": ("schlag2021fast", "yang2024deltanet"),
    "deltaproduct": ("siems2025deltaproduct",),
    "gated_deltanet": ("yang2024gated",),
    "gated_deltaproduct": ("siems2025deltaproduct",),
    "gla": ("yang2023gla",),
    "kda": ("kimi2025linear",),
    "lact": ("zhang2025lact",),
    "lightning": ("qin2024lightning",),
    "linear_attention": ("katharopoulos2020linear",),
    "linear_attention_unnormalised": ("schlag2021fast",),
    "longhorn": ("liu2024longhorn",),
    "mamba2": ("dao2024mamba2",),
    "memora": ("behrouz2025miras",),
    "mesa": ("oswald2023mesa",),
    "mesanet": ("oswald2025mesanet",),
    "mlstm": ("beck2024xlstm", "beck2025xlstm7b"),
    "momentum_deltanet": ("behrouz2025titans",),
    "moneta": ("behrouz2025miras",),
    "omeganet": ("behrouz2025atlas",),
    "retnet": ("sun2023retnet",),
    "rwkv7": ("peng2025rwkv7",),
    "softmax": ("vaswani2017attention", "su2021roformer"),
    "softmax_window": ("beltagy2020longformer",),
    "titans": ("behrouz2025titans",),
    "ttt_linear": ("sun2024ttt",),
    "ttt_mlp": ("sun2024ttt",),
    "yaad": ("behrouz2025miras",),
}

COMPOSITIONS: dict[str, tuple[str, ...]] = {
    "lact_layer": ("zhang2025lact",),
    "titans_mac": ("behrouz2025titans",),
    "titans_mag": ("behrouz2025titans",),
    "titans_mal": ("behrouz2025titans",),
}

PIECES: dict[str, tuple[str, ...]] = {
    "regressor.kernel": ("vaswani2017attention",),
    "regressor.least_squares": ("oswald2023mesa", "oswald2025mesanet"),
    "regressor.mlp": ("sun2024ttt",),
    "objective.huber": ("behrouz2025miras",),
    "objective.lp": ("behrouz2025miras",),
    "objective.window": ("behrouz2025atlas",),
    "optimizer.adam": ("kingma2014adam",),
    "optimizer.delta": ("schlag2021fast",),
    "optimizer.momentum": ("behrouz2025titans",),
    "optimizer.muon": ("jordan2024muon", "zhang2025lact"),
    "optimizer.mirror": ("behrouz2025miras",),
    "optimizer.position": ("sun2024ttt",),
    "optimizer.step_rule.implicit": ("liu2024longhorn",),
    "optimizer.steps": ("siems2025deltaproduct",),
    "optimizer.write_key.separate": ("peng2025rwkv7",),
    "gate.decay.lightning": ("qin2024lightning",),
    "gate.decay.retnet": ("sun2023retnet",),
    "gate.scalar": ("dao2024mamba2",),
    "gate.weight_norm": ("zhang2025lact",),
    "gate.vector": ("yang2023gla",),
}


def source_keys(spec: Spec, place: Place) -> tuple[str, ...]:
    """The papers of the preset with this mathematics; else of the nearest one and of the pieces; and the framework's."""
    if place.presets:
        keys = list(PRESETS.get(place.presets[0], ()))
    else:
        keys = [key for n in place.neighbours[:1] for key in PRESETS.get(n.preset, ())]
        keys += [key for feature in _features(spec) for key in PIECES.get(feature, ())]
    return tuple(dict.fromkeys([*keys, FRAMEWORK]))


def _features(spec: Spec) -> list[str]:
    slots = {"regressor": spec.regressor, "objective": spec.objective, "optimizer": spec.optimizer, "gate": spec.gate}
    features = [f"{slot}.{piece.kind}" for slot, piece in slots.items() if piece is not None]
    optimizer = spec.optimizer
    features.append(f"gate.decay.{getattr(spec.gate, 'decay', None)}")
    features.append(f"optimizer.step_rule.{getattr(getattr(optimizer, 'step_rule', None), 'kind', None)}")
    features.append(f"optimizer.write_key.{getattr(optimizer, 'write_key', None)}")
    features += ["optimizer.steps"] if spec.steps > 1 else []
    features += ["objective.window"] if spec.window > 1 else []
    features += ["optimizer.mirror"] if isinstance(optimizer, Optimizer) and not optimizer.mirror.identity else []
    features += ["optimizer.position"] if getattr(optimizer, "position", "none") != "none" else []
    return features


def bibtex(keys: tuple[str, ...], spec: Spec | None = None) -> str:
    """The BibTeX entries of `keys`, and those that the pieces of `spec` bring themselves."""
    pieces = [] if spec is None else [spec.regressor, spec.objective, spec.optimizer, spec.gate]
    own = [entry.strip() for piece in pieces if piece is not None and (entry := piece.bibtex())]
    return "\n\n".join(dict.fromkeys([*(entries()[key] for key in keys), *own]))


@cache
def entries() -> dict[str, str]:
    """{key: BibTeX entry} of references.bib."""
    text = resources.files("ttr.explanation").joinpath("references.bib").read_text(encoding="utf-8")
    found = re.findall(r"^(@\w+\{([^,]+),.*?^\})", text, flags=re.MULTILINE | re.DOTALL)
    return {key: entry for entry, key in found}


def short(key: str) -> str:
    """One line: `Yang et al. 2024, arXiv:2412.06464`."""
    entry = entries()[key]
    field = dict(re.findall(r"^\s*(\w+) = \{(.*)\},?$", entry, flags=re.MULTILINE))
    authors = field["author"].split(" and ") if "author" in field else []
    family = [a.split(",")[0].strip("{}") for a in authors] or [field["title"]]
    who = " and ".join(family) if len(family) <= 2 and "others" not in family else f"{family[0]} et al."
    where = f"arXiv:{field['eprint']}" if "eprint" in field else field.get("url", "")
    return f"{who} {field['year']}, {where}"
