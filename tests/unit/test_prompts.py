"""The prompt ends where the response begins, and gets no special tokens beyond the template's."""

from transformers import PreTrainedTokenizerFast

from xbai.prompts import prompt_ids, prompt_text

MESSAGES = [{"role": "user", "content": "Make 10 from 5 9 4"}]


def test_prompt_ends_with_the_generation_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = prompt_text(tiny_tokenizer, MESSAGES)
    assert text == "<|im_start|>user\nMake 10 from 5 9 4<|im_end|>\n<|im_start|>assistant\n"
    ids = prompt_ids(tiny_tokenizer, MESSAGES)
    assert tiny_tokenizer.decode(ids) == text
    assert ids[0] == tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
