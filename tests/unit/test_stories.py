"""The embedded word problems: their arithmetic, their language, their files and their grading."""

import json
import re
from collections import Counter
from dataclasses import replace
from random import Random

import pandas as pd
import pytest
import torch

from xbai.benchmarks.registry import get_benchmark
from xbai.benchmarks.stories import SplitSizes, sample_problems, write_splits
from xbai.benchmarks.story_kinds import HELD_OUT, SEEN
from xbai.benchmarks.story_words import MEN, WOMEN, listed, plural, with_article
from xbai.errors import UserError
from xbai.grading import grade
from xbai.sprm import StepRule, step_feature_mask

KINDS = SEEN | HELD_OUT
SMALL = SplitSizes(sft=40, train=30, validation=10, test=20, held_out=10)
EQUATION = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+)")
NUMBER_WORDS = {"half": "2", "twice": "2", "doubles": "2", "three": "3"}


def stories(kind: str, count: int = 400):
    rng = Random(kind)
    return [KINDS[kind](rng) for _ in range(count)]


def numbers(text: str) -> list[int]:
    """Those in digits and those in words."""
    words = re.findall(r"\d+|[a-z]+", text.lower())
    return [int(NUMBER_WORDS.get(word, word)) for word in words if word.isdigit() or word in NUMBER_WORDS]


def is_true(left: int, sign: str, right: int, result: int) -> bool:
    """Checked by the operation's inverse or by counting, never by the operation itself."""
    return {
        "+": lambda: result - right == left,
        "-": lambda: result + right == left,
        "x": lambda: sum([right] * left) == result,
        "/": lambda: result * right == left,
    }[sign]()


@pytest.mark.parametrize("kind", KINDS)
def test_every_equation_is_true_and_follows_from_the_question(kind):
    for story in stories(kind):
        known, given, results = numbers(story.question), Counter(numbers(story.question)), []
        operations = 0
        for step in story.steps:
            found = EQUATION.findall(step)
            assert len(found) == step.count("=") <= 1, step
            for left, sign, right, result in ((int(a), sign, int(b), int(c)) for a, sign, b, c in found):
                assert is_true(left, sign, right, result), step
                assert {left, right} <= {*known, *results}, (story.question, step)
                given.subtract([left, right])
                results.append(result)
                operations += 1
        assert operations >= 2, story.question
        assert results[-1] == story.answer > 0, story
        # Every result is needed: each is the answer or goes into a later equation.
        operands = [int(n) for step in story.steps for equation in EQUATION.findall(step) for n in equation[0:3:2]]
        assert all(result in operands for result in results[:-1]), story


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_of_the_question_is_unused_but_the_one_that_distracts(kind):
    distracted = 0
    for story in stories(kind):
        operands = [n for step in story.steps for n in numbers(step)]
        unused = [n for n in numbers(story.question) if n not in operands]
        assert len(unused) <= 1, story
        distracted += len(unused)
    assert distracted > 20


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_are_english(kind):
    pronouns = {"she": WOMEN, "her": WOMEN, "he": MEN, "him": MEN, "his": MEN}
    for story in stories(kind):
        sentences = re.split(r"(?<=[.?]) ", story.question)
        assert all(re.fullmatch(r"[A-Z][A-Za-z0-9,' ]+[.?]", sentence) for sentence in sentences), story.question
        assert [sentence[-1] for sentence in sentences] == ["."] * (len(sentences) - 1) + ["?"]
        for text in (story.question, *story.steps):
            assert not re.search(r"  |\b1 [a-z]+s\b|\ba [aeiou]|\ban [^aeiou]", text), text
        assert all(step[0].isupper() and not step.endswith(".") for step in story.steps), story.steps
        named = set(re.findall(r"[A-Z][a-z]+", story.question))
        for pronoun in {word for word in re.findall(r"[a-z]+", story.question.lower()) if word in pronouns}:
            assert named & {person.name for person in pronouns[pronoun]}, story.question


def test_forms_of_words():
    assert [plural(noun) for noun in ("apple", "peach", "pansy", "toy car")] == [
        *("apples", "peaches", "pansies", "toy cars")
    ]
    assert (with_article("ant"), with_article("pen")) == ("an ant", "a pen")
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_each_step_of_a_response_is_one_to_the_step_rule(tiny_tokenizer):
    rule = StepRule.from_tokenizer(tiny_tokenizer)
    for problem in sample_problems(45, KINDS, Random(0), set()):
        ids = torch.tensor([tiny_tokenizer.encode(problem.response)])
        assert tiny_tokenizer.decode(ids[0]) == problem.response
        mask = step_feature_mask(ids, torch.ones_like(ids, dtype=torch.bool), rule)
        assert mask.sum() == len(problem.steps)


def test_splits_repeat_no_question_and_follow_the_seed(tmp_path):
    files = write_splits(tmp_path / "a", seed=3, sizes=SMALL)
    again = write_splits(tmp_path / "b", seed=3, sizes=SMALL)
    other = write_splits(tmp_path / "c", seed=4, sizes=SMALL)
    more = write_splits(tmp_path / "d", seed=3, sizes=SplitSizes(sft=50, train=60, validation=10, test=20, held_out=10))
    names = [files[f"{name}.parquet"].name for name in ("sft", "train", "val")]
    asked = {name: [prompt[0]["content"] for prompt in pd.read_parquet(tmp_path / "a" / name).prompt] for name in names}
    for path in (files["test.jsonl"], files["heldout.jsonl"]):
        asked[path.name] = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [len(questions) for questions in asked.values()] == [40, 30, 10, 20, 10]
    assert len({question for questions in asked.values() for question in questions}) == 110

    for name in ("test.jsonl", "heldout.jsonl"):
        texts = [each[name].read_text(encoding="utf-8") for each in (files, again, other, more)]
        assert texts[0] == texts[1] != texts[2]
        # How much there is to train on does not change the tests.
        assert texts[0] == texts[3]
    first, second = (pd.read_parquet(each["sft.parquet"]).response.tolist() for each in (files, again))
    assert first == second


def test_held_out_kinds_are_in_their_file_alone(tmp_path):
    files = write_splits(tmp_path, sizes=SMALL)
    frames = (pd.read_parquet(files[f"{name}.parquet"]) for name in ("sft", "train"))
    trained = {info["kind"] for frame in frames for info in frame.extra_info}
    kinds = {
        name: Counter(json.loads(line)["kind"] for line in files[name].open())
        for name in ("test.jsonl", "heldout.jsonl")
    }
    assert trained == set(SEEN) == set(kinds["test.jsonl"])
    assert kinds["heldout.jsonl"] == dict.fromkeys(HELD_OUT, 2)
    assert not trained & set(HELD_OUT)


def test_validation_is_the_same_in_both_layouts(tmp_path):
    files = write_splits(tmp_path, sizes=SMALL)
    benchmark = get_benchmark("stories")
    rows, lines = benchmark.read(files["val.parquet"]), benchmark.read(files["val.jsonl"])
    assert [benchmark.messages(row) for row in rows] == [benchmark.messages(line) for line in lines]
    assert [row.answer for row in rows] == [line.answer for line in lines]


def test_the_judges_questions_are_the_last_of_the_training(tmp_path):
    benchmark = get_benchmark("stories")
    for judge in (4, 30, 100):
        files = write_splits(tmp_path / str(judge), sizes=replace(SMALL, judge=judge))
        trained, judged = benchmark.read(files["train.parquet"]), benchmark.read(files["judge.jsonl"])
        assert [row.answer for row in judged] == [row.answer for row in trained[-judge:]]
        assert [benchmark.messages(row) for row in judged] == [benchmark.messages(row) for row in trained[-judge:]]


def test_worked_solutions_are_graded_right_and_other_answers_wrong(tmp_path):
    files = write_splits(tmp_path, sizes=SMALL)
    benchmark = get_benchmark("stories")
    test = files["test.jsonl"]
    for question, line in zip(benchmark.read(test), test.read_text(encoding="utf-8").splitlines()):
        solution = json.loads(line)["solution"]
        assert grade(benchmark.grade_request(question, solution)) == 1.0
        wrong = solution.replace(f"\\boxed{{{question.answer}}}", f"\\boxed{{{int(question.answer) + 1}}}")
        assert grade(benchmark.grade_request(question, wrong)) == 0.0
    sft = pd.read_parquet(files["sft.parquet"])
    assert {"data_source", "prompt", "ability", "reward_model", "extra_info", "response"} == set(sft.columns)


def test_more_questions_than_there_are_is_an_error():
    kinds = {"one": lambda rng: KINDS["time"](Random(0))}
    with pytest.raises(UserError, match="cannot find 2 different questions of the kinds one"):
        sample_problems(2, kinds, Random(0), set())
