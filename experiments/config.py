"""The configuration of an experiment: strict dataclasses, a YAML file, and `key=value` on the command line.

A key that no dataclass has is refused by its full name. The `mixers` are not described here: a declaration is whatever
`ttr.spec` takes (a preset's name, a YAML path, a mapping), or a list of them, one per block.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.mixers import MixerEntry, choose_mixers
from experiments.tasks import TASKS, Task

CONFIGS = Path(__file__).parent / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the full key, what came and what was expected."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A `ttr.LM` of `n_layers` blocks; `layer` sizes and streams hold for every mixer that does not declare its own."""

    d_model: int = 64
    n_layers: int = 1
    mlp: Literal["swiglu"] | None = None
    mlp_ratio: float = 8 / 3
    tie_embeddings: bool = True  # of a task of tokens; vectors are read and answered by two maps
    init_std: float | None = None  # null: d_model ** -0.5; the usual 0.02 is made for wide models and stalls small ones
    layer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW under a warmed-up schedule. Exactly one of `steps` and `epochs` is given."""

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 64
    test_batch_size: int = 256
    lr: float = 5e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero at the last step
    warmup: float = 0.1  # fraction of the steps, linear from zero
    clip: float | None = 1.0  # norm of the whole gradient
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    eval_every: int | None = 100  # steps between looks at the val split; null: only at the end
    stop_at: float | None = None  # stop once the score (accuracy, error) on val reaches this


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How, not what: nothing here changes a result, so nothing here enters a run's id."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    jobs: int | None = None  # runs at a time; null: one per core on the CPU, one on a GPU
    threads: int = 1  # torch threads of a run: at this size more of them wait for each other longer than they work
    workers: int = 0  # data loader processes of a run
    checkpoint_every: int = 50  # steps; what is interrupted goes on from the newest
    compile: bool = False
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class UntrainedConfig:
    """Untrained recall, shown before anything is trained: each rule writes n random unit keys, then is asked for them."""

    rules: dict[str, Any] = field(default_factory=dict)  # label -> declaration whose signals are all numbers
    d: int = 64
    pairs: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    sequences: int = 16
    queries: int = 16  # of the stored keys, per sequence
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: every mixer, under every seed and every learning rate, on one task."""

    name: str = ""  # names the folder of results; the file's name if left out
    title: str = ""
    notes: str = ""  # on its own mixers, printed under the table
    task: Any = None  # a mapping with `kind`, read by the task's own dataclass
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mixers: dict[str, Any] = field(default_factory=dict)  # label -> declaration
    seeds: list[int] = field(default_factory=lambda: [0])
    lrs: list[float] = field(default_factory=list)  # learning rates to choose from on val; empty: train.lr
    untrained: UntrainedConfig | None = None
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    output: str = "results"


@dataclass(frozen=True)
class Experiment:
    """A configuration that has been read, checked and resolved."""

    config: Config
    task: Task
    mixers: list[MixerEntry]

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.name

    @property
    def lrs(self) -> list[float]:
        return self.config.lrs or [self.config.train.lr]

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain containers, which `load` reads back."""
        return dataclasses.asdict(self.config)


def names() -> list[str]:
    """The configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """Read a configuration (a name, a YAML path or a mapping) and apply `key=value` overrides.

    Raises ConfigError for an unknown name or key, a value of the wrong type, and settings that cannot be run.
    """
    raw, name = _read(source)
    plain, mixer_overrides = _split_overrides(overrides)
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(raw)), OmegaConf.from_dotlist(plain))
        data = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    data = typing.cast(dict[str, Any], data)
    check_keys(Config, data)
    task = read_task(data.get("task"))
    try:
        mixers = choose_mixers(data.get("mixers") or {}, mixer_overrides, common=(data.get("model") or {}).get("layer"))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config = typing.cast(Config, to_dataclass(Config, data))
    resolved = {
        "task": dataclasses.asdict(typing.cast(Any, task)),
        "mixers": {mixer.label: mixer.declaration for mixer in mixers},
    }
    notes = "" if mixer_overrides else config.notes
    config = dataclasses.replace(config, name=config.name or name, notes=notes, **resolved)
    _check(config)
    for mixer in mixers:
        try:
            mixer.per_block(config.model.n_layers)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return Experiment(config, task, mixers)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "unnamed"
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if str(source) not in names():
            close = difflib.get_close_matches(str(source), names(), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"no configuration {str(source)!r}.{hint} Choose from {names()} or give a YAML path")
        path = CONFIGS / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    raw = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(raw).__name__}")
    return typing.cast(dict[str, Any], raw), path.stem


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(overrides of the configuration, {"mixer": ..., "mixer.optimizer": ..., "mixers": [...]})."""
    plain: list[str] = []
    chosen: dict[str, Any] = {}
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value, got {item!r}")
        try:
            value = OmegaConf.from_dotlist([f"value{item[len(key) :]}"])
        except YAMLError:
            raise ConfigError(f"{item!r}: the value is no YAML (a bracket, brace or quote left open?)") from None
        value = typing.cast(dict[str, Any], OmegaConf.to_container(value))["value"]
        if key == "mixer" and key in chosen:
            raise ConfigError(f"mixer is given twice: {chosen[key]!r} and {value!r}; several are mixers=[a,b]")
        if key == "mixers" and not isinstance(value, (list, dict)):
            raise ConfigError(f"mixers={value!r}: expected a list, as [{value}]")
        if key == "mixer" or key.startswith("mixer.") or (key == "mixers" and isinstance(value, list)):
            chosen[key] = value
        else:
            plain.append(item)
    return plain, chosen


def check_keys(schema: type, data: Any, prefix: str = "") -> None:
    """Refuse every key that `schema` has no field for, at any depth, naming it in full."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{prefix or 'the configuration'}: expected a mapping, got {data!r}")
    hints = typing.get_type_hints(schema)
    for key, value in data.items():
        full = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            close = difflib.get_close_matches(str(key), list(hints), 1)
            near = f"{prefix}.{close[0]}" if close and prefix else close[0] if close else ""
            hint = f" Did you mean {near!r}?" if near else ""
            raise ConfigError(f"unknown key {full!r}.{hint} Known here: {sorted(hints)}")
        for inner in [hints[key], *typing.get_args(hints[key])]:
            if is_dataclass(inner) and value is not None:
                for i, item in enumerate(value if isinstance(value, list) else [value]):
                    check_keys(typing.cast(type, inner), item, f"{full}[{i}]" if isinstance(value, list) else full)


def to_dataclass(schema: type, data: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of `schema` from plain containers; a value of the wrong type raises ConfigError with its full key."""
    try:
        node = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(data)))
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error, prefix)) from None


def read_task(data: Any) -> Task:
    """The task that a mapping with `kind` describes."""
    data = {"kind": data} if isinstance(data, str) else data
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind not in TASKS:
        raise ConfigError(f"task.kind={kind!r} is not a task; choose from {sorted(TASKS)}")
    check_keys(TASKS[kind], data, "task")
    task = to_dataclass(TASKS[kind], data, "task.")
    for split in ("train", "val", "test"):
        try:
            task.segments(split)
        except ValueError as error:
            raise ConfigError(f"task: {error}") from None
    return task


def _check(config: Config) -> None:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        raise ConfigError(f"give one of train.steps and train.epochs, got {train.steps} and {train.epochs}")
    for name, value, least in (
        ("model.n_layers", config.model.n_layers, 1),
        ("train.steps", train.steps, 1),
        ("train.epochs", train.epochs, 1),
        ("train.batch_size", train.batch_size, 1),
        ("train.eval_every", train.eval_every, 1),
        ("execution.jobs", config.execution.jobs, 1),
        ("execution.threads", config.execution.threads, 1),
        ("execution.checkpoint_every", config.execution.checkpoint_every, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: expected at least {least}")
    if not 0 <= train.warmup < 1:
        raise ConfigError(f"train.warmup={train.warmup}: expected a fraction of the steps, 0 <= warmup < 1")
    for name, rates in (("train.lr", [train.lr]), ("lrs", config.lrs)):
        if not all(0 < rate < float("inf") for rate in rates):
            raise ConfigError(f"{name}={rates if name == 'lrs' else train.lr}: expected learning rates > 0")
    if not config.seeds:
        raise ConfigError("seeds is empty: give at least one, e.g. seeds=[0]")


def _first_line(error: Exception, prefix: str = "") -> str:
    key = getattr(error, "full_key", None)
    line = str(error).split("\n")[0]
    if "is not a ListConfig" in line:
        line = "expected a list, as [0]"
    return f"{prefix}{key}: {line}" if key else line
