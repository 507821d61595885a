"""Which result files are measured together, and which are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from xbai.errors import UserError
from xbai.measure.metrics import compare, repeated_accuracy, report_files
from xbai.measure.result_set import read_lines, result_files
from xbai.results.lines import REFUSED, ResultLine, Sample
from xbai.results.settings import BEST_OF_N, differing_settings

RIGHT, WRONG = "The answer is \\boxed{7+8-1+1-5}.", "The answer is \\boxed{7+8+1+1+5}."
SETTINGS = {"task": "make10", "model": "m", "questions": "d", "temperature": 1.0, "seed": 0, "search": BEST_OF_N}


def result_line(index: int, responses: list[str], first_sample: int = 0, **settings: object) -> dict:
    output = {
        "solution_lst": ["P" + text for text in responses],
        "score_lst": [0.5] * len(responses),
        "sample_lst": list(range(first_sample, first_sample + len(responses))),
    }
    line = {"prompt": "P", "answer": "7 8 1 1 5", "output": output, "index": index, "meta": {"question": "Q"}}
    return {**line, "settings": {**SETTINGS, **settings}}


def xbai_line(question: str, responses: list[str], scores: list[float], template: str = "<u>{}<a><think>\n") -> dict:
    """A repetition of a question as XBai's own pipeline writes it: `content` is the prompt that was sent."""
    prompt = template.format(question)
    output = {
        "content": prompt,
        "time": 1.5,
        "solution_lst": [prompt + text for text in responses],
        "score_lst": scores,
    }
    return {"prompt": question, "answer": "7 8 1 1 5", "output": output}


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_files_of_globs_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "part0.jsonl", result_line(0, [RIGHT]))
    write(tmp_path / "part1.jsonl", result_line(0, [WRONG], first_sample=1))
    (tmp_path / "part2.jsonl.journal").write_text("{}", encoding="utf-8")
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


def test_files_of_xbais_own_pipeline(tmp_path: Path) -> None:
    # What graders must not see: a prompt that holds a box, which is not even the right one.
    questions = [f"Make 10 in a \\boxed{{}}, not \\boxed{{7+8-1+1-5}} ({n})." for n in range(2)]
    repetitions = [[WRONG, RIGHT], [RIGHT, "no answer"]]
    path = write(
        tmp_path / "xbai.jsonl",
        *(xbai_line(question, responses, [0.2, 0.9]) for responses in repetitions for question in questions),
    )
    lines = read_lines([path])
    assert [line.responses for line in lines] == [repetitions[0], repetitions[0], repetitions[1], repetitions[1]]
    assert [line.content for line in lines] == [RIGHT, RIGHT, "no answer", "no answer"]
    report, graded = report_files("make10", [str(path)])
    assert [question.correct.tolist() for question in graded] == [[0.0, 1.0, 1.0, 0.0]] * 2
    assert [question.key for question in graded] == [(None, question) for question in questions]
    assert (report.questions, report.samples) == (2, 4)
    assert repeated_accuracy(graded, 2) == [1.0, 0.0]


@pytest.mark.parametrize("template", ["<u>{}<a>", "{}", "{}\n\nAssistant:"])
@pytest.mark.parametrize("response", ["", RIGHT, "Q", "<u>Q<a>", "Q" + RIGHT])
def test_responses_hold_no_prompt_in_either_form(template: str, response: str) -> None:
    prompt = template.format("Q")
    theirs = ResultLine.from_json(json.dumps(xbai_line("Q", [response, prompt], [0.5, None], template)))
    assert (theirs.responses, theirs.prompt) == ([response, prompt], prompt)
    ours = result_line(0, [])
    ours |= {"prompt": prompt, "output": {"content": response, "solution_lst": [prompt + response], "sample_lst": [0]}}
    once = ResultLine.from_json(json.dumps(ours))
    for line in (once, ResultLine.from_json(once.to_json())):
        assert line.responses == [response]


def test_the_layout_of_a_line() -> None:
    samples = [
        Sample(3, 0, "Ä", "stop", 7, 1.5, 0.5, [0.25, 1.0], step_ends=[3, 5], step_log_probs=[-1.5, 0.0, -2.25]),
        Sample(3, 2, "", finish_reason=REFUSED, error="413: too long", mean_log_prob=-0.5),
    ]
    line = ResultLine(3, "P ", "10", {"question": "Q"}, samples, content="Ä", time=1.5, settings={"task": "make10"})
    assert line.to_json() == (
        '{"prompt": "P ", "answer": "10", "output": {"content": "Ä", "time": 1.5, "solution_lst": ["P Ä", "P "], '
        '"score_lst": [0.5, null], "sample_lst": [0, 2], "finish_reason_lst": ["stop", "refused"], '
        '"token_count_lst": [7, null], "step_score_lst": [[0.25, 1.0], null], "seconds_lst": [1.5, 0.0], '
        '"error_lst": [null, "413: too long"], "mean_log_prob_lst": [null, -0.5], "step_end_lst": [[3, 5], null], '
        '"step_log_prob_lst": [[-1.5, 0.0, -2.25], null]}, "index": 3, '
        '"meta": {"question": "Q"}, "settings": {"task": "make10"}}'
    )
    assert ResultLine.from_json(line.to_json()) == line


@pytest.mark.parametrize(
    "column", ["sample_lst", "finish_reason_lst", "seconds_lst", "mean_log_prob_lst", "step_end_lst"]
)
def test_a_list_that_is_not_as_long_as_the_responses_is_named(column: str, tmp_path: Path) -> None:
    line = result_line(0, [RIGHT, WRONG])
    line["output"][column] = [0]
    with pytest.raises(UserError, match=rf"a\.jsonl:1: not a result line .*solution_lst has 2 items, {column} 1"):
        read_lines([write(tmp_path / "a.jsonl", line)])


def test_a_line_of_theirs_with_fewer_responses_than_scores_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "xbai.jsonl", xbai_line("Q", [WRONG], [0.2, 0.9]))
    with pytest.raises(UserError, match=r"xbai\.jsonl:1: not a result line .*solution_lst has 1 items, score_lst 2"):
        read_lines([path])


def test_their_parts_add_up_and_their_files_and_ours_are_not_mixed_but_compared(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours.jsonl", result_line(0, [RIGHT, WRONG]))
    theirs = [write(tmp_path / f"theirs{n}.jsonl", xbai_line("Q", [WRONG, RIGHT], [0.2, 0.9])) for n in range(2)]
    report, graded = report_files("make10", [str(tmp_path / "theirs*")])
    assert (report.questions, report.samples) == (1, 4)
    with pytest.raises(UserError, match=r"theirs0\.jsonl does not say how it was made.*ours\.jsonl does"):
        read_lines([ours, *theirs])
    with pytest.raises(UserError, match=r"theirs0\.jsonl does not say how it was made.*ours\.jsonl does"):
        report_files("make10", [str(tmp_path / "*.jsonl")])
    compared = compare(graded, report_files("make10", [str(ours)])[1])
    assert (compared.questions, compared.unpaired) == (1, 0)


def test_missing_files_and_candidates_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        result_files([str(tmp_path / "none*")])
    (tmp_path / "out.jsonl.journal").write_text("", encoding="utf-8")
    for name in ("out.jsonl", "out.jsonl.journal"):
        with pytest.raises(UserError, match=r"out\.jsonl\.journal is an unfinished run"):
            result_files([str(tmp_path / name)])
    with pytest.raises(UserError, match="no candidates"):
        read_lines([write(tmp_path / "empty.jsonl")])


def test_an_unfinished_extension_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "out.jsonl", result_line(0, [RIGHT]))
    (tmp_path / "out.jsonl.journal").write_text("", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        read_lines([path])
    assert "unfinished run adds to this file" in caplog.text


def test_settings_differ_by_their_search_and_seed() -> None:
    assert differing_settings(SETTINGS, {**SETTINGS}) == []
    beam = {**SETTINGS, "search": {"name": "beam"}, "seed": 3}
    assert sorted(differing_settings(SETTINGS, beam)) == ["search", "seed"]
    assert differing_settings(None, SETTINGS) == []


def test_models_differ_by_their_weights_where_both_files_name_them() -> None:
    served = {**SETTINGS, "policy": "here:1a", "scorer": "here:1a", "lang": "en"}
    assert differing_settings(SETTINGS, served) == [], "a file of before they were recorded"
    assert differing_settings(served, {**served, "policy": "there:1a"}) == []
    assert differing_settings(served, {**served, "scorer": "here:2b", "lang": "zh"}) == ["scorer", "lang"]
