"""A composed configuration as the typed one, or all that is wrong with its values, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

from omegaconf import MISSING, Container, DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from verl.trainer.config.compose import CONFIG_FOLDER, as_written
from verl.trainer.config.fields import REFERENCE, ActsWith, Leaf, fill_nulls, leaves, schema_leaves, value_at
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


@cache
def default_values(name: str) -> dict[str, Any]:
    """Every key of `name`.yaml with its default as it is written."""
    return as_written(OmegaConf.load(CONFIG_FOLDER / f"{name}.yaml"))


def validated(schema: type[T], config: Container, name: str) -> T:
    """The typed form of a configuration that is composed from `name`.yaml, and resolved.

    Raises:
        UserError: values that are not what the schema says, and keys that it does not have: a line each.
    """
    raw: Any = OmegaConf.to_container(config, resolve=True)
    known = schema_leaves(schema)
    nulls = fill_nulls(raw, known)
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        found = {_key(each["loc"], known): each["type"] for each in reversed(error.errors())}
    given = dict(leaves(raw))
    # What is wrong with a value is said once, where it was written.
    references = ((key, REFERENCE.fullmatch(str(default))) for key, default in default_values(name).items())
    copies = nulls | {key: of[1] for key, of in references if of and given.get(key) == given.get(of[1])}
    lines = [
        f"{key}{_said(key, given.get(key), known, found[key], name)}"
        for key in reversed(found)
        if copies.get(key) not in found
    ]
    raise UserError("\n".join(lines))


def _key(place: tuple[int | str, ...], known: Mapping[str, Leaf]) -> str:
    """Of a mistake: below a key, pydantic names the type that it tried."""
    keys = [".".join(map(str, place[:end])) for end in range(len(place), 0, -1)]
    return next((key for key in keys if key in known), keys[0])


def _said(key: str, value: Any, known: Mapping[str, Leaf], error: str, name: str) -> str:
    shown = "null" if value is None else value
    if any(each.startswith(f"{key}.") for each in known):
        return f"={shown} must be a section of keys"
    if key not in known:
        return f" is not a key of this trainer (see {name}.yaml)"
    types, nullable, _ = leaf = known[key]
    bounds = _bounds(leaf)
    described = next((info.description for info in leaf.marked(FieldInfo) if info.description), None)
    if described and (error in BOUND_ERRORS or not bounds):
        return f"={shown} {described}"
    default = default_values(name)[key]
    if value is None and default == MISSING:
        return " must be given, not null"
    if get_origin(types[0]) is Literal:
        choices = (*([None] if nullable else []), *(choice for kind in types for choice in get_args(kind)))
        return f"={shown} is unknown, use one of {', '.join(map(str, choices))}"
    if nullable:
        return f"={shown} must be {' '.join(filter(None, (KINDS[types], bounds)))}, or null"
    if error in BOUND_ERRORS:
        return f"={shown} must be {bounds}"
    like = "" if default in (None, MISSING) or len(types) > 1 else f", like its default {default}"
    return f"={shown} must be {KINDS[types]}{like}"


def _bounds(leaf: Leaf) -> str:
    """Of a number, in words."""
    found = {
        name: getattr(bound, name)
        for info in leaf.marked(FieldInfo)
        for bound in info.metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(bound, name)
    }
    if "ge" in found and len(found) == 2:
        return f"from {found['ge']} to {found['le'] if 'le' in found else 'below {lt}'.format(**found)}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(f"{words[name]} {bound}" for name, bound in found.items())


def cannot_act(config: Any, composed: DictConfig, name: str) -> Iterator[str]:
    """A line for each key that is not at its default in `name`.yaml and cannot act, by the schema's `ActsWith`.

    `config` is typed, from `composed`, which has what was given, nulls as they are.
    """
    given, defaults = as_written(composed), default_values(name)
    for key, leaf in schema_leaves(type(config)).items():
        wrong = (mark for mark in leaf.marked(ActsWith) if value_at(config, mark.key) not in mark.values)
        if given[key] != defaults[key] and (mark := next(wrong, None)) is not None:
            yield f"{key}={given[key]} {mark.otherwise.format(value_at(config, mark.key))}"
