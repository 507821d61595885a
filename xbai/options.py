"""A command line from a dataclass: each field with a docstring is an option, and the docstring its help."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

from xbai.errors import UserError

OptionsT = TypeVar("OptionsT")


def command_of(run: Callable[[OptionsT], None], options: type[OptionsT]) -> Callable[..., None]:
    """`run` with a parameter for each option, as typer reads them.

    Args:
        run: its docstring describes the command.
        options: the dataclass that it takes. The option of a field has its name, with underscores, and takes values of
            its type; `Annotated[type, typer.Option(...)]` says more, `typer.Argument(...)` makes it an argument. A
            tuple's may be repeated. Fields that are dataclasses add their options; those without docstring have none.
    """

    def command(**values: Any) -> None:
        run(_made(options, values))

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(list(_parameters(options)))  # type: ignore[attr-defined]
    return command


def parse_options(options: type[OptionsT], arguments: Sequence[str]) -> OptionsT:
    """The options that a command line says.

    Raises:
        UserError: one is unknown, missing, or has no such value.
    """
    made: list[OptionsT] = []
    script = typer.Typer(add_completion=False)
    script.command()(command_of(made.append, options))
    try:
        typer.main.get_command(script).main(list(arguments), standalone_mode=False)
    except Exception as error:
        # A `ClickException`, of click's or of the one within typer, by its version.
        if not hasattr(error, "format_message"):
            raise
        raise UserError(error.format_message()) from None
    return made[0]


def _made(options: type[OptionsT], values: dict[str, Any]) -> OptionsT:
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(options).items():
        if isinstance(hint, type) and is_dataclass(hint):
            given[name] = _made(hint, values)
        elif name in values:
            given[name] = tuple(values[name] or ()) if get_origin(hint) is tuple else values[name]
    return options(**given)


def _parameters(options: type) -> Iterator[inspect.Parameter]:
    hints, docstrings = get_type_hints(options, include_extras=True), _docstrings(options)
    for field in fields(options):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _parameters(hint)
        elif field.name in docstrings:
            default = {MISSING: inspect.Parameter.empty, (): None}.get(field.default, field.default)
            annotation = _annotation(field.name, hint, docstrings[field.name])
            yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(name: str, hint: Any, docstring: str) -> Any:
    kind, *further = get_args(hint) if get_origin(hint) is Annotated else [hint]
    info = copy(next((one for one in further if isinstance(one, ParameterInfo)), typer.Option()))
    if isinstance(info, OptionInfo) and info.default is ...:
        info.default = f"--{name}"  # Where typer looks for the first name of an option in `Annotated`.
    info.help = docstring
    if info.parser is not None:
        kind = str  # What it parses; typer would ask for as many values as a tuple has.
    return Annotated[GenericAlias(list, get_args(kind)[0]) if get_origin(kind) is tuple else kind, info]


def _docstrings(options: type) -> dict[str, str]:
    """The strings that stand below the fields of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__[:-1]):
        for field, text in pairwise(_classes(inspect.getfile(kind))[kind.__name__]):
            match field, text:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(docstring))):
                    found[name] = inspect.cleandoc(docstring).replace("\n", " ")
    return found


@cache
def _classes(path: str) -> dict[str, list[ast.stmt]]:
    module = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {item.name: item.body for item in module.body if isinstance(item, ast.ClassDef)}
