"""Where the tags of thinking end among tokens, also in a vocabulary that has no token of its own for one."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from transformers import PreTrainedTokenizerBase

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

TagPieces = tuple[tuple[int, str], ...]
"""Id and text of each token that may hold a part of a tag."""


def single_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The one token that a text is; None where it is several."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def tag_pieces(tokenizer: PreTrainedTokenizerBase) -> TagPieces:
    """The tokens that tags may be made of. What is before and behind a tag may be in its first and last one."""
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids])
    return tuple(
        (i, text)
        for i, text in zip(ids, texts, strict=True)
        if any(any(_parts(text, tag)) for tag in (THINK_OPEN, THINK_CLOSE))
    )


def tag_ends(
    input_ids: Int[Tensor, "batch time"], tag: str, token_id: int | None, pieces: TagPieces
) -> tuple[Bool[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Which tokens end a tag.

    Args:
        input_ids: token ids.
        tag: its text.
        token_id: the tag's own token; None where it is made of `pieces`, without which it is never found.
        pieces: from `tag_pieces`.

    Returns:
        Where a tag ends in the token; where it does, and the token's text goes on behind it.
    """
    nowhere = torch.zeros_like(input_ids, dtype=torch.bool)
    if token_id is not None:
        return input_ids == token_id, nowhere
    if not pieces:
        return nowhere, nowhere
    ids, *columns = (column.to(input_ids.device) for column in _table(tag, pieces))
    index = torch.searchsorted(ids, input_ids).clamp(max=len(ids) - 1)
    is_piece = ids[index] == input_ids
    length, begins, inside, ends, goes_on = (torch.where(is_piece, column[index], 0) for column in columns)
    # Bit k: the text up to the end of this token ends with the first k characters of the tag. Each round adds a token.
    begun = begins
    for _ in range(len(tag) - 2):
        begun = begins | ((_shift_right(begun) & inside) << length)
    before = _shift_right(begun) | 1
    return (before & ends) > 0, (before & goes_on) > 0


def _parts(text: str, tag: str) -> tuple[int, int, int, int]:
    """What of a tag a token may be, as bit fields.

    Returns:
        Bit k is set where the first k characters of the tag end the token; where the token is in the tag from character
        k on; where the tag from character k on begins the token (k = 0: where all of the tag is in it); and where it
        does so, and is not the token's end.
    """
    places = range(1, len(tag))
    begins = sum(1 << k for k in places if text.endswith(tag[:k]))
    inside = sum(1 << k for k in places if text and tag.startswith(text, k) and k + len(text) < len(tag))
    ends = sum(1 << k for k in places if text.startswith(tag[k:])) | (tag in text)
    goes_on = sum(1 << k for k in places if text.startswith(tag[k:]) and text != tag[k:]) | (tag in text[:-1])
    return begins, inside, ends, goes_on


@lru_cache(maxsize=8)
def _table(tag: str, pieces: TagPieces) -> tuple[Int[Tensor, "pieces"], ...]:
    """Of each piece its id (ascending), its length up to the tag's, and its `_parts`."""
    rows = [(i, min(len(text), len(tag)), *_parts(text, tag)) for i, text in pieces]
    return tuple(torch.tensor(rows).T.contiguous())


def _shift_right(values: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)
