"""Supervised fine-tuning: its rows, its batches, its command line, and one rank against four."""

import json
import logging
import random
import subprocess
import sys

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.models.loading import fast_dtype
from verl.optim.muon import Muon, orthogonalized
from verl.trainer import main_sft
from verl.trainer.config.compose import compose_config
from verl.trainer.config.sft import YAML, SFTConfig, SFTData, check_sft_config
from verl.trainer.sft import model_output
from verl.trainer.sft.metrics_window import MetricsWindow
from verl.trainer.sft.trainer import SFTTrainer
from verl.utils.dataset.sft_dataset import SFTDataset, collate_examples, length_grouped_batches
from xbai.benchmarks.make10 import Teacher, sample_problems, sft_row
from xbai.benchmarks.tiny_model import make_tokenizer, write_tiny_model
from xbai.errors import UserError
from xbai.files import check_room
from xbai.sprm import ScoreHead, load_score_head, load_sprm_config, save_score_head

DATA = SFTData(
    train_files="none",
    prompt_key="prompt",
    response_key="response",
    label_key="correct",
    train_batch_size=1,
    micro_batch_size_per_gpu=1,
    max_length=512,
)
CHAT = [{"role": "user", "content": "Make 10 from 7 3"}]


def _config(overrides: list[str]) -> SFTConfig:
    return check_sft_config(compose_config(YAML, overrides))


def write_rows(path, rows):
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_example_is_prompt_response_and_end_of_turn(tmp_path, tokenizer):
    rows = [{"prompt": CHAT, "response": "So 7+3.", "correct": True}]
    example = SFTDataset(write_rows(tmp_path / "a.parquet", rows), tokenizer, DATA)[0]
    expected = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "So 7+3."}], tokenize=False)
    assert tokenizer.decode(example.ids) + "\n" == expected
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "So 7+3.<|im_end|>"
    assert example.correct is True


def test_rows_without_label_train_the_language_model_only(tmp_path, tokenizer):
    dataset = SFTDataset(write_rows(tmp_path / "a.parquet", [{"prompt": CHAT, "response": "7"}]), tokenizer, DATA)
    assert not dataset.has_labels
    assert collate_examples([dataset[0]], 0)["graded"].tolist() == [False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": CHAT, "response": "x"}, {"prompt": None, "response": "x"}],
            "row 2: 'prompt' must be a non-empty list",
        ),
        ([{"prompt": CHAT, "response": "x"}, {"prompt": CHAT, "response": None}], "row 2: 'response' must be a text"),
        ([{"prompt": CHAT, "response": "7" * 600}], "row 1 has 6.. tokens, more than data.max_length=512"),
        ([{"prompt": CHAT, "response": "7" * 200_000}], "row 1 has a text of 200000 characters, which no"),
        ([{"question": "x", "response": "x"}], "no column 'prompt'"),
        ([{"prompt": CHAT, "answer": "x"}], "no column 'response'"),
    ],
)
def test_bad_row_is_named(tmp_path, tokenizer, rows, message):
    with pytest.raises(UserError, match=message):
        SFTDataset(write_rows(tmp_path / "a.parquet", rows), tokenizer, DATA)


def test_a_prompt_that_the_template_refuses_is_named(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if 'name' in m %}{{ m.name.upper() }}{% endif %}{{ m.content }}{% endfor %}"
    )
    named = [{"role": "user", "content": "7", "name": "ann"}]
    rows = [{"prompt": CHAT, "response": "x"}, {"prompt": named, "response": "x"}]
    dataset = SFTDataset(write_rows(tmp_path / "a.parquet", rows), tokenizer, DATA)
    assert tokenizer.decode(dataset[0].ids[: dataset[0].prompt_length]) == CHAT[0]["content"]
    rows.append({"prompt": [{"role": "system", "content": "Be brief."}, *CHAT], "response": "x"})
    with pytest.raises(UserError, match=r"row 3: 'prompt': the chat template refuses it: System role not supported$"):
        SFTDataset(write_rows(tmp_path / "b.parquet", rows), tokenizer, DATA)


def test_a_damaged_file_is_named(tmp_path, tokenizer, damage):
    path = write_rows(tmp_path / "a.parquet", 100 * [{"prompt": CHAT, "response": "So 7+3."}])
    damage(path)
    with pytest.raises(UserError, match=rf"^data.train_files: {path} is cut off, or not a parquet file \(") as refused:
        SFTDataset(path, tokenizer, DATA)
    assert "\n" not in str(refused.value)


def test_missing_file_is_named(tokenizer):
    with pytest.raises(UserError, match=r"nowhere.parquet does not exist"):
        SFTDataset("nowhere.parquet", tokenizer, DATA)


def test_collate_pads_right_and_marks_the_response(tmp_path, tokenizer):
    rows = [{"prompt": CHAT, "response": text, "correct": text == "7+3"} for text in ("7+3", "7-3=4 no")]
    dataset = SFTDataset(write_rows(tmp_path / "a.parquet", rows), tokenizer, DATA)
    batch = collate_examples([dataset[0], dataset[1]], tokenizer.pad_token_id)
    assert batch["attention_mask"].sum(1).tolist() == [len(dataset[0].ids), len(dataset[1].ids)]
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], batch["response_mask"])]
    assert texts == ["7+3<|im_end|>", "7-3=4 no<|im_end|>"]
    assert batch["correct"].tolist() == [1.0, 0.0]


def test_batches_hold_each_row_once_and_rows_of_like_length():
    rng = random.Random(0)
    lengths = [rng.randint(10, 200) for _ in range(256)]
    batches = length_grouped_batches(lengths, 8, epoch_seed=1)
    assert sorted(row for batch in batches for row in batch) == list(range(256))
    padding = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches) - sum(lengths)
    assert padding < 0.2 * sum(lengths)
    assert batches == length_grouped_batches(lengths, 8, epoch_seed=1) != length_grouped_batches(lengths, 8, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], "unknown configuration key optim.learning_rate; did you mean"),
        ([], "data.train_files is not set"),
        (["optim.lr=["], "optim.lr"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        compose_config("sft_trainer", overrides)
    assert "\n" not in str(caught.value)


def test_only_the_first_rank_says_what_all_of_them_found(monkeypatch):
    monkeypatch.setattr(main_sft, "FIRST_RANK_GRACE_S", 0.0)

    def fail():
        with main_sft.first_rank_speaks():
            raise UserError("optim.lr")

    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        fail()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"optim\.lr"):
        fail()


def test_orthogonalized_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(0)
    for shape in ((24, 16), (16, 24)):
        matrix = torch.randn(shape)
        result = orthogonalized(matrix)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.4 and values.max() < 1.4
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        rotated = u.T @ result @ v.T
        assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 0.1


def test_muon_equals_adamw_off_the_matrices():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(7)), torch.nn.Parameter(torch.zeros(7))
    theirs.data.copy_(ours.data)
    muon = Muon([("norm.weight", ours)], lr=1.0, adamw_lr=0.01)
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(7)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_the_seed_is_each_ranks_own_and_float16_is_refused(tmp_path):
    write_tiny_model(tmp_path / "base")
    rows = [{"prompt": CHAT, "response": "7+3"}]
    overrides = [
        f"data.train_files={write_rows(tmp_path / 'sft.parquet', rows)}",
        f"model.path={tmp_path / 'base'}",
        f"trainer.output_dir={tmp_path / 'out'}",
        "data.train_batch_size=1",
        "trainer.seed=7",
    ]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        trainer = SFTTrainer(_config(overrides), torch.device("cpu"))
        assert torch.initial_seed() == 7
        assert trainer._compute_dtype == fast_dtype(torch.device("cpu"))
        with pytest.raises(UserError, match=r"^model\.compute_dtype=fp16 cannot train"):
            _config([*overrides, "model.compute_dtype=fp16"])
    finally:
        dist.destroy_process_group()


def test_gradients_are_added_up_over_replicas_in_the_last_micro_batch_alone(tmp_path, monkeypatch):
    write_tiny_model(tmp_path / "base")
    overrides = [
        f"data.train_files={write_rows(tmp_path / 'sft.parquet', [{'prompt': CHAT, 'response': '7+3'}] * 5)}",
        f"model.path={tmp_path / 'base'}",
        f"trainer.output_dir={tmp_path / 'out'}",
        "data.train_batch_size=5",
        "data.micro_batch_size_per_gpu=2",
        "model.compute_dtype=float32",
    ]
    all_reduces, passes = [], []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        trainer = SFTTrainer(_config(overrides), torch.device("cpu"))
        trainer.init_model()
        monkeypatch.setattr(
            type(trainer.model), "set_requires_all_reduce", lambda _, wanted: all_reduces.append(wanted)
        )
        trainer.model.register_forward_hook(lambda *_: passes.append(len(all_reduces)))
        trainer.update(list(trainer.dataset.examples), MetricsWindow(torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    assert all_reduces == [False, False, True]
    assert passes == [1, 2, 3]


def test_a_time_out_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    overrides = [f"{key}=x" for key in ("data.train_files", "model.path", "trainer.output_dir")]
    monkeypatch.setattr("sys.argv", ["main_sft", *overrides, "trainer.nccl_timeout=0"])
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "0")
    with pytest.raises(SystemExit, match="2"):
        main_sft.main()
    assert "trainer.nccl_timeout=0 must be a number of seconds above 0" in capsys.readouterr().err


def run_sft(ranks, *overrides):
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--rdzv-endpoint=localhost:0",
        "--rdzv-backend=c10d",
    ]
    command = [sys.executable, *launcher, "-m", "verl.trainer.main_sft", "--config-name", "make10_sft", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(("has_bfloat16", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_only_chosen_where_the_device_has_it(has_bfloat16: bool, chosen: torch.dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    assert fast_dtype(torch.device("cpu")) == chosen
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_dtype_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    write_tiny_model(tmp_path / "base")
    with pytest.raises(SystemExit, match="2"):
        sft_alone(monkeypatch, tmp_path, "trainer.output_dtype=int8")
    assert "trainer.output_dtype=int8: dtype 'int8' is unknown, use one of" in capsys.readouterr().err


@pytest.mark.long
def test_replicas_of_two_shards_train_as_one_rank_and_the_result_loads(tmp_path):
    write_tiny_model(tmp_path / "base")
    rng = random.Random(0)
    rows = [sft_row(numbers, Teacher(), rng, i) for i, numbers in enumerate(sample_problems(48, rng))]
    common = [
        f"data.train_files={write_rows(tmp_path / 'sft.parquet', rows)}",
        f"model.path={tmp_path / 'base'}",
        "model.compute_dtype=float32",
        "data.train_batch_size=16",
        "data.micro_batch_size_per_gpu=3",
        "score.agreement_weighting=true",
        "score.class_balance=true",
        "trainer.log_freq=1",
        "trainer.logger=[file]",
    ]
    records = []
    for ranks, shards in ((1, -1), (4, 2)):
        output = tmp_path / f"out{ranks}"
        done = run_sft(ranks, *common, f"trainer.output_dir={output}", f"fsdp_config.fsdp_size={shards}")
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / f"out{ranks}_logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records.append([json.loads(line) for line in lines])
    assert len(records[0]) == 3
    for key in ("sft/loss", "score/loss", "grad_norm/policy", "grad_norm/score"):
        assert records[0][0][key] == pytest.approx(records[1][0][key], rel=1e-4), key
    assert records[0][-1]["sft/loss"] == pytest.approx(records[1][-1]["sft/loss"], rel=1e-2)

    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    config = load_sprm_config(output, tokenizer)
    assert config.normalize_features
    head = load_score_head(output, model.config.hidden_size, config)
    assert head(torch.ones(1, 128)).isfinite().all()


def sft_alone(monkeypatch, folder, *overrides, rows=({"prompt": CHAT, "response": "7+3"},) * 10):
    """Two steps in this process over ten rows of tokens."""
    common = [
        f"data.train_files={write_rows(folder / 'sft.parquet', rows)}",
        f"model.path={folder / 'base'}",
        f"trainer.output_dir={folder / 'out'}",
        "trainer.logger=[console]",
        "data.train_batch_size=5",
        "model.compute_dtype=float32",
    ]
    monkeypatch.setattr("sys.argv", ["main_sft", *common, *overrides])
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    main_sft.main()


LABELLED = [{"prompt": CHAT, "response": "So 7+3.\n\nIt is 10.\n\nYes", "correct": i % 2 == 0} for i in range(10)]


def one_sided_base(folder):
    """A model whose head puts every step below 0.5."""
    write_tiny_model(folder)
    head = ScoreHead(128)
    torch.nn.init.constant_(head[3].bias, -9.0)
    save_score_head(folder, head.state_dict(), None)


def test_a_fresh_head_starts_undecided_and_a_loaded_one_as_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for base, fresh in (("fresh", True), ("loaded", False)):
        caplog.clear()
        folder = tmp_path / base
        folder.mkdir()
        (write_tiny_model if fresh else one_sided_base)(folder / "base")
        sft_alone(monkeypatch, folder, "trainer.total_training_steps=6", "trainer.logger=[file]", rows=LABELLED)
        records = [
            json.loads(line)
            for line in (folder / "out_logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert ("the fresh score head starts on features standardised by 20 steps" in caplog.text) == fresh
        warnings = [message for message in caplog.messages if "the score head is one-sided" in message]
        assert len(warnings) == (not fresh)
        assert all("score.agreement_weighting=false" in warning for warning in warnings)
        assert (records[-1]["score/one_sided"] < 1) == (records[-1]["score/loss"] > 0) == fresh


GENERATION_CONFIG = b'{"eos_token_id": 2, "pad_token_id": 0,\n "temperature": 0.6, "top_p": 0.95}'


@pytest.mark.parametrize(("overrides", "dtype"), [([], "bfloat16"), (["trainer.output_dtype=float32"], "float32")])
def test_the_model_is_written_as_it_came_but_for_its_weights(tmp_path, monkeypatch, overrides, dtype):
    base, out = tmp_path / "base", tmp_path / "out"
    write_tiny_model(base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    (base / "generation_config.json").write_bytes(GENERATION_CONFIG)
    sft_alone(monkeypatch, tmp_path, *overrides)
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == load_file(base / "model.safetensors").keys()
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == config["torch_dtype"] == dtype and config["rope_theta"] == 10000.0
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)


def test_an_output_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, capsys):
    write_tiny_model(tmp_path / "base")
    (tmp_path / "file").touch()
    monkeypatch.setattr(SFTTrainer, "update", None)
    with pytest.raises(SystemExit, match="2"):
        sft_alone(monkeypatch, tmp_path, f"trainer.output_dir={tmp_path}/file/out")
    error = capsys.readouterr().err
    assert f"trainer.output_dir={tmp_path}/file/out: the model cannot be written (FileExistsError: " in error
    monkeypatch.setattr(model_output, "check_room", lambda folder, needed: check_room(folder, needed * 10**13))
    with pytest.raises(SystemExit, match="2"):
        sft_alone(monkeypatch, tmp_path)
    assert "MB are free; make room or choose another folder)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "sft.parquet"]
