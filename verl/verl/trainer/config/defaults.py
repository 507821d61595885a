"""ppo_trainer.yaml as typed sections by PyYAML alone, for what must run where torch and transformers are and no Hydra.

Nothing is validated. `verl.bringup` and the benchmarks take sections of it, on machines as they come with a GPU.
"""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from verl.trainer.config.fields import NullMeans
from verl.trainer.config.schema import YAML, PPOConfig

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@cache
def plain_defaults() -> PPOConfig:
    """The defaults; what has none (`???`) is left as it is written."""
    root = yaml.safe_load(Path(__file__).with_name(f"{YAML}.yaml").read_text(encoding="utf-8"))
    config: PPOConfig = _section(PPOConfig, root, root)
    return config


def _section(schema: type, node: dict[str, Any], root: dict[str, Any]) -> Any:
    for name, hint in get_type_hints(schema, include_extras=True).items():
        if name in node:
            # Written back for what stands below and has its value from here.
            node[name] = _value(hint, node[name], root)
    return schema(**node)


def _value(hint: Any, value: Any, root: dict[str, Any]) -> Any:
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
    if isinstance(kind, type) and is_dataclass(kind):
        return _section(kind, value, root)
    source = next((mark.key for mark in marks if isinstance(mark, NullMeans)), None)
    if value is None and source is not None:
        return _at(root, source)
    if isinstance(value, str) and (whole := _REFERENCE.fullmatch(value)):
        return _at(root, whole[1])
    return _REFERENCE.sub(lambda part: str(_at(root, part[1])), value) if isinstance(value, str) else value


def _at(root: dict[str, Any], key: str) -> Any:
    """A value that may itself stand for another."""

    def below(node: Any, name: str) -> Any:
        return node[name] if isinstance(node, dict) else getattr(node, name)

    return _value(Any, reduce(below, key.split("."), root), root)
