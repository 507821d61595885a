"""Thinking and content of texts that come in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from xbai.engine.detokenizer import Detokenizer
from xbai.serve.thinking import Said, TextStream, ThinkingParser, opens_thinking, split_thinking

PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</th", "ink>", " ", "\n\n", "a", "<", "b.\n\n"]),
    max_size=12,
)


def plain_split(prompt: str, text: str) -> Said:
    """The reference, of a whole text."""
    if not opens_thinking(prompt):
        if not text.lstrip().startswith("<think>"):
            return Said("", text.strip())
        text = text.lstrip().removeprefix("<think>")
    reasoning, _, content = text.partition("</think>")
    return Said(reasoning.strip(), content.strip())


@given(st.sampled_from(["p", "p<think>", "<think>x</think>y", "<think></think><think>\n"]), PIECES)
def test_pieces_say_what_the_whole_says(prompt: str, pieces: list[str]) -> None:
    parser = ThinkingParser.after(prompt)
    parts = [*map(parser.push, pieces), parser.end()]
    said = Said("".join(part.reasoning for part in parts), "".join(part.content for part in parts))
    assert said == plain_split(prompt, "".join(pieces)) == split_thinking(prompt, "".join(pieces))


@given(st.text(max_size=30), st.lists(st.integers(1, 5), min_size=1), st.sampled_from([(), ("ab",), ("a\n", "éé")]))
def test_a_stream_of_tokens_is_their_text(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, sizes: list[int], stop: tuple[str, ...]
) -> None:
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    detokenize = Detokenizer(tiny_tokenizer)
    whole = detokenize(ids)
    cut = min((whole.index(each) for each in stop if each in whole), default=len(whole))
    stream, given_text, at = TextStream(detokenize, stop), "", 0
    for size in sizes * len(ids):
        # An engine ends with the token that completes a stop string, and does not show it.
        if any(each in detokenize(ids[: at + size]) for each in stop):
            break
        given_text += stream.push(ids[at : at + size])
        at += size
        assert whole[:cut].startswith(given_text)
    assert given_text + stream.end(whole[:cut]) == whole[:cut]


def test_text_comes_as_soon_as_it_is_certain(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(Detokenizer(tiny_tokenizer))
    ids = tiny_tokenizer.encode("aé.\n\nb", add_special_tokens=False)
    assert [stream.push([i]) for i in ids] == ["a", "", "é", ".\n\n", "b"]


@pytest.mark.parametrize(
    ("pieces", "reasoning", "content"),
    [
        (["<think>", "so", "\n", "</th", "ink>", "\n\n", "it ", "is"], ["so"], ["it", " is"]),
        (["no", " tag"], [], ["no", " tag"]),
    ],
)
def test_what_is_told_when(pieces: list[str], reasoning: list[str], content: list[str]) -> None:
    parser = ThinkingParser.after("")
    parts = [*map(parser.push, pieces), parser.end()]
    assert [part.reasoning for part in parts if part.reasoning] == reasoning
    assert [part.content for part in parts if part.content] == content
