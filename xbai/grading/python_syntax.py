"""What can be said of Python source without running it."""

from __future__ import annotations

import ast
import warnings


def parse_python(source: str) -> ast.Module | None:
    """The syntax tree; None where it is no Python, or nested too deeply to look at."""
    try:
        return _parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_in_string(source: str, triple_quoted: bool) -> bool:
    """Whether the source ends inside of a string, triple-quoted ones only where so asked."""
    try:
        _parse(source)
    except SyntaxError as error:
        return str(error.msg).startswith("unterminated triple-quoted" if triple_quoted else "unterminated")
    except (ValueError, RecursionError, MemoryError):
        pass
    return False


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)
