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
    shaped = {name: hint for name, hint in function.__annotations__.items() if _SHAPED.search(str(hint))}
    function.__annotations__ = shaped
    return beartype(function)
