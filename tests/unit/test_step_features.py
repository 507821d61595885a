"""Features of stored responses: what is written is read, and a head on them gives the scores of the score service."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from xbai.cli import app
from xbai.engine import Scorer
from xbai.engine.feature_extractor import EncodedResponse, FeatureExtractor
from xbai.engine.packed_batch import PackedBatch
from xbai.errors import UserError
from xbai.measure.feature_files import FeatureFiles, encode_response
from xbai.measure.graded_responses import GradedResponse, response_files
from xbai.measure.options import FeatureOptions
from xbai.model_identity import model_identity
from xbai.sprm import ScoreHead, StepRule, load_score_head, save_score_head, trajectory_scores
from xbai.sprm.step_features import FeatureSource, StepFeatures

HEADER = "<|im_start|>assistant\n"
PROMPTS = [f"<|im_start|>user\n{question}<|im_end|>\n{HEADER}" for question in ("Hi.\n\nBye", "And you")]
RESPONSES = [
    "<think>\nOne.\n\nTwo.\n\n</think>\n\nThree.\n\nFour",
    "no step",
    "a.\n\n" * 30,
    "<think>\nOne.\n\nTwo.\n\nThree.\n\n",
    "",
]
ROWS = [
    {"prompt": PROMPTS[number % 2], "response": response, "correct": float(number % 3 == 0), "graded": number != 2}
    for number, response in enumerate(RESPONSES * 4)
]


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    path = tmp_path / "7.jsonl"
    path.write_text("".join(json.dumps({"step": 7, **row}) + "\n" for row in ROWS), encoding="utf-8")
    return path


def make(model: Path, path: Path, folder: Path, **options: object) -> StepFeatures:
    return StepFeatures.open(FeatureFiles(FeatureOptions(str(model), **options), folder).of(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    source = FeatureSource("m:1", StepRule("zh", (5, 9), 1, None, "assistant"), (3, 1), dtype)
    steps = [3, 0, 4]
    features = torch.randn(7, 2, 5).to(dtype)
    with StepFeatures.create(tmp_path / "a.safetensors", source, steps, hidden_size=5) as written:
        written.features.copy_(features)
        written.mean_log_prob[1] = math.nan
        written.states.copy_(torch.arange(7) - 2**62)
        written.questions.copy_(torch.tensor([-(2**62), 2**62, 1]))
        written.graded[2] = True
        assert not (tmp_path / "a.safetensors").exists(), "the file has its name when it is whole"
    read = StepFeatures.open(tmp_path / "a.safetensors")
    assert read.source == source
    assert torch.equal(read.features, features) and read.features.dtype == dtype
    assert torch.equal(read.of_layer(1), features[:, 1]) and torch.equal(read.of_layer(3), features[:, 0])
    assert read.steps.tolist() == steps and read.starts.tolist() == [0, 3, 3]
    assert read.questions.tolist() == [-(2**62), 2**62, 1]
    assert read.graded.tolist() == [False, False, True]
    assert torch.equal(read.states, torch.arange(7) - 2**62)
    assert read.mean_log_prob.isnan().tolist() == [False, True, False]
    with pytest.raises(UserError, match="layer 2 was not kept, only 3, 1"):
        read.of_layer(2)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    source = FeatureSource("m:1", StepRule("en", (5,)), (1,), torch.float32)
    with pytest.raises(ZeroDivisionError), StepFeatures.create(tmp_path / "a.safetensors", source, [1], 4):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_steps_share_a_state_when_all_before_them_is_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    texts = ["One.\n\nTwo.\n\n", "One.\n\nTwo.\n\nThree.\n\n", "Zero.\n\nTwo.\n\n"]
    rows = [{"prompt": prompt, "response": text, "correct": 1} for prompt in PROMPTS for text in texts]
    path = tmp_path / "1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stored = make(tiny_model_dir, path, tmp_path)
    assert stored.steps.tolist() == [2, 3, 2] * 2
    first, second = stored.states.reshape(2, 7).tolist()
    assert first[:2] == first[2:4] and len({*first, *second}) == 10


@pytest.mark.parametrize("max_batch_tokens", [None, 64, 1])
def test_a_head_on_them_gives_the_scores_of_the_score_service(
    tiny_model_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rollouts: Path,
    tmp_path: Path,
    max_batch_tokens: int | None,
) -> None:
    stored = make(tiny_model_dir, rollouts, tmp_path, dtype="float32", max_batch_tokens=max_batch_tokens)
    scorer = Scorer.from_folder(tiny_model_dir, dtype="float32")
    responses = [GradedResponse(**row) for row in ROWS]
    encoded = [encode_response(tiny_tokenizer, scorer.step_rule, response) for response in responses]
    expected = scorer.score([list(e.ids) for e in encoded], [e.start for e in encoded])
    assert stored.steps.tolist() == [len(result.step_scores) for result in expected]
    assert sum(stored.steps) > 60
    head = load_score_head(tiny_model_dir, 64)
    with torch.no_grad():
        logits = head(stored.of_layer(2)).split(stored.steps.tolist())
    for result, row in zip(expected, logits, strict=True):
        assert row.sigmoid().tolist() == pytest.approx(result.step_scores, abs=1e-5)
        value = trajectory_scores(row[None], torch.ones(1, len(row), dtype=torch.bool))
        assert float(value) == pytest.approx(result.value, abs=1e-5)


def test_equal_responses_are_computed_once(
    tiny_model_dir: Path, rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, computed = FeatureExtractor.run, 0

    def counted(extractor: FeatureExtractor, batch: PackedBatch, responses: list[EncodedResponse]) -> object:
        nonlocal computed
        computed += len(responses)
        return run(extractor, batch, responses)

    monkeypatch.setattr(FeatureExtractor, "run", counted)
    stored = make(tiny_model_dir, rollouts, tmp_path)
    assert len(stored.steps) == len(ROWS) == 2 * computed


@pytest.mark.parametrize("tied", [False, True])
def test_layers_log_probs_and_grades(
    make_tiny_model: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    rollouts: Path,
    tmp_path: Path,
    tied: bool,
) -> None:
    folder = make_tiny_model(tied=tied)
    stored = make(folder, rollouts, tmp_path, dtype="float32", layers=(3, 0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rule = StepRule.from_tokenizer(tiny_tokenizer)
    captured = {}
    for layer in (0, 3):
        model.model.layers[layer].register_forward_hook(lambda _m, _a, out, i=layer: captured.__setitem__(i, out))
    for number, (row, start) in enumerate(zip(ROWS, stored.starts.tolist(), strict=True)):
        encoded = encode_response(tiny_tokenizer, rule, GradedResponse(**row))
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, encoded.start - 1 : -1]
        expected = torch.stack([captured[i][0, encoded.positions] for i in (3, 0)], dim=1)
        found = stored.features[start : start + len(expected)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        mean = log_probs.gather(-1, ids[0, encoded.start :, None]).mean() if row["response"] else torch.tensor(math.nan)
        torch.testing.assert_close(stored.mean_log_prob[number], mean, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert stored.tokens[number] == ids.shape[1] - encoded.start
    assert stored.graded.tolist() == [row["graded"] for row in ROWS]
    assert stored.correct.tolist() == [row["correct"] if row["graded"] else 0.0 for row in ROWS]
    assert len(stored.questions.unique()) == 2 and len(stored.questions[::2].unique()) == 1


def test_result_files_are_graded(tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    responses = ["So.\n\nThe answer is \\boxed{7+3}", "The answer is \\boxed{7*3}"]
    line = {
        "prompt": PROMPTS[0],
        "answer": "7 3",
        "output": {
            "solution_lst": [PROMPTS[0] + response for response in [*responses, ""]],
            "finish_reason_lst": ["stop", "stop", "refused"],
        },
        "index": 0,
        "meta": {"question": "7 3"},
        "settings": {"task": "make10"},
    }
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is a result file: name the benchmark by which it is graded"):
        make(tiny_model_dir, path, tmp_path)
    stored = make(tiny_model_dir, path, tmp_path, task="make10")
    assert stored.correct.tolist() == [1.0, 0.0] and stored.steps.tolist() == [1, 0]
    assert "were they written for another model?" not in caplog.text


def test_kept_features_are_used_again_by_the_same_model_alone(
    make_tiny_model: Callable[..., Path], rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make_tiny_model(), make_tiny_model(seed=1)
    files = FeatureFiles(FeatureOptions(str(model)), tmp_path)
    stored = files.of(rollouts)
    save_score_head(model, ScoreHead(64).state_dict(), None)
    with monkeypatch.context() as patched:
        patched.setattr(FeatureFiles, "_make", None)
        again = FeatureFiles(FeatureOptions(str(model)), tmp_path)
        assert again.of(rollouts) == stored, "another head is no other model"
        assert again.of(stored) == stored
    assert FeatureFiles(FeatureOptions(str(other)), tmp_path).of(rollouts) != stored
    assert FeatureFiles(FeatureOptions(str(model), lang="en", layers=(1,)), tmp_path).of(rollouts) != stored
    rollouts.write_text(rollouts.read_text(encoding="utf-8").replace("One", "Six"), encoding="utf-8")
    assert files.of(rollouts) != stored
    with pytest.raises(UserError, match=rf"features of another model, .*{model_identity(model, with_head=False)}"):
        FeatureFiles(FeatureOptions(str(other)), tmp_path).of(stored)
    with pytest.raises(UserError, match=r"has no features of layer 1, only of \(2,\)"):
        FeatureFiles(FeatureOptions(str(model), layers=(1,)), tmp_path).of(stored)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no lines of JSON with graded responses"),
        ('{"prompt": "a", "response": "b"}', r"1.jsonl:1: .*KeyError\('correct'\)"),
        ("[1]", r"1.jsonl:1: no object with the texts prompt and response"),
        ('{"prompt": "a", "response": "b", "correct": 1}\n[1]', r"1.jsonl:2: no object with the texts prompt"),
        ('{"prompt": "a", "response": "b", "correct": 1}\n\udcff', r"1.jsonl:2: no object with the texts prompt"),
        ('{"prompt": "a", "response": "b", "correct": 2}', "correct is 2, must be from 0 to 1"),
        ('{"prompt": "a", "response": ["b"], "correct": 1}', "prompt and response must be texts"),
        (json.dumps({"prompt": "a", "response": "b" * 600, "correct": 1}), "response 1 has 601 tokens .* holds 512"),
    ],
)
def test_files_without_usable_responses(tiny_model_dir: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "1.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        make(tiny_model_dir, path, tmp_path)


def test_command(tiny_model_dir: Path, rollouts: Path, tmp_path: Path) -> None:
    command = ["features", str(tmp_path), "--model_path", str(tiny_model_dir), "--output", str(tmp_path / "features")]
    result = CliRunner().invoke(app, [*command, "--layers", "1,2"])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "features").glob("*.safetensors")
    assert str(path) in result.output.replace("\n", "")
    assert StepFeatures.open(path).source.layers == (1, 2)
    assert response_files([str(tmp_path), str(path.parent), str(path)]) == [rollouts, path]
    assert CliRunner().invoke(app, [*command, "--layers", "4"]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--layers", "a"]).exit_code == 2


def test_prompts_of_another_template_are_said(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "1.jsonl"
    path.write_text(
        json.dumps({"prompt": "user\nHi\nassistant\n", "response": "b.\n\nc", "correct": 1}), encoding="utf-8"
    )
    make(tiny_model_dir, path, tmp_path)
    assert "1 of 1 prompts lack what the model's chat template puts before a response" in caplog.text
