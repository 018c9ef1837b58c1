"""Terms of a line: coefficients in front of matrices and outer products, written as a person would."""

from __future__ import annotations

from .symbols import Symbol

Term = tuple[str, str]  # (sign, text)
Terms = list[Term]


def split(c: Symbol) -> tuple[str, Symbol]:
    """The sign that can be written in front, and what is left."""
    negative = all(x < 0 for x in c.terms.values())
    return ("-", -c) if negative else ("+", c)


def times(c: Symbol, matrix: str, axes: set[str]) -> Term:
    sign, c = split(c)
    if c == 1:
        return sign, matrix
    if not axes:
        return sign, f"{coefficient(c)} {matrix}"
    return sign, {"key": f"Diag({c}) {matrix}", "value": f"{matrix} Diag({c})"}.get("".join(axes), f"({c}) ⊙ {matrix}")


def coefficient(c: Symbol) -> str:
    """The text of a number in front of a matrix."""
    bare = " / " not in str(c) and (len(c.terms) == 1 or c.factored()[0].constant is None)
    return str(c) if bare else f"({c})"


def outer(b: Symbol, k: str, e: str, axes: set[str]) -> Term:
    """b ⊗ k eᵀ, b a number, a vector over the keys or over the values."""
    sign, b = split(b)
    if b == 1:
        return sign, f"{k} {e}ᵀ"
    text = coefficient(b)
    if not axes:
        return sign, f"{text} {k} {e}ᵀ"
    return sign, {"key": f"({text} ⊙ {k}) {e}ᵀ", "value": f"{k} ({text} ⊙ {e})ᵀ"}.get("".join(axes), f"{text} ⊙ ({k} {e}ᵀ)")


def join(terms: Terms) -> str:
    text = ""
    for sign, term in sorted(terms, key=lambda t: t[0] == "-"):
        text += f" {sign} {term}" if text else (term if sign == "+" else f"-{term}")
    return text or "0"


def transposed(terms: Terms) -> str:
    """(sum of terms)ᵀ, without parentheses where it is one matrix or a number times one."""
    if len(terms) == 1 and terms[0][0] == "+" and "Diag" not in terms[0][1] and "⊙" not in terms[0][1]:
        return f"{terms[0][1]}ᵀ"
    return f"({join(terms)})ᵀ"
