"""Supervised fine-tuning that is interrupted goes on exactly where it was, and refuses what it cannot go on from."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from verl.checkpoints.folder import LATEST_FILE
from verl.trainer import main_sft
from verl.trainer.sft import run_state
from verl.trainer.sft.trainer import SFTTrainer
from verl.utils.tracking import METRICS_FILE
from xbai.benchmarks.make10 import Teacher, sample_problems, sft_row
from xbai.benchmarks.tiny_model import write_tiny_model
from xbai.files import check_room

STEPS = 7
"""Five in the first epoch, two in the next."""


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint after every step, records that cover three, and dropout."""
    folder, rng = tmp_path_factory.mktemp("sft"), random.Random(0)
    write_tiny_model(folder / "base")
    rows = [sft_row(numbers, Teacher(), rng, i) for i, numbers in enumerate(sample_problems(22, rng))]
    pd.DataFrame(rows).to_parquet(folder / "sft.parquet")
    return [
        f"data.train_files={folder}/sft.parquet",
        f"model.path={folder}/base",
        "model.compute_dtype=float32",
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=1",
        "optim.lr=1e-3",
        "score.backbone_grad_scale=1.0",
        "score.agreement_weighting=false",
        f"trainer.total_training_steps={STEPS}",
        "trainer.logger=[file]",
        "trainer.log_freq=3",
        "trainer.save_freq=1",
        "trainer.max_ckpt_to_keep=null",
    ]


def fine_tune(folder: Path, overrides: list[str], config: str = "sft_trainer") -> None:
    """Run the command in this process, on one rank."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    places = {"default_local_dir": folder, "log_dir": folder, "output_dir": folder / "out"}
    arguments = ["--config-name", config, *(f"trainer.{key}={path}" for key, path in places.items()), *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["main_sft", *arguments])
        for variable, value in rank.items():
            patch.setenv(variable, value)
        main_sft.main()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Path, list[str]], str]:
    """`refused(folder, overrides)` is the one line of a run that is none."""

    def run(folder: Path, overrides: list[str]) -> str:
        with pytest.raises(SystemExit, match="2"):
            fine_tune(folder, overrides)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    return run


@pytest.fixture(scope="module")
def uninterrupted(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one rank."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    fine_tune(folder, overrides)
    return folder


@pytest.fixture
def interrupted(uninterrupted: Path, tmp_path: Path) -> Callable[[int], Path]:
    """`interrupted(step)` is the folder of a run that ended as the checkpoint after `step` had been written."""

    def make(step: int) -> Path:
        folder = tmp_path / "run"
        for number in range(1, step + 1):
            shutil.copytree(uninterrupted / f"global_step_{number}", folder / f"global_step_{number}")
        (folder / LATEST_FILE).write_text(str(step), encoding="utf-8")
        # Written after the checkpoint, and not to be there twice.
        shutil.copy(uninterrupted / METRICS_FILE, folder)
        return folder

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    head = torch.load(folder / "out" / "score_module.pt", weights_only=True)
    return load_file(folder / "out" / "model.safetensors") | head


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    expected = weights(other)
    assert weights(one).keys() == expected.keys()
    for name, weight in weights(one).items():
        assert torch.equal(weight, expected[name]), name
    assert metrics(one) == [pytest.approx(row, rel=1e-12) for row in metrics(other)]


@pytest.mark.parametrize("step", [1, 5, STEPS])
def test_it_goes_on_bit_by_bit(step: int, interrupted: Callable[[int], Path], overrides, uninterrupted: Path) -> None:
    folder = interrupted(step)
    fine_tune(folder, overrides)
    assert_same_run(folder, uninterrupted)
    assert [row["step"] for row in metrics(folder)] == [3, 6, 7]
    assert len(list(folder.glob("global_step_*"))) == STEPS and not list(folder.glob(".*"))


def other_rows(overrides: list[str], folder: Path) -> str:
    table = pd.read_parquet(overrides[0].partition("=")[2])
    table.iloc[1:].to_parquet(folder / "other.parquet")
    return f"data.train_files={folder}/other.parquet"


def other_model(overrides: list[str], folder: Path) -> str:
    write_tiny_model(folder / "other", seed=1)
    return f"model.path={folder}/other"


def other_template(overrides: list[str], folder: Path) -> str:
    shutil.copytree(overrides[1].partition("=")[2], folder / "base")
    template = folder / "base" / "chat_template.jinja"
    template.write_text("Solve this. " + template.read_text(encoding="utf-8"), encoding="utf-8")
    return f"model.path={folder}/base"


DOES_NOT_FIT = {
    "rows": (other_rows, "other.parquet has changed (", "put that back, or start anew"),
    "model": (other_model, "model.path=", " was base:", "and is other:"),
    "template": (other_template, "the tokenizer or chat template in model.path", "22 then, 22 now since"),
    "batch": ("data.train_batch_size=2", "data.train_batch_size was 4 and is 2 since"),
    "order": ("trainer.seed=1", "trainer.seed was 0 and is 1 since"),
    "labels": ("data.label_key=none", "data.label_key was correct and is none since"),
    "head": ("score.normalize_features=true", "normalize_features was False and is True for the score head (score.*,"),
    "steps": ("trainer.total_training_steps=2", "global_step_3 is further than the 2 steps of this run"),
}


@pytest.mark.parametrize("change", DOES_NOT_FIT)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: str, interrupted: Callable[[int], Path], overrides, refused, tmp_path: Path
) -> None:
    value, *words = DOES_NOT_FIT[change]
    folder = interrupted(3)
    override = value if isinstance(value, str) else value(overrides, tmp_path)
    line = refused(folder, [*overrides, override])
    for word in [*words, f"{folder}/global_step_3", "trainer.resume_mode=disable"]:
        assert word in line
    assert not (folder / "out").exists()


def test_what_may_change_is_said(interrupted, overrides, uninterrupted, caplog) -> None:
    folder = interrupted(5)
    fine_tune(folder, [*overrides, "optim.lr=5e-4"])
    assert f"optim.lr was 0.001 and is 0.0005 since {folder}/global_step_5 was written" in caplog.text
    changed = weights(uninterrupted)["model.norm.weight"] != weights(folder)["model.norm.weight"]
    assert changed.any()


def test_the_same_data_and_model_elsewhere_are_the_same(interrupted, overrides, uninterrupted, tmp_path) -> None:
    data, model = (Path(override.partition("=")[2]) for override in overrides[:2])
    shutil.copy(data, tmp_path / "moved.parquet")
    shutil.copytree(model, tmp_path / "moved")
    folder = interrupted(5)
    fine_tune(folder, [*overrides, f"data.train_files={tmp_path}/moved.parquet", f"model.path={tmp_path}/moved"])
    assert_same_run(folder, uninterrupted)


def test_a_finished_run_has_nothing_left_to_do(uninterrupted, overrides, refused, caplog, monkeypatch) -> None:
    before = (uninterrupted / METRICS_FILE).read_bytes()
    monkeypatch.setattr(SFTTrainer, "init_model", None)
    caplog.set_level("INFO")
    fine_tune(uninterrupted, overrides)
    assert f"nothing left to do: 7 steps are done and trainer.output_dir={uninterrupted}/out is written" in caplog.text
    taken = f"trainer.output_dir={uninterrupted}/out exists already; remove it or name another"
    assert refused(uninterrupted, [*overrides, "optim.lr=2e-3"]).endswith("(optim.lr was 0.001 and is 0.002)")
    assert taken in refused(uninterrupted, [*overrides, "trainer.resume_mode=disable"])
    assert (uninterrupted / METRICS_FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["data.pt", "actor/__0_0.distcp"])
def test_a_flipped_bit_of_a_checkpoint_is_named(name: str, interrupted, overrides, refused) -> None:
    folder = interrupted(2)
    path = folder / "global_step_2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = refused(folder, overrides)
    assert f"{path} is damaged: its bytes are not those that were written; take an earlier checkpoint" in line
    fine_tune(folder, [*overrides, f"trainer.resume_mode={folder}/global_step_1"])


def test_a_foreign_output_folder_is_left_alone(overrides, refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    assert "/out exists already; remove it or name another" in refused(tmp_path, overrides)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"


def test_what_killed_writers_left_is_removed(interrupted, overrides) -> None:
    folder = interrupted(6)
    leftovers = [folder / name for name in (".global_step_7.0123abcd.tmp", ".out.0123abcd.tmp", ".out.some_try.tmp")]
    others = [folder / name for name in (".out.v2.0123abcd.tmp", ".outer.0123abcd.tmp")]
    for path in leftovers + others:
        path.mkdir()
        (path / "model.safetensors").touch()
    fine_tune(folder, overrides)
    assert [path for path in leftovers + others if path.exists()] == others


def test_it_starts_anew_when_told(interrupted, overrides, uninterrupted) -> None:
    folder = interrupted(4)
    fine_tune(folder, [*overrides, "trainer.resume_mode=disable", "trainer.save_freq=-1"])
    assert_same_run(folder, uninterrupted)
    assert not (folder / LATEST_FILE).exists()


def test_a_checkpoint_is_named_and_old_ones_go(interrupted, overrides, uninterrupted, tmp_path: Path) -> None:
    source, folder = interrupted(4) / "global_step_2", tmp_path / "elsewhere"
    fine_tune(folder, [*overrides, f"trainer.resume_mode={source}", "trainer.max_ckpt_to_keep=2"])
    assert weights(folder)["model.norm.weight"].equal(weights(uninterrupted)["model.norm.weight"])
    assert sorted(path.name for path in folder.glob("global_step_*")) == ["global_step_6", "global_step_7"]


BAD = {
    "trainer.resume_mode=yes": "trainer.resume_mode=yes is unknown, use one of auto, disable, resume_path",
    "trainer.resume_from_path=x": "acts with trainer.resume_mode=resume_path only",
    "trainer.resume_mode=resume_path": "resume_mode=resume_path needs a folder global_step_N",
    "trainer.save_freq=0.5": "trainer.save_freq=0.5 must be a whole number of steps, or -1 for never",
    "trainer.max_ckpt_to_keep=0": "trainer.max_ckpt_to_keep=0 must be a whole number above 0, or null",
    "trainer.log_dir=${trainer.output_dir}/_logs": "must lie outside of trainer.output_dir=",
}


@pytest.mark.parametrize("override", BAD)
def test_a_mistake_is_one_line_at_once(override, overrides, refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(main_sft, "init_distributed", None)
    assert BAD[override] in refused(tmp_path, [*overrides, override])


def test_checkpoints_that_cannot_be_written_are_found_before_training(
    overrides, refused, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(SFTTrainer, "update", None)
    (tmp_path / "file").touch()
    line = refused(tmp_path, [*overrides, f"trainer.default_local_dir={tmp_path}/file/run"])
    assert f"trainer.default_local_dir={tmp_path}/file/run: no checkpoint can be written (" in line
    monkeypatch.setattr(run_state, "check_room", lambda folder, needed: check_room(folder, needed * 10**13))
    line = refused(tmp_path / "run", overrides)
    assert f"trainer.default_local_dir={tmp_path}/run: no checkpoint can be written (" in line
    assert "MB are free; make room or choose another folder" in line
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.long
def test_a_killed_run_ends_as_one_that_was_not(start_sft: Callable[..., Any], overrides, tmp_path: Path) -> None:
    folder, changes = tmp_path / "killed", [*overrides, "score.dropout=0.5"]
    settings = ["--config-name", "make10_sft", *changes]
    whole = start_sft(tmp_path / "whole", settings).finish()
    run = start_sft(folder, settings)
    ranks: list[psutil.Process] = []

    def is_saving() -> bool:
        ranks[:] = psutil.Process(run.pid).children()
        return any(folder.glob(".global_step_3.*.tmp"))

    run.kill_when(is_saving)
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=60)[1], "torchrun's ranks outlive it"
    assert not (folder / "global_step_3").exists() and not (folder / "out").exists()
    shutil.copytree(folder, tmp_path / "one")
    resumed = start_sft(folder, settings).finish()
    assert f"going on from {folder}/global_step_2: step 2 of {STEPS} is done" in resumed.log()
    assert_same_run(folder, whole.folder)

    # On another number of ranks dropout differs; the language model does not feel the head's here.
    fine_tune(tmp_path / "one", changes, "make10_sft")
    one, two = metrics(tmp_path / "one"), metrics(folder)
    assert one[-1]["sft/loss"] == pytest.approx(two[-1]["sft/loss"], rel=1e-3)
    assert one[-1]["lr/policy"] == two[-1]["lr/policy"]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_again_and_again_ends_the_same(seed, start_sft, overrides, tmp_path: Path) -> None:
    settings, rng = ["--config-name", "make10_sft", *overrides, "score.dropout=0.5"], random.Random(seed)
    whole, folder = start_sft(tmp_path / "whole", settings).finish().folder, tmp_path / "killed"
    while not (folder / "out").exists():
        begun = len(list(folder.glob("global_step_*")))
        run = start_sft(folder, settings)
        run.kill_when(lambda begun=begun: len(list(folder.glob("global_step_*"))) > begun or (folder / "out").exists())
        time.sleep(rng.random() / 10)
    assert_same_run(folder, whole)
