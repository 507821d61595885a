"""What a field of a configuration may hold, and where it acts; the sections are made of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from xbai.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

if TYPE_CHECKING or find_spec("pydantic") is not None:
    from pydantic import BeforeValidator, ConfigDict, Field, Strict
else:

    def _unchecked(*_: Any, **__: Any) -> None:
        """Stands for a rule on a machine with torch and transformers alone (`defaults.py`), where none is checked."""

    BeforeValidator = ConfigDict = Field = Strict = _unchecked

T = TypeVar("T", bound="DataclassInstance")

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""What stands in the YAML for the value of another key."""


class Section:
    """A frozen dataclass of fields and further sections, none with a default: the YAML has them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


class Missing(str):
    """What is said of a file or package that is not on this machine, where a run may find it on another."""

    __slots__ = ()


@dataclass(frozen=True)
class NullMeans:
    """Marks a field whose null stands for the value of another key."""

    key: str


@dataclass(frozen=True)
class ActsWith:
    """Marks a field or section that acts where another key has one of some values, and else is left at its default.

    Attributes:
        key, values: of the other one.
        otherwise: what is said after `key=value` of a field that cannot act.
    """

    key: str
    values: tuple[str, ...]
    otherwise: str


ON_GPU = ActsWith("trainer.device", ("cuda",), "needs a GPU and cannot act on CPU; leave it at its default")
WITH_VLLM = ActsWith(
    "actor_rollout_ref.rollout.name",
    ("vllm",),
    "cannot act with rollout.name=hf; leave it at its default, or use vllm",
)
WITH_CRITIC = ActsWith(
    "algorithm.adv_estimator", ("gae",), "acts only with algorithm.adv_estimator=gae, which has a critic"
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
