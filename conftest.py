"""Fixtures that several test folders share: a tiny tokenizer and random Qwen3 models that use it."""

from __future__ import annotations

import builtins
import faulthandler
import gc
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# The folder `verl/` holds both the package and its tests, and pytest's importlib mode would take the folder itself for
# a namespace package `verl` as it imports `verl/tests/...`, unless the real one is loaded already.
import verl  # noqa: F401

if find_spec("beartype") is not None:
    # Every call of the method and of the algorithms is checked against the shapes in their annotations.
    import jaxtyping

    # The modules know them while types are checked, and do without when they run.
    vars(builtins).update(
        {name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Float32", "Float64", "Int", "Int64", "Shaped")}
    )
    jaxtyping.install_import_hook(
        ["xbai.calibration", "xbai.sprm", "verl.trainer.ppo.core_algos"], "shape_checks.checked"
    )
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, save_score_head

# How long an example takes says nothing where other work is done beside it.
hypothesis.settings.register_profile("xbai", deadline=None)
hypothesis.settings.load_profile("xbai")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

BOUNDS_S = {"long": 1800, "slow": 900}
"""What a test with this mark may take, with the fixtures that it is the first to need; `timeout` is the others'. Ten
times what it takes when nothing else runs, but for the few whose fixtures are whole runs."""
GRACE_S = 60
STDERR = pytest.StashKey[int]()
BOUND_S = pytest.StashKey[float]()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A bound for each."""
    if bounds := [seconds for mark, seconds in BOUNDS_S.items() if item.get_closest_marker(mark)]:
        item.add_marker(pytest.mark.timeout(max(bounds)))


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries complain of what they find left at the end of the process."""
    gc.unfreeze()


def pytest_configure(config: pytest.Config) -> None:
    """What is written there is seen, also while a test's output is captured."""
    config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """pytest-timeout raises in the test, which code that no signal reaches never sees; the process then ends instead.

    Under pytest-xdist that is a failure of the test, too.
    """
    item.stash[BOUND_S] = settings.timeout
    _show_stacks_and_end_after(settings.timeout + GRACE_S, item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a test that ran into its bound leaves to its fixtures may hang as well."""
    if BOUND_S in item.stash:
        _show_stacks_and_end_after(item.stash[BOUND_S] + GRACE_S, item)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer() -> None:
    """It has ended."""
    faulthandler.cancel_dump_traceback_later()


def _show_stacks_and_end_after(seconds: float, item: pytest.Item) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[STDERR])


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that run inside of a test configure logging for the whole process, on streams that end with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _blank_pages(content: bytes) -> bytes:
    blank = len(content) // 3
    return content[:8] + bytes(blank) + content[8 + blank :]


def _blank_footer(content: bytes) -> bytes:
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    return content[:begin] + bytes(40) + content[begin + 40 :]


@pytest.fixture(
    params=[_cut, _blank_pages, _blank_footer, lambda content: b"", lambda content: b"<html>" * 50],
    ids=["cut", "blank pages", "blank footer", "empty", "a page"],
)
def damage(request: pytest.FixtureRequest) -> Callable[[str | Path], None]:
    """`damage(path)` spoils a parquet file, each time the test runs in another way."""

    def damage(path: str | Path) -> None:
        Path(path).write_bytes(request.param(Path(path).read_bytes()))

    return damage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be made here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def remount(small_disk: Path) -> Callable[[str], None]:
    """`remount(option)` changes `small_disk`: `ro`, `rw`, `size=...`."""

    def remount(option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", small_disk], check=True)

    return remount


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes plus the tokens that matter: `.\\n\\n`, think tags and Qwen's chat markers; it can encode any text."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", ".\n\n")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def make_tiny_model(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_tiny_model(tied=False, seed=0) -> folder`: a random 4-layer Qwen3 with tokenizer and score head."""

    def make(tied: bool = False, seed: int = 0) -> Path:
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tiny_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        save_score_head(folder, ScoreHead(64).state_dict(), SPRMConfig(StepRule.from_tokenizer(tiny_tokenizer)))
        torch.set_rng_state(generator_state)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """A random Qwen3 with untied embeddings, its tokenizer and a random score head. Do not write into it."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tied_model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """The same with tied embeddings."""
    return make_tiny_model(tied=True)
