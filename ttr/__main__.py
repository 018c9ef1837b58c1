"""The command line: `python -m ttr list [KIND]`, `python -m ttr explain NAME-or-YAML [key=value ...]`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from .choice import select_path
from .explanation import explain
from .explanation.kinds import REGISTRIES, of_kind
from .explanation.sources import COMPOSITIONS, PRESETS, short
from .explanation.text import describe
from .layers.compose import Composition, declare
from .registry import SpecError
from .sources import compositions
from .spec import presets, spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for a declaration or a size that has no meaning."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these letters shows `?`
    parser = _parser()
    options, words = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in words) or (words and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if words:  # key=value after an option
        options.overrides += words
    try:
        print(options.run(options), flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:  # SpecError among them
        print(f"ttr: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ttr", description="Layers that learn while they read: what there is, and what one does."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser(
        "list", help="the published mechanisms that come with ttr and the kinds for every slot, or what one kind takes",
        epilog="example: python -m ttr list momentum",
    )  # fmt: skip
    listing.add_argument("kind", metavar="KIND", nargs="?", help="its fields, what they take and what they hold when left out")
    listing.set_defaults(run=lambda options: listing_text() if options.kind is None else of_kind(options.kind))
    page = commands.add_parser(
        "explain", help="recurrence, coefficients, neighbours, path, costs and sources of a declaration",
        epilog="example: python -m ttr explain kda optimizer=momentum optimizer.nesterov=true --d-model 1024",
    )  # fmt: skip
    page.add_argument("source", metavar="NAME-or-YAML", help="a preset (see list) or a YAML file")
    page.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the declaration, as optimizer.steps=2 or gate=vector")
    page.add_argument("--d-model", type=int, metavar="D", help="width of the layer whose costs are given (default: one head)")
    page.add_argument("--length", type=int, default=2048, metavar="T", help="tokens (default: %(default)s)")
    page.set_defaults(run=_explain)
    return parser


def _explain(options: argparse.Namespace) -> str:
    declaration = declare(options.source, **overrides(options.overrides))
    return str(explain(declaration, d_model=options.d_model, T=options.length))


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as the keyword arguments of `ttr.spec`; values are YAML.

    `optimizer=momentum optimizer.nesterov=true` is the optimizer {kind: momentum, nesterov: true}.
    """
    from omegaconf import OmegaConf

    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SpecError(f"{pair!r}: expected key=value, as optimizer.steps=2")
        try:
            given[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)["value"]  # type: ignore[index, call-overload]
        except Exception as error:
            raise SpecError(f"{key}={value!r} is no YAML value: {error}") from None
    for slot in ("regressor", "objective", "optimizer", "gate"):
        if isinstance(given.get(slot), str) and any(key.startswith(f"{slot}.") for key in given):
            given[slot] = {"kind": given[slot]}
    return given


def listing_text() -> str:
    """The presets and the compositions as tables, and the registered kinds per slot."""
    header = ("name", "regressor", "objective", "optimizer", "gate", "path", "source")
    memories = _table([header, *(_row(name) for name in presets())])
    composed = _table([("composition", "kind", "parts", "source"), *(_composed_row(name) for name in compositions())])
    width = max(len(slot) for slot in REGISTRIES)
    kinds = [f"{slot.ljust(width)}  {', '.join(registry.kinds())}" for slot, registry in REGISTRIES.items()]
    return "\n".join([*memories, "", *composed, "", "Registered kinds (what one takes: python -m ttr list KIND)", *kinds])


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [table[0], "  ".join("─" * w for w in widths), *table[1:]]


def _composed_row(name: str) -> tuple[str, ...]:
    declaration = declare(name)
    assert isinstance(declaration, Composition)  # a file in presets/compositions
    declared = {part: getattr(declaration, part) for part in declaration.parts}
    parts = [f"{part} {p.name or describe(p, 'regressor')}" for part, p in declared.items()]
    parts += [f"persistent {declaration.persistent}"] if declaration.persistent else []
    return name, declaration.kind, ", ".join(parts), short(COMPOSITIONS[name][0]) if name in COMPOSITIONS else ""


def _row(name: str) -> tuple[str, ...]:
    declaration = spec(name)
    slots = [describe(declaration, slot) for slot in ("regressor", "objective", "optimizer", "gate")]
    path, _ = select_path(declaration)
    sources = PRESETS.get(name, ())
    return name, *slots, path, short(sources[0]) if sources else ""


if __name__ == "__main__":
    sys.exit(main())
