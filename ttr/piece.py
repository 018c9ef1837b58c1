"""What every piece of a declaration has in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from .constant import Declaration
from .signals import Signal

if TYPE_CHECKING:
    from .spec import Spec


@dataclass(frozen=True, kw_only=True)
class Piece(Declaration):
    """A frozen dataclass in one slot of a declaration."""

    kind: ClassVar[str]

    def signals(self) -> dict[str, Signal]:
        """The per-token quantities this piece declares: its Signal fields, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Signal)}

    def check(self, spec: Spec) -> None:
        """Raise SpecError, with the reason, when this piece has no meaning beside the others of `spec`."""

    def bibtex(self) -> str | None:
        """The source of the mechanism, if it has one of its own."""
        return None
