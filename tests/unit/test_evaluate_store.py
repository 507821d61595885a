"""The result store: nothing lost, nothing twice, nothing mixed, whenever the process dies."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.errors import UserError
from xbai.infer.journal import encode_line
from xbai.infer.store import ResultStore
from xbai.model_identity import is_same_model, model_identity
from xbai.results.lines import Sample, StoredQuestion, read_result_lines
from xbai.results.settings import RunSettings, request_seed

SETTINGS = RunSettings("make10", "m", "q", 0.8, 0.95, -1, 1.05, 64, (), 0)
QUESTIONS = [StoredQuestion(i, f"<p{i}>", str(i), {"question": f"q{i}"}) for i in range(3)]


def sample(question: int, number: int, score: float | None = None) -> Sample:
    return Sample(
        question, number, f"response {question}/{number} 数", "stop", 3, 0.5, score, None if score is None else [score]
    )


def store(path: Path, **changes: object) -> ResultStore:
    return ResultStore(path, replace(SETTINGS, **changes), QUESTIONS)


def test_results_have_the_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        for key in ((1, 1), (0, 0), (1, 0), (2, 0)):
            results.add(sample(*key))
        results.add_score((1, 1), 0.9, [0.9])
        results.add_score((1, 0), 0.4, [0.4])
        results.write_results()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[1]["prompt"] == "<p1>"
    assert lines[1]["answer"] == "1"
    output = lines[1]["output"]
    assert output["solution_lst"] == ["<p1>response 1/0 数", "<p1>response 1/1 数"]
    assert output["score_lst"] == [0.4, 0.9]
    assert output["content"] == "response 1/1 数"
    assert output["time"] == 0.5
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_a_journal_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(sample(0, 0))
        results.add(sample(0, 1))
        results.add_score((0, 1), 0.7)
    with store(path) as results:
        assert len(results) == 2
        assert results.unscored() == [(0, 0)]
        assert results.get((0, 1)) == replace(sample(0, 1, 0.7), step_scores=None)
        with pytest.raises(ValueError, match="already"):
            results.add(sample(0, 0))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=1, max_value=700), data=st.data())
def test_a_journal_cut_anywhere_loses_only_what_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int, data
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    order = data.draw(st.permutations([(q, s) for q in range(3) for s in range(2)]))
    with store(path) as results:
        for key in order:
            results.add(sample(*key))
            results.add_score(key, 0.5)
        journal = results.journal_path
    whole = journal.read_bytes()
    kept = whole[: max(0, len(whole) - cut)]
    journal.write_bytes(kept)
    with store(path) as results:
        present = [key for key in order if key in results]
        assert len(present) == kept.count(b'"response"', 0, kept.rfind(b"\n") + 1)
        for key in order:
            if key not in results:
                results.add(sample(*key))
        for key in results.unscored():
            results.add_score(key, 0.5)
        results.write_results()
    for line in read_result_lines(path):
        assert [each.key for each in line.samples] == [(line.index, 0), (line.index, 1)]
        assert [each.score for each in line.samples] == [0.5, 0.5]
        assert line.responses == [sample(line.index, 0).response, sample(line.index, 1).response]


def test_a_finished_file_is_extended_and_retried(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(sample(0, 0))
        results.add(sample(0, 1, 0.3))
        results.write_results()
    with store(path) as results:
        assert results.unscored() == [(0, 0)]
        assert results.get((0, 1)) == sample(0, 1, 0.3)
        results.add_score((0, 0), 0.6)
        results.add(sample(0, 2, 0.1))
        results.write_results()
    assert [each.score for each in next(read_result_lines(path)).samples] == [0.6, 0.3, 0.1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mean_log_prob", (-0.25, -0.75)),
        ("step_ends", ([2], [1])),
        ("step_log_probs", ([-0.5, -0.25], [-0.125, -2.0])),
    ],
)
def test_what_log_probs_tell_is_kept_and_older_files_have_none(
    tmp_path: Path, name: str, values: tuple[object, object]
) -> None:
    path = tmp_path / "out.jsonl"
    first, last = (replace(sample(0, 2 * i, 0.3), **{name: value}) for i, value in enumerate(values))
    with store(path) as results:
        results.add(first)
        results.add(sample(0, 1, 0.2))
    lines = results.journal_path.read_bytes().splitlines(keepends=True)
    of_before = asdict(sample(0, 1, 0.2))
    del of_before[name]
    results.journal_path.write_bytes(lines[0] + lines[1] + encode_line(of_before))
    with store(path) as results:
        assert results.get((0, 0)) == first
        results.add(last)
        results.write_results()
    (line, *_) = read_result_lines(path)
    assert line.samples == [first, sample(0, 1, 0.2), last]
    with store(path) as results:
        assert results.get((0, 2)) == last
    old = json.loads(line.to_json())
    del old["output"][f"{name.removesuffix('s')}_lst"]
    path.write_text(json.dumps(old) + "\n", encoding="utf-8")
    assert [getattr(each, name) for each in next(read_result_lines(path)).samples] == [None] * 3


def test_parts_share_a_file_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for part in (QUESTIONS[:1], QUESTIONS[1:]):
        with ResultStore(path, SETTINGS, part) as results:
            for question in part:
                results.add(sample(question.index, 0, 0.5))
            results.write_results()
    assert [line.index for line in read_result_lines(path)] == [0, 1, 2]


def test_an_unfinished_part_is_not_dropped_by_another(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultStore(path, SETTINGS, QUESTIONS[:1]) as results:
        results.add(sample(0, 0))
    with (
        pytest.raises(UserError, match="unfinished run of other questions"),
        ResultStore(path, SETTINGS, QUESTIONS[1:]),
    ):
        pass


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path: Path, finished: bool) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(sample(0, 0, 0.5))
        if finished:
            results.write_results()
    with (
        pytest.raises(UserError, match=r"temperature=0.8, now 1.0; model='m', now 'other'|model='m', now 'other'"),
        store(path, temperature=1.0, model="other"),
    ):
        pass
    with store(path) as results:
        assert len(results) == 1, "a refusal leaves nothing behind"


@pytest.mark.parametrize("finished", [True, False])
def test_models_are_recorded_and_others_refused(tmp_path: Path, finished: bool) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.record(policy="m:1a")
        results.add(sample(0, 0, 0.5))
        results.record(scorer="s:2b", lang="en")
        if finished:
            results.write_results()
    with store(path) as results:
        results.record(policy="renamed:1a", scorer="s:2b", lang="en")
        for models, message in (
            ({"policy": "m2:3c"}, r"policy='renamed:1a', now 'm2:3c'"),
            ({"scorer": "s2:4d", "lang": "zh"}, r"scorer='s:2b', now 's2:4d'; lang='en', now 'zh'"),
        ):
            with pytest.raises(UserError, match=message):
                results.record(**models)
        results.record(policy=None)
        results.write_results()
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["settings"]["policy"] == "renamed:1a"


def test_a_file_that_does_not_name_its_models_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(sample(0, 0, 0.5))
        results.write_results()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for name in ("policy", "scorer", "lang"):
            del line["settings"][name]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with store(path) as results:
        results.record(policy="m:1a", scorer="m:1a", lang="en")
        assert len(results) == 1


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with store(path) as results:
        results.add(sample(0, 0))
        with pytest.raises(UserError, match="another run is writing"), store(path):
            pass
        results.add(sample(0, 1))
    with store(path) as results:
        assert len(results) == 2


@pytest.mark.parametrize("begins_again", [False, True])
def test_a_journal_removed_before_it_was_locked_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins_again: bool
) -> None:
    path = tmp_path / "out.jsonl"
    lock, journal = fcntl.flock, Path(f"{path}.journal")

    def lock_too_late(file: FileIO, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        journal.unlink()
        if begins_again:
            journal.touch()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with store(path) as results:
        results.add(sample(0, 0))
    with store(path) as results:
        assert len(results) == 1


def test_a_foreign_result_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    line = {
        "prompt": "p",
        "answer": "1",
        "output": {"content": "", "time": 1, "solution_lst": ["px"], "score_lst": [0.5]},
    }
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="another run"), store(path):
        pass
    assert next(iter(read_result_lines(path))).responses == ["x"]
    assert json.loads(path.read_text(encoding="utf-8")) == line


def test_a_damaged_result_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"prompt": "p"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"out\.jsonl:1: not a result line"):
        list(read_result_lines(path))


def test_model_identity_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "model.safetensors").write_bytes(b"x" * 200_000)
    first, second = model_identity(tmp_path / "a"), model_identity(tmp_path / "b")
    assert (first[:2], second[:2]) == ("a:", "b:")
    assert is_same_model(first, second)
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x" * 199_999 + b"y")
    assert not is_same_model(model_identity(tmp_path / "b"), first)
    assert model_identity("hub/name") == "hub/name"


def test_request_seeds_differ_and_repeat() -> None:
    seeds = {request_seed(seed, q, s) for seed in range(3) for q in range(10) for s in (0, 8, 16)}
    assert len(seeds) == 90
    assert request_seed(1, 2, 8) == request_seed(1, 2, 8)
    assert max(seeds) < 2**63
    assert request_seed(None, 0, 0) is None
