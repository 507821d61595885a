"""Steps of 1,000 random texts in training, in fused scores and from the score service, against a plain reading of the
rule over the tokens' texts; the service's scores also against transformers, one token at a time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
from clocks import wait_until
from fastapi import FastAPI
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from xbai.engine import Scorer
from xbai.model_folder import load_tokenizer
from xbai.prompts import prompt_text
from xbai.serve.limits import Limits
from xbai.serve.score import create_score_app
from xbai.serve.scorer_thread import ScoreModel, ScorerThread
from xbai.sprm import (
    SPRMConfig,
    StepRule,
    load_score_head,
    load_sprm_config,
    save_score_head,
    step_feature_mask,
    trajectory_scores,
)
from xbai.sprm.steps import step_scores

TEXTS = 500
OPENED = {"opens": "<think>\n", "says nothing": "", "opens and closes": "<think>\n\n</think>\n\n"}
PIECES = ["<think>", "</think>", ".\n\n", ".\n\n", ".\n\n", "\n", "a ", "so ", "2+2"]


class Text(NamedTuple):
    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids


class Kind(NamedTuple):
    """A model whose chat template is of one kind, and texts of it."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    rule: StepRule
    texts: list[Text]
    steps: list[list[int]]
    """Of each text, the positions of its features."""


@pytest.fixture(scope="module", params=OPENED)
def kind(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder = tmp_path_factory.mktemp("region") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = load_tokenizer(folder)
    header = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(f"'{header}'", f"'{header}' + {OPENED[request.param]!r}")
    tokenizer.save_pretrained(folder)
    rule = StepRule.from_tokenizer(tokenizer)
    assert rule.generation_prompt == f"<|im_start|>assistant\n{OPENED[request.param]}"
    save_score_head(folder, torch.load(folder / "score_module.pt", weights_only=True), SPRMConfig(rule))
    texts = random_texts(tokenizer, random.Random(request.param))
    return Kind(folder, tokenizer, rule, texts, [plain_features(text, tokenizer) for text in texts])


def random_texts(tokenizer: PreTrainedTokenizerFast, generator: random.Random) -> list[Text]:
    def pieces(most: int) -> str:
        return "".join(generator.choices(PIECES, k=generator.randint(0, most)))

    texts = []
    for _ in range(TEXTS):
        messages = [{"role": "user", "content": pieces(3)}]
        if generator.random() < 0.3:
            messages += [{"role": "assistant", "content": pieces(4)}, {"role": "user", "content": pieces(2)}]
        prompt, response = prompt_text(tokenizer, messages), pieces(12)
        ids = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, response))
        texts.append(Text(prompt, response, *ids))
    return texts


def plain_features(text: Text, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    prompt, response = ([tokenizer.decode([i]) for i in ids] for ids in (text.prompt_ids, text.response_ids))
    last_tag = next((token for token in reversed(prompt) if token in ("<think>", "</think>")), None)
    begin = 0
    if last_tag != "<think>" and "<think>" in response:
        begin = response.index("<think>") + 1
    region = response[begin:]
    if "</think>" in region:
        region = region[: region.index("</think>")]
    firsts = [i for i in range(1, len(region)) if region[i] == ".\n\n" and region[i - 1] != ".\n\n"]
    return [len(prompt) + begin + i - 1 for i in firsts]


def test_the_texts_are_of_all_kinds(kind: Kind) -> None:
    assert sum(len(steps) > 1 for steps in kind.steps) > 40
    assert sum("</think>" in text.response for text in kind.texts) > 200
    assert sum("<think>" in text.prompt.rpartition("<|im_start|>assistant")[0] for text in kind.texts) > 100


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_training_counts_these_steps(kind: Kind, padding_side: str) -> None:
    """RL pads prompts on the left and responses on the right, SFT whole rows on the right."""

    def pad(rows: list[list[int]], side: str) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_side=side, padding_value=-1)

    if padding_side == "left":
        prompts, responses = (
            pad([t.prompt_ids for t in kind.texts], "left"),
            pad([t.response_ids for t in kind.texts], "right"),
        )
        rows = torch.cat([prompts, responses], dim=1)
        in_response = torch.cat([torch.zeros_like(prompts), responses + 1 > 0], dim=1)
    else:
        rows = pad([t.ids for t in kind.texts], "right")
        starts = torch.tensor([[len(t.prompt_ids)] for t in kind.texts])
        in_response = (rows >= 0) & (torch.arange(rows.shape[1]) >= starts)
    is_real = rows >= 0
    mask = step_feature_mask(rows.clamp(min=kind.tokenizer.pad_token_id), in_response, kind.rule)
    assert not (mask & ~is_real).any()
    for row, real, steps in zip(mask, is_real, kind.steps, strict=True):
        assert row[real].nonzero().flatten().tolist() == steps


def test_fused_scores_are_of_these_steps(kind: Kind) -> None:
    for text, steps in zip(kind.texts, kind.steps, strict=True):
        logits = torch.linspace(-2, 2, len(text.response_ids)).tolist()
        wanted = [logits[position + 1 - len(text.prompt_ids)] for position in steps]
        found, ends = step_scores(text.prompt_ids, text.response_ids, logits, kind.rule)
        assert found == pytest.approx(torch.tensor(wanted).sigmoid().tolist())
        assert all(text.response_ids[end - 1] in kind.rule.step_ids for end in ends)


@pytest.mark.parametrize("says", ["prompt", "text", "response"])
def test_the_score_service_scores_these_steps_as_transformers_does(
    kind: Kind, says: str, serve_app: Callable[[FastAPI], str]
) -> None:
    """By `/score` with the prompt told; by `/score_batch` with texts that hold it, and with 100 that do not."""
    # A third of the texts, for all of which steps are found above.
    answered = [(t, s) for t, s in zip(kind.texts, kind.steps) if t.response][::3]
    texts, steps = map(list, zip(*answered))
    bodies = [{"text": t.prompt + t.response} for t in texts]
    if says == "prompt":
        bodies = [body | {"prompt": t.prompt} for body, t in zip(bodies, texts)]
    if says == "response":
        texts = [Text("", t.response, [], t.response_ids) for t in texts[:100]]
        bodies, steps = [{"text": t.response} for t in texts], [plain_features(t, kind.tokenizer) for t in texts]
    answers = ask(kind, serve_app, bodies)
    values, scores = token_by_token(kind, texts, steps)
    for text, answer, positions, value, wanted in zip(texts, answers, steps, values, scores, strict=True):
        assert answer["token_ids"] == text.ids
        assert answer["score_positions"] == positions
        assert answer["value"] == pytest.approx(value, abs=1e-5)
        assert answer["all_scores"] == pytest.approx(wanted, abs=1e-5)


def ask(kind: Kind, serve_app: Callable[[FastAPI], str], bodies: list[dict]) -> list[dict]:
    thread = ScorerThread(lambda: ScoreModel(Scorer.from_folder(kind.folder), kind.tokenizer, 512))
    url = serve_app(create_score_app(thread, "tiny", Limits()))
    wait_until(lambda: thread.ready, "the model is loaded")
    with httpx.Client(timeout=60) as client:
        if "prompt" in bodies[0]:
            return [client.post(f"{url}/score", json=body | {"return_all_scores": True}).json() for body in bodies]
        body = {"texts": [body["text"] for body in bodies], "return_all_scores": True}
        answer = client.post(f"{url}/score_batch", json=body).json()
    columns = {
        "value": "values",
        "all_scores": "all_scores",
        "token_ids": "token_ids",
        "score_positions": "score_positions",
    }
    return [{name: answer[column][i] for name, column in columns.items()} for i in range(len(bodies))]


def token_by_token(kind: Kind, texts: list[Text], steps: list[list[int]]) -> tuple[list[float], list[list[float]]]:
    """Trajectory and step scores; all texts go through the whole model together, in steps of one token each."""
    model = AutoModelForCausalLM.from_pretrained(kind.folder, dtype=torch.float32).eval()
    config = load_sprm_config(kind.folder, kind.tokenizer)
    head = load_score_head(kind.folder, model.config.hidden_size, config)
    ids = pad_sequence([torch.tensor(text.ids) for text in texts], batch_first=True)
    cache, logits = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for column in ids.split(1, dim=1):
            output = model(column, past_key_values=cache, use_cache=True, output_hidden_states=True)
            logits.append(head(output.hidden_states[-2])[:, 0])
    of_texts = torch.stack(logits, dim=1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, positions in zip(mask, steps, strict=True):
        row[positions] = True
    values = trajectory_scores(of_texts, mask).tolist()
    return values, [row[chosen].sigmoid().tolist() for row, chosen in zip(of_texts, mask)]
