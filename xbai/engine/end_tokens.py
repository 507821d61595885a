"""Which tokens end a response."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xbai.errors import UserError
from xbai.model_folder import read_json
from xbai.prompts import example_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ANSWER = "Indeed"


def end_token_ids(model_path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response, in ascending order.

    The ends of sequence of `generation_config.json`, `config.json` and the tokenizer, and what the chat template ends
    a turn with: a model that was taught turns goes on with the next one, where that is no end of sequence.

    Raises:
        UserError: one of the files is no JSON object.
    """
    files = (Path(model_path) / name for name in ("config.json", "generation_config.json"))
    # From the files: where they name none, transformers has defaults for families of models, of other vocabularies.
    listed = [tokenizer.eos_token_id, *(read_json(file).get("eos_token_id") for file in files if file.is_file())]
    ids = {i for ends in listed for i in (ends if isinstance(ends, list) else [ends]) if i is not None}
    turn_end = turn_end_id(tokenizer)
    if turn_end is not None and turn_end not in ids:
        token = tokenizer.convert_ids_to_tokens(turn_end)
        if not torch.distributed.is_initialized():  # The ranks of a trainer leave it to their driver.
            _say_once(
                f"{model_path}: {token} (id {turn_end}) ends a response too: no end of sequence, but what the chat "
                "template ends a turn with"
            )
        ids.add(turn_end)
    return sorted(ids)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token with which the chat template ends an assistant's turn; None where it ends with none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = example_text(tokenizer, messages, add_generation_prompt=False)
    except UserError:  # It may want other messages; what it says of a user's is for whoever makes prompts.
        return None
    _, found, after = text.rpartition(_ANSWER)
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False) if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
