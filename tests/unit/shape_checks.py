"""What checks shapes in tests: jaxtyping's import hook decorates with it each function of the modules it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_SHAPED = re.compile(r"\b(?:Bool|Float|Int|Shaped)\d*\[")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with every argument and result checked at each call whose annotation gives a shape.

    The others are for mypy: some name what is imported for type checkers alone.
    """

    def spelled_out(word: re.Match[str]) -> str:
        stands_for = function.__globals__.get(word[0])
        return stands_for if isinstance(stands_for, str) and _SHAPED.search(stands_for) else word[0]

    hints = {
        name: re.sub(r"\w+", spelled_out, hint) if isinstance(hint, str) else hint
        for name, hint in function.__annotations__.items()
    }
    function.__annotations__ = {name: hint for name, hint in hints.items() if _SHAPED.search(str(hint))}
    return beartype(function)
