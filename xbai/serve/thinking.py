"""The thinking of a response and its answer, in a whole text or in one that is being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xbai.engine.detokenizer import Detokenizer
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN

REPLACEMENT = "\ufffd"
"""What bytes decode to that are no character, or not yet one."""


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt ends inside of an open `<think>`."""
    return prompt.rfind(THINK_OPEN) > prompt.rfind(THINK_CLOSE)


@dataclass
class Said:
    """Parts of a response, without the tags and the white space around them."""

    reasoning: str = ""
    content: str = ""


@dataclass
class ThinkingParser:
    """Takes a response's text piece by piece, and gives what is certain of it.

    The response thinks where its prompt has opened a `<think>`, or where it begins with one; the rest is its content.

    Attributes:
        thinks: it is in its thinking; None where that is still open.
    """

    thinks: bool | None
    _rest: str = ""
    _blank: str = ""
    _has_begun: bool = False

    @classmethod
    def after(cls, prompt: str) -> ThinkingParser:
        """Of a response to this prompt."""
        return cls(thinks=True if opens_thinking(prompt) else None)

    def push(self, text: str) -> Said:
        """What can be told of the response now."""
        self._rest += text
        return self._take(is_end=False)

    def end(self) -> Said:
        """What was held back, as nothing more comes."""
        return self._take(is_end=True)

    def _take(self, is_end: bool) -> Said:
        said = Said()
        if self.thinks is None:
            begin = self._rest.lstrip()
            if not is_end and THINK_OPEN.startswith(begin[: len(THINK_OPEN)]) and len(begin) < len(THINK_OPEN):
                return said
            self.thinks = begin.startswith(THINK_OPEN)
            self._rest = begin.removeprefix(THINK_OPEN) if self.thinks else self._rest
        if self.thinks:
            thought, closed, behind = self._rest.partition(THINK_CLOSE)
            held = 0 if closed or is_end else _held(thought, THINK_CLOSE)
            said.reasoning = self._stripped(thought[: len(thought) - held])
            self._rest = thought[len(thought) - held :]
            if not closed:
                return said
            self.thinks, self._rest = False, behind
            self._blank, self._has_begun = "", False
        said.content = self._stripped(self._rest)
        self._rest = ""
        return said

    def _stripped(self, text: str) -> str:
        """The text, but white space only once something follows it that is none, and none at the beginning."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if not kept:
            return ""
        if not self._has_begun:
            kept, self._has_begun = kept.lstrip(), True
        return kept


def split_thinking(prompt: str, text: str) -> Said:
    """Thinking and content of a whole response to a prompt."""
    parser = ThinkingParser.after(prompt)
    first, last = parser.push(text), parser.end()
    return Said(first.reasoning + last.reasoning, first.content + last.content)


def _held(text: str, tag: str) -> int:
    """How many of the last characters may begin a tag."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


@dataclass
class TextStream:
    """The text of a response whose tokens come one by one.

    Nothing that it gives changes with what follows: it waits for the last byte of a character, and holds back as much
    as a stop string may begin with.
    """

    detokenize: Detokenizer
    stop: Sequence[str] = ()
    _ids: list[int] = field(default_factory=list)
    _begin: int = 0
    _read: int = 0
    _held: str = ""
    _given: int = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """What more of the text is certain."""
        self._ids += token_ids
        # Of the tokens before, the last piece again: a token may decode to something else at the beginning of a text.
        known = self.detokenize(self._ids[self._begin : self._read])
        text = self.detokenize(self._ids[self._begin :])
        if text.endswith(REPLACEMENT) or len(text) <= len(known):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        self._held += text[len(known) :]
        kept = max((len(stop) for stop in self.stop), default=1) - 1
        given, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._given += len(given)
        return given

    def end(self, text: str) -> str:
        """The rest of the whole text."""
        return text[self._given :]
