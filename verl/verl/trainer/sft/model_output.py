"""The folder of the trained model: it appears whole at the end, and says which run it is of."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.checkpoints.weight_files import write_weights
from verl.models.fsdp import named_full_tensors
from verl.models.joint_model import JointModel
from verl.models.loading import dtype_name
from verl.trainer.config.sft import IDENTITY_FILE, taken
from verl.trainer.sft.run_identity import what_changed, what_forbids_going_on
from verl.utils.first_rank import on_first_rank
from xbai.engine.scorer import HEAD_PREFIX
from xbai.errors import UserError
from xbai.files import atomic_directory, check_room, followed, remove_leftovers
from xbai.model_files import ModelFiles
from xbai.sprm import SPRMConfig, save_score_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOutput:
    """`trainer.output_dir`: the model with tokenizer, head and step rule."""

    folder: Path
    """It must not exist before the end."""
    dtype: torch.dtype
    """Of the weights there."""
    files: ModelFiles
    """Of the model that training began with."""
    sprm_config: SPRMConfig | None
    """Of its head; None without one."""
    identity: dict[str, Any]
    """From `run_identity`."""

    def is_finished(self, model_path: str) -> bool:
        """Whether this run has written it, before now. A collective.

        Raises:
            UserError: it is there and of another run.
        """
        return on_first_rank(lambda: self._is_own(model_path))

    def _is_own(self, model_path: str) -> bool:
        if not self.folder.exists():
            return False
        then = json.loads((self.folder / IDENTITY_FILE).read_text(encoding="utf-8"))
        changes = what_forbids_going_on(then, self.identity, model_path) + what_changed(then, self.identity)
        if changes:
            raise UserError(f"{taken(self.folder)}: it is of a run from which this one differs ({changes[0]})")
        return True

    def write(self, model: JointModel) -> None:
        """Write the trained model. A collective."""
        # Every rank gathers, one tensor at a time; only the one that writes keeps them.
        weights = {name: tensor.cpu() for name, tensor in named_full_tensors(model) if dist.get_rank() == 0}
        head = {name.removeprefix(HEAD_PREFIX): w for name, w in weights.items() if name.startswith(HEAD_PREFIX)}
        policy = {name: weight for name, weight in weights.items() if not name.startswith(HEAD_PREFIX)}

        def write() -> None:
            with atomic_directory(self.folder) as folder:
                self._fill(folder, policy, head)

        self._on_first_rank(write)
        logger.info("wrote %s in %s", self.folder, dtype_name(self.dtype))

    def try_writing(self, model: JointModel) -> None:
        """Write everything but the weights, and remove it: what would fail after training fails here. A collective."""
        needed = sum(weight.numel() for weight in model.lm.parameters()) * self.dtype.itemsize
        few = {"few": torch.zeros(1)}

        def write() -> None:
            parent = followed(self.folder).parent
            parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            with TemporaryDirectory(prefix=f".{self.folder.name}.", suffix=".tmp", dir=parent) as folder:
                self._fill(Path(folder), few, few if self.sprm_config is not None else {})
                check_room(Path(folder), needed)

        self._on_first_rank(write)

    def _on_first_rank(self, write: Callable[[], None]) -> None:
        try:
            on_first_rank(write)
        except UserError as error:
            raise UserError(f"trainer.output_dir={self.folder}: the model cannot be written ({error})") from error

    def _fill(self, folder: Path, policy: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        self.files.write(folder, dtype_name(self.dtype))
        write_weights(folder, policy, self.dtype, lambda names: {name: policy[name] for name in names})
        if head:
            save_score_head(folder, head, self.sprm_config)
        (folder / IDENTITY_FILE).write_text(json.dumps(self.identity), encoding="utf-8")
