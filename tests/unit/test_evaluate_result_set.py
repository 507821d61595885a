"""Which result files are measured together, and which are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from xbai.errors import UserError
from xbai.evaluate.metrics import compare, repeated_accuracy, report_files
from xbai.evaluate.result_set import read_lines, result_files
from xbai.evaluate.settings import differing_settings

RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", "The answer is \\boxed{7+8+1+1+5}."
SETTINGS = {"task": "make10", "model": "m", "questions": "d", "temperature": 1.0, "seed": 0}


def result_line(index: int, responses: list[str], first_sample: int = 0, **settings: object) -> dict:
    output = {
        "solution_lst": ["P" + text for text in responses],
        "score_lst": [0.5] * len(responses),
        "sample_lst": list(range(first_sample, first_sample + len(responses))),
    }
    line = {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index, "meta": {"question": "Q"}}
    return {**line, "settings": {**SETTINGS, **settings}}


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_files_of_globs_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "part0.jsonl", result_line(0, [RIGHT]))
    write(tmp_path / "part1.jsonl", result_line(0, [WRONG], first_sample=1))
    (tmp_path / "part2.jsonl.journal").write_text("{}")
    report, _ = report_files("make10", [str(tmp_path / "part*"), str(tmp_path / "part0.jsonl")])
    assert (report.questions, report.samples, report.mean_at_1.mean) == (1, 2, 0.5)


def test_a_name_may_hold_the_characters_of_a_glob(tmp_path: Path) -> None:
    path = write(tmp_path / "out[1].jsonl", result_line(0, [RIGHT]))
    assert result_files([str(path)]) == [path]


def test_questions_of_the_same_text_stay_apart(tmp_path: Path) -> None:
    write(tmp_path / "part0.jsonl", result_line(0, [RIGHT]), result_line(1, [RIGHT]))
    write(tmp_path / "part1.jsonl", result_line(1, [RIGHT], first_sample=1))
    report, questions = report_files("make10", [str(tmp_path / "part*")])
    assert [len(question.correct) for question in questions] == [1, 2]
    assert (report.samples, report.missing) == (1, 1)


def test_a_question_without_a_sample_is_wrong_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", result_line(0, [RIGHT, RIGHT]), result_line(1, []))
    with caplog.at_level(logging.WARNING):
        report, questions = report_files("make10", [str(path)])
    assert (report.questions, report.samples, report.missing, report.unanswered) == (2, 2, 2, 1)
    assert report.mean_at_1.mean == 0.5
    assert {curve[n].mean for curve in report.curves.values() for n in (1, 2)} == {0.5}
    assert repeated_accuracy(questions, 1) == [0.5, 0.5]
    assert "1 of 2 questions have no sample and count as wrong" in caplog.text
    unpaired = compare(questions, questions[:1])
    assert (unpaired.questions, unpaired.unpaired) == (1, 1)
    assert compare(questions, questions).curves["random"][2].mean == 0.0


def test_runs_that_differ_in_the_seed_alone_add_up(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.jsonl", result_line(0, [RIGHT], seed=seed)) for seed in (0, 1)]
    assert len(read_lines(paths)) == 2


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", result_line(0, [RIGHT]))
    hot = write(tmp_path / "b.jsonl", result_line(1, [RIGHT], temperature=2.0))
    with pytest.raises(UserError, match=r"a\.jsonl and .*b\.jsonl .*temperature=1\.0, there 2\.0"):
        read_lines([first, hot])
    copy = write(tmp_path / "c.jsonl", result_line(0, [RIGHT]))
    with pytest.raises(UserError, match=r"c\.jsonl holds sample 0 of question 0 again, after .*a\.jsonl"):
        read_lines([first, copy])
    with pytest.raises(UserError, match="made for --task make10, not aime24"):
        read_lines([first], "aime24")


def test_missing_files_and_candidates_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        result_files([str(tmp_path / "none*")])
    (tmp_path / "out.jsonl.journal").write_text("")
    for name in ("out.jsonl", "out.jsonl.journal"):
        with pytest.raises(UserError, match=r"out\.jsonl\.journal is an unfinished run"):
            result_files([str(tmp_path / name)])
    with pytest.raises(UserError, match="no candidates"):
        read_lines([write(tmp_path / "empty.jsonl")])


def test_an_unfinished_extension_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "out.jsonl", result_line(0, [RIGHT]))
    (tmp_path / "out.jsonl.journal").write_text("")
    with caplog.at_level(logging.WARNING):
        read_lines([path])
    assert "unfinished run adds to this file" in caplog.text


def test_settings_of_before_searches_are_those_of_best_of_n() -> None:
    assert differing_settings(SETTINGS, {**SETTINGS, "search": {"name": "best_of_n"}}) == []
    beam = {**SETTINGS, "search": {"name": "beam"}, "seed": 3}
    assert sorted(differing_settings(SETTINGS, beam)) == ["search", "seed"]
    assert differing_settings(None, SETTINGS) == []


def test_models_differ_by_their_weights_where_both_files_name_them() -> None:
    served = {**SETTINGS, "policy": "here:1a", "scorer": "here:1a", "lang": "en"}
    assert differing_settings(SETTINGS, served) == [], "a file of before they were recorded"
    assert differing_settings(served, {**served, "policy": "there:1a"}) == []
    assert differing_settings(served, {**served, "scorer": "here:2b", "lang": "zh"}) == ["scorer", "lang"]
