"""Supervised fine-tuning of the LM on response tokens, and of the score head where rows carry an outcome label.

    torchrun --nproc_per_node=2 -m verl.trainer.main_sft [--config-name make10_sft] \
        data.train_files=... model.path=... trainer.output_dir=...

There are no checkpoints: the output folder appears whole at the end or not at all, and a killed run is run again.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from verl.trainer.compose import compose_config
from verl.trainer.score_watch import Classes, UncountedClassWatch
from verl.utils.dataset.sft_dataset import SFTDataset, SFTExample, collate_examples, length_grouped_batches
from verl.utils.fsdp import all_reduce_last, create_mesh, init_distributed, named_full_tensors, shard_model
from verl.utils.head_start import start_head
from verl.utils.model import (
    build_joint_model,
    dtype_name,
    has_score_head,
    load_tokenizer,
    loading_dtype,
    torch_dtype,
    trained_dtype,
)
from verl.utils.optim import JointOptimizer
from verl.utils.packing import TokenLayout, padded_layout
from verl.utils.tracking import Tracking
from verl.utils.weight_files import write_weights
from verl.workers.actor.joint_model import JointModel, JointOutput
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_directory, check_room, why_not_written
from xbai.model_files import ModelFiles
from xbai.sprm import (
    ScoreObjective,
    SPRMConfig,
    StepCounts,
    auc,
    count_by_class,
    counted_steps,
    load_sprm_config,
    save_score_head,
    sprm_loss,
    step_feature_mask,
    trajectory_scores,
)

logger = logging.getLogger(__name__)

FIRST_RANK_GRACE_S = 2.0
HEAD_PREFIX = "score_head."
START_ROWS = 512
"""How many rows a fresh score head's features are standardised by."""


class SFTTrainer:
    """One rank of the training run. Every rank holds all the data and takes every `world_size`-th row of each batch.

    Args:
        config: `sft_trainer.yaml`, resolved.
        device: from `init_distributed`.
    """

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.trainer.seed + self.rank)
        self.output_dir = Path(config.trainer.output_dir)
        self._check_config()
        self.tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        self.dataset = SFTDataset(config.data.train_files, self.tokenizer, config.data)
        self.files = ModelFiles.read(config.model.path)
        self._output_dtype = self._checked_output_dtype()
        self.sprm_config = self._sprm_config() if self.dataset.has_labels else None
        self.batches_per_epoch = len(self.dataset) // config.data.train_batch_size
        if self.batches_per_epoch == 0:
            raise UserError(
                f"data.train_batch_size={config.data.train_batch_size} is more than the {len(self.dataset)} rows"
            )
        steps = config.trainer.total_training_steps
        self.total_steps = steps or config.trainer.total_epochs * self.batches_per_epoch
        score = config.score
        self._starts_head = (
            self.sprm_config is not None and score.standardized_start and not has_score_head(config.model.path, None)
        )
        self._score_watch = UncountedClassWatch("score")
        self.model = self._build_model()
        self.optimizer = JointOptimizer(
            self.model, self._with_total(config.optim), self._with_total(config.score.optim)
        )

    def _with_total(self, section: DictConfig) -> DictConfig:
        return OmegaConf.create({**section, "total_training_steps": self.total_steps})

    def _check_config(self) -> None:
        if self.output_dir.exists():
            raise UserError(f"trainer.output_dir={self.output_dir} exists already; remove it or name another")
        if self.config.data.train_batch_size % self.world_size:
            raise UserError(
                f"data.train_batch_size={self.config.data.train_batch_size} must be a multiple of the "
                f"{self.world_size} ranks"
            )

    def _checked_output_dtype(self) -> torch.dtype:
        name = self.config.trainer.output_dtype
        try:
            return torch_dtype(self.files.dtype or "float32" if name == "auto" else name)
        except UserError as error:
            raise UserError(f"trainer.output_dtype={name}: {error}") from error

    def _sprm_config(self) -> SPRMConfig:
        score = self.config.score
        travelling = load_sprm_config(self.config.model.path, self.tokenizer, score.lang)
        return SPRMConfig(travelling.step_rule, score.dropout, score.normalize_features)

    def _build_model(self) -> JointModel:
        path, compute_dtype = (
            self.config.model.path,
            trained_dtype(self.config.model.compute_dtype, "model.compute_dtype"),
        )
        model = build_joint_model(
            path,
            loading_dtype(path, torch.float32),
            sprm_config=self.sprm_config,
            trust_remote_code=self.config.model.trust_remote_code,
            gradient_checkpointing=self.config.model.enable_gradient_checkpointing,
            compute_dtype=compute_dtype,
        )
        fsdp = self.config.fsdp_config
        return shard_model(model, create_mesh(fsdp.fsdp_size), fsdp, compute_dtype, torch.float32)

    def fit(self) -> None:
        """Train, then write the output folder, which is tried before."""
        self._try_saving()
        window = MetricsWindow(self.device)
        with self._tracking() as tracking, self._progress() as progress:
            task = progress.add_task("SFT", total=self.total_steps)
            if self._starts_head:
                self._start_head()
            for step, rows in enumerate(self._batches(), start=1):
                metrics = self.update([self.dataset[row] for row in rows], window)
                if step % self.config.trainer.log_freq == 0 or step == self.total_steps:
                    metrics |= window.flush()
                    if self.rank == 0:
                        tracking.log(metrics, step)
                progress.advance(task)
        self.save()

    def _progress(self) -> Progress:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        towards = TextColumn(f"{{task.description}} -> {self.output_dir}")
        return Progress(towards, *columns, disable=self.rank > 0)

    def _tracking(self) -> Tracking:
        trainer = self.config.trainer
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger if self.rank == 0 else [],
            trainer.log_dir,
            OmegaConf.to_container(self.config),
        )

    def _batches(self) -> Iterator[list[int]]:
        lengths = [len(example.ids) for example in self.dataset.examples]
        size, seed = self.config.data.train_batch_size, self.config.trainer.seed
        done = 0
        for epoch in range(-(-self.total_steps // self.batches_per_epoch)):
            for rows in length_grouped_batches(lengths, size, epoch_seed=seed + epoch):
                if done == self.total_steps:
                    return
                done += 1
                yield rows

    def update(self, examples: list[SFTExample], window: MetricsWindow) -> dict[str, float]:
        """One optimiser step on a global batch; the same on every rank, and for every number of ranks.

        Args:
            examples: the global batch.
            window: collects what is only worth reporting over several steps.

        Returns:
            Gradient norms, learning rates and whether the update was skipped.
        """
        mine = examples[self.rank :: self.world_size]
        size = self.config.data.micro_batch_size_per_gpu
        micro_batches = [self._batch(mine[i : i + size]) for i in range(0, len(mine), size)]
        tokens = sum(len(example.ids) - example.prompt_length for example in examples)
        counted, counts = self._steps_that_count(micro_batches)
        self.model.train()
        for batch, batch_counted in all_reduce_last(self.model, list(zip(micro_batches, counted))):
            layout = padded_layout(batch)
            output = self._forward(layout)
            lm_loss = -output.log_probs.sum() / tokens
            loss, score_loss = lm_loss, torch.zeros_like(lm_loss)
            if self.sprm_config is not None:
                step_counted, labels = layout.steps(batch_counted), layout.steps(batch["correct"][:, None])
                # To the loss of the head a flat step is a trajectory of one.
                score_loss = sprm_loss(
                    output.step_logits[:, None], step_counted[:, None], labels, counts, self.config.score.class_balance
                )
                loss = loss + self.config.score.loss_coef * score_loss
                window.add_scores(layout.restore_steps(output.step_logits), batch)
            # FSDP2 takes the mean over ranks where the shares are to be added up.
            (loss * self.world_size).backward()
            window.add_losses(lm_loss, score_loss)
        window.end_step(tokens)
        return self.optimizer.step(self.config.optim.grad_clip) | self.optimizer.advance_schedules()

    def _batch(self, examples: list[SFTExample]) -> dict[str, Tensor]:
        batch = collate_examples(examples, self.tokenizer.pad_token_id)
        if self.sprm_config is not None:
            rule = self.sprm_config.step_rule
            batch["step_feature_mask"] = step_feature_mask(batch["input_ids"], batch["response_mask"], rule)
        # A layout wants a column before those of the response.
        batch["response_mask"] = batch["response_mask"][:, 1:]
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _forward(self, layout: TokenLayout) -> JointOutput:
        return self.model(layout, backbone_grad_scale=self.config.score.backbone_grad_scale)

    def _steps_that_count(self, micro_batches: list[dict[str, Tensor]]) -> tuple[list[Tensor | None], StepCounts]:
        """The steps with w_n = 1 of each micro-batch, by the head in evaluation mode, and their global number, which
        the watch sees."""
        if self.sprm_config is None:
            return [None] * len(micro_batches), StepCounts(0.0, 0.0)
        agreement = self.config.score.agreement_weighting
        counted, counts = [], torch.zeros(2, 2, device=self.device)
        for batch in micro_batches:
            logits = self._evaluate(batch) if agreement else torch.zeros_like(batch["input_ids"], dtype=torch.float)
            steps = batch["step_feature_mask"], batch["correct"], batch["graded"]
            counted.append(counted_steps(logits, *steps, agreement))
            graded = counted_steps(logits, *steps, agreement_weighting=False)
            counts += torch.stack([count_by_class(mask, batch["correct"]) for mask in (counted[-1], graded)])
        dist.all_reduce(counts)
        of_loss, of_all = counts.tolist()
        if self.rank == 0:
            self._score_watch.observe(Classes(*of_loss), Classes(*of_all))
        return counted, StepCounts(*of_loss)

    def _start_head(self) -> None:
        """See `start_head`; by some of the rows. A collective."""
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.config.trainer.seed))
        rows = order[: min(START_ROWS, len(order)) // self.world_size * self.world_size].tolist()
        mine, size = rows[self.rank :: self.world_size], self.config.data.micro_batch_size_per_gpu
        parts = [[self.dataset[row] for row in mine[i : i + size]] for i in range(0, len(mine), size)]
        batches, objective = list(map(self._batch, parts)), ScoreObjective.from_config(self.config.score)
        start_head(self.model, batches, self._evaluate, objective, self.optimizer)

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        layout = padded_layout(batch)
        return layout.restore_steps(self._forward(layout).step_logits)

    def save(self) -> None:
        """Write the model folder with tokenizer, head and step rule. A collective."""
        # Every rank gathers, one tensor at a time; only the one that writes keeps them.
        weights = {name: tensor.cpu() for name, tensor in named_full_tensors(self.model) if self.rank == 0}
        head = {name.removeprefix(HEAD_PREFIX): w for name, w in weights.items() if name.startswith(HEAD_PREFIX)}
        policy = {name: weight for name, weight in weights.items() if not name.startswith(HEAD_PREFIX)}

        def write() -> None:
            with atomic_directory(self.output_dir) as folder:
                self._write(folder, policy, head)

        self._on_first_rank(write)
        logger.info("wrote %s in %s", self.output_dir, dtype_name(self._output_dtype))

    def _try_saving(self) -> None:
        """Write everything of the model but its weights, and remove it: what would fail after training fails here."""
        bytes_of_weights = sum(weight.numel() for weight in self.model.lm.parameters()) * self._output_dtype.itemsize
        parent, few = self.output_dir.parent, {"few": torch.zeros(1)}

        def write() -> None:
            parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{self.output_dir.name}_try_", suffix=".tmp", dir=parent) as folder:
                self._write(Path(folder), few, few if self.sprm_config is not None else {})
                check_room(Path(folder), bytes_of_weights)

        self._on_first_rank(write)

    def _on_first_rank(self, write: Callable[[], None]) -> None:
        """Let rank 0 write; where it cannot, every rank raises the same `UserError`. A collective."""
        failure: list[str | None] = [None]
        if self.rank == 0:
            try:
                write()
            except (OSError, UserError) as error:
                failure = [why_not_written(error)]
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise UserError(f"trainer.output_dir={self.output_dir}: the model cannot be written ({failure[0]})")

    def _write(self, folder: Path, policy: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        self.files.write(folder, dtype_name(self._output_dtype))
        write_weights(folder, policy, self._output_dtype, lambda names: {name: policy[name] for name in names})
        if head:
            save_score_head(folder, head, self.sprm_config)


class MetricsWindow:
    """Sums over the steps since the last record, of this rank until `flush` adds all ranks up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._losses = torch.zeros(2, dtype=torch.double, device=self._device)
        self._sides = torch.zeros(2, dtype=torch.double, device=self._device)
        self._scores: list[float] = []
        self._labels: list[float] = []
        self._steps = self._tokens = 0

    def add_losses(self, lm_loss: Tensor, score_loss: Tensor) -> None:
        """Shares of one micro-batch."""
        self._losses += torch.stack([lm_loss, score_loss]).detach().double()

    def add_scores(self, step_logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Trajectory scores of one micro-batch's graded rows, and on which side of 0.5 their steps are."""
        graded = batch["graded"]
        logits = step_logits.detach()[batch["step_feature_mask"] & graded[:, None]]
        self._sides += torch.stack([(logits > 0).sum(), (logits <= 0).sum()])
        self._scores += trajectory_scores(step_logits.detach(), batch["step_feature_mask"])[graded].tolist()
        self._labels += batch["correct"][graded].tolist()

    def end_step(self, tokens: int) -> None:
        """Count one step of `tokens` response tokens over all ranks."""
        self._steps += 1
        self._tokens += tokens

    def flush(self) -> dict[str, float]:
        """Means over the window; the same on every rank. A collective."""
        dist.all_reduce(self._losses)
        dist.all_reduce(self._sides)
        gathered: list[tuple[list[float], list[float]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._scores, self._labels))
        scores, labels = (torch.tensor(list(chain.from_iterable(parts))) for parts in zip(*gathered))
        lm_loss, score_loss = (self._losses / self._steps).tolist()
        metrics = {"sft/loss": lm_loss, "sft/tokens": float(self._tokens)}
        if len(scores):
            one_sided = float(self._sides.max() / self._sides.sum())
            metrics |= {"score/loss": score_loss, "score/one_sided": one_sided, "score/auc": auc(scores, labels)}
        self._reset()
        return metrics


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Leave a `UserError`, which all ranks of a machine run into alike, to the first of them to say.

    torchrun ends every rank as soon as one has ended, so the others give the first one time.
    """
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(FIRST_RANK_GRACE_S)
        raise SystemExit(2) from None


@exit_on_user_error
@first_rank_speaks()
def main() -> None:
    """Entry point of every rank that torchrun starts; without torchrun, one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="sft_trainer", help="a file of verl/trainer/config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    arguments = parser.parse_args()
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(variable, value)
    level = logging.INFO if os.environ["RANK"] == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(show_path=False)])
    config = compose_config(arguments.config_name, arguments.overrides)
    if not isinstance(timeout_s := config.trainer.nccl_timeout, int | float) or timeout_s <= 0:
        raise UserError(f"trainer.nccl_timeout={timeout_s} must be a number of seconds above 0")
    device = init_distributed(timeout_s)
    try:
        SFTTrainer(config, device).fit()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
