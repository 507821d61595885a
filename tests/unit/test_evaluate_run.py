"""Where the scores of a run come from."""

from __future__ import annotations

import asyncio

import pytest

from xbai.errors import UserError
from xbai.evaluate.run import RunOptions, _use_fused_scores


class Policy:
    """Copies of a policy service, one of which does not say that it returns scores when `offers` is False."""

    def __init__(self, offers: bool) -> None:
        self.offers = offers

    async def describe(self) -> list[dict[str, bool]]:
        return [{"scores": True}, {"scores": True} if self.offers else {}]


def options(source: str, url: str | None) -> RunOptions:
    return RunOptions("make10", "in", "out", "model", "http://policy", url, score_source=source)


@pytest.mark.parametrize(
    ("source", "url", "fused"),
    [
        ("auto", "http://score", False),
        ("auto", None, True),
        ("fused", "http://score", True),
        ("fused", None, True),
        ("service", "http://score", False),
        ("none", None, False),
    ],
)
def test_a_score_url_is_used_unless_fused_scores_are_asked_for(source: str, url: str | None, fused: bool) -> None:
    assert asyncio.run(_use_fused_scores(options(source, url), Policy(offers=True))) is fused
    if not fused:
        assert asyncio.run(_use_fused_scores(options(source, url), Policy(offers=False))) is False
        return
    with pytest.raises(UserError, match="the service offers no scores"):
        asyncio.run(_use_fused_scores(options(source, url), Policy(offers=False)))
