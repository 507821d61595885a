"""Questions by seed, and what one engine answers to each: copies of a service have to say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xbai.engine import SamplingParams, load_engine
from xbai.prompts import prompt_text

MAX_TOKENS = 12
SEEDS = 6


def question(seed: int) -> dict[str, Any]:
    """Body of a request for a chat completion."""
    messages = [{"role": "user", "content": f"question {seed}"}]
    return {"messages": messages, "reasoning_effort": "none", "max_tokens": MAX_TOKENS, "seed": seed}


def right_answers(model: Path) -> list[str]:
    """To each seed."""
    engine = load_engine("hf", str(model))
    found = []
    for seed in range(SEEDS):
        prompt = prompt_text(engine.tokenizer, question(seed)["messages"], "messages")
        params = SamplingParams(1, MAX_TOKENS, temperature=0.8, top_p=0.95, repetition_penalty=1.05, seed=seed)
        ((completion,),) = engine.generate([engine.tokenizer.encode(prompt, add_special_tokens=False)], [params])
        found.append(completion.text)
    return found


def said(answer: dict[str, Any]) -> str:
    """The whole text of a chat completion."""
    message = answer["choices"][0]["message"]
    return (message.get("reasoning") or "") + message["content"]
