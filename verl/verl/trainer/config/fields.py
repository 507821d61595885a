"""What a field of a configuration may hold, and where it acts; the sections are made of these, found by dotted keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from importlib.util import find_spec
from operator import getitem
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from xbai.errors import UserError

if TYPE_CHECKING or find_spec("pydantic") is not None:
    from pydantic import BeforeValidator, ConfigDict, Field, Strict
else:

    def _unchecked(*_: Any, **__: Any) -> None:
        """Stands for a rule on a machine with torch and transformers alone (`defaults.py`), where none is checked."""

    BeforeValidator = ConfigDict = Field = Strict = _unchecked

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""What stands in the YAML for the value of another key."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
    """A subclass is a frozen dataclass of fields and further sections, none with a default: the YAML has them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


T = TypeVar("T", bound=Section)
Mark = TypeVar("Mark")


class Missing(str):
    """What is said of a file or package that is not on this machine, where a run may find it on another."""

    __slots__ = ()


@dataclass(frozen=True)
class NullMeans:
    """Marks a field whose null stands for the value of another key."""

    key: str


@dataclass(frozen=True)
class ActsWith:
    """Marks a field or section that acts where another `key` has one of some `values`, else is left at its default."""

    key: str
    values: Container[Any]
    otherwise: str
    """What is said after `key=value` of a field that cannot act."""


ON_GPU = ActsWith("trainer.device", ("cuda",), "needs a GPU and cannot act on CPU; leave it at its default")
WITH_VLLM = ActsWith(
    "actor_rollout_ref.rollout.name", ("vllm",), "cannot act with rollout.name=hf; leave it at its default, or use vllm"
)
WITH_CRITIC = ActsWith(
    "algorithm.adv_estimator", ("gae",), "acts only with algorithm.adv_estimator=gae, which has a critic"
)
LORA_RANK = "actor_rollout_ref.model.lora_rank"
WITH_LORA = ActsWith(LORA_RANK, range(1, sys.maxsize), f"acts only with {LORA_RANK} above 0")
WITHOUT_LORA = ActsWith(
    LORA_RANK,
    (0,),
    f"cannot act with {LORA_RANK}={{}}: the reference is the policy's own base, placed by actor.fsdp_config; leave it "
    "at its default",
)


def _as_text(value: Any) -> Any:
    """A name may look like a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Flag = Annotated[bool, Strict()]
Switch = Flag | Literal["auto"]
Text = Annotated[str, Strict(), BeforeValidator(_as_text)]
Files = Text | list[Text]
Whole = Annotated[int, Strict()]
Positive = Annotated[Whole, Field(gt=0)]
Number = Annotated[float, Strict()]
PositiveNumber = Annotated[Number, Field(gt=0)]
Coefficient = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Dropout = Annotated[Number, Field(ge=0, lt=1)]

Dtype = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
ServedDtype = Literal["auto", "float32", "bfloat16", "float16"]
ResumeMode = Literal["auto", "disable", "resume_path"]
Language = Literal["en", "zh"]


def value_at(section: Any, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), section)


def with_values(section: T, changes: Mapping[str, Any]) -> T:
    """A section with other values, by dotted key."""
    for key, value in changes.items():
        name, _, below = key.partition(".")
        new = with_values(getattr(section, name), {below: value}) if below else value
        section = replace(section, **{name: new})
    return section


def told(check: Callable[..., Any], *arguments: Any) -> Iterator[str]:
    """What a check that raises a `UserError` has to say."""
    try:
        check(*arguments)
    except UserError as error:
        yield str(error)


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a plain mapping, such as `OmegaConf.to_container` gives, with its value."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Leaf(NamedTuple):
    """What a schema says of one key."""

    types: tuple[Any, ...]
    """Of its values, other than null."""
    nullable: bool
    """Null may be written."""
    marks: tuple[Any, ...]
    """What stands beside the types, here and at the sections above."""

    def marked(self, kind: type[Mark]) -> Iterator[Mark]:
        """Its marks of one kind."""
        return (mark for mark in self.marks if isinstance(mark, kind))


def schema_leaves(schema: type[Any]) -> dict[str, Leaf]:
    """Every dotted key of a schema."""
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


def fill_nulls(values: dict[str, Any], known: Mapping[str, Leaf]) -> dict[str, str]:
    """Write in place of each null what it stands for.

    Returns:
        The keys that have now the value of another one, and which.
    """
    given = dict(leaves(values))
    means = {key: mark.key for key, leaf in known.items() for mark in leaf.marked(NullMeans)}
    nulls = {key: source for key, source in means.items() if given.get(key, source) is None}
    for key, source in nulls.items():
        given[key] = given.get(source)
        *sections, name = key.split(".")
        reduce(getitem, sections, values)[name] = given[key]
    return nulls
