"""Think tags, ends of turns and stop strings that are special tokens of the vocabulary, in both engines."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import torch
from clocks import wait_until
from fastapi import FastAPI
from transformers import AutoModelForCausalLM

from xbai.engine import Engine, SamplingParams, load_engine
from xbai.errors import UserError
from xbai.model_folder import load_tokenizer
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CHAIN = [
    "?",
    "<think>",
    "a",
    "b",
    ".\n\n",
    "c",
    "</think>",
    "d",
    "<|im_end|>",
    "<|im_start|>",
    "e",
    "<|endoftext|>",
    "f",
]
WHOLE = "<think>ab.\n\nc</think>d"
GREEDY = SamplingParams(temperature=0, max_tokens=len(CHAIN) - 1)


@pytest.fixture(scope="module")
def chain_model(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that follows each token of `CHAIN` by the next one. Its think tags are special tokens, and a turn of its
    chat template ends with a token that is no end of sequence anywhere."""
    folder = tmp_path_factory.mktemp("chain") / "model"
    shutil.copytree(make_tiny_model(), folder)
    as_special(folder, "<think>", "</think>")
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    for name in ("config.json", "generation_config.json"):
        change(folder / name, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            weight.zero_()
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in CHAIN]
    for (before,), (after,) in pairwise(ids):
        weights["lm_head.weight"][after] = weights["model.embed_tokens.weight"][before]
    model.save_pretrained(folder)
    return folder


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def as_special(folder: Path, *texts: str) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] |= token["content"] in texts
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=needs_vllm)])
def engine(request: pytest.FixtureRequest, chain_model: Path) -> Iterator[Engine]:
    loaded = load_engine(request.param, chain_model, dtype="float32")
    yield loaded
    loaded.close()


def answer(engine: Engine, **params: object) -> tuple[str, str]:
    [[completion]] = engine.generate([prompt(engine)], SamplingParams(**{"temperature": 0, "max_tokens": 11, **params}))
    return completion.text, completion.finish_reason


def prompt(engine: Engine) -> list[int]:
    return engine.tokenizer.encode("?", add_special_tokens=False)


def test_a_turn_ends_where_the_template_ends_one(engine: Engine) -> None:
    [[completion]] = engine.generate([prompt(engine)], GREEDY)
    assert engine.tokenizer.decode(completion.token_ids) == f"{WHOLE}<|im_end|>"
    assert (completion.text, completion.finish_reason) == (WHOLE, "stop")


def test_think_tags_stay_in_the_text_and_other_special_tokens_do_not(engine: Engine) -> None:
    assert answer(engine, ignore_eos=True) == (f"{WHOLE}e", "length")
    assert answer(engine, ignore_eos=True, max_tokens=9) == (WHOLE, "length")


def test_the_text_has_the_score_of_the_tokens(engine: Engine) -> None:
    [[completion]] = engine.generate([prompt(engine)], GREEDY, return_scores=True)
    ids = engine.tokenizer.encode(completion.text, add_special_tokens=False)
    [scored] = engine.score([prompt(engine) + ids], [1])
    assert len(scored.step_scores) == 1
    assert completion.step_scores == pytest.approx(scored.step_scores, abs=1e-5)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_start|>", WHOLE),
        ("<|im_end|>", WHOLE),
        ("<|endoftext|>", f"{WHOLE}e"),
        (("<|im_start|>", "c"), "<think>ab.\n\n"),
        ("</think>", "<think>ab.\n\nc"),
        ("</think>d", "<think>ab.\n\nc"),
        ("\n\nc</think>", "<think>ab."),
        ("<think>", ""),
        ("b", "<think>a"),
    ],
)
def test_a_special_token_is_a_stop_string(engine: Engine, stop: str | tuple[str, ...], text: str) -> None:
    assert answer(engine, ignore_eos=True, stop=stop) == (text, "stop")


def test_a_stop_string_is_not_found_across_a_tag(engine: Engine) -> None:
    assert answer(engine, ignore_eos=True, stop="cd") == (f"{WHOLE}e", "length")


def test_a_stop_string_wins_over_the_same_stop_token(engine: Engine) -> None:
    ends = tuple(engine.tokenizer.convert_tokens_to_ids(["</think>", "<|im_start|>"]))
    assert answer(engine, stop_token_ids=ends) == ("<think>ab.\n\nc</think>", "stop_token")
    assert answer(engine, stop_token_ids=ends, stop="</think>") == ("<think>ab.\n\nc", "stop")
    assert answer(engine, stop_token_ids=ends[1:], ignore_eos=True) == (WHOLE, "stop_token")


@pytest.mark.parametrize("stop", ["<|im_end|>\n", " <|im_end|>", "d<|im_end|>", "<|im_end|><|im_start|>"])
def test_a_special_token_beside_other_text_is_refused(engine: Engine, stop: str) -> None:
    with pytest.raises(UserError, match=r"^stop: .* holds the special token <.*>, .*stop_token_ids"):
        answer(engine, stop=("fine", stop))


def test_the_service_takes_a_special_token_as_stop(chain_model: Path, serve_app: Callable[[FastAPI], str]) -> None:
    thread = EngineThread(lambda: load_engine("hf", chain_model, dtype="float32"))
    url = serve_app(create_policy_app(thread, "chain", Limits()))
    wait_until(lambda: thread.ready, "the model is loaded")

    def post(**fields: object) -> httpx.Response:
        body = {"prefix_prompt": "?", "response_num": 1, "temperature": 0, "repetition_penalty": 1, **fields}
        return httpx.post(f"{url}/generate", json=body, timeout=60)

    for fields, text, tokens in (({}, WHOLE, 8), ({"stop": "</think>"}, "<think>ab.\n\nc", 6)):
        answer = post(**fields).json()
        assert (answer["results"], answer["finish_reasons"], answer["token_counts"]) == ([text], ["stop"], [tokens])
    refused = post(stop="d<|im_end|>")
    assert refused.status_code == 422
    assert "stop_token_ids" in refused.json()["detail"]


def test_an_end_outside_of_the_models_vocabulary_ends_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_end_ids", {*engine._end_ids, engine.vocab_size})
    assert answer(engine) == (WHOLE, "stop")
