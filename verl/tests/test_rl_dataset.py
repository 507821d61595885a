"""Prompts from parquet: what is read, dropped, refused, and where a resumed loader goes on."""

import copy
import logging

import datasets
import pytest
import torch
from tiny import ppo_defaults

from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import DataConfig
from verl.trainer.ppo.data import check_gradable
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, create_dataloader
from xbai.errors import UserError
from xbai.grading import GradeRequest, grade


def _config(**changes) -> DataConfig:
    return with_values(ppo_defaults("data.max_prompt_length=64").data, changes)


@pytest.fixture
def write_rows(tmp_path):
    def write(texts, name="rows.parquet"):
        prompts = [None if text is None else [{"role": "user", "content": text}] for text in texts]
        rows = {
            "data_source": ["make10"] * len(texts),
            "prompt": prompts,
            "reward_model": [{"style": "rule", "ground_truth": str(i)} for i in range(len(texts))],
        }
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_item_is_the_chat_prompt(write_rows, tiny_tokenizer):
    item = RLHFDataset(write_rows(["hi"]), tiny_tokenizer, _config(return_raw_chat=True))[0]
    assert tiny_tokenizer.decode(item["input_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert item["raw_prompt"] == [{"role": "user", "content": "hi"}]
    assert item["reward_model"]["ground_truth"] == "0"


def test_overlong_prompts_are_dropped_and_counted(write_rows, tiny_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        dataset = RLHFDataset(write_rows(["short", "x" * 80, "short too"]), tiny_tokenizer, _config())
    assert [dataset[i]["row_index"] for i in range(len(dataset))] == [0, 2]
    assert "1 of 3 prompts dropped" in caplog.text


@pytest.mark.parametrize(("truncation", "kept"), [("left", slice(-64, None)), ("right", slice(0, 64))])
def test_truncation_keeps_one_end(write_rows, tiny_tokenizer, truncation, kept):
    path, text = write_rows(["a" * 50 + "b" * 50]), "a" * 50 + "b" * 50
    whole = RLHFDataset(path, tiny_tokenizer, _config(max_prompt_length=500))[0]["input_ids"].tolist()
    dataset = RLHFDataset(path, tiny_tokenizer, _config(filter_overlong_prompts=False, truncation=truncation))
    assert dataset[0]["input_ids"].tolist() == whole[kept]
    assert text[:5] in tiny_tokenizer.decode(whole)


def test_truncation_error_names_the_row(write_rows, tiny_tokenizer):
    files = [write_rows(["hi"], "a.parquet"), write_rows(["hi", "x" * 80], "b.parquet")]
    with pytest.raises(UserError, match=r"b\.parquet: row 2 has a prompt of 99 tokens; raise"):
        RLHFDataset(files, tiny_tokenizer, _config(filter_overlong_prompts=False))


def test_a_prompt_of_megabytes_is_not_encoded(write_rows, tiny_tokenizer, monkeypatch):
    encoded = []
    encode = type(tiny_tokenizer).encode

    def counted(tokenizer, text, **options):
        encoded.append(len(text))
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(type(tiny_tokenizer), "encode", counted)
    text = "ab" * 1_000_000
    path = write_rows(["hi", text])
    dataset = RLHFDataset(path, tiny_tokenizer, _config())
    assert [dataset[i]["row_index"] for i in range(len(dataset))] == [0]
    with pytest.raises(UserError, match=r"row 2 has a prompt of more than 16384 characters; raise data.max_prompt"):
        RLHFDataset(path, tiny_tokenizer, _config(filter_overlong_prompts=False))
    for truncation, kept in (("left", "b<|im_end|>\n<|im_start|>assistant\n"), ("right", "<|im_start|>user\na")):
        dataset = RLHFDataset(path, tiny_tokenizer, _config(filter_overlong_prompts=False, truncation=truncation))
        ids = dataset[1]["input_ids"].tolist()
        assert len(ids) == 64
        shown = tiny_tokenizer.decode(ids)
        assert shown.endswith(kept) if truncation == "left" else shown.startswith(kept)
    assert max(encoded) < 50_000


def test_row_without_prompt_is_named(write_rows, tiny_tokenizer):
    path = write_rows(["hi", "there", None])
    with pytest.raises(UserError, match=r"rows\.parquet: row 3: 'prompt'"):
        RLHFDataset(path, tiny_tokenizer, _config())


def test_fields_that_other_rows_have_do_not_reach_the_template(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}"
        "{{ m.tool_calls|length }} {{ m.tool_calls[0].function.arguments|tojson }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"a": 1, "b": 2}}}]}
    other = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"a": 3}}}]}
    prompts = [[{"role": "user", "content": "x"}], [{"role": "user", "content": "y"}, call, other]]
    datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]).to_parquet(tmp_path / "rows.parquet")
    dataset = RLHFDataset(str(tmp_path / "rows.parquet"), tokenizer, _config(return_raw_chat=True))
    texts = [tokenizer.decode(dataset[i]["input_ids"]) for i in range(2)]
    assert texts == ["x;", 'y;1 {"a": 1, "b": 2};1 {"a": 3};']
    assert [dataset[i]["raw_prompt"] for i in range(2)] == prompts


@pytest.mark.parametrize(
    "changes",
    [{}, {"filter_overlong_prompts": False}, {"filter_overlong_prompts": False, "truncation": "left"}],
    ids=["filter", "error", "truncate"],
)
def test_a_prompt_that_the_template_refuses_is_named_before_training(write_rows, tiny_tokenizer, changes):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content|length > 50 %}{{ raise_exception('too much') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    files = [write_rows(["hi", "x" * 40], "a.parquet"), write_rows(["hi", "hi", "x" * 60], "b.parquet")]
    assert len(RLHFDataset(files[0], tokenizer, _config(**changes))) == 2
    with pytest.raises(UserError, match=r"b\.parquet: row 3: 'prompt': the chat template refuses it: too much$"):
        RLHFDataset(files, tokenizer, _config(**changes))


def test_a_damaged_file_is_named(write_rows, tiny_tokenizer, damage):
    path = write_rows([f"hello {number}" for number in range(100)])
    damage(path)
    with pytest.raises(UserError, match=rf"^{path}: cut off, or not a parquet file \(") as refused:
        RLHFDataset(path, tiny_tokenizer, _config())
    assert "\n" not in str(refused.value)


def test_missing_column_and_missing_file(write_rows, tiny_tokenizer):
    with pytest.raises(UserError, match="no column 'question'"):
        RLHFDataset(write_rows(["hi"]), tiny_tokenizer, _config(prompt_key="question"))
    with pytest.raises(UserError, match=r"nowhere\.parquet does not exist"):
        RLHFDataset("nowhere.parquet", tiny_tokenizer, _config())


def test_files_may_hold_ground_truths_of_different_forms(write_rows, tiny_tokenizer, tmp_path):
    row = {"data_source": "make10", "prompt": [{"role": "user", "content": "hello"}]}
    nested = [{**row, "reward_model": {"ground_truth": {"target": "7"}}, "extra_info": {"index": 3}}]
    datasets.Dataset.from_list(nested).to_parquet(tmp_path / "nested.parquet")
    files = [write_rows(["hi", "x" * 80]), str(tmp_path / "nested.parquet")]
    dataset = RLHFDataset(files, tiny_tokenizer, _config())
    assert dataset.values("row_index") == [0, 2]
    assert [truth["ground_truth"] for truth in dataset.values("reward_model")] == ["0", {"target": "7"}]
    assert dataset.places() == [f"{files[0]}: row 1", f"{files[1]}: row 1"]
    batch = collate_fn([dataset[0], dataset[1]], pad_token_id=9)
    assert batch["extra_info"].tolist() == [None, {"index": 3}]


def test_rows_as_metastones_trainer_reads_them(tiny_tokenizer, tmp_path):
    """Its reward managers want a column `question` and answers as {"target": ...}."""
    row = {
        "data_source": "ys_train",
        "prompt": [{"role": "user", "content": "What is 1/2 + 1/2?"}],
        "question": "What is 1/2 + 1/2?",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": {"target": "1"}},
        "extra_info": {"index": 0, "split": "train"},
    }
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "train.parquet")
    dataset = RLHFDataset(f"{tmp_path}/train.parquet", tiny_tokenizer, _config())
    assert dataset[0]["question"] == row["question"]
    custom = ppo_defaults().custom_reward_function
    columns = dataset.values("data_source"), dataset.values("reward_model")
    check_gradable(zip(dataset.places(), *columns), custom)
    (source,), (reward_model,) = columns
    assert grade(GradeRequest(source, r"<think> easy </think> \boxed{1}", reward_model["ground_truth"])) == 1


def test_collate_pads_on_the_left(write_rows, tiny_tokenizer):
    dataset = RLHFDataset(
        [write_rows(["hi"], "a.parquet"), write_rows(["hello"], "b.parquet")], tiny_tokenizer, _config()
    )
    batch = collate_fn([dataset[0], dataset[1]], pad_token_id=9)
    assert batch["row_index"].tolist() == [0, 1]
    assert batch["input_ids"][0, :3].tolist() == [9, 9, 9]
    assert batch["attention_mask"].sum(-1).tolist() == [len(dataset[i]["input_ids"]) for i in (0, 1)]
    assert torch.equal(batch["position_ids"][0], (batch["attention_mask"][0].cumsum(0) - 1).clamp(min=0))


@pytest.mark.parametrize("shuffle", [True, False])
def test_loader_resumes_exactly_at_every_step(write_rows, tiny_tokenizer, shuffle):
    dataset = RLHFDataset(write_rows([str(i) for i in range(7)]), tiny_tokenizer, _config())

    def fresh():
        return create_dataloader(dataset, 2, shuffle=shuffle, seed=3)

    def indices(loader, epochs):
        return [batch["row_index"].tolist() for _ in range(epochs) for batch in loader]

    loader, states, seen = fresh(), [], []
    for _ in range(2):
        for batch in loader:
            seen.append(batch["row_index"].tolist())
            states.append(loader.state_dict())
    assert len(seen) == 6 and (seen[:3] != seen[3:]) == shuffle
    for step, state in enumerate(states, start=1):
        resumed = fresh()
        resumed.load_state_dict(state)
        assert indices(resumed, 2 if step <= 3 else 1) == seen[step:]


def test_batch_larger_than_the_data(write_rows, tiny_tokenizer):
    dataset = RLHFDataset(write_rows(["hi"]), tiny_tokenizer, _config())
    with pytest.raises(UserError, match=r"data\.train_batch_size=2"):
        create_dataloader(dataset, 2, shuffle=True, seed=0)
