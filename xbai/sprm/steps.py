"""Which positions of a response are reasoning steps. Training and serving both ask this one module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xbai.errors import UserError
from xbai.prompts import TemplateRefusalError, apply_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STEP_TEXT_EN = ".\n\n"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class StepRule:
    """The tokens that end a step, and where to look for them. Travels with the model.

    Attributes:
        lang: `en` (one delimiter token) or `zh` (a family of newline and full-stop tokens).
        step_ids: token ids that end a step.
        think_open_id, think_close_id: ids of `<think>` and `</think>`; None where the tokenizer has no single token.
        generation_prompt: what the chat template puts before a response, to find where one begins in a bare text.
    """

    lang: str
    step_ids: tuple[int, ...]
    think_open_id: int | None = None
    think_close_id: int | None = None
    generation_prompt: str = ""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, lang: str = "en") -> StepRule:
        """Derive the rule from a tokenizer.

        Raises:
            UserError: unknown `lang`, or a tokenizer that has no token of the kind the rule needs.
        """
        if lang not in _STEP_IDS:
            raise UserError(f"step rule: lang={lang!r} is unknown, use one of {sorted(_STEP_IDS)}")
        return cls(
            lang=lang,
            step_ids=_STEP_IDS[lang](tokenizer),
            think_open_id=_single_id(tokenizer, THINK_OPEN),
            think_close_id=_single_id(tokenizer, THINK_CLOSE),
            generation_prompt=_generation_prompt(tokenizer),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StepRule:
        """The inverse of `to_dict`."""
        return cls(**{**value, "step_ids": tuple(value["step_ids"])})


def _step_ids_en(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = tokenizer.encode(STEP_TEXT_EN, add_special_tokens=False)
    if not ids or tokenizer.decode(ids[:1]) != STEP_TEXT_EN:
        raise UserError(
            f"step rule: the tokenizer has no single token for {STEP_TEXT_EN!r} (it gives {len(ids)} tokens); "
            "use lang=zh, whose steps end at any short newline or full-stop token, or add the token to the vocabulary"
        )
    return (ids[0],)


def _step_ids_zh(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids])
    found = tuple(i for i, text in zip(ids, texts) if _is_zh_delimiter(text))
    if not found:
        raise UserError("step rule: no token of the vocabulary holds a newline or '。', so lang=zh finds no steps")
    return found


def _is_zh_delimiter(text: str) -> bool:
    others = sum(c not in "\n。" for c in text)
    return 0 < len(text) <= 3 and others < len(text) and others <= 1


_STEP_IDS = {"en": _step_ids_en, "zh": _step_ids_zh}


def _single_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    messages, place = [{"role": "user", "content": "x"}], tokenizer.name_or_path
    try:
        bare = apply_chat_template(tokenizer, messages, place, add_generation_prompt=False)
        opened = apply_chat_template(tokenizer, messages, place, add_generation_prompt=True)
    except TemplateRefusalError as refusal:
        logger.warning("%s (a question alone); what it puts before a response stays unknown", refusal)
        return ""
    # A template that closes a bare conversation in another way does not say what opens a response.
    return opened[len(bare) :] if opened.startswith(bare) else ""


def split_response(text: str, rule: StepRule) -> tuple[str, str]:
    """Prompt and response of a whole conversation whose prompt length is unknown.

    To be encoded apart, as they were generated: a token may not straddle the border.

    Returns:
        What stands up to the end of the last generation prompt, and the rest; all of it is response where there is
        none.
    """
    if not rule.generation_prompt:
        return "", text
    before, found, response = text.rpartition(rule.generation_prompt)
    return before + found, response


def step_feature_mask(input_ids: Tensor, response_mask: Tensor, rule: StepRule) -> Tensor:
    """Mark the position just before each step token: its hidden state is the feature of the step.

    Only step tokens inside the response count, and there only those between `<think>` and `</think>` (the whole
    response where either tag is missing or repeated). Of consecutive step tokens the first counts; one right after
    `<think>`, or at the response's very first position, does not.

    Args:
        input_ids: [batch, time] token ids.
        response_mask: [batch, time], True on response tokens (a contiguous run per row).
        rule: the model's step rule.

    Returns:
        [batch, time] bool mask of feature positions.
    """
    response = response_mask.bool()
    is_step = torch.isin(input_ids, torch.tensor(rule.step_ids, device=input_ids.device)) & response
    region = response & _thinking_region(input_ids, response, rule)
    follows_step, follows_region = _shift_right(is_step), _shift_right(region)
    counted = is_step & region & ~follows_step & follows_region
    if rule.think_open_id is not None:
        counted &= ~_shift_right(input_ids == rule.think_open_id)
    return torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)


def scores_within(before: Sequence[int], added: Sequence[int], scores: Sequence[float], rule: StepRule) -> list[float]:
    """Of the step scores of a continuation that was judged alone, those that count in the whole response.

    A continuation alone does not know of a `<think>` before it, and so takes what follows `</think>` for steps. It has
    no score of a step whose token it begins with.

    Args:
        before: the response's tokens that were there.
        added: the continuation's.
        scores: one for each step of `added`, were it the whole response.
        rule: which tokens end a step.
    """
    ids = torch.tensor([[*before, *added]])
    is_added = torch.arange(ids.shape[1])[None] >= len(before)
    alone = step_feature_mask(ids, is_added, rule)
    whole = step_feature_mask(ids, torch.ones_like(is_added), rule)
    # Text from a service may encode to other tokens than those that were generated and scored.
    counts = whole[alone].tolist() if int(alone.sum()) == len(scores) else [True] * len(scores)
    return [score for score, counted in zip(scores, counts, strict=True) if counted]


def _thinking_region(input_ids: Tensor, response: Tensor, rule: StepRule) -> Tensor:
    if rule.think_open_id is None or rule.think_close_id is None:
        return torch.ones_like(response)
    opens = (input_ids == rule.think_open_id) & response
    closes = (input_ids == rule.think_close_id) & response
    inside = opens.cumsum(1) > closes.cumsum(1)
    well_formed = (opens.sum(1) == 1) & (closes.sum(1) == 1) & inside.any(1)
    return inside | ~well_formed[:, None]


def _shift_right(mask: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
