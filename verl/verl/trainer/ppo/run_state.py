"""What of a run outlives its process: the checkpoint it goes on from, and those it writes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, TimeoutError, wait
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.checkpoints.adapters import check_base, peft_config, read_adapter_config
from verl.checkpoints.checksums import check_files, read_checksums
from verl.checkpoints.data_identity import data_identity, differences
from verl.checkpoints.folder import CheckpointFolder, read_state, step_name, step_of, write_state
from verl.checkpoints.remote import RemoteFolder, Uploads, is_folder, is_url
from verl.checkpoints.rng_state import rng_state, set_rng_state
from verl.checkpoints.state import HUGGINGFACE_FOLDER
from verl.models.lora import lora_config
from verl.trainer.config.fields import value_at
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.core_algos import KLController
from verl.trainer.ppo.data import Loader
from verl.trainer.ppo.rollout_pool import RolloutPool
from verl.utils.dataset.rl_dataset import RLHFDataset, file_list
from verl.workers.checkpointed_worker import CheckpointedWorkers
from xbai.engine.files import read_config
from xbai.errors import UserError, one_line
from xbai.files import check_room, why_not_written
from xbai.sprm.head import SPRM_CONFIG_FILE, SPRMConfig, load_sprm_config

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""How often to ask the workers whether a save in the background is done."""
CLOSE_TIMEOUT_S = 30.0
"""How long a run that ends by an error waits for a save under way."""
ORDER_KEYS = ("data.train_batch_size", "data.shuffle", "data.dataloader_num_workers", "data.curriculum.enable")
"""What decides the order of the data."""
OTHER_PROMPTS = "other prompts pass data.max_prompt_length (or its filter, or the tokenizer)"
MODEL_SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)
"""Fields of config.json in which a checkpoint and the model of a run that goes on from it must agree."""

ADAPTER_KEYS = {"r": "lora_rank", "lora_alpha": "lora_alpha", "target_modules": "target_modules"}
"""Fields of adapter_config.json, by the keys under `model` that they come from, in which they must agree too."""

WorkerGroups = Mapping[str, CheckpointedWorkers]
"""Worker groups by the name of their part of a checkpoint: `actor`, and `critic` where there is one."""


class RunState:
    """Finds the checkpoint to go on from, restores it, and writes new ones (with `trainer.async_save`, meanwhile).

    Args:
        kl_controller: an adaptive one's coefficient belongs to the state.
        fetches: copy a remote checkpoint to go on from to this machine; otherwise it is only looked for.
        pool: what is in flight between steps belongs to the state.

    Attributes:
        checkpoint: the one to go on from; None for a new run.
        step: of that checkpoint, or 0.

    Raises:
        UserError: a checkpoint that is not there or does not fit the run, a remote folder that cannot be used.
    """

    def __init__(
        self,
        config: PPOConfig,
        dataset: RLHFDataset,
        loader: Loader,
        kl_controller: KLController,
        fetches: bool = True,
        pool: RolloutPool | None = None,
    ) -> None:
        trainer = config.trainer
        self._config, self._loader, self._kl_controller, self._pool = config, loader, kl_controller, pool
        self._folder = CheckpointFolder(trainer.default_local_dir, trainer.max_actor_ckpt_to_keep)
        self._remote = self._uploads = None
        copies = trainer.default_hdfs_dir
        if copies is not None and is_folder(copies, trainer.default_local_dir):
            logger.info("trainer.default_hdfs_dir is trainer.default_local_dir: nothing is copied")
        elif copies is not None:
            self._remote = RemoteFolder(copies, trainer.max_actor_ckpt_to_keep)
            self._uploads = Uploads(self._remote)
        self._identity = data_identity(
            file_list(config.data.train_files),
            {key: value_at(config, key) for key in ORDER_KEYS},
            (int(row).to_bytes(8, "little") for row in dataset.values("row_index")),
        )
        self.checkpoint = self._newest = self._find(fetches)
        self._state: dict[str, Any] | None = None
        self._keeps_place = True
        self._epoch, self._batch = 1, 0
        if self.checkpoint is not None:
            self._state = read_state(self.checkpoint)
            self._check_model(self.checkpoint, dataset.tokenizer)
            if "data" not in self._state:
                raise UserError(f"{self.checkpoint} is not of this trainer; {_ANEW}")
            self._check_data(self._state["data"])
        self.step = step_of(self.checkpoint) if self.checkpoint is not None else 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future[None] | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self._folder.folder

    def try_saving(self, groups: WorkerGroups) -> None:
        """Write everything of a checkpoint but the weights, and remove it: what would fail at the first one fails here.

        `groups` are those that have started; the driver's own part needs none.

        Raises:
            UserError: a folder that cannot be written, or has no room for the weights.
        """
        if self._config.trainer.save_freq <= 0:
            return
        try:
            with self._folder.rehearse() as folder:
                write_state({"rng": rng_state(), "data": self._identity}, folder)
                parts = [group.try_saving(str(folder.resolve() / part))[0] for part, group in groups.items()]
                check_room(folder, sum(parts))
        except (OSError, UserError) as error:
            raise UserError(f"{self._here}: no checkpoint can be written ({why_not_written(error)})") from error
        if self._remote is not None:
            self._remote.try_writing()

    def restore(self, groups: WorkerGroups) -> None:
        """Make ready for saving; where there is a checkpoint, put workers, data and random states where it was."""
        self._folder.prepare(self.checkpoint)
        self.try_saving(groups)
        if self.checkpoint is None or (state := self._state) is None:
            return
        self._upload_if_behind(self.checkpoint)
        for part, group in groups.items():
            group.load_checkpoint(str(self.checkpoint.resolve() / part))
        if self._keeps_place:
            self._loader.load_state_dict(state["loader"])
            self._epoch, self._batch = state["place"]
        self._restore_pool(state.get("pool") if self._keeps_place else None)
        if self._kl_controller.adapts and (coefficient := state["kl_coef"]) is not None:
            self._kl_controller.value = coefficient
        set_rng_state(state["rng"])
        logger.info("going on from %s: step %d is done%s", self.checkpoint, self.step, self._place_in_words())
        self._state = None

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of prompts, epoch after epoch, without end, from the place where the checkpoint was."""
        while True:
            for columns in self._loader:
                self._batch += 1
                yield columns
            self._epoch, self._batch = self._epoch + 1, 0

    def save(self, step: int, groups: WorkerGroups) -> None:
        """Write the checkpoint after `step`: returns when it is on the disk, or, with `trainer.async_save`, as soon as
        training may change the weights again.

        Raises:
            UserError: this save failed, or the one before.
        """
        start = time.perf_counter()
        self._wait_for_save()
        state = {
            "step": step,
            "loader": self._loader.state_dict(),
            "place": (self._epoch, self._batch),
            "rng": rng_state(),
            # A fixed one is the configuration's, which may change between two starts.
            "kl_coef": self._kl_controller.value if self._kl_controller.adapts else None,
            "data": self._identity,
            "pool": None if self._pool is None else self._pool.state_dict(),
        }
        copied: Future[None] = Future()
        self._saving = self._thread.submit(self._write, step, state, groups, copied)
        if self._config.trainer.async_save:
            wait([copied, self._saving], return_when=FIRST_COMPLETED)
            self.check()
        else:
            self._wait_for_save()
        logger.info("training waited %.1f s for the checkpoint of step %d", time.perf_counter() - start, step)

    def check(self) -> None:
        """Raise the error of a save that failed in the background."""
        if self._saving is not None and self._saving.done():
            self._wait_for_save()

    def finish(self) -> None:
        """Wait until everything is written, and copied to the remote folder or given up.

        Raises:
            UserError: the last save failed.
        """
        self._wait_for_save()
        if self._uploads is None:
            return
        if self._uploads.in_use:
            logger.info("waiting for the copies in %s", self._uploads.remote.url)
        self._uploads.wait()
        self._folder.drop_old()
        if self._uploads.failed:
            logger.error("not copied to %s: %s", self._uploads.remote.url, ", ".join(map(str, self._uploads.failed)))

    def catch_up(self) -> None:
        """Copy the checkpoint found to the remote folder, where that has none as new, and wait."""
        if self.checkpoint is not None:
            self._upload_if_behind(self.checkpoint)
        self.finish()

    def close(self) -> None:
        """Let a save under way end, for a while, when the run ends early; copies that are not done start over when the
        run goes on."""
        try:
            if self._saving is not None:
                self._saving.result(CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("a checkpoint was still being written and is lost; the latest one whole stays")
        except Exception as error:
            logger.warning("a checkpoint could not be written: %s", one_line(error)[:300])
        self._saving = None
        self._thread.shutdown(wait=False)

    def how_to_go_on(self) -> str:
        """What to start after a run that ended early, in words."""
        if self._newest is None:
            return "no checkpoint was written yet: the same command starts anew"
        changes = {
            "disable": " with trainer.resume_mode=auto",
            "resume_path": " with trainer.resume_mode=auto and without trainer.resume_from_path",
        }
        # Until it saves, a run's own mode leads to where it began.
        mode = "auto" if self._newest == self.checkpoint else self._config.trainer.resume_mode
        return f"the same command{changes.get(mode, '')} goes on from {self._newest}"

    def _write(self, step: int, state: dict[str, Any], groups: WorkerGroups, copied: Future[None]) -> None:
        """Runs in the saving thread."""
        start = time.perf_counter()
        try:
            with self._folder.write(step) as folder:
                write_state(state, folder)
                background = self._config.trainer.async_save
                for part, group in groups.items():
                    group.save_checkpoint(str(folder.resolve() / part), background=background)
                copied.set_result(None)
                # Asked, not waited for: a worker answers between two phases of training.
                while background and not all(all(group.checkpoint_is_written()) for group in groups.values()):
                    time.sleep(POLL_S)
            self._newest = self._folder.step_folder(step)
            if self._uploads is not None:
                self._uploads.submit(self._newest)
            self._folder.drop_old(self._uploads.in_use if self._uploads is not None else ())
        except (OSError, UserError) as error:
            why = f"the checkpoint of step {step} was not saved ({why_not_written(error)})"
            raise UserError(f"{self._here}: {why}; {self.how_to_go_on()}") from error
        logger.info("saved %s in %.1f s", self._newest, time.perf_counter() - start)

    @property
    def _here(self) -> str:
        return f"trainer.default_local_dir={self.folder}"

    def _wait_for_save(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    # What a run goes on from

    def _find(self, fetches: bool) -> Path | None:
        trainer = self._config.trainer
        mode, source, remote = trainer.resume_mode, trainer.resume_from_path, self._remote
        if mode == "resume_path" and source is not None and is_url(source):
            url, _, name = source.rstrip("/").rpartition("/")
            remote = RemoteFolder(url, key="trainer.resume_from_path")
        elif (found := self._folder.find(mode, source)) is not None:
            return found
        elif remote is not None and mode == "auto" and (step := remote.latest()) is not None:
            name = step_name(step)
        else:
            return None
        if fetches:
            return remote.fetch(name, self._folder)
        remote.check(name)
        return None

    def _upload_if_behind(self, checkpoint: Path) -> None:
        """A run that was killed may have saved what it could not copy any more."""
        if self._uploads is None or checkpoint.parent.resolve() != self.folder.resolve():
            return
        copied = self._uploads.remote.latest()
        if copied is None or copied < step_of(checkpoint):
            self._uploads.submit(checkpoint)

    def _restore_pool(self, saved: dict[str, Any] | None) -> None:
        if self._pool is None:
            if saved is not None and (prompts := len(saved["rows"])):
                logger.warning(
                    "%d prompts in flight are left out: actor_rollout_ref.rollout.mode was partial, or sampling one "
                    "step ahead",
                    prompts,
                )
        elif saved is None:
            # Each step has drawn one batch.
            self._pool.drawn = self.step
        else:
            self._pool.load_state_dict(saved)

    def _check_model(self, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A checkpoint of another model is one line, before the workers load anything."""
        section, saved = self._config.actor_rollout_ref, checkpoint / "actor" / HUGGINGFACE_FOLDER
        _check_model_files(checkpoint / "actor")
        if not (saved / "config.json").is_file():
            raise UserError(f"{saved}: no config.json; this is no checkpoint of this trainer")
        then, now = (read_config(path, section.model.trust_remote_code) for path in (saved, section.model.path))
        for field in MODEL_SHAPE:
            if getattr(then, field, None) != getattr(now, field, None):
                raise UserError(
                    f"{checkpoint} is of another model: its {field} is {getattr(then, field, None)}, that of "
                    f"actor_rollout_ref.model.path={section.model.path} is {getattr(now, field, None)}; {_ANEW}"
                )
        self._check_adapters(checkpoint, saved)
        had_head = (saved / SPRM_CONFIG_FILE).is_file()
        if had_head != section.use_score:
            raise UserError(
                f"{checkpoint} was written with actor_rollout_ref.use_score={str(had_head).lower()}; set that, "
                f"or {_ANEW}"
            )
        if not had_head:
            return
        had = _fields(load_sprm_config(saved, tokenizer))
        has = _fields(load_sprm_config(section.model.path, tokenizer, section.score.lang))
        for field in had:
            if had[field] != has[field]:
                raise UserError(
                    f"{checkpoint} was written with {field}={had[field]!r:.60} for the score head, and this run has "
                    f"{has[field]!r:.60} (by actor_rollout_ref.score.lang, or {SPRM_CONFIG_FILE} in "
                    f"actor_rollout_ref.model.path={section.model.path}); put that back, or {_ANEW}"
                )

    def _check_adapters(self, checkpoint: Path, saved: Path) -> None:
        """Adapters of another kind, or on another base, are one line too."""
        model = self._config.actor_rollout_ref.model
        lora, had = lora_config(model), read_adapter_config(saved) or {"r": 0}
        has = {"r": 0} if lora is None else json.loads(peft_config(lora))
        for field, key in ADAPTER_KEYS.items():
            if had.get(field) != has.get(field):
                raise UserError(
                    f"{checkpoint} was written with actor_rollout_ref.model.{key}={had.get(field)}, and this run has "
                    f"{has.get(field)}; put that back, or {_ANEW}"
                )
        if lora is not None:
            check_base(saved, model.path)

    def _check_data(self, then: dict[str, Any]) -> None:
        # Checkpoints were written before there were curricula.
        then["settings"].setdefault("data.curriculum.enable", False)
        changes = differences(then, self._identity, OTHER_PROMPTS)
        self._keeps_place = not changes
        if not changes:
            return
        if not self._config.trainer.resume_with_new_data:
            raise UserError(
                f"{changes[0]} since {self.checkpoint} was written, so that its place in the data means nothing now; "
                "put that back, or accept it with trainer.resume_with_new_data=true, which keeps the weights and the "
                "step and begins a new epoch over the data"
            )
        logger.warning("%s: a new epoch over the data begins", "; ".join(changes))

    def _place_in_words(self) -> str:
        if not self._keeps_place:
            return ", and a new epoch over the data begins"
        if self._batch == len(self._loader):
            return f", which ended epoch {self._epoch}: epoch {self._epoch + 1} begins"
        return f", batch {self._batch} of {len(self._loader)} in epoch {self._epoch}"


_ANEW = "start anew with trainer.resume_mode=disable"


def _check_model_files(folder: Path) -> None:
    """Of the sums, those of what the driver reads; the workers check the rest."""
    sums = read_checksums(folder)
    check_files(folder, {name: sums[name] for name in sums if name.startswith(f"{HUGGINGFACE_FOLDER}/")})


def _fields(config: SPRMConfig) -> dict[str, Any]:
    fields = config.to_dict()
    return fields.pop("step_rule") | fields
