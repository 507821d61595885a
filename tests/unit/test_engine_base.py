"""Validation, seeds and loading, common to all engines."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from xbai.engine import Engine, PromptTooLong, SamplingParams, Scorer, load_engine
from xbai.engine.hf.engine import HFEngine
from xbai.errors import UserError


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Engine:
    return load_engine("hf", tiny_model_dir, max_model_len=32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 2.5},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
    ],
)
def test_impossible_sampling_parameters_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"sampling: {next(iter(wrong))}"):
        SamplingParams(**wrong)


def test_a_single_stop_string_and_none_are_taken() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], UserError, "at least one token"),
        ([1] * 32, PromptTooLong, "32 tokens, but at most 31 fit"),
        ([1, 262], UserError, "token id 262 is outside the vocabulary of 262"),
        ([-1], UserError, "token id -1"),
    ],
)
def test_impossible_prompts_are_refused(engine: Engine, prompt: list[int], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        engine.generate([[1, 2], prompt], SamplingParams(max_tokens=2))
    assert not engine.has_unfinished()


def test_a_sequence_may_fill_the_context_when_scored(engine: Engine) -> None:
    assert engine.score([[1] * 32], [0])[0].value == 0.0
    with pytest.raises(PromptTooLong, match="33 tokens"):
        engine.score([[1] * 33], [0])


def test_an_engine_seed_fixes_unseeded_requests(tiny_model_dir: Path) -> None:
    params = SamplingParams(n=2, max_tokens=8)
    runs = [load_engine("hf", tiny_model_dir, seed=3).generate([[1], [1]], params) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_loading_leaves_every_random_stream_where_it_was(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda = torch.cuda.is_available()

    def draw() -> list[float]:
        device = torch.rand(2, device="cuda").tolist() if has_cuda else []
        return [random.random(), float(numpy.random.rand()), torch.rand(()).item(), *device]

    def reseed(self: HFEngine, *args: object, **options: object) -> None:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)

    monkeypatch.setattr(HFEngine, "__init__", reseed)
    draws = []
    for load in (lambda: None, lambda: load_engine("hf", tiny_model_dir)):
        random.seed(5)
        numpy.random.seed(5)
        torch.manual_seed(5)
        load()
        draws.append(draw())
    assert draws[0] == draws[1]


def test_scores_need_a_head(tiny_model_dir: Path) -> None:
    engine = load_engine("hf", tiny_model_dir, with_scores=False)
    assert engine.step_rule is None
    with pytest.raises(UserError, match="without a score head"):
        engine.generate([[1]], SamplingParams(), return_scores=True)
    with pytest.raises(UserError, match="without a score head"):
        engine.score([[1]], [0])


def test_the_step_rule_travels_with_the_model(tiny_model_dir: Path) -> None:
    assert load_engine("hf", tiny_model_dir).step_rule.lang == "en"
    with pytest.raises(UserError, match="trained with lang=en"):
        load_engine("hf", tiny_model_dir, lang="zh")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "config.json: no such file"),
        ("tokenizer.json", "no tokenizer"),
        ("score_module.pt", "score_module.pt: no such file"),
    ],
)
def test_what_a_folder_lacks_is_named(make_tiny_model: Callable[..., Path], missing: str, message: str) -> None:
    folder = make_tiny_model()
    (folder / missing).unlink()
    with pytest.raises(UserError, match=message):
        load_engine("hf", folder, with_scores=True)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", (1, 64), r"shape \(1, 64\), the model has shape \(128, 64\)"),
        ("model.norm.weight", (3,), r"shape \(3,\), the model has shape \(64,\)"),
        ("score_head.3.bias", (), r"shape \(\), the model has shape \(1,\)"),
        ("score_head.7.weight", (1,), "no such weight"),
        ("model.layers.9.mlp.up_proj.weight", (1,), "no such weight"),
    ],
)
def test_a_weight_of_another_shape_reaches_neither_model_nor_scorer(
    tiny_model_dir: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    engine = load_engine("hf", tiny_model_dir)
    before = {name: weight.clone() for name, weight in engine.scorer.backbone.named_parameters()}
    with pytest.raises(UserError, match=f"^update_weights: {name} has .*{message}"):
        engine.update_weights([(name, torch.full(shape, 7.0))])
    assert all(torch.equal(weight, before[name]) for name, weight in engine.scorer.backbone.named_parameters())
    assert all((weight < 7).all() for weight in engine.scorer.head.parameters())


def test_code_of_a_model_folder_runs_only_when_trusted(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "their_model",
        "auto_map": {"AutoConfig": "their.TheirConfig", "AutoModel": "their.Body", "AutoModelForCausalLM": "their.LM"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "their.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model\n"
        "class TheirConfig(Qwen3Config):\n    model_type = 'their_model'\n"
        "class Body(Qwen3Model):\n    config_class = TheirConfig\n"
        "class LM(Qwen3ForCausalLM):\n    config_class = TheirConfig\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        load_engine("hf", folder)
    engine = load_engine("hf", folder, trust_remote_code=True)
    assert type(engine._model).__name__ == "LM"
    engine.update_weights(engine._model.state_dict().items())
    assert Scorer.from_folder(folder, trust_remote_code=True).score([[1, 2]], [0])[0].value == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sglang"}, "engine='sglang' is unknown"),
        ({"name": "hf", "dtype": "int3"}, "dtype='int3' is unknown"),
        ({"name": "hf", "max_model_len": 513}, "max_model_len=513: between 2 and the model's 512"),
        ({"name": "hf", "max_num_batched_tokens": 8192}, "max_num_batched_tokens: the hf engine has no such option"),
        ({"name": "hf", "gpu_memory_utilization": 0.5}, "gpu_memory_utilization: the hf engine has no such option"),
    ],
)
def test_impossible_options_are_named(tiny_model_dir: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_engine(model_path=tiny_model_dir, **arguments)


def test_without_vllm_auto_falls_back_with_a_warning(tiny_model_dir: Path) -> None:
    program = (
        "import importlib.util, logging, sys\n"
        "logging.basicConfig()\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'vllm' else find_spec(name, *rest)\n"
        "sys.modules['vllm'] = None\n"
        "from xbai.engine import load_engine\n"
        "print(type(load_engine('auto', sys.argv[1])).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "HFEngine"
    assert "falling back to the slower hf engine" in done.stderr
