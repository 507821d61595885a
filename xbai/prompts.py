"""From chat messages to the prompt that training, services and evaluation all use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from xbai.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""`{"role": ..., "content": ...}`, and what else a template knows (`tool_calls`, `name`, ...)."""

MOST_CHARACTERS = 300
"""Of what a template says, in an error."""
CHARACTERS_OF_A_TOKEN = 256
"""More than almost any token has."""


class TemplateRefusalError(UserError):
    """The chat template itself does not take such a conversation: its `raise_exception`."""


def chat_messages(value: Any, place: str) -> list[Message]:
    """Messages of a file as a chat template takes them.

    Fields that are null are left out, at any depth: in a column of parquet every message has the fields of all of them.
    Only a null `content` beside tool calls stays, because templates ask for it. Content in parts becomes one text,
    which templates for text alone take too.

    Raises:
        UserError: no list of messages, or one of them without role or text.
    """
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{place} must be a non-empty list of {{role, content}} messages, found {value!r:.60}")
    return [_message(message, f"{place}: message {number}") for number, message in enumerate(value, start=1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{place} must be an object with role and content, found {value!r:.60}")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{place}: role must be a text such as user, found {role!r:.60}")
    if content is None and (value.get("tool_calls") or value.get("function_call")):
        return {**_without_nulls(value), "content": None}
    return {**_without_nulls(value), "content": _text(content, place)}


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if not parts or len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: content must be a text, or a list of parts of type text, found {content!r:.60}")
    return "".join(texts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: str, *, add_generation_prompt: bool
) -> str:
    """What the tokenizer's chat template makes of `messages`, whose errors begin with `place`.

    Raises:
        TemplateRefusalError: the template says that it does not take them.
        UserError: there is no template, or it fails.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{place}: the tokenizer has no chat template, which prompts need")
    try:
        # A text already: its signature does not say that only `tokenize` makes it anything else.
        return str(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt, tokenize=False)
        )
    except Exception as error:  # A template is a program of others, and can fail in any way.
        said = f"{one_line(error):.{MOST_CHARACTERS}}"
        # What `raise_exception` raises; jinja2's own errors are of derived classes.
        if type(error) is TemplateError:
            raise TemplateRefusalError(f"{place}: the chat template refuses it: {said}") from error
        line = f" in its line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise UserError(f"{place}: the chat template fails{line}: {type(error).__name__}: {said}") from error


def example_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    """What the chat template makes of a conversation that stands for any, behind a system message where it wants one.

    Raises:
        TemplateRefusalError, UserError: as of `apply_chat_template`.
    """
    place = tokenizer.name_or_path
    try:
        return apply_chat_template(tokenizer, messages, place, add_generation_prompt=add_generation_prompt)
    except TemplateRefusalError as refusal:
        behind_system = [{"role": "system", "content": "Be brief."}, *messages]
        try:
            return apply_chat_template(tokenizer, behind_system, place, add_generation_prompt=add_generation_prompt)
        except UserError:
            raise refusal from None


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Any, place: str = "prompt") -> str:
    """The chat template applied to `messages`, as `chat_messages` takes them, up to where the response begins.

    Raises:
        UserError: malformed messages, or the template does not take them.
    """
    text = apply_chat_template(tokenizer, chat_messages(messages, place), place, add_generation_prompt=True)
    if not text:
        raise UserError(f"{place}: the chat template makes an empty prompt of it")
    return text


def most_characters(tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """A text of more characters has more than `tokens` tokens: to encode it, only to find that out, can take gigabytes.

    What a tokenizer leaves out (runs of spaces, characters that it does not know) counts too.
    """
    return tokens * max(CHARACTERS_OF_A_TOKEN, *map(len, tokenizer.get_vocab()))


def is_far_longer(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `text` has more than `most_characters`."""
    return len(text) > CHARACTERS_OF_A_TOKEN * tokens and len(text) > most_characters(tokens, tokenizer)
