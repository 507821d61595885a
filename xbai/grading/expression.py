"""LaTeX expressions for computer algebra: exact, letters as they stand and no unit taken out of them."""

from __future__ import annotations

import re
from functools import lru_cache, partial

from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy import Expr, Float, nsimplify

from xbai.grading.collection import closes_brackets

to_sympy = partial(
    latex2sympy,
    convert_degrees=False,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    ),
    conversion_config=ConversionConfig(lowercase_symbols=False),
)
"""The parser, which raises bare exceptions for whatever it does not know."""


@lru_cache(maxsize=4096)
def read_expression(latex: str) -> Expr | None:
    """The expression with real unknowns and exact numbers; None where the text is no expression.

    Unlike in `symbolic`, `A` is not `a` and `5m` is a product.
    """
    if re.search(r"'|\\(?:prime|pm|mp)(?![A-Za-z])", latex) or not closes_brackets(latex):
        return None
    try:
        expression = to_sympy(latex, is_real=True)
    except MemoryError:
        raise
    except Exception:
        return None
    if not isinstance(expression, Expr):
        return None
    expression = expression.doit()
    return nsimplify(expression, rational=True) if expression.has(Float) else expression
