"""Which tokens end a response: of three files, and of the chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from xbai.engine.end_tokens import end_token_ids, turn_end_id
from xbai.errors import UserError

MESSAGE = "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
EACH = "{% for m in messages %}"
WANTS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (EACH + MESSAGE + "<|im_end|>\n{% endfor %}", "<|im_end|>"),
        (EACH + MESSAGE + " <|im_end|>{% endfor %}", "<|im_end|>"),
        (WANTS_SYSTEM + EACH + MESSAGE + "<|im_end|>{% endfor %}", "<|im_end|>"),
        (EACH + MESSAGE + "<|im_end|>\n{% endfor %}<|endoftext|>", "<|im_end|>"),
        (EACH + MESSAGE + "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}", "<|endoftext|>"),
        (EACH + MESSAGE + "<end_of_turn>\n{% endfor %}", "<end_of_turn>"),
        (EACH + MESSAGE + "<|no_token_of_this_vocabulary|>\n{% endfor %}", None),
        (EACH + "{{ m.role }}: {{ m.content }}\n\n{% endfor %}", None),
        (EACH + "{{ m.content }}{% endfor %}", None),
        ("{{ messages[0].content }}<|im_end|>", None),
        ("{{ raise_exception('no assistant may speak') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_a_token_of_the_template(
    template: str | None, end: str | None, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    tokenizer.add_tokens([AddedToken("<end_of_turn>", normalized=False)])
    found = turn_end_id(tokenizer)
    assert (None if found is None else tokenizer.decode([found])) == end


@pytest.mark.parametrize(
    ("generation_config", "config", "eos", "template", "ends"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, "<|im_end|>", None, {5, 6, 7, 258}),
        (None, {"eos_token_id": [7, 8]}, "<|endoftext|>", None, {7, 8, 256}),
        ({}, {}, "<|endoftext|>", EACH + MESSAGE + "<|im_end|>\n{% endfor %}", {256, 258}),
        # Not 2, which is transformers' default for this family.
        ({}, {"model_type": "llama"}, "<|endoftext|>", None, {256}),
        ({"eos_token_id": None}, {"model_type": "llama", "eos_token_id": None}, "<|endoftext|>", None, {256}),
        (
            {"eos_token_id": 258},
            {"eos_token_id": 256},
            "<|endoftext|>",
            EACH + MESSAGE + "<|im_end|>\n{% endfor %}",
            {256, 258},
        ),
        # What transformers refuses to read.
        ({"eos_token_id": 5, "num_return_sequences": 4}, {"eos_token_id": 7}, "<|im_end|>", None, {5, 7, 258}),
        (None, None, None, None, set()),
    ],
)
def test_all_that_ends_a_response_is_taken_together(
    generation_config: dict | None,
    config: dict | None,
    eos: str | None,
    template: str | None,
    ends: set[int],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    tokenizer.eos_token = eos
    for name, content in (("generation_config.json", generation_config), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert end_token_ids(tmp_path, tokenizer) == sorted(ends)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object")])
def test_a_damaged_file_is_named(
    content: str, message: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"generation_config\.json: {message}"):
        end_token_ids(tmp_path, tiny_tokenizer)


@pytest.mark.parametrize("in_a_rank", [False, True])
def test_an_end_that_is_no_end_of_sequence_is_said_once(
    in_a_rank: bool,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: in_a_rank)
    tokenizer = with_template(tiny_tokenizer, EACH + MESSAGE + "<|im_end|>\n{% endfor %}")
    end_token_ids("in order", tokenizer)
    assert not caplog.messages
    tokenizer.eos_token = "<|endoftext|>"
    for _ in range(2):
        end_token_ids(f"{in_a_rank}", tokenizer)
    assert [("<|im_end|> (id 258) ends a response too" in line) for line in caplog.messages] == [True][in_a_rank:]
