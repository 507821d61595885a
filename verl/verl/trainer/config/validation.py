"""A composed configuration as the typed one, or all that is wrong with its values, a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, Container, DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from verl.trainer.config.compose import CONFIG_FOLDER, as_written, leaves
from verl.trainer.config.fields import REFERENCE, ActsWith, NullMeans, value_at
from xbai.errors import UserError

T = TypeVar("T")

KINDS: dict[tuple[Any, ...], str] = {
    (bool,): "true or false",
    (bool, Literal["auto"]): "true, false or auto",
    (int,): "a whole number",
    (float,): "a number",
    (str,): "text",
    (list,): "a list",
    (str, list): "text or a list",
}

BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class Leaf(NamedTuple):
    """What a schema says of one key.

    Attributes:
        types: of its values, other than null.
        nullable: null may be written.
        marks: what stands beside the types, here and at the sections above.
    """

    types: tuple[Any, ...]
    nullable: bool
    marks: tuple[Any, ...]

    def marked(self, kind: type[T]) -> Iterator[T]:
        """Its marks of one kind."""
        return (mark for mark in self.marks if isinstance(mark, kind))

    @property
    def bounds(self) -> str:
        """Of a number, in words."""
        found = {
            name: getattr(bound, name)
            for info in self.marked(FieldInfo)
            for bound in info.metadata
            for name in ("gt", "ge", "lt", "le")
            if hasattr(bound, name)
        }
        if "ge" in found and len(found) == 2:
            return f"from {found['ge']} to {found['le'] if 'le' in found else 'below {lt}'.format(**found)}"
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        return " and ".join(f"{words[name]} {bound}" for name, bound in found.items())


def _schema_leaves(schema: type) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    hints = get_type_hints(schema, include_extras=True)
    for name in (field.name for field in fields(schema)):
        arms = list(_arms(hints[name]))
        types = tuple(kind for kind, _ in arms if kind is not NoneType)
        marks = tuple(mark for _, marks in arms for mark in marks)
        if isinstance(types[0], type) and is_dataclass(types[0]):
            below = schema_leaves(types[0]).items()
            found |= {f"{name}.{key}": leaf._replace(marks=leaf.marks + marks) for key, leaf in below}
        else:
            nullable = len(types) < len(arms) or any(isinstance(mark, NullMeans) for mark in marks)
            found[name] = Leaf(types, nullable, marks)
    return found


schema_leaves: Callable[[type], dict[str, Leaf]] = cache(_schema_leaves)
"""Every dotted key of a schema."""


def _arms(hint: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The types that a hint allows, each with what stands beside it."""
    origin = get_origin(hint)
    if origin is Annotated:
        kind, *marks = get_args(hint)
        for arm, inner in _arms(kind):
            yield arm, (*inner, *marks)
    elif origin in (Union, UnionType):
        for arm in get_args(hint):
            yield from _arms(arm)
    else:
        yield list if origin is list else hint, ()


@cache
def default_values(name: str) -> dict[str, Any]:
    """Every key of `name`.yaml with its default as it is written."""
    return as_written(OmegaConf.load(CONFIG_FOLDER / f"{name}.yaml"))


def validated(schema: type[T], config: Container, name: str) -> T:
    """The typed form of a configuration.

    Args:
        schema: of the whole configuration.
        config: composed from `name`.yaml and resolved.
        name: of the YAML file, for messages and the defaults in them.

    Raises:
        UserError: values that are not what the schema says, and keys that it does not have: a line each.
    """
    raw: Any = OmegaConf.to_container(config, resolve=True)
    given, known = dict(leaves(raw)), schema_leaves(schema)
    nulls = {key: mark.key for key, leaf in known.items() for mark in leaf.marked(NullMeans) if given.get(key) is None}
    for key, source in nulls.items():
        given[key] = given.get(source)
        _put(raw, key, given[key])
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        found = {_key(each["loc"], known): each["type"] for each in reversed(error.errors())}
    # What is wrong with a value is said once, where it was written.
    copies = nulls | {key: source for key, source in _copies(name) if given.get(key) == given.get(source)}
    lines = [
        f"{key}{_said(key, given.get(key), known, found[key], name)}"
        for key in reversed(found)
        if copies.get(key) not in found
    ]
    raise UserError("\n".join(lines))


def _copies(name: str) -> Iterator[tuple[str, str]]:
    """Keys whose default is the value of another one."""
    for key, default in default_values(name).items():
        if match := REFERENCE.fullmatch(str(default)):
            yield key, match[1]


def _put(node: dict[str, Any], key: str, value: Any) -> None:
    section, _, below = key.partition(".")
    if not below:
        node[key] = value
    elif isinstance(inner := node.get(section), dict):
        _put(inner, below, value)


def _key(place: tuple[int | str, ...], known: dict[str, Leaf]) -> str:
    """Of a mistake: below a key, pydantic names the type that it tried."""
    keys = [".".join(map(str, place[:end])) for end in range(len(place), 0, -1)]
    return next((key for key in keys if key in known), keys[0])


def _said(key: str, value: Any, known: dict[str, Leaf], error: str, name: str) -> str:
    shown = "null" if value is None else value
    if any(each.startswith(f"{key}.") for each in known):
        return f"={shown} must be a section of keys"
    if key not in known:
        return f" is not a key of this trainer (see {name}.yaml)"
    types, nullable, _ = leaf = known[key]
    described = next((info.description for info in leaf.marked(FieldInfo) if info.description), None)
    if described and (error in BOUND_ERRORS or not leaf.bounds):
        return f"={shown} {described}"
    default = default_values(name)[key]
    if value is None and default == MISSING:
        return " must be given, not null"
    if get_origin(types[0]) is Literal:
        choices = (*([None] if nullable else []), *(choice for kind in types for choice in get_args(kind)))
        return f"={shown} is unknown, use one of {', '.join(map(str, choices))}"
    if nullable:
        return f"={shown} must be {' '.join(filter(None, (KINDS[types], leaf.bounds)))}, or null"
    if error in BOUND_ERRORS:
        return f"={shown} must be {leaf.bounds}"
    like = "" if default in (None, MISSING) or len(types) > 1 else f", like its default {default}"
    return f"={shown} must be {KINDS[types]}{like}"


def cannot_act(config: Any, composed: DictConfig, name: str) -> Iterator[str]:
    """A line for each key that is not at its default and cannot act, by the schema's `ActsWith`.

    Args:
        config: typed, from `composed`.
        composed: what was given, nulls as they are.
        name: of the YAML file.
    """
    given, defaults = as_written(composed), default_values(name)
    for key, leaf in schema_leaves(type(config)).items():
        wrong = (mark for mark in leaf.marked(ActsWith) if value_at(config, mark.key) not in mark.values)
        if given[key] != defaults[key] and (mark := next(wrong, None)) is not None:
            yield f"{key}={given[key]} {mark.otherwise.format(value_at(config, mark.key))}"
