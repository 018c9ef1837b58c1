"""Which tile sizes, warps and stages the kernels run with: a table, never a search on a user's call.

configs.json (committed) and, over it, the user's file that `ttr.tune` writes: architecture -> its number of
multiprocessors and a Config per shape class. A class is the rule (erase or not), dk and dv rounded up to a power of
two in 32..256, and the bytes of a number. Where the table has no row, the nearest one serves: the nearest architecture
(the older of two as near), in it the class of the same rule whose bytes, then dk, then dv are nearest.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cache, lru_cache
from importlib import resources
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch

INTERPRETER = "interpreter"  # the architecture of CPU tensors


@dataclass(frozen=True)
class Launch:
    tile: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    chunk: int
    every: int
    inverse: Launch
    forward: Launch
    local: Launch
    reverse: Launch
    pairs: Launch
    readers: Launch
    keys: Launch
    segments: Launch

    def __post_init__(self) -> None:
        for name in ("chunk", "every"):
            if (n := getattr(self, name)) < 1 or n & (n - 1):
                raise ValueError(f"{name}={n}: expected a power of two")
        object.__setattr__(self, "_hash", hash(astuple(self)))

    def __hash__(self) -> int:  # once: every call looks for its launches by it
        return self._hash  # type: ignore[attr-defined]


class ShapeClass(NamedTuple):
    erase: bool
    dk: int
    dv: int
    itemsize: int

    @classmethod
    def of(cls, erase: bool, dk: int, dv: int, dtype: torch.dtype) -> ShapeClass:
        return cls(erase, _power_of_two(dk), _power_of_two(dv), dtype.itemsize)

    @classmethod
    def read(cls, text: str) -> ShapeClass:
        rule, dk, dv, itemsize = text.split()
        return cls(rule == "erase", int(dk), int(dv), int(itemsize))

    def __str__(self) -> str:
        return f"{'erase' if self.erase else 'add'} {self.dk} {self.dv} {self.itemsize}"


def _power_of_two(d: int) -> int:
    return min(256, max(32, 1 << (d - 1).bit_length()))


def to_json(config: Config) -> dict[str, Any]:
    """Plain data: a Launch as [tile, warps, stages]."""
    return {name: list(x.values()) if isinstance(x, dict) else x for name, x in asdict(config).items()}


def from_json(data: Mapping[str, Any]) -> Config:
    """The inverse of `to_json`; raises ValueError naming the field."""
    names = {f.name for f in fields(Config)}
    if names != data.keys():
        raise ValueError(f"configs: got the fields {sorted(data)}, expected {sorted(names)}")
    values: dict[str, Any] = {name: Launch(*x) if isinstance(x, list) else x for name, x in data.items()}
    return Config(**values)


def user_file() -> Path:
    """Where `ttr.tune` writes: $TTR_KERNEL_CONFIGS, or ~/.cache/ttr/kernels.json."""
    return Path(os.environ.get("TTR_KERNEL_CONFIGS") or Path.home() / ".cache" / "ttr" / "kernels.json")


class Arch(NamedTuple):
    multiprocessors: int
    rows: dict[ShapeClass, Config]


@cache
def table() -> dict[str, Arch]:
    """The committed table with the user's rows over it; read once a process."""
    archs = read_table(resources.files("ttr.kernels.triton").joinpath("configs.json").read_text())
    file = user_file()
    if file.is_file():
        try:
            own = read_table(file.read_text())
        except ValueError as error:
            warnings.warn(f"{file} is left out: {error}; ttr.tune() writes it anew", stacklevel=2)
            own = {}
        for name, arch in own.items():
            known = archs.get(name, Arch(arch.multiprocessors, {}))
            archs[name] = Arch(known.multiprocessors, {**known.rows, **arch.rows})
    return archs


def read_table(text: str) -> dict[str, Arch]:
    """Raises ValueError for what is no table, or one of other fields (an earlier version's)."""
    try:
        return {
            name: Arch(arch["multiprocessors"], {ShapeClass.read(key): from_json(row) for key, row in arch["configs"].items()})
            for name, arch in json.loads(text).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no table of kernel configurations ({type(error).__name__}: {error})") from error


def write_table(archs: Mapping[str, Arch], file: Path) -> None:
    """One line a row; a reader never meets half a file."""
    blocks = []
    for name, arch in archs.items():
        rows = ",\n".join(f'   "{key}": {json.dumps(to_json(row))}' for key, row in sorted(arch.rows.items(), reverse=True))
        blocks.append(f' "{name}": {{\n  "multiprocessors": {arch.multiprocessors},\n  "configs": {{\n{rows}\n  }}\n }}')
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    fresh.replace(file)


@cache
def arch_of(device: torch.device) -> str:
    """sm_90, ..., of a CUDA device; of a fake one, without a GPU, the table's best known."""
    if device.type != "cuda":
        return INTERPRETER
    if not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def nearest_arch(arch: str) -> str:
    archs = table()
    if arch in archs:
        return arch
    number = int(arch.removeprefix("sm_"))
    return min((name for name in archs if name != INTERPRETER), key=lambda name: (abs(int(name[3:]) - number), int(name[3:])))


def multiprocessors(arch: str) -> int:
    return table()[nearest_arch(arch)].multiprocessors


@cache
def config_for(arch: str, erase: bool, dk: int, dv: int, dtype: torch.dtype) -> Config:
    """The table's row, or the nearest one."""
    wanted, rows = ShapeClass.of(erase, dk, dv, dtype), table()[nearest_arch(arch)].rows

    def distance(row: ShapeClass) -> tuple[float, ...]:
        return row.erase != erase, *(abs(log2(getattr(row, x) / getattr(wanted, x))) for x in ("itemsize", "dk", "dv"))

    return rows[wanted] if wanted in rows else rows[min(rows, key=distance)]


LEAST_CHUNKS = 8  # of a segment
DOUBLINGS = (1, 2, 4, 8, 16, 32)


def forget() -> None:
    """Read the tables again: `ttr.tune` has written one."""
    for cached in (table, nearest_arch, config_for, suited, _choose_for_numbers):
        cached.cache_clear()


@cache
def suited(config: Config, before: bool) -> Config:
    """before: somebody looks or reads before the token's decay. At a chunk's first token that is all of the state: too much
    to follow back by differences, so every chunk keeps its own."""
    return replace(config, every=1) if before else config


class Choice(NamedTuple):
    """How one call runs. room: for how many segments forward keeps states (0 where no length would be cut)."""

    config: Config
    segments: int
    room: int


def choose(arch: str, erase: bool, dk: int, dv: int, dtype: torch.dtype, heads: int, T: int) -> Choice:
    """heads: sequences x value heads. heads and T may be symbols."""
    symbolic = isinstance(heads, torch.SymInt) or isinstance(T, torch.SymInt)
    return (_choose if symbolic else _choose_for_numbers)(arch, erase, dk, dv, dtype, heads, T)


def _choose(arch: str, erase: bool, dk: int, dv: int, dtype: torch.dtype, heads: int, T: int) -> Choice:
    config = config_for(arch, erase, dk, dv, dtype)
    pieces = segments_of(arch, config, heads, dv, T)
    few = _fewer(_programs(config, heads, dv), 7 * multiprocessors(arch) // 10)
    return Choice(config, pieces, few * pieces)


_choose_for_numbers = lru_cache(maxsize=4096)(_choose)


def segments_of(arch: str, config: Config, heads: int, dv: int, T: int) -> int:
    """`segments` of a call with this configuration."""
    return segments(config.chunk, multiprocessors(arch), _programs(config, heads, dv), T)


def _programs(config: Config, heads: int, dv: int) -> int:
    """Of the scan, for one segment."""
    return heads * -(-dv // config.forward.tile)


def segments(chunk: int, processors: int, programs: int, T: int) -> int:
    """Into how many pieces a sequence is cut inside the GPU: a power of two, and 1 where its programs alone fill it.

    With 0.7 programs a multiprocessor nothing is cut; with fewer, there are as many pieces as make about two programs a
    multiprocessor, none shorter than LEAST_CHUNKS chunks. Made of //, * and min alone: where programs or T are symbols, a
    comparison would compile anew for every answer.
    """
    chunks = (T + chunk - 1) // chunk
    pieces: Any = 1
    for n in DOUBLINGS:  # from n pieces to 2 n
        few = _fewer(programs, min(7 * processors // 10, 7 * processors // (4 * n)))
        pieces = pieces + n * few * torch.sym_min(1, chunks // (2 * n * LEAST_CHUNKS))
    return pieces


def _fewer(programs: int, enough: int) -> Any:
    """1 if programs < enough else 0."""
    return 1 - torch.sym_min(1, programs // max(1, enough))
