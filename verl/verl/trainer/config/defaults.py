"""ppo_trainer.yaml as typed sections by PyYAML alone, for what must run where torch and transformers are and no Hydra.

Nothing is validated. `verl.bringup` and the benchmarks take sections of it, on machines as they come with a GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from verl.trainer.config.fields import REFERENCE, fill_nulls, leaves, schema_leaves
from verl.trainer.config.schema import YAML, PPOConfig


@cache
def plain_defaults() -> PPOConfig:
    """The defaults; what has none (`???`) is left as it is written."""
    root = yaml.safe_load(Path(__file__).with_name(f"{YAML}.yaml").read_text(encoding="utf-8"))
    fill_nulls(root, schema_leaves(PPOConfig))
    config: PPOConfig = _typed(PPOConfig, root, dict(leaves(root)))
    return config


def _typed(schema: Any, node: Any, values: dict[str, Any]) -> Any:
    """`node` with the `values` of the keys that it refers to."""
    if isinstance(node, dict):
        hints = get_type_hints(schema)
        return schema(**{name: _typed(hints[name], below, values) for name, below in node.items()})
    if not isinstance(node, str):
        return node
    if whole := REFERENCE.fullmatch(node):
        return values[whole[1]]
    return REFERENCE.sub(lambda part: str(values[part[1]]), node)
