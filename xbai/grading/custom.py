"""A grading function out of the user's own file (`custom_reward_function.path` and `.name`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from xbai.errors import UserError
from xbai.grading.dispatch import GradeRequest


@dataclass(frozen=True)
class CustomGrader:
    """Grades by calling `name(data_source, solution_str, ground_truth, extra_info)` of the Python file `path`.

    The function returns the score, or a dict that holds it as `score`. Picklable, so that it reaches the grading
    processes.
    """

    path: str
    name: str = "compute_score"

    def __call__(self, request: GradeRequest) -> float:
        """The function's score of one response."""
        result = self.load()(
            data_source=request.data_source,
            solution_str=request.response,
            ground_truth=request.ground_truth,
            extra_info=request.extra_info,
        )
        return float(result["score"] if isinstance(result, dict) else result)

    def load(self) -> Callable[..., float | dict[str, float]]:
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


@cache
def _load_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"custom_reward_function.path: {path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
