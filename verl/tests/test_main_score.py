"""Training a score head alone: what it learns, what is served of it, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from verl.trainer.config.compose import compose_config
from verl.trainer.config.score import YAML, check_score_config
from verl.trainer.main_score import ScoreTrainer
from verl.utils.dataset.step_dataset import StepDataset
from verl.utils.head_quality import candidates, head_quality
from xbai.engine import Scorer
from xbai.errors import UserError
from xbai.measure.feature_files import FeatureFiles, encode_response
from xbai.measure.graded_responses import read_graded_responses
from xbai.measure.options import FeatureOptions
from xbai.sprm import StepRule, load_score_head, load_sprm_config
from xbai.sprm.step_features import FeatureSource, StepFeatures

BENCH = Path(__file__).parents[2] / "bench"
RULE = StepRule("en", (5,))
CHANNELS = 64


def write_features(
    path: Path, source: FeatureSource, prompts: range, responses: int = 8, signal: float = 1.0, seed: int = 0
) -> Path:
    """Steps whose coordinate 5 says whether the answer is right, and coordinate 7 how hard the question is."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [(prompt, draw.random() < (0.3 if prompt % 2 else 0.7)) for prompt in prompts for _ in range(responses)]
    steps = [draw.randint(1, 6) for _ in rows]
    with StepFeatures.create(path, source, steps, CHANNELS) as stored:
        stored.features.copy_(torch.randn(stored.features.shape, generator=torch_draw))
        of_step = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(steps))
        correct, question = torch.tensor([float(right) for _, right in rows]), torch.tensor([p for p, _ in rows])
        stored.features[:, 0, 0] = 500 + 5 * stored.features[:, 0, 0]
        stored.features[:, 0, 5] += signal * (2 * correct[of_step] - 1)
        stored.features[:, 0, 7] += 3 * (question[of_step] % 2)
        stored.questions.copy_(question)
        stored.correct.copy_(correct)
        stored.graded.fill_(True)
        stored.tokens.fill_(10)
        stored.mean_log_prob.fill_(-1.0)
    return path


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    folder = make_tiny_model()
    (folder / "score_module.pt").unlink()
    return folder


@pytest.fixture(scope="module")
def source(model: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureSource:
    return FeatureFiles(FeatureOptions(str(model)), tmp_path_factory.mktemp("none")).source


def trainer(model: Path, folder: Path, *overrides: str) -> ScoreTrainer:
    named = [f"model.path={model}", f"trainer.output_dir={folder / 'head'}", "trainer.total_epochs=12"]
    return ScoreTrainer(check_score_config(compose_config(YAML, [*named, *overrides])))


@pytest.mark.parametrize("changes", [[], ["score.loss=pairwise"], ["score.loss=both", "score.normalize_features=true"]])
def test_a_head_learns_what_the_features_hold(
    model: Path, source: FeatureSource, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str]
) -> None:
    train = write_features(tmp_path / "train.safetensors", source, range(100), signal=2.0)
    val = write_features(tmp_path / "val.safetensors", source, range(100, 140), signal=2.0, seed=1)
    training = trainer(
        model, tmp_path, f"data.train_files={train}", f"data.val_files=[{val}]", "score.optim.lr=2e-3", *changes
    )
    before = head_quality(training.head, training.val_data, torch.device("cpu"))
    training.fit()
    head = load_score_head(tmp_path / "head", CHANNELS, load_sprm_config(tmp_path / "head", training.files.tokenizer))
    after = head_quality(head, training.val_data, torch.device("cpu"))
    assert after["val/within_prompt_auc"] > 0.95 > before["val/within_prompt_auc"]
    assert after["val/best_of_8"] > after["val/pass@1"] + 0.3
    rows = [
        json.loads(line) for line in (tmp_path / "head_logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert max(row["val/within_prompt_auc"] for row in rows) == pytest.approx(after["val/within_prompt_auc"], abs=1e-4)
    assert (tmp_path / "head_logs" / "training.png").stat().st_size > 10_000
    assert "Best-of-N" in capsys.readouterr().out


def test_the_best_epoch_is_kept_and_training_ends_when_none_is_better(
    model: Path, source: FeatureSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_features(tmp_path / "train.safetensors", source, range(8), signal=0.0)
    val = write_features(tmp_path / "val.safetensors", source, range(7, 40), signal=0.0, seed=1)
    overrides = ["trainer.total_epochs=30", "trainer.patience=3", "score.optim.lr=1e-2"]
    training = trainer(model, tmp_path, f"data.train_files={train}", f"data.val_files={val}", *overrides)
    assert "1 of the 33 prompts of data.val_files are in data.train_files too" in caplog.text
    training.fit()
    rows = [
        json.loads(line) for line in (tmp_path / "head_logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    quality = [row["val/within_prompt_auc"] for row in rows]
    best = quality.index(max(quality))
    assert len(rows) == best + 1 + 3 < 30
    kept = head_quality(load_score_head(tmp_path / "head", CHANNELS), training.val_data, torch.device("cpu"))
    assert kept["val/within_prompt_auc"] == pytest.approx(max(quality), abs=1e-4)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with the same prompts, in which right answers have a mark in each step."""
    folder, draw = tmp_path_factory.mktemp("rollouts"), random.Random(0)
    for step in (1, 2):
        rows = []
        for question in range(6):
            for number in range(4):
                right = number % 2 == 0
                steps = [f"{draw.randint(10, 99)}{'!' if right else '?'}.\n\n" for _ in range(draw.randint(1, 4))]
                rows.append(
                    {
                        "step": step,
                        "prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
                        "response": "".join(steps) + "end",
                        "correct": float(right),
                        "graded": number != 3,
                    }
                )
        (folder / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_the_service_gives_the_scores_that_training_saw(
    make_tiny_model: Callable[..., Path], rollouts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_model()
    (folder / "score_module.pt").unlink()
    (folder / "sprm_config.json").unlink()
    overrides = [
        f"data.train_files={rollouts}",
        f"trainer.output_dir={folder}",
        f"trainer.features_dir={tmp_path}/features",
        f"trainer.log_dir={tmp_path}/logs",
        "model.dtype=float32",
        "score.normalize_features=true",
    ]
    training = trainer(folder, tmp_path, *overrides)
    assert len(training.train_data.groups) == 6, "a prompt of two files is one group"
    training.fit()
    assert load_sprm_config(folder, training.files.tokenizer).normalize_features
    scorer = Scorer.from_folder(folder, dtype="float32")
    found = candidates(training.head, training.train_data, torch.device("cpu"))
    assert head_quality(training.head, training.train_data, torch.device("cpu"))["val/within_prompt_auc"] == 1.0
    responses = [response for step in (1, 2) for response in read_graded_responses(rollouts / f"{step}.jsonl")]
    encoded = [encode_response(training.files.tokenizer, scorer.step_rule, response) for response in responses]
    served = scorer.score([list(e.ids) for e in encoded], [e.start for e in encoded])
    for question, group in zip(found, training.train_data.groups, strict=True):
        assert question.scores.tolist() == pytest.approx([served[i].value for i in group], abs=1e-5)
    with caplog.at_level("INFO"):
        other = [override for override in overrides if "output_dir" not in override]
        trainer(folder, tmp_path, *other)
    assert caplog.text.count("are there already") == 2, "the head is no part of the model that made the features"


def test_batches_are_whole_groups(source: FeatureSource, tmp_path: Path) -> None:
    paths = [write_features(tmp_path / f"{i}.safetensors", source, range(3 * i, 3 * i + 4), 4, seed=i) for i in (0, 1)]
    stores = [StepFeatures.open(path) for path in paths]
    data = StepDataset(stores, source.layers[0])
    assert len(data) == 32 and sorted(map(len, data.groups)) == [4, 4, 4, 4, 4, 4, 8]
    rows = [
        (int(question), features)
        for store in stores
        for question, features in zip(store.questions, store.features[:, 0].split(store.steps.tolist()), strict=True)
    ]
    seen = []
    for batch in data.epoch(prompts=2, seed=3):
        sizes = batch.groups.unique(return_counts=True)[1].tolist()
        assert sizes in ([4, 4], [4, 8], [8, 4], [4], [8])
        found = batch.rows(batch.features[:, 5])
        steps = batch.mask.sum(-1).tolist()
        seen += [tuple(row[:count].tolist()) for row, count in zip(found, steps, strict=True)]
        assert not found[~batch.mask].any()
    assert sorted(seen) == sorted(tuple(features[:, 5].tolist()) for _, features in rows)
    first, again, other = ([b.groups.tolist() for b in data.epoch(2, seed)] for seed in (3, 3, 4))
    assert first == again != other


def ungraded(row: dict) -> dict:
    return {**row, "graded": False}


def all_right(row: dict) -> dict:
    return {**row, "correct": 1.0}


def stepless(row: dict) -> dict:
    return {**row, "response": "end"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ungraded, "data.train_files: none of the 24 responses could be graded"),
        (all_right, "data.train_files: none of the 6 prompts has both a right and a wrong response"),
        (stepless, "data.train_files: the 24 responses have no step .lang=en."),
    ],
)
def test_responses_from_which_nothing_can_be_learnt(
    model: Path, rollouts: Path, tmp_path: Path, change: Callable[[dict], dict], message: str
) -> None:
    rows = [change(json.loads(line)) for line in (rollouts / "1.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        trainer(model, tmp_path, f"data.train_files={tmp_path}/1.jsonl")
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["score.loss=hinge"], "score.loss=hinge is unknown, use one of step_bce, outcome_bce"),
        (["score.aggregation=min"], "score.aggregation=min is unknown, use one of geometric"),
        (["score.lang=fr"], "score.lang=fr is unknown, use one of None, en, zh"),
        (["trainer.total_epochs=0"], "trainer.total_epochs=0 must be above 0"),
        (["trainer.patience=x"], "trainer.patience=x must be a whole number above 0, or null"),
        (["score.dropout=1.0"], "score.dropout=1.0 must be from 0 to below 1"),
        (["score.optim.lr=fast"], "score.optim.lr=fast must be a number"),
        (["trainer.logger=[paper]"], "trainer.logger: paper is unknown"),
        (["data.train_files=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["model.path=nowhere"], "nowhere/config.json: no such file"),
        (["trainer.output_dir=/proc/head"], "trainer.output_dir=/proc/head: the head cannot be written"),
    ],
)
def test_wrong_configuration(model: Path, rollouts: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(model, tmp_path, f"data.train_files={rollouts}", *overrides)


def test_what_is_there_is_never_replaced(
    tiny_model_dir: Path, model: Path, source: FeatureSource, rollouts: Path, tmp_path: Path
) -> None:
    given = f"data.train_files={rollouts}"
    with pytest.raises(UserError, match=r"has a head already, score_module.pt; move it away"):
        trainer(tiny_model_dir, tmp_path, given, f"trainer.output_dir={tiny_model_dir}")
    (tmp_path / "head").mkdir()
    with pytest.raises(UserError, match="head exists already; remove it or name another"):
        trainer(model, tmp_path, given)
    foreign = FeatureSource("other:0123", source.step_rule, source.layers, source.dtype)
    path = write_features(tmp_path / "foreign.safetensors", foreign, range(2))
    with pytest.raises(UserError, match="features of another model, other:0123, not of"):
        trainer(model, tmp_path / "new", f"data.train_files={path}")


def test_the_laboratory_compares_heads_on_the_same_responses(source: FeatureSource, tmp_path: Path) -> None:
    train = write_features(tmp_path / "train.safetensors", source, range(60), signal=2.0)
    test = write_features(tmp_path / "test.safetensors", source, range(60, 90), signal=2.0, seed=1)
    titles = ["pairwise, mean_logit", "pairwise, mean_logit, logistic regression"]
    only = [part for title in titles for part in ("--only", title)]
    command = [
        sys.executable,
        BENCH / "score_lab.py",
        train,
        test,
        "--seeds",
        "1",
        "--out",
        tmp_path / "lab.json",
        *only,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "lab.json").read_text(encoding="utf-8"))
    free, *heads = result["rows"]
    assert free["title"] == "mean log-prob" and free["within_prompt_auc"] == 0.5
    assert [head["title"] for head in heads] == [f"{title}{end}" for title in titles for end in ("", " + log-prob")]
    for head in heads[::2]:
        assert head["within_prompt_auc"] > 0.75 > 0.7 > result["test"]["one_sample"]["mean"]
        assert head["best_of_8_less"]["mean log-prob"]["mean"] > 0.2
    assert f"| {titles[0]} |" in done.stdout
