"""From tokens to the text of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from xbai.errors import UserError
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Decodes responses without the vocabulary's special tokens, save for think tags that are some.

    A text without its tags would lose where thinking ends: to the step rule, and to graders.

    Attributes:
        keeps_special: whether a think tag is one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._left_out = {i: text for i, text in special.items() if text not in (THINK_OPEN, THINK_CLOSE)}
        self.keeps_special = len(self._left_out) < len(special)

    def __call__(self, token_ids: Sequence[int]) -> str:
        """The text."""
        ids = [i for i in token_ids if i not in self._left_out] if self.keeps_special else list(token_ids)
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=not self.keeps_special))

    def stop_ids(self, stop: Sequence[str]) -> set[int]:
        """The tokens of those stop strings that no text has, since they are special tokens.

        Raises:
            UserError: one of these with other text beside it.
        """
        ids = set()
        for string in stop:
            within = {i: text for i, text in self._left_out.items() if text and text in string}
            exact = {i for i, text in within.items() if text == string}
            if within and not exact:
                i, text = max(within.items(), key=lambda item: len(item[1]))
                raise UserError(
                    f"stop: {string!r} holds the special token {text}, which is found only alone; give that, or its "
                    f"id {i} in stop_token_ids"
                )
            ids |= exact
        return ids
