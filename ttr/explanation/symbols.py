"""Symbols: small objects that go through a piece's own functions and print as the formula they went through.

A Symbol is a sum of products of atoms, kept expanded, so that what cancels disappears and 1 - 1 + b prints as `b`. A
torch function of a symbol becomes an atom that prints as a call (`exp(step)`) and can still be evaluated. What has no
formula (a comparison, a shape) raises NotSymbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Tensor]
POWERS = {1: "", 2: "²", 3: "³"}


class NotSymbolic(Exception):
    """A function asked a symbol for something that only numbers have."""


@dataclass(frozen=True)
class Atom:
    """What is not taken apart: a name, a function's value, a sum in a denominator. tight: needs no parentheses in a product."""

    text: str
    tight: bool = field(default=True, compare=False)
    names: frozenset[str] = field(default=frozenset(), compare=False)
    value: Callable[[Values], Any] = field(default=lambda values: None, compare=False, repr=False)

    def power(self, exponent: float, alone: bool) -> str:
        text = self.text if self.tight or (alone and exponent == 1) else f"({self.text})"
        return text + (POWERS[int(exponent)] if exponent in POWERS else f"^{number(exponent)}")


Monomial = tuple[tuple[Atom, float], ...]


def number(x: float) -> str:
    """1, 0.9, 1/3: as few characters as give the number back."""
    if x == int(x):
        return str(int(x))
    fraction = Fraction(x).limit_denominator(64)
    return f"{x:g}" if len(f"{x:g}") <= 4 or float(fraction) != x else str(fraction)


class Symbol:
    """A sum of coefficient * product of atom^exponent. Supports + - * / ** @, torch functions, and `at(values)`."""

    def __init__(self, terms: dict[Monomial, float]):
        self.terms = {m: c for m, c in terms.items() if c != 0}

    @classmethod
    def named(cls, name: str) -> Symbol:
        return cls.of(Atom(name, names=frozenset([name]), value=lambda values: values[name]))

    @classmethod
    def of(cls, atom: Atom, exponent: float = 1) -> Symbol:
        return cls({((atom, exponent),): 1.0})

    @classmethod
    def lift(cls, x: Any) -> Symbol:
        """A number, a tensor of one element or a symbol, as a symbol."""
        if isinstance(x, Symbol):
            return x
        if isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1):
            return cls({(): float(x)})
        raise NotSymbolic(f"{type(x).__name__} is no number")

    @property
    def constant(self) -> float | None:
        """The number this symbol is, or None."""
        return self.terms.get((), 0.0) if set(self.terms) <= {()} else None

    @property
    def names(self) -> frozenset[str]:
        """The names this symbol depends on."""
        return frozenset(name for m in self.terms for atom, _ in m for name in atom.names)

    def at(self, values: Values) -> Any:
        """The value where the names have these values."""
        total: Any = 0.0
        for monomial, coefficient in self.terms.items():
            product: Any = coefficient
            for atom, exponent in monomial:
                product = product * atom.value(values) ** exponent
            total = total + product
        return total

    def __add__(self, other: Any) -> Symbol:
        terms = dict(self.terms)
        for m, c in Symbol.lift(other).terms.items():
            terms[m] = terms.get(m, 0.0) + c
        return Symbol(terms)

    def __mul__(self, other: Any) -> Symbol:
        terms: dict[Monomial, float] = {}
        for m1, c1 in self.terms.items():
            for m2, c2 in Symbol.lift(other).terms.items():
                m = _times(m1, m2)
                terms[m] = terms.get(m, 0.0) + c1 * c2
        return Symbol(terms)

    def __neg__(self) -> Symbol:
        return self * -1.0

    def __sub__(self, other: Any) -> Symbol:
        return self + -Symbol.lift(other)

    def __rsub__(self, other: Any) -> Symbol:
        return Symbol.lift(other) - self

    def __truediv__(self, other: Any) -> Symbol:
        return self * Symbol.lift(other) ** -1

    def __rtruediv__(self, other: Any) -> Symbol:
        return Symbol.lift(other) / self

    def __pow__(self, exponent: Any) -> Symbol:
        power = Symbol.lift(exponent).constant
        if power is None:
            return _function(operator.pow, f"{_tight(self)}^{_tight(exponent)}", self, exponent)
        if self.constant is not None:
            return Symbol.lift(self.constant**power)
        if len(self.terms) == 1 and power == int(power):
            ((monomial, coefficient),) = self.terms.items()
            return Symbol({tuple((a, e * power) for a, e in monomial): coefficient**power})
        return Symbol.of(self.as_atom(), power)

    def __rpow__(self, base: Any) -> Symbol:
        return Symbol.lift(base) ** self

    def __matmul__(self, other: Any) -> Symbol:
        return _function(operator.matmul, f"{_factor(self)} {_factor(other)}", self, other, tight=False)

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> Symbol:
        return self  # views and broadcasts do not change a formula

    def __bool__(self) -> bool:
        if self.constant is None:
            raise NotSymbolic("a branch on a symbol's value")
        return bool(self.constant)

    def __float__(self) -> float:
        if self.constant is None:
            raise NotSymbolic("the number behind a symbol")
        return self.constant

    def _compare(self, other: Any) -> bool:
        raise NotSymbolic("a comparison of symbols")

    __lt__ = __le__ = __gt__ = __ge__ = _compare

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Symbol, int, float)) and self.terms == Symbol.lift(other).terms

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("_") or method is None:
            raise AttributeError(name)
        if name in ("T", "mT"):
            return self
        if not callable(method):
            return Unknown(name)
        return lambda *args, **kwargs: call(method, (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def as_atom(self) -> Atom:
        """The whole sum as one atom."""
        return Atom(str(self), tight=False, names=self.names, value=self.at)

    def factored(self) -> tuple[Symbol, Symbol]:
        """(what all terms of a sum share, the sum without it)."""
        first, *others = self.terms or {(): 0.0}
        shared = {a: e for a, e in first if e > 0 and others and all(e == dict(m).get(a) for m in others)}
        common = Symbol({tuple(item for item in first if item[0] in shared): 1.0})
        return common, self / common

    def __str__(self) -> str:
        common, rest = self.factored()
        if common.constant is None:
            return f"{common} ({rest})"
        text = ""
        for monomial, coefficient in sorted(self.terms.items(), key=lambda term: (term[1] < 0, term[0] != ())):
            term = _product(monomial, abs(coefficient))
            sign = "-" if coefficient < 0 else "+"
            text += f" {sign} {term}" if text else ("-" if coefficient < 0 else "") + term
        return text or "0"

    __repr__ = __str__


class Unknown:
    """A tensor's attribute that a symbol does not have (shape, dtype); it may be handed on but not looked at."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, index: Any) -> Unknown:
        return self

    def _refuse(self, *_: Any):
        raise NotSymbolic(f"a symbol has no {self.name}")

    __lt__ = __le__ = __gt__ = __ge__ = __iter__ = __bool__ = __int__ = __index__ = __add__ = __mul__ = __len__ = _refuse
    __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def _times(m1: Monomial, m2: Monomial) -> Monomial:
    powers: dict[Atom, float] = {}
    for atom, exponent in (*m1, *m2):
        powers[atom] = powers.get(atom, 0) + exponent
    return tuple(sorted(((a, e) for a, e in powers.items() if e), key=lambda item: _rank(item[0])))


def _rank(atom: Atom) -> tuple[bool, bool, str]:
    """Factors are written Greek letters first, then names, then functions."""
    return atom.names != {atom.text}, atom.text[0] < "Α", atom.text


def _product(monomial: Monomial, coefficient: float) -> str:
    above = [(a, e) for a, e in monomial if e > 0]
    below = [(a, -e) for a, e in monomial if e < 0]
    alone = len(above) == 1 and coefficient == 1
    factors = [a.power(e, alone and not below) for a, e in above]
    if coefficient != 1 or not factors:
        factors.insert(0, number(coefficient))
    text = " ".join(factors)
    if not below:
        return text
    divisor = " ".join(a.power(e, False) for a, e in below)
    return f"{text} / {divisor if len(below) == 1 else f'({divisor})'}"


def _tight(x: Any) -> str:
    """The text of x, in parentheses unless it is one word."""
    text = str(Symbol.lift(x))
    return text if " " not in text and not text.startswith("-") else f"({text})"


def _factor(x: Any) -> str:
    """The text of x as a factor of a matrix product."""
    monomials = list(Symbol.lift(x).terms)
    return str(x) if len(monomials) == 1 and len(monomials[0]) == 1 else f"({x})"


def _function(func: Callable, text: str, *args: Any, tight: bool = True, **kwargs: Any) -> Symbol:
    """The atom `text`, whose value is func of the arguments' values."""

    def at(x: Any, values: Values) -> Any:
        return x.at(values) if isinstance(x, Symbol) else x

    def value(values: Values) -> Any:
        return func(*(at(a, values) for a in args), **{k: at(a, values) for k, a in kwargs.items()})

    symbols = [x for x in (*args, *kwargs.values()) if isinstance(x, Symbol)]
    names = frozenset(name for x in symbols for name in x.names)
    return Symbol.of(Atom(text, tight=tight, names=names, value=value))


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "rsub": lambda a, b: b - a, "mul": operator.mul, "multiply": operator.mul,
    "div": operator.truediv, "true_divide": operator.truediv, "neg": operator.neg, "pow": operator.pow,
    "matmul": operator.matmul, "square": lambda a: a**2, "reciprocal": lambda a: 1 / a, "lerp": lambda a, b, w: a + w * (b - a),
    "zeros_like": lambda a: Symbol.lift(0), "ones_like": lambda a: Symbol.lift(1),
}  # fmt: skip
UNCHANGED = ("clone", "detach", "contiguous", "float", "double", "to", "expand", "expand_as", "unsqueeze", "reshape", "view")
WORDS = {"layer_norm": "LN", "log_sigmoid": "logsigmoid", "sum": "Σ", "sqrt": "√"}
QUIET = ("layer_norm", "gelu", "silu", "relu", "sum", "mean")  # their further arguments say how, not what


def call(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A torch function met a symbol."""
    name = func.__name__.strip("_")
    if name in ARITHMETIC:
        return ARITHMETIC[name](*(Symbol.lift(a) if isinstance(a, Tensor) else a for a in args))
    if name in UNCHANGED:
        return Symbol.lift(args[0])
    given = [*args, *kwargs.values()]
    if any(isinstance(a, (list, tuple)) and any(isinstance(x, Symbol) for x in a) for a in given):
        raise NotSymbolic(f"{name} of several symbols")
    if all(x.constant is not None for x in given if isinstance(x, Symbol)):
        numbers = [torch.tensor(float(x), dtype=torch.float64) if isinstance(x, Symbol) else x for x in args]
        words = {k: torch.tensor(float(x), dtype=torch.float64) if isinstance(x, Symbol) else x for k, x in kwargs.items()}
        return Symbol.lift(func(*numbers, **words))
    if name in ("sum", "mean") and len(args[0].terms) == 1:
        ((monomial, coefficient),) = args[0].terms.items()
        if coefficient != 1:  # a number may be taken out
            return coefficient * call(func, (args[0] / coefficient, *args[1:]), kwargs)
        if name == "sum" and len(monomial) == 1 and monomial[0][1] == 2:
            return _function(func, f"‖{monomial[0][0].text}‖²", *args, **kwargs)
    if name == "abs":
        return _function(func, f"|{args[0]}|", *args)
    shown = [str(a) for a in args if isinstance(a, Symbol) or (name not in QUIET and isinstance(a, (int, float)))]
    shown += [f"{k}={v}" for k, v in kwargs.items() if isinstance(v, Symbol) or (name not in QUIET and type(v) in (int, float))]
    return _function(func, f"{WORDS.get(name, name)}({', '.join(shown)})", *args, **kwargs)
