"""A grading function out of the user's own file (`custom_reward_function.path` and `.name`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from xbai.errors import UserError
from xbai.grading.dispatch import GradeRequest


@dataclass(frozen=True)
class CustomFunction:
    """The function `name` of the Python file `path`. Picklable, so that it reaches the grading processes."""

    path: str
    name: str = "compute_score"

    def load(self) -> Callable[..., Any]:
        """The function itself.

        Raises:
            UserError: no such file, or no such function in it.
        """
        if not Path(self.path).is_file():
            raise UserError(f"custom_reward_function.path: {self.path} is not a file")
        function = getattr(_load_module(self.path), self.name, None)
        if not callable(function):
            raise UserError(f"custom_reward_function.name: {self.path} defines no function {self.name}")
        return function


class CustomGrader(CustomFunction):
    """Grades one response by a call of `name(data_source, solution_str, ground_truth, extra_info)`.

    The function returns the score, or a dict that holds it as `score` (see `as_grade`).
    """

    def __call__(self, request: GradeRequest) -> Any:
        """What the function returns for one response."""
        return self.load()(
            data_source=request.data_source,
            solution_str=request.response,
            ground_truth=request.ground_truth,
            extra_info=request.extra_info,
        )


class CustomBatchGrader(CustomFunction):
    """Grades many responses by one call, `name(data_sources, solution_strs, ground_truths, extra_infos)`: four lists.

    The function returns a list with a score or dict for each response; None for one that it could not grade.
    """

    def __call__(self, requests: Sequence[GradeRequest]) -> list[Any]:
        """What the function returns for each response.

        Raises:
            ValueError: not one result for each response.
        """
        results = self.load()(
            data_sources=[request.data_source for request in requests],
            solution_strs=[request.response for request in requests],
            ground_truths=[request.ground_truth for request in requests],
            extra_infos=[request.extra_info for request in requests],
        )
        if len(results) != len(requests):
            raise ValueError(f"{self.name} returned {len(results)} scores for {len(requests)} responses")
        return list(results)


@cache
def _load_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"custom_reward_function.path: {path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
