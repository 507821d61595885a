"""Strings at which generation pauses, so that no step is missed; the step rule then tells whether it was one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbai.sprm import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_STOP_TEXTS = 16


def stop_texts(rule: StepRule, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The fewest strings of which every step token's text holds one: the token's own, or the marks of a family."""
    texts = tokenizer.batch_decode([[i] for i in rule.step_ids])
    if len(texts) <= MAX_STOP_TEXTS:
        return tuple(dict.fromkeys(texts))
    return tuple(mark for mark in ("\n", "。") if any(mark in text for text in texts))
