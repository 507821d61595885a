"""Composing a trainer's configuration from its YAML file and the command line's overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.trainer.config.overrides import read_overrides
from verl.trainer.config.upstream_keys import upstream_key
from xbai.errors import UserError, one_line

CONFIG_FOLDER = Path(__file__).parent.resolve()


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration `name` of `verl/trainer/config` with overrides in Hydra's grammar.

    Unlike a `@hydra.main` application this composes only: no working folders, and a mistake is one line.

    Raises:
        UserError: no such configuration, an unknown key, an override that does not parse, a value left at `???`.
    """
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            config = compose(name, overrides=read_overrides(overrides, as_written(compose(name))))
            if missing := next((key for key, value in as_written(config).items() if value == MISSING), None):
                raise UserError(f"{missing} is not set; give it on the command line as {missing}=...")
            OmegaConf.resolve(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_one_line(name, error)) from error
    return config


def _one_line(name: str, error: Exception) -> str:
    """Hydra's message, with the override that does not parse, or the nearest key where one is unknown."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not a valid override: {_reason(error)}"
    unknown = re.search(r"is not in struct\s+full_key: (\S+)", str(error.__cause__))
    if unknown is None:
        return one_line(error)
    if (upstream := upstream_key(unknown[1])) is not None:
        return f"{unknown[1]} cannot act here: {upstream.instead}"
    near = difflib.get_close_matches(unknown[1], as_written(compose(name)), n=1)
    return f"unknown configuration key {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")


def _reason(error: OverrideParseException) -> str:
    if any(error.override.count(opening) != error.override.count(closing) for opening, closing in ("[]", "{}", "()")):
        return "half of a list or of brackets: the shell splits at spaces; write it without them, or quote all of it"
    return error.message.splitlines()[0]


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a plain mapping, such as `OmegaConf.to_container` gives, with its value."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_written(config: Container) -> dict[str, Any]:
    """Every dotted key with its value, interpolations as they stand."""
    container: Any = OmegaConf.to_container(config)
    return dict(leaves(container))
