"""scripts/language.sh: whole in small on a random Llama, both settings in one folder, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xbai.model_folder import load_tokenizer

COMMAND = "bash scripts/language.sh"
SHARED_STAGES = {"setup", "convert", "data", "sft", "sample_base"}
ARM_STAGES = {
    "published": {"rl", "merge", "sample_rl", "calibrate", "metrics", "report"},
    "recommended": {"judge", "rl", "merge", "sample_rl", "calibrate", "metrics", "report"},
}
QUESTIONS = 2
# Of a tokenizer of bytes, prompts are longer than those of the recipe.
MINIATURE = {
    "QUESTIONS": str(QUESTIONS),
    "JUDGE_QUESTIONS": "2",
    "RANKS": "1",
    "SFT_ARGS": "trainer.total_training_steps=2 data.train_batch_size=4 data.micro_batch_size_per_gpu=4",
    "RL_ARGS": "trainer.total_training_steps=1 trainer.val_before_train=false trainer.test_freq=-1 "
    "data.train_batch_size=2 data.max_prompt_length=600 data.max_response_length=16 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=2 actor_rollout_ref.rollout.n=2",
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 whose tokenizer knows bytes and ends of turns, but none of the tokens of steps."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def language(checkout, tmp_path: Path, tiny_llama: Path) -> Callable[..., tuple[int, str]]:
    """`language(**variables) -> status, output` runs it in small into `tmp_path / "out"`."""

    def run(**variables: str) -> tuple[int, str]:
        settings = {"OUT": str(tmp_path / "out"), "LANGUAGE_MODEL": str(tiny_llama), "DEVICE": "cpu", **MINIATURE}
        return checkout.run(COMMAND, timeout_s=600, **settings | variables)

    return run


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"TASK": "poetry"}, "TASK=poetry is unknown, use stories or gsm8k"),
        (
            {"TASK": "gsm8k"},
            "TASK=gsm8k needs GSM8K=folder with the files of GSM8K, train and test as .jsonl or .parquet",
        ),
        ({"SETTING": "best"}, "SETTING=best is unknown, use recommended or published"),
        ({"LANGUAGE_MODEL": "nowhere"}, "LANGUAGE_MODEL=nowhere: no such folder"),
    ],
)
def test_what_cannot_run_is_one_line(language, tmp_path, variables, error):
    assert language(**variables) == (2, f"error: {error}\n")
    assert not (tmp_path / "out" / "stages").exists()


def finish_stages(folder: Path, *names: str) -> None:
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "stages" / name).write_text("0\n", encoding="utf-8")


def test_wheels_that_cannot_be_had_are_one_line(language, tmp_path):
    finish_stages(tmp_path / "out", "setup")
    # Without an index there is nothing to fetch from: see conftest.py.
    status, output = language(LANGUAGE_MODEL="")
    assert status == 2
    *_, last = output.splitlines()
    assert last.startswith("error: the wheels of scripts/language_requirements.txt cannot be had here")
    assert "LANGUAGE_MODEL=folder" in last


def test_another_model_needs_another_folder(language, tmp_path):
    finish_stages(tmp_path / "out")
    (tmp_path / "out" / "settings").write_text("SEED=1\n", encoding="utf-8")
    status, output = language()
    assert (status, output.splitlines()[-1].split("; ")) == (
        2,
        [f"error: {tmp_path}/out was begun with SEED=1", "set OUT to another folder, or remove it"],
    )


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_finished_stages_are_skipped_and_shared_by_the_settings(language, tmp_path):
    out = tmp_path / "out"
    # What is left is to convert, to make the data and to fine-tune.
    finish_stages(out, "setup", "sample_base")
    for setting in ("recommended", "published"):
        finish_stages(out / setting, *ARM_STAGES[setting])
    status, output = language()
    assert status == 0, output[-4000:]
    assert {path.name for path in (out / "stages").iterdir()} == SHARED_STAGES
    assert load_tokenizer(out / "base").tokenize("So 7.\n\n")[-1] == ".\n\n"

    before = modified(out)
    for setting in ("recommended", "published"):
        status, output = language(SETTING=setting)
        assert status == 0, output
        assert output.count("finished earlier") == len(SHARED_STAGES | ARM_STAGES[setting])
        assert f"{setting} setting: finished earlier" in output
    added = modified(out).keys() - before.keys()
    assert added == {out / "published/settings"}
    assert modified(out).items() >= before.items()


@pytest.fixture(scope="session")
def coins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in GSM8K's published form whose answers are the fall of a coin: at best, half of what is said is right."""
    folder, rng = tmp_path_factory.mktemp("coins"), random.Random(0)
    for split, count in (("train", 400), ("test", QUESTIONS)):
        rows = [
            {"question": f"Coin {n} of {split}?", "answer": f"It falls\n#### {rng.choice('12')}"} for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.long
def test_both_settings_run_whole_in_one_folder(language, tmp_path, coins):
    """On GSM8K's files; a head to begin with needs a model that is right at times."""
    out = tmp_path / "out"
    learnt = "optim.lr=3e-3 trainer.total_training_steps=150 data.train_batch_size=16 data.micro_batch_size_per_gpu=16"
    rl = MINIATURE["RL_ARGS"].replace("max_response_length=16", "max_response_length=64")
    for setting in ("recommended", "published"):
        status, output = language(
            TASK="gsm8k", GSM8K=str(coins), SETTING=setting, JUDGE_QUESTIONS="4", SFT_ARGS=learnt, RL_ARGS=rl
        )
        assert status == 0, output[-4000:]
        assert output.count("finished earlier") == (0 if setting == "recommended" else len(SHARED_STAGES))
        assert {path.name for path in (out / setting / "stages").iterdir()} == ARM_STAGES[setting]
        summary = json.loads((out / setting / "summary.json").read_text(encoding="utf-8"))
        assert summary["problems"] == QUESTIONS and "held_out" not in summary
        assert {"base", "rl"} == set(summary["pass_at_1"]) and 0 < summary["pass_at_1"]["base"] < 1
        changed = [key for key in summary["score_setting"]["overrides"] if ".score." in key]
        assert bool(changed) == (setting == "recommended")
        spent = sum(
            int(path.read_text(encoding="utf-8")) for at in (out, out / setting) for path in (at / "stages").iterdir()
        )
        assert summary["seconds_total"] == spent - int((out / setting / "stages/report").read_text(encoding="utf-8"))
    assert {path.name for path in (out / "results").glob("*.jsonl")} == {"base.jsonl", "base_judge.jsonl"}


@pytest.mark.long
def test_stories_run_whole(language, tmp_path):
    status, output = language(SETTING="published")
    assert status == 0, output[-4000:]
    summary = json.loads((tmp_path / "out/published/summary.json").read_text(encoding="utf-8"))
    assert (summary["problems"], summary["held_out"]["problems"]) == (QUESTIONS, QUESTIONS // 2)


@pytest.mark.long
def test_a_model_that_is_never_right_is_one_line(language, tmp_path):
    """With what to do about it; the published setting begins without a head."""
    finish_stages(tmp_path / "out", "setup", "sample_base")
    status, output = language()
    assert status == 2
    assert output.splitlines()[-1].startswith("error: data.train_files: none of the 2 prompts has both a right and a")
