"""A score service as public code has it, to compare with: one text after the other through the whole model.

    python bench/reference_score_service.py --model_path DIR --port 8001

All hidden states are kept and all logits computed. Steps, head and score are those of `xbai.sprm`, so that both
services give the same values.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import machine  # noqa: F401 (makes xbai importable)
import torch
import typer
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM

from xbai.model_folder import load_tokenizer
from xbai.serve.schemas import ScoreRequest, ScoreResponse
from xbai.sprm import load_score_head, load_sprm_config, split_response, step_feature_mask, trajectory_scores


class PlainScorer:
    """The whole causal LM with the score head beside it."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = load_tokenizer(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        sprm_config = load_sprm_config(folder, self._tokenizer)
        self._rule = sprm_config.step_rule
        self._head = load_score_head(folder, self._model.config.hidden_size, sprm_config).to(device)

    @torch.no_grad()
    def __call__(self, text: str) -> float:
        """The trajectory score."""
        prompt_ids, response_ids = self._tokenizer(
            list(split_response(text, self._rule)), add_special_tokens=False
        ).input_ids
        input_ids = torch.tensor([prompt_ids + response_ids], device=self._model.device)
        output = self._model(input_ids=input_ids, output_hidden_states=True)
        is_response = torch.arange(input_ids.shape[1], device=input_ids.device)[None] >= len(prompt_ids)
        mask = step_feature_mask(input_ids, is_response, self._rule)
        return float(trajectory_scores(self._head(output.hidden_states[-2]), mask))


def create_app(score: PlainScorer) -> FastAPI:
    """`POST /score`, a text at a time."""
    app = FastAPI()
    one_at_a_time = ThreadPoolExecutor(1)

    @app.post("/score", response_model_exclude_none=True)
    async def answer(body: ScoreRequest) -> ScoreResponse:
        return ScoreResponse(value=await asyncio.get_running_loop().run_in_executor(one_at_a_time, score, body.text))

    @app.get("/ready")
    async def ready() -> None:
        """The model was loaded before the port was taken."""

    return app


def main(
    model_path: Annotated[Path, typer.Option("--model_path")], port: Annotated[int, typer.Option("--port")]
) -> None:
    """Serve until SIGTERM."""
    uvicorn.run(create_app(PlainScorer(model_path)), host="127.0.0.1", port=port, access_log=False)


if __name__ == "__main__":
    typer.run(main)
