"""The supervised training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from verl.trainer.score_watch import Classes, UncountedClassWatch
from verl.trainer.sft.metrics_window import MetricsWindow
from verl.trainer.sft.model_output import ModelOutput
from verl.trainer.sft.run_identity import run_identity
from verl.trainer.sft.run_state import RunState
from verl.utils.dataset.sft_dataset import SFTDataset, SFTExample, collate_examples, length_grouped_batches
from verl.utils.first_rank import on_first_rank
from verl.utils.fsdp import all_reduce_last, create_mesh, shard_model
from verl.utils.head_start import start_head
from verl.utils.model import (
    build_joint_model,
    has_score_head,
    load_tokenizer,
    loading_dtype,
    torch_dtype,
    trained_dtype,
)
from verl.utils.optim import JointOptimizer
from verl.utils.packing import TokenLayout, padded_layout
from verl.utils.tracking import Tracking
from verl.workers.actor.joint_model import JointOutput
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import (
    ScoreObjective,
    SPRMConfig,
    StepCounts,
    count_by_class,
    counted_steps,
    load_sprm_config,
    sprm_loss,
    step_feature_mask,
)

logger = logging.getLogger(__name__)

START_ROWS = 512
"""How many rows a fresh score head's features are standardised by."""


class SFTTrainer:
    """One rank of the training run. Every rank holds all the data and takes every `world_size`-th row of each batch.

    Args:
        config: `sft_trainer.yaml`, resolved and checked.
        device: from `init_distributed`.

    Attributes:
        is_finished: an earlier start of the same run has written the output folder.

    Raises:
        UserError: data, model, checkpoint or output folder do not fit the configuration.
    """

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.trainer.seed + self.rank)
        size = config.data.train_batch_size
        if size % self.world_size:
            raise UserError(f"data.train_batch_size={size} must be a multiple of the {self.world_size} ranks")
        self._compute_dtype = trained_dtype(config.model.compute_dtype, "model.compute_dtype")
        self.tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        self.dataset = SFTDataset(config.data.train_files, self.tokenizer, config.data)
        self.batches_per_epoch = len(self.dataset) // size
        if self.batches_per_epoch == 0:
            raise UserError(f"data.train_batch_size={size} is more than the {len(self.dataset)} rows")
        steps = config.trainer.total_training_steps
        self.total_steps = steps or config.trainer.total_epochs * self.batches_per_epoch
        self.sprm_config = self._sprm_config() if self.dataset.has_labels else None
        self._score_watch = UncountedClassWatch("score")
        files = ModelFiles.read(config.model.path)
        identity = on_first_rank(lambda: run_identity(config, self.dataset, self.sprm_config, self.total_steps))
        self._output = ModelOutput(
            Path(config.trainer.output_dir), self._output_dtype(files), files, self.sprm_config, identity
        )
        self.is_finished = self._output.is_finished(config.model.path)
        if not self.is_finished:
            self._run_state = RunState(config, identity, files, self.sprm_config)

    def _output_dtype(self, files: ModelFiles) -> torch.dtype:
        name = self.config.trainer.output_dtype
        try:
            return torch_dtype(files.dtype or "float32" if name == "auto" else name)
        except UserError as error:
            raise UserError(f"trainer.output_dtype={name}: {error}") from error

    def _sprm_config(self) -> SPRMConfig:
        score = self.config.score
        travelling = load_sprm_config(self.config.model.path, self.tokenizer, score.lang)
        return SPRMConfig(travelling.step_rule, score.dropout, score.normalize_features)

    def init_model(self) -> None:
        """Load the model and shard it, with its optimisers. A collective."""
        path, fsdp = self.config.model.path, self.config.fsdp_config
        model = build_joint_model(
            path,
            loading_dtype(path, torch.float32),
            sprm_config=self.sprm_config,
            trust_remote_code=self.config.model.trust_remote_code,
            gradient_checkpointing=self.config.model.enable_gradient_checkpointing,
            compute_dtype=self._compute_dtype,
        )
        self.model = shard_model(model, create_mesh(fsdp.fsdp_size), fsdp, self._compute_dtype, torch.float32)
        self.optimizer = JointOptimizer(
            self.model, self._with_total(self.config.optim), self._with_total(self.config.score.optim)
        )

    def _with_total(self, section: DictConfig) -> DictConfig:
        return OmegaConf.create({**section, "total_training_steps": self.total_steps})

    def end_without_training(self) -> None:
        """Say that nothing is left to do."""
        trainer = self.config.trainer
        done = f"{self.total_steps} steps are done and trainer.output_dir={trainer.output_dir} is written"
        logger.info("nothing left to do: %s; remove it, or name another, to train again", done)

    def fit(self) -> None:
        """Train from the resumed step to the last one, then write the output folder; all that is written is tried
        before."""
        state, window = self._run_state, MetricsWindow(self.device)
        self._output.try_writing(self.model)
        state.try_saving(self.optimizer.least_state_bytes + sum(map(_bytes, self.model.parameters())))
        state.restore(self.model, self.optimizer)
        if state.window is not None:
            window.go_on_from(state.window)
        with self._tracking() as tracking, self._progress() as progress:
            task = progress.add_task("SFT", total=self.total_steps, completed=state.step)
            if state.step == 0 and self._has_fresh_head:
                self._start_head()
            for step, rows in enumerate(self._batches(state.step), start=state.step + 1):
                metrics = self.update([self.dataset[row] for row in rows], window)
                if self._is_due(step, self.config.trainer.log_freq):
                    metrics |= window.flush()
                    if self.rank == 0:
                        tracking.log(metrics, step)
                # After logging: what a checkpoint stands for is never missing from the logs.
                if self._is_due(step, self.config.trainer.save_freq):
                    state.save(step, window.totals(), self.model, self.optimizer)
                progress.advance(task)
        self._output.write(self.model)

    @property
    def _has_fresh_head(self) -> bool:
        standardized = self.config.score.standardized_start
        return self.sprm_config is not None and standardized and not has_score_head(self.config.model.path, None)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def _progress(self) -> Progress:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        towards = TextColumn(f"{{task.description}} -> {self.config.trainer.output_dir}")
        return Progress(towards, *columns, disable=self.rank > 0)

    def _tracking(self) -> Tracking:
        trainer = self.config.trainer
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger if self.rank == 0 else [],
            trainer.log_dir,
            OmegaConf.to_container(self.config),
            resume_step=self._run_state.step,
        )

    def _batches(self, done: int) -> Iterator[list[int]]:
        """Rows of each batch after the first `done`: the order follows from seed and epoch alone."""
        lengths = [len(example.ids) for example in self.dataset.examples]
        size, seed = self.config.data.train_batch_size, self.config.trainer.seed
        first_epoch, place = divmod(done, self.batches_per_epoch)
        epochs = (length_grouped_batches(lengths, size, epoch_seed=seed + epoch) for epoch in count(first_epoch))
        return islice(chain.from_iterable(epochs), place, place + self.total_steps - done)

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
        start_head(self.model, batches, self._evaluate, objective)

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        layout = padded_layout(batch)
        return layout.restore_steps(self._forward(layout).step_logits)


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.itemsize
