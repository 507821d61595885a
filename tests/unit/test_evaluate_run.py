"""Which models a run is asked of, where its scores come from, and what is refused before anything is sent."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from xbai.client.wire import ReadyAnswer, ServedModel
from xbai.errors import UserError
from xbai.infer.options import RunOptions
from xbai.infer.run import run, use_fused_scores

READY = {"model": "/models/m", "identity": "m:1a", "lang": "en", "scores": True}
OTHER = READY | {"identity": "other:2b"}


def served(*copies: dict) -> ServedModel:
    return ServedModel.from_copies("--response_api_url http://policy", [ReadyAnswer(**copy) for copy in copies])


def options(**changes: object) -> RunOptions:
    return RunOptions("make10", "in", "out", "model", "http://policy", **changes)


def fused(source: str, policy: ServedModel, scorer: ServedModel | None) -> bool:
    url = None if scorer is None else "http://score"
    return use_fused_scores(options(score_api_url=url, score_source=source), policy, scorer)


@pytest.mark.parametrize(
    ("source", "scorer", "expected"),
    [
        ("auto", READY, True),
        ("auto", READY | {"model": "/a/copy", "identity": "copy:1a"}, True),
        ("auto", OTHER, False),
        ("auto", READY | {"lang": "zh"}, False),
        ("auto", {}, False),
        ("auto", None, True),
        ("fused", OTHER, True),
        ("fused", None, True),
        ("service", READY, False),
        ("none", None, False),
    ],
)
def test_scores_come_with_the_responses_where_they_are_those_of_the_score_service(
    source: str, scorer: dict | None, expected: bool
) -> None:
    assert fused(source, served(READY, READY), None if scorer is None else served(scorer)) is expected


def test_without_scores_in_every_copy_the_score_service_is_asked() -> None:
    policy = served(READY, READY | {"scores": False, "lang": None})
    assert fused("auto", policy, served(READY)) is False
    assert fused("none", policy, None) is False
    for source in ("auto", "fused"):
        with pytest.raises(UserError, match="the service offers no scores"):
            fused(source, policy, None)


def test_log_probs_are_asked_for_where_every_copy_returns_them() -> None:
    able = READY | {"log_probs": True}
    assert served(able, able).log_probs
    assert not served(able, READY).log_probs, "an older service of this project would refuse the field"
    assert not served(able, {}).log_probs


def test_copies_of_different_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"--response_api_url http://policy: .*different models \(m:1a, other:2b\)"):
        served(READY, OTHER)
    with pytest.raises(UserError, match=r"different rules \(en, zh\)"):
        served(READY, READY | {"lang": "zh"})
    assert served({}, READY) == ServedModel("m:1a", "en", scores=False, log_probs=False, is_ours=False), (
        "one that does not say goes with any"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.0}, "--top_p 0.0: Input should be greater than 0"),
        ({"temperature": 2.5}, "--temperature 2.5: Input should be less than or equal to 2"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0: "),
        ({"response_num": 2000}, "--response_num 2000: Input should be less than or equal to 1024"),
        ({"max_tokens": 0}, "--max_tokens 0: "),
        ({"seed": -1}, "--seed -1: "),
        ({"stop": ("",)}, "--stop '': String should have at least 1 character"),
    ],
)
def test_what_the_service_would_refuse_for_every_question_is_refused_at_once(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        options(**changes)
    assert str(caught.value).startswith(message)


def test_what_cannot_be_the_result_file_is_refused_before_anything_is_read_or_asked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    before = set(tmp_path.iterdir())
    for name, why in (
        ("", "a folder; name a file"),
        ("fifo", "--output_file .*fifo: no regular file, but results are read back"),
        ("stdout", "--output_file .*stdout: no regular file"),
        ("circle", "its symbolic links lead in a circle"),
        ("n" * 243, "choose a shorter path"),
        ("fifo/below", "cannot be written"),
    ):
        with pytest.raises(UserError, match=why):
            run(replace(options(), output_file=str(tmp_path / name)))
    assert set(tmp_path.iterdir()) == before
