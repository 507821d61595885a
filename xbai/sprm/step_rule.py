"""Which tokens end a reasoning step, and where to look for them: the rule that travels with a model."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from xbai.errors import UserError
from xbai.prompts import TemplateRefusalError, example_text
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN, TagPieces, single_id, tag_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STEP_TEXT_EN = ".\n\n"


@dataclass(frozen=True)
class StepRule:
    """The tokens that end a step, and where to look for them. Travels with the model.

    Attributes:
        lang: `en` (one delimiter token) or `zh` (a family of newline and full-stop tokens).
        step_ids: token ids that end a step.
        think_open_id, think_close_id: ids of `<think>` and `</think>`; None where the tokenizer has no single token.
        generation_prompt: what the chat template puts before a response, to find where one begins in a bare text.
        tag_pieces: the tokens that tags without a token of their own may be made of; from the tokenizer, never stored.
    """

    lang: str
    step_ids: tuple[int, ...]
    think_open_id: int | None = None
    think_close_id: int | None = None
    generation_prompt: str = ""
    tag_pieces: TagPieces = ()

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, lang: str = "en") -> StepRule:
        """Derive the rule from a tokenizer.

        Raises:
            UserError: unknown `lang`, or a tokenizer that has no token of the kind the rule needs.
        """
        if lang not in _STEP_IDS:
            raise UserError(f"step rule: lang={lang!r} is unknown, use one of {sorted(_STEP_IDS)}")
        rule = cls(
            lang=lang,
            step_ids=_STEP_IDS[lang](tokenizer),
            think_open_id=single_id(tokenizer, THINK_OPEN),
            think_close_id=single_id(tokenizer, THINK_CLOSE),
            generation_prompt=_generation_prompt(tokenizer),
        )
        return rule.with_tag_pieces(tokenizer)

    def with_tag_pieces(self, tokenizer: PreTrainedTokenizerBase) -> StepRule:
        """The rule with `tag_pieces`, where it needs any."""
        needs_some = None in (self.think_open_id, self.think_close_id)
        return replace(self, tag_pieces=tag_pieces(tokenizer) if needs_some else ())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of what is stored."""
        return {name: value for name, value in asdict(self).items() if name != "tag_pieces"}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StepRule:
        """The inverse of `to_dict`; `with_tag_pieces` adds what is not stored.

        Raises:
            ValueError, KeyError, TypeError: it is no such form.
        """
        rule = cls(**{**value, "step_ids": tuple(value["step_ids"])})
        if rule.lang not in _STEP_IDS or not isinstance(rule.generation_prompt, str):
            raise ValueError(f"lang={rule.lang!r:.60}, generation_prompt={rule.generation_prompt!r:.60}")
        if not all(type(i) is int for i in rule.step_ids) or not all(
            i is None or type(i) is int for i in (rule.think_open_id, rule.think_close_id)
        ):
            raise TypeError("an id of a token is no whole number")
        return rule


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
    found = tuple(i for i, text in zip(ids, texts, strict=True) if _is_zh_delimiter(text))
    if not found:
        raise UserError("step rule: no token of the vocabulary holds a newline or '。', so lang=zh finds no steps")
    return found


def _is_zh_delimiter(text: str) -> bool:
    others = sum(c not in "\n。" for c in text)
    return 0 < len(text) <= 3 and others < len(text) and others <= 1


_STEP_IDS = {"en": _step_ids_en, "zh": _step_ids_zh}


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    messages = [{"role": "user", "content": "x"}]
    try:
        bare, opened = (example_text(tokenizer, messages, add_generation_prompt=opens) for opens in (False, True))
    except TemplateRefusalError as refusal:
        logger.warning("%s (a question alone); what it puts before a response stays unknown", refusal)
        return ""
    # A template that closes a bare conversation in another way does not say what opens a response.
    return opened[len(bare) :] if opened.startswith(bare) else ""


def split_response(text: str, rule: StepRule) -> tuple[str, str]:
    """Prompt and response of a whole conversation whose prompt length is unknown.

    To be encoded apart, as they were generated: a token may not straddle the border.

    Returns:
        What stands up to the end of the last generation prompt, with or without the `<think>` that it may open, and
        the rest; all of it is response where there is none.
    """
    if not rule.generation_prompt:
        return "", text
    header = rule.generation_prompt.partition(THINK_OPEN)[0] or rule.generation_prompt
    before, found, response = text.rpartition(header)
    opening = rule.generation_prompt[len(header) :]
    if not found or not response.startswith(opening):
        opening = ""
    return before + found + opening, response[len(opening) :]
