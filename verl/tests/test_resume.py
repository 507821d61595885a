"""What a run goes on from: it says so, goes on exactly there, and refuses what it cannot go on from."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import datasets
import pytest
from tiny import ppo_config

from verl.checkpoints.checksums import file_digest, write_checksums
from verl.checkpoints.folder import LATEST_FILE, TRAINER_STATE_FILE
from verl.checkpoints.remote import COMPLETE_FILE
from verl.checkpoints.state import HUGGINGFACE_FOLDER
from verl.models.loading import load_tokenizer
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo import run_state
from verl.trainer.ppo.core_algos import KLController
from verl.trainer.ppo.data import PromptData
from verl.trainer.ppo.rollout_pool import RolloutPool
from verl.trainer.ppo.run_state import RunState
from verl.utils.dataset.rl_dataset import RLHFDataset, create_dataloader
from xbai.errors import UserError
from xbai.files import why_not_written
from xbai.sprm.head import SPRM_CONFIG_FILE, load_sprm_config


def write_sums(files: Path) -> None:
    """As the workers do, beside the folder of the model's files."""
    write_checksums(files.parent, {f"{files.name}/{path.name}": file_digest(path) for path in files.iterdir()})


class Workers:
    """What the run state asks of a worker group; the rest of a checkpoint is real."""

    def __init__(self, model: Path, written: Callable[[], bool] = lambda: True) -> None:
        self._model, self._written = model, written
        self.loaded: list[str] = []

    def save_checkpoint(self, folder: str, background: bool = False) -> None:
        files = Path(folder) / HUGGINGFACE_FOLDER
        files.mkdir(parents=True)
        (files / "config.json").write_text((self._model / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
        rule = load_sprm_config(self._model, load_tokenizer(self._model))
        (files / SPRM_CONFIG_FILE).write_text(json.dumps(rule.to_dict()), encoding="utf-8")
        write_sums(files)

    def try_saving(self, folder: str) -> list[int]:
        self.save_checkpoint(folder)
        return [1000]

    def checkpoint_is_written(self) -> list[bool]:
        return [True, self._written()]

    def load_checkpoint(self, folder: str) -> None:
        self.loaded.append(folder)


@pytest.fixture
def config(training_files: Path, tiny_model_dir: Path, tmp_path: Path) -> PPOConfig:
    """Of a run over 8 prompts in batches of 2, with its own copy of the data."""
    train = tmp_path / "train.parquet"
    train.write_bytes((training_files / "train.parquet").read_bytes())
    return ppo_config(
        [
            f"data.train_files={train}",
            "data.train_batch_size=2",
            "data.max_prompt_length=64",
            f"actor_rollout_ref.model.path={tiny_model_dir}",
            f"trainer.default_local_dir={tmp_path}/run",
        ],
    )


def start(config: PPOConfig, kl_controller: KLController | None = None) -> RunState:
    """As the trainer does."""
    data = config.data
    dataset = RLHFDataset(data.train_files, load_tokenizer(config.actor_rollout_ref.model.path), data)
    loader = create_dataloader(
        dataset,
        data.train_batch_size,
        shuffle=data.shuffle,
        seed=config.trainer.seed,
        num_workers=data.dataloader_num_workers,
    )
    return RunState(config, dataset, loader, kl_controller or KLController(config.algorithm.kl_ctrl))


def rows(state: RunState, count: int) -> list[list[int]]:
    batches = state.batches()
    return [list(next(batches)["row_index"]) for _ in range(count)]


def save(config: PPOConfig, steps: int) -> None:
    """Go on for `steps` and leave a checkpoint."""
    groups = {"actor": Workers(Path(config.actor_rollout_ref.model.path))}
    state = start(config)
    state.restore(groups)
    rows(state, steps)
    state.save(state.step + steps, groups)
    state.finish()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_place_in_the_data_is_exact(workers: int, shuffle: bool, config: PPOConfig) -> None:
    config = with_values(config, {"data.dataloader_num_workers": workers, "data.shuffle": shuffle})
    uninterrupted = start(config)
    expected = rows(uninterrupted, 11)
    assert sorted(chain.from_iterable(expected[:4])) == list(range(8)) and (expected[:4] != expected[4:8]) == shuffle
    done = 0
    # In an epoch, at its end, and over the end of the next one.
    for steps in (3, 1, 5):
        state = start(config)
        state.restore({})
        assert state.step == done
        assert rows(state, steps) == expected[done : done + steps]
        done += steps
        state.save(done, {"actor": Workers(Path(config.actor_rollout_ref.model.path))})
        state.finish()
    state = start(config)
    state.restore({})
    assert rows(state, 2) == expected[9:]


def test_it_says_where_it_goes_on(config: PPOConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save(config, 3)
    save(config, 1)
    assert "global_step_3: step 3 is done, batch 3 of 4 in epoch 1" in caplog.text
    groups = {
        "actor": Workers(Path(config.actor_rollout_ref.model.path)),
        "critic": Workers(Path(config.actor_rollout_ref.model.path)),
    }
    start(config).restore(groups)
    assert "global_step_4: step 4 is done, which ended epoch 1: epoch 2 begins" in caplog.text
    assert [group.loaded for group in groups.values()] == [
        [f"{config.trainer.default_local_dir}/global_step_4/{part}"] for part in groups
    ]


def append_row(config: PPOConfig) -> PPOConfig:
    path = Path(config.data.train_files)
    table = datasets.Dataset.from_parquet(str(path)).to_list()
    datasets.Dataset.from_list([*table, table[0]]).to_parquet(path)
    return config


def repeat_file(config: PPOConfig) -> PPOConfig:
    return with_values(config, {"data.train_files": [config.data.train_files] * 2})


CHANGES = {
    "file": (append_row, r"train\.parquet has changed \(\d+ bytes then, \d+ now\)"),
    "batch": (lambda c: with_values(c, {"data.train_batch_size": 4}), r"data\.train_batch_size was 2 and is 4"),
    "order": (lambda c: with_values(c, {"data.shuffle": False}), r"data\.shuffle was True and is False"),
    "files": (repeat_file, r"data\.train_files were 1 and are 2"),
}


@pytest.mark.parametrize("change", ["file", "batch", "order", "files"])
def test_other_data_is_refused_or_accepted(change: str, config: PPOConfig, caplog: pytest.LogCaptureFixture) -> None:
    save(config, 3)
    apply, message = CHANGES[change]
    config = apply(config)
    with pytest.raises(UserError, match=f"{message} since .*global_step_3 .*trainer.resume_with_new_data=true"):
        start(config)
    config = with_values(config, {"trainer.resume_with_new_data": True})
    state = start(config)
    state.restore({})
    assert state.step == 3
    assert "a new epoch over the data begins" in caplog.text
    batches = 8 * (2 if change == "files" else 1) // config.data.train_batch_size
    assert len(set(chain.from_iterable(rows(state, batches)))) >= 8
    # From here on that data is the run's, also while the key is still set.
    state.save(4, {"actor": Workers(Path(config.actor_rollout_ref.model.path))})
    state.finish()
    caplog.clear()
    start(config)
    assert "a new epoch" not in caplog.text


def test_other_prompts_after_the_filter_are_noticed(config: PPOConfig) -> None:
    path = Path(config.data.train_files)
    table = datasets.Dataset.from_parquet(str(path)).to_list()
    table[0]["prompt"][0]["content"] += " 5 6 7"
    datasets.Dataset.from_list(table).to_parquet(path)
    save(config, 1)
    tokenizer = load_tokenizer(config.actor_rollout_ref.model.path)
    lengths = [len(item["input_ids"]) for item in RLHFDataset(str(path), tokenizer, config.data)]
    config = with_values(config, {"data.max_prompt_length": max(lengths) - 1})
    with pytest.raises(UserError, match=r"data\.max_prompt_length .*: 8 then, 7 now since"):
        start(config)


def test_the_same_data_elsewhere_is_the_same(config: PPOConfig, tmp_path: Path) -> None:
    save(config, 1)
    moved = tmp_path / "moved.parquet"
    Path(config.data.train_files).rename(moved)
    config = with_values(config, {"data.train_files": str(moved)})
    assert start(config).step == 1


def test_a_checkpoint_from_before_there_were_curricula_had_none(config: PPOConfig, monkeypatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(run_state, "ORDER_KEYS", run_state.ORDER_KEYS[:-1])
        save(config, 1)
    assert start(config).step == 1
    with pytest.raises(UserError, match=r"data\.curriculum\.enable was False and is True since"):
        start(with_values(config, {"data.curriculum.enable": True}))


def test_another_model_is_refused(config: PPOConfig) -> None:
    save(config, 1)
    config = with_values(config, {"actor_rollout_ref.use_score": False})
    with pytest.raises(UserError, match=r"global_step_1 was written with actor_rollout_ref\.use_score=true"):
        start(config)
    saved = Path(config.trainer.default_local_dir) / "global_step_1" / "actor" / HUGGINGFACE_FOLDER / "config.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text(encoding="utf-8")), "hidden_size": 96}), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is damaged: its bytes are not those that were written; take an"):
        start(config)
    write_sums(saved.parent)
    with pytest.raises(UserError, match=r"is of another model: its hidden_size is 96, that of .* is 64"):
        start(config)


def test_another_step_rule_or_head_is_refused(config: PPOConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / SPRM_CONFIG_FILE).unlink()
    config = with_values(config, {"actor_rollout_ref.model.path": str(model)})
    save(config, 1)
    config = with_values(config, {"actor_rollout_ref.score.lang": "zh"})
    with pytest.raises(UserError, match=r"global_step_1 was written with lang='en' .* this run has 'zh' .*score\.lang"):
        start(config)
    config = with_values(config, {"actor_rollout_ref.score.lang": "en"})
    assert start(config).step == 1
    saved = Path(config.trainer.default_local_dir) / "global_step_1" / "actor" / HUGGINGFACE_FOLDER / SPRM_CONFIG_FILE
    saved.write_text(
        json.dumps({**json.loads(saved.read_text(encoding="utf-8")), "normalize_features": True}), encoding="utf-8"
    )
    write_sums(saved.parent)
    with pytest.raises(UserError, match="normalize_features=True for the score head, and this run has False"):
        start(config)


def test_a_damaged_state_is_named(config: PPOConfig) -> None:
    save(config, 1)
    state = Path(config.trainer.default_local_dir) / "global_step_1" / TRAINER_STATE_FILE
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(UserError) as caught:
        start(config)
    assert str(caught.value).startswith(
        f"{state} is damaged: its bytes are not those that were written; take an earlier"
    )
    assert "trainer.resume_from_path=" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "resumed"), [("fixed", 0.5), ("adaptive", 0.02)])
def test_only_an_adapted_kl_coefficient_is_state(kind: str, resumed: float, config: PPOConfig) -> None:
    def begin(coefficient: float) -> tuple[RunState, KLController]:
        changes = {"algorithm.kl_ctrl.type": kind, "algorithm.kl_ctrl.kl_coef": coefficient}
        changed = with_values(config, changes)
        controller = KLController(changed.algorithm.kl_ctrl)
        return start(changed, controller), controller

    state, controller = begin(0.001)
    if kind == "adaptive":
        controller.value = 0.02
    state.save(1, {"actor": Workers(Path(config.actor_rollout_ref.model.path))})
    state.finish()
    state, controller = begin(0.5)
    state.restore({})
    assert controller.value == resumed


def test_what_is_in_flight_goes_on_or_is_said_to_be_left_out(config: PPOConfig, caplog) -> None:
    data = PromptData(config, load_tokenizer(config.actor_rollout_ref.model.path))

    def begin(pool: RolloutPool | None) -> RunState:
        state = RunState(config, data.train, data.loader, KLController(config.algorithm.kl_ctrl), pool=pool)
        state.restore({})
        return state

    pool, groups = RolloutPool(config, data), {"actor": Workers(Path(config.actor_rollout_ref.model.path))}
    state = begin(None)
    rows(state, 1)
    state.save(1, groups)
    state.finish()
    state = begin(pool)
    assert pool.drawn == 1 and not pool.groups, "a run of single batches has drawn one a step"
    pool.add(next(state.batches()))
    state.save(2, groups)
    state.finish()
    begin(again := RolloutPool(config, data))
    assert again.drawn == 2
    assert [group.prompt["uid"] for group in again.groups] == [group.prompt["uid"] for group in pool.groups]
    assert [group.prompt["seed"] for group in again.groups] == [group.prompt["seed"] for group in pool.groups]
    begin(None)
    assert "2 prompts in flight are left out: actor_rollout_ref.rollout.mode was partial" in caplog.text


def test_it_says_what_to_start_next(config: PPOConfig) -> None:
    folder = Path(config.trainer.default_local_dir)
    assert start(config).how_to_go_on() == "no checkpoint was written yet: the same command starts anew"
    save(config, 1)
    assert start(config).how_to_go_on() == f"the same command goes on from {folder}/global_step_1"
    source = folder / "global_step_1"
    config = with_values(config, {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": str(source)})
    state, groups = start(config), {"actor": Workers(Path(config.actor_rollout_ref.model.path))}
    assert state.how_to_go_on() == f"the same command goes on from {source}"
    state.save(2, groups)
    state.finish()
    assert state.how_to_go_on() == (
        "the same command with trainer.resume_mode=auto and without trainer.resume_from_path "
        f"goes on from {folder}/global_step_2"
    )
    config = with_values(config, {"trainer.resume_mode": "disable", "trainer.resume_from_path": None})
    anew = start(config)
    assert anew.how_to_go_on().endswith("starts anew")
    anew.save(1, groups)
    anew.finish()
    assert anew.how_to_go_on().startswith("the same command with trainer.resume_mode=auto goes on")


def test_a_save_goes_on_while_training_does_and_the_next_one_waits(config: PPOConfig) -> None:
    written = threading.Event()
    groups = {"actor": Workers(Path(config.actor_rollout_ref.model.path), written.is_set)}
    state = start(config)
    state.restore(groups)
    folder = Path(config.trainer.default_local_dir)
    state.save(1, groups)
    assert not (folder / LATEST_FILE).exists() and list(folder.glob(".global_step_1.*.tmp"))
    threading.Timer(0.5, written.set).start()
    state.save(2, groups)
    assert (folder / LATEST_FILE).read_text(encoding="utf-8") == "1" and (folder / "global_step_1").is_dir()
    state.finish()
    assert (folder / LATEST_FILE).read_text(encoding="utf-8") == "2"


def test_without_async_save_training_waits(config: PPOConfig) -> None:
    config = with_values(config, {"trainer.async_save": False})
    state = start(config)
    state.save(1, {"actor": Workers(Path(config.actor_rollout_ref.model.path), lambda: False)})
    assert (Path(config.trainer.default_local_dir) / LATEST_FILE).read_text(encoding="utf-8") == "1"


@pytest.mark.parametrize("noticed_by", ["check", "save", "finish"])
def test_a_save_that_fails_is_one_error_and_the_one_before_stays(noticed_by: str, config: PPOConfig) -> None:
    broken = threading.Event()

    def is_written() -> bool:
        if broken.is_set():
            raise UserError("the checkpoint could not be written: rank 1: OSError: [Errno 28] No space left on device")
        return False

    def check_every_step() -> None:
        while True:
            state.check()

    save(config, 1)
    state, groups = start(config), {"actor": Workers(Path(config.actor_rollout_ref.model.path), is_written)}
    state.save(2, groups)
    state.check()
    broken.set()
    notice = {"check": check_every_step, "save": lambda: state.save(3, groups), "finish": state.finish}
    with pytest.raises(UserError, match=r"step 2 was not saved .*No space left on device") as caught:
        notice[noticed_by]()
    assert "default_local_dir=" in str(caught.value) and "\n" not in str(caught.value)
    assert start(config).step == 1
    assert not list(Path(config.trainer.default_local_dir).glob(".global_step_*"))


class FailingWorkers(Workers):
    """A worker of another machine, which cannot write."""

    def try_saving(self, folder: str) -> list[int]:
        super().try_saving(folder)
        raise UserError(f"{folder}: the checkpoint could not be written: rank 3: {why_not_written(DENIED)}")


class HugeWorkers(Workers):
    """Of a model larger than any disk."""

    def try_saving(self, folder: str) -> list[int]:
        return [10**18]


DENIED = PermissionError(errno.EACCES, "Permission denied", "/data/x")
WHAT_FAILS = {
    "worker": (FailingWorkers, r"rank 3: PermissionError: .*; choose a folder that can be written\)$"),
    "room": (
        HugeWorkers,
        r"1,000,000,000,000 MB are needed, .* MB are free; make room or choose another folder",
    ),
}


@pytest.mark.parametrize("kind", WHAT_FAILS)
def test_what_would_fail_at_a_checkpoint_fails_before_training(kind: str, config: PPOConfig) -> None:
    workers, message = WHAT_FAILS[kind]
    state, folder = start(config), Path(config.trainer.default_local_dir)
    with pytest.raises(UserError, match=message) as caught:
        state.restore({"actor": workers(Path(config.actor_rollout_ref.model.path))})
    assert str(caught.value).startswith(f"trainer.default_local_dir={folder}: no checkpoint can be written (")
    assert "\n" not in str(caught.value) and list(folder.iterdir()) == []
    config = with_values(config, {"trainer.save_freq": -1})
    start(config).restore({"actor": workers(Path(config.actor_rollout_ref.model.path))})


def test_a_folder_that_cannot_be_is_found_before_the_workers_start(config: PPOConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = with_values(config, {"trainer.default_local_dir": f"{tmp_path}/file/run"})
    with pytest.raises(UserError, match=r"no checkpoint can be written \(NotADirectoryError: .*choose another folder"):
        start(config).try_saving({})
    config = with_values(
        config,
        {"trainer.default_local_dir": f"{tmp_path}/run", "trainer.default_hdfs_dir": f"file://{tmp_path}/file/remote"},
    )
    with pytest.raises(
        UserError, match=r"trainer\.default_hdfs_dir=file://.*/file/remote cannot be used: NotADirectory"
    ):
        start(config).try_saving({})
    config = with_values(config, {"trainer.default_hdfs_dir": f"file://{tmp_path}/remote"})
    start(config).try_saving({})
    assert list((tmp_path / "remote").iterdir()) == list((tmp_path / "run").iterdir()) == []


def test_a_failed_save_says_why_and_gives_no_advice_of_another_failure(config: PPOConfig, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    state = start(config)
    state.restore({})
    monkeypatch.setattr(run_state, "write_state", refuse)
    with pytest.raises(UserError, match=r"step 1 was not saved \(OSError: \[Errno 5\] Input/output error\)") as caught:
        state.save(1, {})
        state.finish()
    assert "room" not in str(caught.value)


def test_an_empty_folder_is_filled_from_the_remote_one(config: PPOConfig, tmp_path: Path) -> None:
    config = with_values(config, {"trainer.default_hdfs_dir": f"file://{tmp_path}/remote"})
    save(config, 3)
    config = with_values(config, {"trainer.default_local_dir": f"{tmp_path}/elsewhere"})
    state = start(config)
    state.restore({})
    assert state.step == 3 and state.checkpoint == tmp_path / "elsewhere" / "global_step_3"
    changes = {
        "trainer.default_local_dir": f"{tmp_path}/third",
        "trainer.resume_mode": "resume_path",
        "trainer.resume_from_path": f"file://{tmp_path}/remote/global_step_3",
    }
    config = with_values(config, changes)
    third = start(config)
    third.restore({})
    assert rows(third, 5) == rows(state, 5)


def test_copies_go_to_a_folder_as_well(config: PPOConfig, tmp_path: Path) -> None:
    config = with_values(config, {"trainer.default_hdfs_dir": f"{tmp_path}/copies/"})
    save(config, 3)
    config = with_values(config, {"trainer.default_local_dir": f"{tmp_path}/elsewhere"})
    assert start(config).checkpoint == tmp_path / "elsewhere" / "global_step_3"


@pytest.mark.parametrize("form", ["{0}", "{0}/", "file://{0}", "{0}/../{1}"])
def test_copies_into_the_folder_itself_are_none(config: PPOConfig, form: str) -> None:
    local = Path(config.trainer.default_local_dir)
    config = with_values(config, {"trainer.default_hdfs_dir": form.format(local, local.name)})
    save(config, 3)
    start(config).catch_up()
    assert start(config).checkpoint == local / "global_step_3"
    assert not list(local.rglob(COMPLETE_FILE))


def test_what_a_killed_run_could_not_copy_is_copied_by_the_next(config: PPOConfig, tmp_path: Path) -> None:
    save(config, 2)
    config = with_values(config, {"trainer.default_hdfs_dir": f"file://{tmp_path}/remote"})
    start(config).catch_up()
    assert (tmp_path / "remote" / LATEST_FILE).read_text(encoding="utf-8") == "2"


def test_a_remote_folder_that_cannot_be_used_is_one_line(config: PPOConfig, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / LATEST_FILE).write_text("nonsense", encoding="utf-8")
    config = with_values(config, {"trainer.default_hdfs_dir": f"file://{tmp_path}/remote"})
    with pytest.raises(UserError, match=r"trainer\.default_hdfs_dir=file://.*remote cannot be used: ValueError"):
        start(config)
