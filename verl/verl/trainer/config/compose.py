"""Composing a trainer's configuration from its YAML file and the command line's overrides.

What people bring from the public trainers on their command lines means the same here, or is answered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.trainer.config.fields import leaves
from verl.trainer.config.upstream_keys import RENAMED, SAME_VALUES, upstream_key
from xbai.errors import UserError, one_line

CONFIG_FOLDER = Path(__file__).parent.resolve()
RESUME_MODE = "trainer.resume_mode"


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration `name` of `verl/trainer/config` with overrides in Hydra's grammar.

    Unlike a `@hydra.main` application this composes only: no working folders, and a mistake is one line.

    Raises:
        UserError: no such configuration, an unknown key, an override that does not parse, a value left at `???`.
    """
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            config = compose(name, overrides=read_overrides(overrides, _defaults(name)))
            if missing := next((key for key, value in as_written(config).items() if value == MISSING), None):
                raise UserError(f"{missing} is not set; give it on the command line as {missing}=...")
            OmegaConf.resolve(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_one_line(name, error)) from error
    return config


@cache
def _defaults(name: str) -> dict[str, Any]:
    """Every dotted key of a configuration with its default; to be called where Hydra knows the folder."""
    return as_written(compose(name))


def _one_line(name: str, error: Exception) -> str:
    """Hydra's message, with the override that does not parse, or the nearest key where one is unknown."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not a valid override: {_reason(error)}"
    unknown = re.search(r"is not in struct\s+full_key: (\S+)", str(error.__cause__))
    if unknown is None:
        return one_line(error)
    if (upstream := upstream_key(unknown[1])) is not None:
        return f"{unknown[1]} cannot act here: {upstream.instead}"
    near = difflib.get_close_matches(unknown[1], _defaults(name), n=1)
    return f"unknown configuration key {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")


def _reason(error: OverrideParseException) -> str:
    if any(error.override.count(opening) != error.override.count(closing) for opening, closing in ("[]", "{}", "()")):
        return "half of a list or of brackets: the shell splits at spaces; write it without them, or quote all of it"
    return error.message.splitlines()[0]


def as_written(config: Container) -> dict[str, Any]:
    """Every dotted key with its value, interpolations as they stand."""
    container: Any = OmegaConf.to_container(config)
    return dict(leaves(container))


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
