"""Scores: the packed scorer in bfloat16 against transformers' own model in float32."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import PreTrainedModel

from verl.bringup.step import Context, require, seconds, step
from verl.bringup.workload import STEP_IDS, model_folder, plain_model
from xbai.engine import Scored, Scorer
from xbai.engine.files import read_config
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, load_score_head

SCORE_ERROR = 0.01
PROMPT_TOKENS = 60
ROWS = 8


def texts(rows: int, response_tokens: int, longer: int = 0) -> list[list[int]]:
    """Token ids of so many responses to one prompt, about every 16th of them the end of a step."""
    draw = random.Random(0)
    prompt = [draw.randrange(50, 100) for _ in range(PROMPT_TOKENS)]

    def response(length: int) -> list[int]:
        return [draw.choice(STEP_IDS) if draw.random() < 1 / 16 else draw.randrange(50, 100) for _ in range(length)]

    return [prompt + response(response_tokens + longer * row) for row in range(rows)]


@step(
    means="Scores in bfloat16, computed with packed texts that share prefixes, differ from those of the plain model in "
    "float32 by more than rounding: the score service and every selection by it are wrong. Where the attention "
    "steps pass, see xbai/engine/packed_batch.py (positions, paths) and scorer.py.",
    quick=True,
)
def scores(context: Context) -> str:
    """Trajectory scores within 0.01, and tokens a second."""
    folder = model_folder(context)
    asked = texts(ROWS, 100, longer=30)
    starts = [PROMPT_TOKENS] * len(asked)
    scorer = Scorer.from_folder(folder, dtype="bfloat16")
    scored = scorer.score(asked, starts)
    wanted = _plain_scores(context, folder, scored)
    worst = max(abs(one.value - other) for one, other in zip(scored, wanted, strict=True))
    require(worst < SCORE_ERROR, f"scores are up to {worst:.3g} off; at most {SCORE_ERROR}")
    many = texts(32, 2000 if context.on_gpu else 100)
    scorer.score(many, [PROMPT_TOKENS] * len(many))
    speed = sum(map(len, many)) / seconds(lambda: scorer.score(many, [PROMPT_TOKENS] * len(many)))
    return f"within {worst:.2g} of float32, from {min(wanted):.3f} to {max(wanted):.3f}; {speed:,.0f} tokens/s"


def _plain_scores(context: Context, folder: Path, scored: list[Scored]) -> list[float]:
    """By `hidden_states[-2]` of the whole model at the positions that the scorer names, one text at a time."""
    model = plain_model(context, folder)
    config = SPRMConfig(StepRule("en", step_ids=STEP_IDS), dropout=0.0)
    head = load_score_head(folder, read_config(folder).hidden_size, config).to(context.device)
    return [_plain_score(model, head, one) for one in scored]


@torch.no_grad()
def _plain_score(model: PreTrainedModel, head: ScoreHead, scored: Scored) -> float:
    ids = torch.tensor([scored.token_ids], device=model.device)
    hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-2][0]
    logits = head(hidden[scored.positions]).double()
    return float(torch.nn.functional.logsigmoid(logits).mean().exp())
