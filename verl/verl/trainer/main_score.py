"""Training a score head alone, on graded responses of any reasoning model: a judge for it.

    python -m verl.trainer.main_score model.path=MODEL data.train_files=ROLLOUTS data.val_files=OTHERS \
        trainer.output_dir=OUT

The model reads each response once, and what a head sees of it is kept in `trainer.features_dir`, which later runs use
again; an epoch over those features takes seconds. The output folder appears whole at the end or not at all.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import torch
from rich.logging import RichHandler

from verl.distribution import check_distribution
from verl.models.fsdp import local_device
from verl.optim.optimizers import Optimizers
from verl.trainer.config.compose import compose_config
from verl.trainer.config.score import YAML, HeadConfig, check_score_config
from verl.trainer.plot import plot_training
from verl.utils.dataset.rl_dataset import file_list
from verl.utils.dataset.step_dataset import StepDataset
from verl.utils.head_quality import candidates, head_quality
from verl.utils.tracking import METRICS_FILE, Tracking
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_directory, check_directory, check_writable, why_not_written
from xbai.measure.feature_files import FeatureFiles
from xbai.measure.graded_responses import response_files
from xbai.measure.metrics import measure
from xbai.measure.options import FeatureOptions
from xbai.measure.tables import report_grids, show
from xbai.sprm import (
    ScoreHead,
    SPRMConfig,
    observed_inputs,
    save_score_head,
    shift_head,
    standardize_head,
    start_shift,
    start_totals,
)
from xbai.sprm.head import SCORE_MODULE_FILE, save_sprm_config
from xbai.sprm.step_features import StepFeatures

logger = logging.getLogger(__name__)

PLOT_FILE = "training.png"


class ScoreTrainer:
    """One process; the head learns on the GPU where there is one.

    Raises:
        UserError: files without responses to learn from, or folders that cannot be written.
    """

    def __init__(self, config: HeadConfig) -> None:
        self.config, self.device = config, local_device()
        self.objective = config.score.objective
        self.output_dir, self.log_dir = Path(config.trainer.output_dir), Path(config.trainer.log_dir)
        self._try_saving()
        options = FeatureOptions(
            model_path=config.model.path,
            task=config.data.task,
            lang=config.score.lang,
            dtype=config.model.dtype,
            max_batch_tokens=config.model.max_batch_tokens,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.files = FeatureFiles(options, Path(config.trainer.features_dir))
        travelling = self.files.sprm_config
        self.sprm_config = SPRMConfig(travelling.step_rule, config.score.dropout, config.score.normalize_features)
        self.train_data = self._dataset("data.train_files", config.data.train_files)
        self.val_data = self._dataset("data.val_files", config.data.val_files) if config.data.val_files else None
        self._check_overlap()
        torch.manual_seed(config.trainer.seed)
        self.head = self._fresh_head().to(self.device)
        steps_per_epoch = -(-len(self.train_data.groups) // config.data.train_batch_size)
        total_steps = config.trainer.total_epochs * steps_per_epoch
        self.optimizer = Optimizers({"score": (self.head, config.score.optim)}, total_steps)

    def _dataset(self, key: str, patterns: str | Sequence[str]) -> StepDataset:
        paths = response_files(file_list(patterns))
        (layer,) = self.files.source.layers
        data = StepDataset([StepFeatures.open(self.files.of(path)) for path in paths], layer)
        graded, steps, mixed = int(data.graded.sum()), int(data.steps.sum()), data.mixed_groups
        if not graded:
            raise UserError(f"{key}: none of the {len(data)} responses could be graded")
        if not steps:
            raise UserError(
                f"{key}: the {len(data)} responses have no step (lang={self.sprm_config.step_rule.lang}): the model "
                "must end its steps as the rule says, and score.lang=zh takes every line and full stop for one"
            )
        if not mixed:
            raise UserError(
                f"{key}: none of the {len(data.groups)} prompts has both a right and a wrong response, so nothing says "
                "which of two to choose: sample more of each, or easier or harder prompts"
            )
        logger.info(
            "%s: %d responses to %d prompts, %d of them with right and wrong ones; %.1f steps a response",
            key, len(data), len(data.groups), mixed, steps / len(data),
        )  # fmt: skip
        return data

    def _check_overlap(self) -> None:
        if self.val_data is None:
            return
        seen = int(torch.isin(self.val_data.questions, self.train_data.questions).sum())
        if seen:
            logger.warning(
                "%d of the %d prompts of data.val_files are in data.train_files too: it says little about others",
                seen, len(self.val_data.questions),
            )  # fmt: skip

    @torch.no_grad()
    def _fresh_head(self) -> ScoreHead:
        config = self.sprm_config
        head = ScoreHead(self.files.hidden_size, config.dropout, config.normalize_features).eval()
        if self.config.score.standardize:
            with observed_inputs(head) as moments:
                for batch in self.train_data.in_order():
                    head(batch.features)
            standardize_head(head, moments)
            totals = (
                start_totals(batch.rows(head(batch.features)), batch.mask, batch.labels, batch.graded)
                for batch in self.train_data.in_order()
            )
            shift_head(head, start_shift(reduce(torch.add, totals), self.objective))
        return head

    def fit(self) -> None:
        """Train, and write the head of the epoch that validation found best."""
        trainer, best, quality, weights = self.config.trainer, 0, float("-inf"), copy.deepcopy(self.head.state_dict())
        names = trainer.project_name, trainer.experiment_name
        with Tracking(*names, trainer.logger, self.log_dir, asdict(self.config)) as tracking:
            for epoch in range(1, trainer.total_epochs + 1):
                metrics = self._epoch(epoch)
                if self.val_data is None:
                    best, weights = epoch, self.head.state_dict()
                else:
                    metrics |= head_quality(self.head, self.val_data, self.device)
                    if metrics["val/within_prompt_auc"] > quality:
                        best, quality = epoch, metrics["val/within_prompt_auc"]
                        weights = copy.deepcopy(self.head.state_dict())
                tracking.log(metrics, epoch)
                logger.info("epoch %d of %d: %s", epoch, trainer.total_epochs, _shown(metrics))
                if trainer.patience is not None and epoch - best >= trainer.patience:
                    logger.info("no better epoch than %d in the last %d: training ends", best, trainer.patience)
                    break
        self.head.load_state_dict(weights)
        self._finish(best)

    def _epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training data; means over its updates."""
        started, updates = time.perf_counter(), []
        self.head.train()
        for batch in self.train_data.epoch(self.config.data.train_batch_size, self.config.trainer.seed + epoch):
            batch = batch.to(self.device)
            logits = batch.rows(self.head(batch.features))
            loss = self.objective(logits, batch.mask, batch.labels, batch.graded, batch.groups.tolist())
            loss.backward()
            update = {"loss": loss.item(), **self.optimizer.step(self.config.score.grad_clip, loss.item())}
            updates.append(update | self.optimizer.advance_schedules())
        means = {f"score/{name}": sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        return means | {"timing_s/epoch": time.perf_counter() - started}

    def _finish(self, epoch: int) -> None:
        head = self.head.cpu().eval()
        data, name = (self.val_data, "validation") if self.val_data is not None else (self.train_data, "training data")
        show(report_grids({f"{name}, epoch {epoch}": measure(candidates(head, data, torch.device("cpu")))}))
        if "file" in self.config.trainer.logger:
            plot_training([self.log_dir / METRICS_FILE], self.log_dir / PLOT_FILE, unit="epoch")
        self._save(head)
        logger.info(
            "wrote the head of epoch %d into %s; metrics and curves are in %s", epoch, self.output_dir, self.log_dir
        )

    def _save(self, head: ScoreHead) -> None:
        with self._named_if_not_written():
            if self.output_dir.exists():
                # Beside the model: what says that there is a head comes last.
                save_sprm_config(self.output_dir, self.sprm_config)
                save_score_head(self.output_dir, head.state_dict(), None)
            else:
                with atomic_directory(self.output_dir) as folder:
                    save_score_head(folder, head.state_dict(), self.sprm_config)

    def _try_saving(self) -> None:
        with self._named_if_not_written():
            if self.output_dir.exists():
                check_writable(self.output_dir / SCORE_MODULE_FILE)
            else:
                check_directory(self.output_dir)
        check_writable(self.log_dir / METRICS_FILE)

    @contextmanager
    def _named_if_not_written(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            why = why_not_written(error)
            raise UserError(f"trainer.output_dir={self.output_dir}: the head cannot be written ({why})") from None


def _shown(metrics: dict[str, float]) -> str:
    names = ("score/loss", *(name for name in metrics if name.startswith("val/")), "timing_s/epoch")
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in names)


@exit_on_user_error
def main() -> None:
    """Entry point."""
    check_distribution()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of score_trainer.yaml")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    ScoreTrainer(check_score_config(compose_config(YAML, arguments.overrides))).fit()


if __name__ == "__main__":
    main()
