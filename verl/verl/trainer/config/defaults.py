"""ppo_trainer.yaml as typed sections by PyYAML alone, for what must run where torch and transformers are and no Hydra.

Nothing is validated. `verl.bringup` and the benchmarks take sections of it, on machines as they come with a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from verl.trainer.config.fields import REFERENCE, NullMeans
from verl.trainer.config.schema import YAML, PPOConfig


@cache
def plain_defaults() -> PPOConfig:
    """The defaults; what has none (`???`) is left as it is written."""
    root = yaml.safe_load(Path(__file__).with_name(f"{YAML}.yaml").read_text(encoding="utf-8"))
    config: PPOConfig = _section(PPOConfig, root, root)
    return config


def _section(schema: type[Any], node: dict[str, Any], root: dict[str, Any]) -> Any:
    hints, values = get_type_hints(schema, include_extras=True), dict[str, Any]()
    for name in (field.name for field in fields(schema)):
        hint = hints[name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if isinstance(kind, type) and is_dataclass(kind):
            values[name] = _section(kind, node[name], root)
        else:
            # Written back for the keys that have their values from here.
            values[name] = node[name] = _leaf(node[name], marks, root)
    return schema(**values)


def _leaf(value: Any, marks: Sequence[Any], root: dict[str, Any]) -> Any:
    def at(key: str) -> Any:
        return _leaf(reduce(getitem, key.split("."), root), (), root)

    if value is None:
        return next((at(mark.key) for mark in marks if isinstance(mark, NullMeans)), None)
    if not isinstance(value, str):
        return value
    if whole := REFERENCE.fullmatch(value):
        return at(whole[1])
    return REFERENCE.sub(lambda part: str(at(part[1])), value)
