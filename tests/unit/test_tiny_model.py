"""The from-scratch model and tokenizer."""

import random
import string

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xbai.benchmarks.make10 import Teacher, question_text, sample_problems
from xbai.benchmarks.tiny_model import make_tokenizer, write_tiny_model
from xbai.sprm import StepRule, split_response, step_feature_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(path, seed=5)
    return path


def test_task_text_round_trips_in_known_tokens(folder):
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(0)
    for numbers in sample_problems(50, rng):
        messages = [
            {"role": "user", "content": question_text(numbers)},
            {"role": "assistant", "content": Teacher().solve(numbers, rng)},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_numbers_and_step_delimiter_are_single_tokens():
    tokenizer = make_tokenizer()
    assert tokenizer.tokenize("7+8=15-1=14 no.\n\n") == ["7", "+", "8", "=", "15", "-", "1", "=", "14", " no", ".\n\n"]
    assert StepRule.from_tokenizer(tokenizer).step_ids == (tokenizer.convert_tokens_to_ids(".\n\n"),)


def test_any_printable_ascii_round_trips():
    tokenizer, text = make_tokenizer(), string.printable[:95] + "\n\n 123 \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_attempt_and_the_conclusion_are_steps():
    tokenizer = make_tokenizer()
    rule = StepRule.from_tokenizer(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Make 10 from 5 9 4"}], tokenize=False, add_generation_prompt=True
    )
    response = "<think>\n5+9=14+4=18 no.\n\n5+9=14-4=10 yes.\n\nSo 5+9-4.\n\n</think>\n\nThe answer is \\boxed{5+9-4}."
    assert split_response(prompt + response, rule) == (prompt, response)
    ids, start = torch.tensor([tokenizer.encode(prompt + response)]), len(tokenizer.encode(prompt))
    mask = step_feature_mask(ids, torch.arange(ids.shape[1])[None] >= start, rule)
    assert tokenizer.batch_decode(ids[0][mask[0]][:, None]) == [" no", " yes", "4"]


def test_same_seed_same_model(folder, tmp_path):
    write_tiny_model(tmp_path / "same", seed=5)
    write_tiny_model(tmp_path / "other", seed=6)
    first, same, other = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (folder, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_existing_folder_is_left_alone(folder):
    with pytest.raises(FileExistsError):
        write_tiny_model(folder)
