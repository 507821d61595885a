"""The score service finds the response as generation left it, over a tokenizer that merges newlines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from clocks import PATIENCE_S, wait_until
from fastapi import FastAPI

from xbai.benchmarks.tiny_model import write_tiny_model
from xbai.engine import Scorer, load_engine
from xbai.model_folder import load_tokenizer
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app
from xbai.serve.score import create_score_app
from xbai.serve.scorer_thread import ScoreModel, ScorerThread
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, save_score_head

PROMPT = "<|im_start|>user\nStep one.\n\nMake 10<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("score") / "model"
    write_tiny_model(path)
    config = SPRMConfig(StepRule.from_tokenizer(load_tokenizer(path)))
    save_score_head(path, ScoreHead(128).state_dict(), config)
    return path


@pytest.mark.parametrize("response", ["\n1+2 no.\n\n3+4 yes.\n\nSo 3", "\n\nx.\n\ny", ".\n\nx.\n\ny", "\n"])
def test_a_bare_text_scores_as_one_with_its_prompt(
    serve_app: Callable[[FastAPI], str], folder: Path, response: str
) -> None:
    tokenizer = load_tokenizer(folder)
    thread = ScorerThread(lambda: ScoreModel(Scorer.from_folder(folder), tokenizer, 1024))
    url = serve_app(create_score_app(thread, "tiny", Limits()))
    wait_until(lambda: thread.ready, "the scorer is loaded")
    body = {"text": PROMPT + response, "return_all_scores": True}
    bare, told = (httpx.post(f"{url}/score", json=body | extra).json() for extra in ({}, {"prompt": PROMPT}))
    assert bare == told
    assert bare["token_ids"] == tokenizer.encode(PROMPT) + tokenizer.encode(response)
    assert all(position >= len(tokenizer.encode(PROMPT)) for position in bare["score_positions"])
    texts = {"texts": [PROMPT + response, PROMPT + "a.\n\nb", PROMPT + response], "prompt": PROMPT}
    batch = httpx.post(f"{url}/score_batch", json=texts).json()
    assert batch.keys() == {"values"}
    detailed = httpx.post(f"{url}/score_batch", json={**texts, "return_all_scores": True}).json()
    assert detailed["values"] == batch["values"]
    for i in (0, 2):
        assert detailed["values"][i] == pytest.approx(bare["value"], abs=1e-6)
        assert detailed["all_scores"][i] == pytest.approx(bare["all_scores"], abs=1e-6)
        assert detailed["token_ids"][i] == bare["token_ids"]
        assert detailed["score_positions"][i] == bare["score_positions"]
    assert len(detailed["all_scores"][1]) == 1


def test_a_batch_that_cannot_be_scored_names_the_texts(serve_app: Callable[[FastAPI], str], folder: Path) -> None:
    thread = ScorerThread(lambda: ScoreModel(Scorer.from_folder(folder), load_tokenizer(folder), 8))
    url = serve_app(create_score_app(thread, "tiny", Limits()))
    wait_until(lambda: thread.ready, "the scorer is loaded")
    refused = httpx.post(f"{url}/score_batch", json={"texts": ["1+2", "1+2" * 4, "1", "1+2" * 3]})
    assert refused.status_code == 413
    assert refused.json()["detail"] == "texts[1]: 12 tokens, texts[3]: 9 tokens, the model takes 8"
    refused = httpx.post(f"{url}/score_batch", json={"texts": ["1+2", "2+1"], "prompt": "1"})
    assert (refused.status_code, refused.json()["detail"]) == (422, "prompt: texts[1] does not start with it")


def test_one_server_scores_as_the_score_service_does_while_it_generates(
    serve_app: Callable[[FastAPI], str], folder: Path
) -> None:
    engine = EngineThread(lambda: load_engine("hf", folder, with_scores=True))
    scorer = ScorerThread(lambda: ScoreModel(Scorer.from_folder(folder), load_tokenizer(folder), 1024))
    one = serve_app(create_policy_app(engine, "tiny", Limits(), with_score_routes=True))
    apart = serve_app(create_score_app(scorer, "tiny", Limits()))
    wait_until(lambda: engine.ready and scorer.ready, "both models are loaded")
    endless = {"prefix_prompt": PROMPT, "max_tokens": 900, "response_num": 1, "stop_token_ids": []}
    with ThreadPoolExecutor(1) as client:
        generating = client.submit(httpx.post, f"{one}/generate", json=endless, timeout=PATIENCE_S)
        wait_until(lambda: engine.begun or generating.done(), "it generates")
        for path, body in (
            ("/score", {"text": f"{PROMPT}a.\n\nb.\n\nc", "return_all_scores": True}),
            ("/score_batch", {"texts": [f"{PROMPT}a.\n\nb", f"{PROMPT}c"], "prompt": PROMPT}),
        ):
            together, expected = (httpx.post(url + path, json=body, timeout=PATIENCE_S).json() for url in (one, apart))
            assert together == expected
        assert generating.result().is_success
    too_long = httpx.post(f"{one}/score", json={"text": "1+2" * 2000})
    assert too_long.status_code == 413
