"""A Qwen3 and its tokenizer made from scratch: small enough to learn Make 10 on a laptop."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from xbai.files import atomic_directory
from xbai.model_files import ModelFiles
from xbai.sprm.step_rule import STEP_TEXT_EN
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END]
THINK_TAGS = [THINK_OPEN, THINK_CLOSE]
WORDS = [
    *(STEP_TEXT_EN, "\n\n", "system", "user", "assistant", "Make ", " from"),
    *(" yes", " no", " close", "So ", "The answer is \\boxed{"),
]
NUMBERS = [str(number) for number in range(10, 21)]
CHARACTERS = ["\n", *map(chr, range(32, 127))]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the task's words, whole numbers up to 20, and every printable ASCII character.

    ASCII text decodes to itself; any other character becomes `<|endoftext|>`.
    """
    pieces = [*WORDS, *NUMBERS, *CHARACTERS]
    vocabulary = {text: index for index, text in enumerate([*SPECIAL, *THINK_TAGS, *pieces])}
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in text) for text in longest_first)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(THINK_TAGS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The shape of the tiny model: 0.8 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.06,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def write_tiny_model(folder: str | Path, seed: int = 0) -> None:
    """Save an untrained model and its tokenizer as a Hugging Face folder.

    Raises:
        FileExistsError: when `folder` exists already.
    """
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(tiny_config(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        ModelFiles.read(temporary).write(temporary)


def main(out: Annotated[Path, typer.Option(help="folder to create")], seed: int = 0) -> None:
    """Write the tiny model."""
    write_tiny_model(out, seed)
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
