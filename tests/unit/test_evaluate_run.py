"""Where the scores of a run come from."""

from __future__ import annotations

import asyncio

import pytest

from xbai.errors import UserError
from xbai.evaluate.run import RunOptions, use_fused_scores

READY = {"model": "m", "lang": "en", "scores": True}


class Service:
    """Copies of a service, as they describe themselves."""

    def __init__(self, *described: dict) -> None:
        self.described = list(described)

    async def describe(self) -> list[dict]:
        return self.described


def fused(source: str, policy: Service, scorer: Service | None) -> bool:
    url = None if scorer is None else "http://score"
    options = RunOptions("make10", "in", "out", "model", "http://policy", url, score_source=source)
    return asyncio.run(use_fused_scores(options, policy, scorer))


@pytest.mark.parametrize(
    ("source", "scorer", "expected"),
    [
        ("auto", Service(READY), True),
        ("auto", Service(READY | {"model": "other"}), False),
        ("auto", Service(READY | {"lang": "zh"}), False),
        ("auto", Service({}), False),
        ("auto", None, True),
        ("fused", Service(READY | {"model": "other"}), True),
        ("fused", None, True),
        ("service", Service(READY), False),
        ("none", None, False),
    ],
)
def test_scores_come_with_the_responses_where_they_are_those_of_the_score_service(
    source: str, scorer: Service | None, expected: bool
) -> None:
    assert fused(source, Service(READY, READY), scorer) is expected


def test_without_scores_in_every_copy_the_score_service_is_asked() -> None:
    policy = Service(READY, READY | {"scores": False})
    assert fused("auto", policy, Service(READY)) is False
    assert fused("none", policy, None) is False
    for source in ("auto", "fused"):
        with pytest.raises(UserError, match="the service offers no scores"):
            fused(source, policy, None)


def test_copies_of_different_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"different models \(m, other\)"):
        fused("none", Service(READY, READY | {"model": "other"}), None)
