"""A command line's overrides as Hydra takes them: what people bring from the public trainers means the same here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from verl.trainer.config.upstream_keys import RENAMED, SAME_VALUES, upstream_key
from xbai.errors import UserError

RESUME_MODE = "trainer.resume_mode"


def read_overrides(overrides: Sequence[str], defaults: Mapping[str, Any]) -> list[str]:
    """The overrides without what changes nothing, each key by its name here.

    Args:
        overrides: in Hydra's grammar; `+` before a key that exists is as good as none.
        defaults: every key's default, by dotted key.

    Raises:
        UserError: a key of the public trainers that cannot act, with what to write; an empty value that could mean
            anything; a key that is to be removed, or gets several values.
        OverrideParseException: an override that is none.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [text for line, override in zip(overrides, parsed, strict=True) for text in _read(line, override, defaults)]


def _read(line: str, override: Override, defaults: Mapping[str, Any]) -> Iterator[str]:
    """What one override becomes: nothing where it asks for what is so anyway."""
    given = override.get_key_element().lstrip("+~")
    if not given:
        raise UserError(f"{line!r} names no key (is a variable of the shell not set?)")
    if override.is_delete():
        raise UserError(f"~{given}: a key cannot be removed; set it, to null where that means something")
    if override.is_sweep_override():
        raise UserError(f"{line} gives several values; write a list in [], a text with commas in quotes")
    key, value, text = RENAMED.get(given, given), override.value(), override.get_value_element_as_str()
    if key not in defaults:
        yield from _of_upstream(line, override, key, value)
        return
    if value == "":
        text = _empty(key, defaults[key])
    elif key in SAME_VALUES and _same(value, SAME_VALUES[key][0]):
        text = _as_text(SAME_VALUES[key][1])
    elif key == RESUME_MODE and "/" in str(value):
        yield f"{RESUME_MODE}=resume_path"
        key = "trainer.resume_from_path"
    yield f"++{key}={text}"


def _of_upstream(line: str, override: Override, key: str, value: Any) -> Iterator[str]:
    known = upstream_key(key)
    if known is None:
        yield line
    elif value not in ("", None) and not any(_same(value, each) for each in known.holds):
        raise UserError(f"{key}={override.get_value_element_as_str()} cannot act here: {known.instead}")


def _same(one: Any, other: Any) -> bool:
    """Equality for which 0 and False are two values."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _empty(key: str, default: Any) -> str:
    """An empty value, which a variable of the shell that is not set leaves behind, where it can only mean one thing."""
    if default is None or default is False:
        return _as_text(default)
    raise UserError(f"{key}= is empty (is a variable of the shell not set?): give it a value, or leave it out")


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value).lower()
