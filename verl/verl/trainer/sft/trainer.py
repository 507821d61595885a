"""The supervised training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from verl.models.fsdp import create_mesh, shard_model
from verl.models.head_start import start_head
from verl.models.loading import (
    build_joint_model,
    fast_dtype,
    has_score_head,
    load_tokenizer,
    loading_dtype,
    torch_dtype,
)
from verl.models.packing import Batch, padded_layout
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.sft import SFTConfig
from verl.trainer.score_watch import UncountedClassWatch
from verl.trainer.sft.loss import SFTLoss
from verl.trainer.sft.metrics_window import MetricsWindow
from verl.trainer.sft.model_output import ModelOutput
from verl.trainer.sft.run_identity import run_identity
from verl.trainer.sft.run_state import RunState
from verl.utils.dataset.sft_dataset import SFTDataset, SFTExample, collate_examples, length_grouped_batches
from verl.utils.first_rank import on_first_rank
from verl.utils.tracking import Tracking
from verl.workers.update import Update
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import SPRMConfig, load_sprm_config, step_feature_mask

logger = logging.getLogger(__name__)

START_ROWS = 512
"""How many rows a fresh score head's features are standardised by."""


class SFTTrainer:
    """One rank of the training run. Every rank holds all the data and takes every `world_size`-th row of each batch.

    Attributes:
        is_finished: an earlier start of the same run has written the output folder.

    Raises:
        UserError: data, model, checkpoint or output folder do not fit the configuration.
    """

    def __init__(self, config: SFTConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.trainer.seed + self.rank)
        size = config.data.train_batch_size
        if size % self.world_size:
            raise UserError(f"data.train_batch_size={size} must be a multiple of the {self.world_size} ranks")
        chosen = config.model.compute_dtype
        self._compute_dtype = fast_dtype(device) if chosen is None else torch_dtype(chosen)
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
        mesh, dtypes = create_mesh(fsdp.fsdp_size), (self._compute_dtype, torch.float32)
        self.model = shard_model(model, mesh, *dtypes, reshards=fsdp.reshard_after_forward, offload=fsdp.offload_policy)
        self.optimizer = JointOptimizer(self.model, self.config.optim, self.config.score.optim, self.total_steps)

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
        state.try_saving(self.optimizer.least_state_bytes + sum(weight.nbytes for weight in self.model.parameters()))
        state.restore(self.model, self.optimizer)
        if state.window is not None:
            window.go_on_from(state.window)
        trainer, is_first = self.config.trainer, self.rank == 0
        names = trainer.project_name, trainer.experiment_name, trainer.logger if is_first else [], trainer.log_dir
        with Tracking(*names, asdict(self.config), state.step) as tracking, self._progress() as progress:
            task = progress.add_task("SFT", total=self.total_steps, completed=state.step)
            if state.step == 0 and self.sprm_config is not None and self.config.score.standardized_start:
                self._start_head()
            for step, rows in enumerate(self._batches(state.step), start=state.step + 1):
                metrics = self.update([self.dataset[row] for row in rows], window)
                if self._is_due(step, trainer.log_freq):
                    metrics |= window.flush()
                    if is_first:
                        tracking.log(metrics, step)
                # After logging: what a checkpoint stands for is never missing from the logs.
                if self._is_due(step, trainer.save_freq):
                    state.save(step, window.totals(), self.model, self.optimizer)
                progress.advance(task)
        self._output.write(self.model)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def _progress(self) -> Progress:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        towards = TextColumn(f"{{task.description}} -> {self.config.trainer.output_dir}")
        return Progress(towards, *columns, disable=self.rank > 0)

    def _batches(self, done: int) -> Iterator[list[int]]:
        """Rows of each batch after the first `done`: the order follows from seed and epoch alone."""
        lengths = [len(example.ids) for example in self.dataset.examples]
        size, seed = self.config.data.train_batch_size, self.config.trainer.seed
        first_epoch, place = divmod(done, self.batches_per_epoch)
        epochs = (length_grouped_batches(lengths, size, epoch_seed=seed + epoch) for epoch in count(first_epoch))
        return islice(chain.from_iterable(epochs), place, place + self.total_steps - done)

    def update(self, examples: list[SFTExample], window: MetricsWindow) -> dict[str, float]:
        """One optimiser step on a global batch; the same on every rank, and for every number of ranks.

        Returns gradient norms, learning rates and whether the update was skipped; `window` collects what is only worth
        reporting over several steps.
        """
        micro_batches = self._micro_batches(examples)
        has_head, score = self.sprm_config is not None, self.config.score
        if has_head:
            for batch in micro_batches:
                # They decide which steps agree with the outcome, where that matters.
                weighs = score.agreement_weighting
                logits = self._evaluate(batch) if weighs else torch.zeros(batch["input_ids"].shape, device=self.device)
                batch["old_step_logits"] = logits
        forward = partial(self.model, backbone_grad_scale=score.backbone_grad_scale)
        update = Update(self.model, forward, SFTLoss(score if has_head else None, window), padded_layout)
        totals = update.totals(micro_batches)
        if has_head and self.rank == 0:
            self._score_watch.observe(totals.counted, totals.graded)
        for shares in update.backward(micro_batches, totals):
            window.add_losses(shares["sft/loss"], shares["score/loss"])
        window.end_step(int(totals.tokens))
        return self.optimizer.step(self.config.optim.grad_clip) | self.optimizer.advance_schedules()

    def _micro_batches(self, examples: list[SFTExample]) -> list[dict[str, Tensor]]:
        """This rank's share of the examples."""
        mine, size = examples[self.rank :: self.world_size], self.config.data.micro_batch_size_per_gpu
        return [self._batch(mine[i : i + size]) for i in range(0, len(mine), size)]

    def _batch(self, examples: list[SFTExample]) -> dict[str, Tensor]:
        batch = collate_examples(examples, self.tokenizer.pad_token_id)
        if self.sprm_config is not None:
            rule = self.sprm_config.step_rule
            batch["step_feature_mask"] = step_feature_mask(batch["input_ids"], batch["response_mask"], rule)
        # A layout wants a column before those of the response.
        batch["response_mask"] = batch["response_mask"][:, 1:]
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _start_head(self) -> None:
        """See `start_head`, for a fresh one; by some of the rows. A collective."""
        if has_score_head(self.config.model.path, None):
            return
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.config.trainer.seed))
        rows = order[: min(START_ROWS, len(order)) // self.world_size * self.world_size].tolist()
        batches = self._micro_batches([self.dataset[row] for row in rows])
        start_head(self.model, batches, self._evaluate, self.config.score.objective)

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> Tensor:
        """[B, T] step logits in evaluation mode."""
        self.model.eval()
        layout = padded_layout(batch)
        return layout.restore_steps(self.model(layout).step_logits)
