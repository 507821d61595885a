"""The value of a formula at a point, to any number of digits and in bounded time, and how many digits it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import sympy
from mpmath import isfinite, mp, mpc, mpf, workprec
from sympy.functions.elementary.hyperbolic import HyperbolicFunction
from sympy.utilities.lambdify import MPMATH_TRANSLATIONS

IMAGINARY_UNIT = "i"
LARGEST_SIZE = 500_000
"""Where `bits` cuts off the exponents and other numbers that it multiplies by."""
LARGEST_EXPONENT_BITS = 2_000
"""The size of the largest number that is an exponent, or that a function is applied to."""
LARGEST_FACTORIAL = 200_000
LARGEST_BINOMIAL = 20_000
HIDDEN_BITS = 2_000
"""How much smaller than a sum a term must be to count as hidden by it."""

Point = dict[str, Fraction]
Number: TypeAlias = mpf | mpc
Rules = dict[type, Callable[..., Number]]


class UndefinedError(Exception):
    """No (real) number: a division by zero, the logarithm of a negative number."""


class UnsupportedError(Exception):
    """Something that is not evaluated here: an unknown function, infinity, an integral."""


class TooLargeError(Exception):
    """A number that would fill the memory, or that hides what is added to it."""


class Evaluator:
    """The value of a formula at a point, to the working precision of mpmath.

    With `real`, roots of odd degree are real, and whatever leaves the real numbers on the way is undefined. With
    `hides_nothing`, a sum that hides one of its terms is too large. The errors are those above.
    """

    def __init__(self, point: Point, real: bool, hides_nothing: bool = False) -> None:
        self._point = point
        self._real = real
        self._hides_nothing = hides_nothing
        self._rules: Rules = {**_RULES, sympy.Add: self._sum, sympy.Pow: self._power}

    def __call__(self, formula: sympy.Expr) -> Number:
        try:
            value = self._value(formula)
        except (ZeroDivisionError, ValueError, TypeError) as error:  # The last: complex numbers have no order.
            raise UndefinedError from error
        if not isfinite(value):
            raise UndefinedError
        if isinstance(value, mpc) and self._real:
            if value.imag:
                raise UndefinedError
            return value.real
        return value

    def _value(self, formula: sympy.Expr) -> Number:
        if isinstance(formula, sympy.Symbol) and formula.name != IMAGINARY_UNIT:
            if formula.name not in self._point:
                raise UnsupportedError  # The variable of an integral or a sum.
            return _quotient(self._point[formula.name])
        if isinstance(formula, sympy.Rational | sympy.Float):
            return _quotient(exact(formula))
        if formula in _CONSTANTS:
            return +_CONSTANTS[formula]
        if isinstance(formula, sympy.Symbol):
            return mp.j
        rule = self._rules.get(formula.func) or _function(formula)
        return rule(*map(self, formula.args))

    def _sum(self, *terms: Number) -> Number:
        total = mp.fsum(terms)
        if self._hides_nothing and any(term and abs(term) < mp.ldexp(abs(total), -HIDDEN_BITS) for term in terms):
            raise TooLargeError
        return total

    def _power(self, base: Number, exponent: Number) -> Number:
        if exponent and mp.mag(exponent) > LARGEST_EXPONENT_BITS:
            raise TooLargeError
        if self._real and base < 0 and not mp.isint(exponent):
            return _odd_root_power(base, exponent)
        return mp.power(base, exponent)


def exact(number: sympy.Rational | sympy.Float) -> Fraction:
    """A number as it was written: 0.1 is a tenth."""
    number = sympy.Rational(str(number)) if isinstance(number, sympy.Float) else number
    return Fraction(int(number.p), int(number.q))


def is_rational(formula: sympy.Expr) -> bool:
    """Whether a formula is made of rational numbers by rational operations, as far as it shows."""
    if isinstance(formula, sympy.Pow) and isinstance(formula.exp, sympy.Rational) and formula.exp.q > 1:
        return False
    if formula.is_Atom:
        return isinstance(formula, sympy.Rational | sympy.Float | sympy.Symbol)
    return isinstance(formula, _RATIONAL_OPERATIONS) and all(map(is_rational, formula.args))


def bits(formula: sympy.Expr, point: Point) -> int:
    """About how many bits the exact value of a rational formula takes, numerator and denominator together.

    Raises:
        UnsupportedError, TooLargeError: as the `Evaluator` does on exponents.
    """
    if formula.is_Atom:
        return 1 + math.ceil(_log2(formula, point))
    of_arguments = [bits(argument, point) for argument in formula.args]
    total = 1 + sum(of_arguments)
    if isinstance(formula, sympy.Pow):
        base = _log2(formula.base, point) if formula.base.is_Atom else of_arguments[0]
        return total + math.ceil(base * _size(formula.exp, point))
    if isinstance(formula, sympy.exp | HyperbolicFunction):
        return total + 2 * _size(formula.args[0], point)
    if isinstance(formula, sympy.factorial | sympy.binomial):
        count = _size(formula.args[0], point)
        return total + count * count.bit_length()
    return total


def _log2(atom: sympy.Expr, point: Point) -> float:
    """The bits of a number or variable; 2 for a constant like pi."""
    if isinstance(atom, sympy.Rational | sympy.Float):
        number = exact(atom)
    elif isinstance(atom, sympy.Symbol):
        number = point.get(atom.name, Fraction(1))
    else:
        return 2.0
    return math.log2(max(1, abs(number.numerator))) + math.log2(number.denominator)


def _size(formula: sympy.Expr, point: Point) -> int:
    """The absolute value, rounded up; a very large one is cut off."""
    try:
        with workprec(53):
            return int(min(mp.ceil(abs(Evaluator(point, real=False)(formula))), LARGEST_SIZE))
    except UndefinedError:
        return 0


def _quotient(number: Fraction) -> mpf:
    return mpf(number.numerator) / number.denominator


def _odd_root_power(base: mpf, exponent: mpf) -> mpf:
    """A negative number to a fraction p/q with a small odd q: the real one."""
    for degree in range(3, 22, 2):
        top = mp.nint(exponent * degree)
        if abs(exponent * degree - top) < mp.ldexp(1, 10 - mp.prec):
            return (-1) ** (int(top) % 2) * mp.power(-base, exponent)
    raise UndefinedError


def _integer(value: Number) -> int:
    nearest = mp.nint(value.real)
    if abs(value - nearest) > mp.ldexp(1, -mp.prec // 2):
        raise UndefinedError
    return int(nearest)


def _factorial(count: Number) -> mpf:
    """Of whole numbers only: between them, formulas for whole numbers need not agree."""
    count = _integer(count)
    if count < 0:
        raise UndefinedError
    if count > LARGEST_FACTORIAL:
        raise TooLargeError
    return mp.factorial(count)


def _binomial(total: Number, chosen: Number) -> mpf:
    total, chosen = _integer(total), _integer(chosen)
    if min(total, chosen) < 0:
        raise UndefinedError
    if total > LARGEST_BINOMIAL:
        raise TooLargeError
    return mp.binomial(total, chosen)


def _floor(value: Number) -> mpf:
    nearest = mp.nint(value)
    return nearest if abs(value - nearest) < mp.ldexp(1, -mp.prec // 2) else mp.floor(value)


_CONSTANTS = {
    sympy.pi: mp.pi,
    sympy.E: mp.e,
    sympy.GoldenRatio: mp.phi,
    sympy.EulerGamma: mp.euler,
    sympy.Catalan: mp.catalan,
    sympy.I: mp.j,
}
_RATIONAL_OPERATIONS = sympy.Add | sympy.Mul | sympy.Pow | sympy.factorial | sympy.binomial
_RULES: Rules = {
    sympy.Mul: lambda *factors: mp.fprod(factors),
    sympy.UnevaluatedExpr: lambda value: value,
    sympy.log: lambda value, *base: mp.log(value) / mp.log(*base) if base else mp.log(value),
    sympy.factorial: _factorial,
    sympy.binomial: _binomial,
    sympy.floor: _floor,
    sympy.ceiling: lambda value: -_floor(-value),
    sympy.Mod: lambda value, divisor: value - divisor * _floor(value / divisor),
    sympy.Max: max,
    sympy.Min: min,
}


def _function(formula: sympy.Expr) -> Callable[..., Number]:
    """What mpmath has for a function of SymPy's."""
    name = type(formula).__name__
    function = getattr(mp, MPMATH_TRANSLATIONS.get(name, name), None)
    if not isinstance(formula, sympy.Function) or function is None or not type(formula).__module__.startswith("sympy."):
        raise UnsupportedError

    def bounded(*arguments: Number) -> Number:
        if any(argument and mp.mag(argument) > LARGEST_EXPONENT_BITS for argument in arguments):
            raise TooLargeError
        return function(*arguments)

    return bounded
