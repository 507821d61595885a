"""Fenced blocks of Markdown, read as leniently as models write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from xbai.grading.python_syntax import is_in_string, parse_python

MAX_TRIES = 32
"""At how many fences inside of one block its end is looked for."""

_PYTHON = re.compile(r"(?:python|pypy|py)[\d.]*|\S+\.py", re.IGNORECASE)
_MARKDOWN = ("markdown", "md")
_WORD = re.compile(r"\{?\.?([\w+#.-]+)")
_FENCE = re.compile(r"`{3,}|~{3,}")
_AT_START = re.compile(r"((?:[\s>]|[-*+]\s|\d+[.)]\s)*)(`{3,}|~{3,})(.*)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    """The first word after the opening fence, in lower case; empty without one."""
    text: str
    """Its content; without an end, all that follows."""
    is_closed: bool = True
    """It has an end."""

    @property
    def is_marked_python(self) -> bool:
        """Whether it is marked as Python."""
        return _PYTHON.fullmatch(self.language) is not None

    @property
    def may_be_python(self) -> bool:
        """Whether it is marked as Python, or not at all."""
        return not self.language or self.is_marked_python


_End = tuple[Block, int]
"""A block, and the number of the line to go on with."""


@dataclass(frozen=True)
class _Opening:
    indent: str
    fence: str
    language: str

    def outdent(self, line: str) -> str:
        return line.removeprefix(self.indent) if line.strip() != self.indent.strip() else ""

    def block(self, lines: list[str], is_closed: bool = True) -> Block:
        return Block(self.language, "\n".join(map(self.outdent, lines)), is_closed)


def fenced_blocks(text: str) -> Iterator[Block]:
    """The blocks of a text, in order.

    A fence is three or more backticks or tildes. It may follow other text in its line, as in `Answer: ```python`. A
    block ends at the next fence of its kind that is as long, whatever stands after it, be it on the last line of code;
    but a fence inside of a string of Python, or in a comment, ends nothing. Of a block of Markdown, the blocks in it
    are read; and so are those that follow a fence without an end.
    """
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if one_line := _one_line_block(line):
            yield one_line
            continue
        opening = _opening(line)
        if opening is None or opening.language in _MARKDOWN:
            continue
        end = _end(opening, lines, number)
        if end is None:
            yield opening.block(lines[number:], is_closed=False)
        else:
            block, number = end
            yield block


def _one_line_block(line: str) -> Block | None:
    """Python between two fences, of which the second ends the line."""
    fences = list(_FENCE.finditer(line))
    if len(fences) != 2 or line[fences[1].end() :].strip():
        return None
    language, _, code = line[fences[0].end() : fences[1].start()].partition(" ")
    block = Block(language.lower(), code.strip())
    return block if block.is_marked_python else None


def _opening(line: str) -> _Opening | None:
    at_start = _AT_START.fullmatch(line)
    if at_start:
        before, fence, info = at_start.groups()
        if "`" in fence and "`" in info:
            return None
        # The lines of a list's item are indented by as much as its mark takes.
        return _Opening(re.sub(r"[^\s>]", " ", before), fence, _language(info))
    fences = list(_FENCE.finditer(line))
    if len(fences) != 1:
        return None
    fence, info = fences[0].group(), line[fences[0].end() :].strip()
    opens = _PYTHON.fullmatch(info) or ("`" in fence and not info)
    return _Opening("", fence, _language(info)) if opens else None


def _language(info: str) -> str:
    word = _WORD.match(info.strip())
    return word.group(1).lower() if word else ""


def _end(opening: _Opening, lines: list[str], first: int) -> _End | None:
    """Where the block ends whose first line is `lines[first]`; None where it has no end."""
    fallback: _End | None = None
    tries = 0
    for number in range(first, len(lines)):
        line = lines[number]
        for fence in _FENCE.finditer(line):
            before, after = line[: fence.start()], line[fence.end() :]
            is_at_start = not opening.outdent(before).strip()
            if not fence.group().startswith(opening.fence) or (tries >= MAX_TRIES and not is_at_start):
                continue
            tries += 1
            block = opening.block(lines[first:number] if is_at_start else [*lines[first:number], before])
            end = block, number if is_at_start and _opens_another(after) else number + 1
            if "#" not in before and _ends_here(block, is_at_start, bool(after.strip())):
                return _more_like_python(end, fallback)
            if is_at_start or not after.strip():
                fallback = fallback or end
            if tries >= MAX_TRIES:
                return fallback
    return fallback


def _more_like_python(end: _End, earlier: _End | None) -> _End:
    """The end that was found, unless the code up to an earlier fence, in what looks like a comment, alone is Python."""
    if earlier is None or parse_python(end[0].text) is not None or parse_python(earlier[0].text) is None:
        return end
    return earlier


def _ends_here(block: Block, is_at_start: bool, has_text_after: bool) -> bool:
    if not block.may_be_python:
        return is_at_start or not has_text_after
    if has_text_after and not is_at_start:
        return parse_python(block.text) is not None
    return not is_in_string(block.text, triple_quoted=is_at_start)


def _opens_another(info: str) -> bool:
    return bool(_WORD.fullmatch(info.rstrip()) or _PYTHON.fullmatch(info.strip()))
