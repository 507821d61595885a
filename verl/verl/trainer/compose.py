"""Composing a trainer's configuration from its YAML file and the command line's overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xbai.errors import UserError

CONFIG_FOLDER = Path(__file__).parent.resolve() / "config"


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration `name` of `verl/trainer/config` with overrides in Hydra's grammar.

    Unlike a `@hydra.main` application this composes only: no working folders, and a mistake is one line.

    Raises:
        UserError: no such configuration, an unknown key, an override that does not parse, a value left at `???`.
    """
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            config = compose(name, overrides=list(overrides))
            if missing := next((key for key, is_missing in _keys(config) if is_missing), None):
                raise UserError(f"{missing} is not set; give it on the command line as {missing}=...")
            OmegaConf.resolve(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_one_line(name, error)) from error
    return config


def _one_line(name: str, error: Exception) -> str:
    """Hydra's message, with the override that does not parse, or the nearest key where one is unknown."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not a valid override: {error.message.splitlines()[0]}"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        return " ".join(str(error).split())
    near = difflib.get_close_matches(unknown[1], [key for key, _ in _keys(compose(name))], n=1)
    return f"unknown configuration key {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")


def _keys(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key, and whether its value is `???`."""
    for key in config:
        is_missing = OmegaConf.is_missing(config, key)
        yield f"{prefix}{key}", is_missing
        if not OmegaConf.is_interpolation(config, key) and not is_missing and isinstance(config[key], DictConfig):
            yield from _keys(config[key], f"{prefix}{key}.")
