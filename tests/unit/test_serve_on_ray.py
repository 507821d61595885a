"""What Ray Serve is told of a service; `tests/integration/test_on_ray.py` runs it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

from xbai.errors import UserError
from xbai.serve import on_ray
from xbai.serve.options import OnRayOptions


@pytest.mark.parametrize(("candidates", "copies"), [((), 0), ((0, 0), 0), ((32, 32), 0.5), ((300, 84), 3)])
def test_copies_are_wanted_for_their_candidates(candidates: tuple[float, ...], copies: float) -> None:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 128)
    metrics = {"candidates": dict(enumerate(candidates))} if candidates else None
    context: Any = SimpleNamespace(aggregated_metrics=metrics, config=config)
    assert on_ray.wanted_copies(context) == (copies, {})


def test_arguments_are_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[OnRayOptions] = []
    monkeypatch.setattr(on_ray, "application", told.append)
    on_ray.build({"model_path": "m", "replicas": "4", "max_replicas": 8, "no_page": "true", "effort": "high"})
    on_ray.build({"model_path": "m", "no_page": False, "openwebui_status": True, "request_timeout": 1.5})
    assert [(one.replicas, one.max_replicas, one.openai.page) for one in told] == [(4, 8, False), (None, None, True)]
    assert (told[0].openai.effort, told[1].openai.openwebui_status, told[1].request_timeout) == ("high", True, 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": "many"}, "Invalid value for '--replicas'"),
        ({"copies": 2}, "No such option: --copies"),
        ({"replicas": 4, "max_replicas": 2}, "--max_replicas 2: fewer than --replicas 4"),
        ({"model_path": "nowhere"}, "nowhere/config.json: no such file"),
    ],
)
def test_wrong_arguments_are_one_line(changes: dict[str, Any], message: str, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=message):
        on_ray.build({"model_path": str(tiny_model_dir), **changes})
