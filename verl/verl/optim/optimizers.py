"""The optimisers and schedules of a model's parts, stepped together or not at all."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from verl.models.fsdp import grad_norm, local_device
from verl.models.joint_model import JointModel
from verl.optim.eight_bit_adam import EIGHT_BIT_OPTIMIZERS, EightBitAdam, check_eight_bit
from verl.optim.muon import Muon
from verl.trainer.config.schema import OptimConfig, SFTOptim
from xbai.errors import UserError
from xbai.sprm import ScoreHead, unfolded

logger = logging.getLogger(__name__)

MAX_NONFINITE = 10
STATE_BYTES = {"AdamW": 8, "Muon": 4, **dict.fromkeys(EIGHT_BIT_OPTIMIZERS, 2)}
"""What an optimiser keeps of one float32 parameter, at least."""


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> Optimizer:
    """The optimiser of one `optim` section.

    Raises:
        UserError: an 8-bit one that cannot run here.
        ValueError: Muon without `adamw_lr`.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if config.name == "Muon":
        if not isinstance(config, SFTOptim) or config.adamw_lr is None:
            raise ValueError("optim.name=Muon needs an optim.adamw_lr")
        return Muon(named_parameters, adamw_lr=config.adamw_lr, **options)
    parameters = [parameter for _, parameter in named_parameters]
    if config.name in EIGHT_BIT_OPTIMIZERS:
        check_eight_bit(config.name, local_device().type)
        return EightBitAdam(config.name, parameters, **options)
    # In place: torch's default on a GPU makes a copy of all second moments in every step.
    return torch.optim.AdamW(parameters, **options, fused=local_device().type == "cuda" or None)


def lr_factor(step: int, warmup_steps: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate at `step` (0-based) relative to its peak.

    Args:
        warmup_steps: linear over these, from 1 / warmup_steps to 1.
        total_steps: where the cosine ends; it stays there afterwards.
        config: its `warmup_style`, and for cosine `min_lr_ratio` and `num_cycles` (0.5: one fall).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.warmup_style == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    cosine = 0.5 * (1 + math.cos(2 * math.pi * config.num_cycles * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine


def build_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int | None = None) -> LambdaLR:
    """Warm-up and decay of one `optim` section; `total_steps` is what ratio and cosine refer to.

    Raises:
        ValueError: a ratio or a cosine without it.
    """
    warmup_steps, ratio = config.lr_warmup_steps, config.lr_warmup_steps_ratio
    if total_steps is None:
        if config.warmup_style == "cosine" or (warmup_steps < 0 and ratio > 0):
            raise ValueError("warmup_style=cosine and lr_warmup_steps_ratio need total_steps")
        total_steps = 0
    if warmup_steps < 0:
        warmup_steps = int(ratio * total_steps)
    return LambdaLR(optimizer, lambda step: lr_factor(step, warmup_steps, total_steps, config))


class Optimizers:
    """One optimiser and one schedule for each part of a model, over what of it is not frozen.

    Args:
        parts: from a part's name, which metrics and checkpoints use, to its module, sharded or plain, and its `optim`
            section.
        max_nonfinite: how many updates in a row may be left out because a gradient was not finite.

    Attributes:
        optimizers, schedules: by the part's name; what checkpoints and offloading go through.
        least_state_bytes: what the optimisers of all ranks keep once they have stepped, at least.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[nn.Module, OptimConfig]],
        total_steps: int | None = None,
        max_nonfinite: int = MAX_NONFINITE,
    ) -> None:
        self._max_nonfinite, self._nonfinite_in_a_row = max_nonfinite, 0
        self._heads = [module for module, _ in parts.values() if isinstance(module, ScoreHead)]
        trained = {
            name: [(key, parameter) for key, parameter in module.named_parameters() if parameter.requires_grad]
            for name, (module, _) in parts.items()
        }
        self._parameters = {name: [parameter for _, parameter in named] for name, named in trained.items()}
        self.optimizers, self.schedules, self.least_state_bytes = dict[str, Optimizer](), dict[str, LambdaLR](), 0
        for name, (_, config) in parts.items():
            self.optimizers[name] = build_optimizer(trained[name], config)
            self.schedules[name] = build_schedule(self.optimizers[name], config, total_steps)
            self.least_state_bytes += STATE_BYTES[config.name] * sum(p.numel() for p in self._parameters[name])

    def step(self, max_norm: float, loss: float = 0.0) -> dict[str, float]:
        """Clip each part to `max_norm` and update all of them; where the loss or a gradient is not finite, none.

        A standardised score head's step, and its gradient's norm, are those on standardised features.

        Args:
            max_norm: of a part's gradient over all ranks.
            loss: of the global mini-batch, the same on every rank.

        Returns:
            Gradient norms before clipping, `grad_norm/{part}`, and `skipped` (0 or 1). The same on every rank.

        Raises:
            UserError: on every rank, after `max_nonfinite` updates in a row that were left out.
        """
        with ExitStack() as stack:
            for head in self._heads:
                stack.enter_context(unfolded(head))
            metrics = self._step(max_norm, loss)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self._count_nonfinite(not metrics["skipped"], {"loss": loss, **metrics})
        return metrics

    def _step(self, max_norm: float, loss: float) -> dict[str, float]:
        norms = {name: grad_norm(parameters) for name, parameters in self._parameters.items()}
        metrics = {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}
        finite = all(map(math.isfinite, (loss, *metrics.values())))
        if finite:
            for name, norm in norms.items():
                nn.utils.clip_grads_with_norm_(self._parameters[name], max_norm, norm)
                self.optimizers[name].step()
        return metrics | {"skipped": float(not finite)}

    def _count_nonfinite(self, finite: bool, values: dict[str, float]) -> None:
        if finite:
            self._nonfinite_in_a_row = 0
            return
        self._nonfinite_in_a_row += 1
        seen = ", ".join(f"{name} {value:g}" for name, value in values.items())
        logger.warning("update skipped: not finite (%s)", seen)
        if self._nonfinite_in_a_row >= self._max_nonfinite:
            raise UserError(
                f"{self._nonfinite_in_a_row} updates in a row were not finite (last: {seen}) and changed nothing; "
                "resume from the last checkpoint with a lower optim.lr or grad_clip, or in compute_dtype=float32 "
                "(max_nonfinite_updates is what stopped the run)"
            )

    def advance_schedules(self) -> dict[str, float]:
        """Move every schedule on by one; returns the learning rates that were in force, `lr/{part}`."""
        rates = {f"lr/{name}": float(schedule.get_last_lr()[0]) for name, schedule in self.schedules.items()}
        for schedule in self.schedules.values():
            schedule.step()
        return rates


class JointOptimizer(Optimizers):
    """The parts `policy` and, when the model has a head, `score`, which then must be configured."""

    def __init__(
        self,
        model: JointModel,
        policy_config: OptimConfig,
        score_config: OptimConfig | None = None,
        total_steps: int | None = None,
        max_nonfinite: int = MAX_NONFINITE,
    ) -> None:
        parts: dict[str, tuple[nn.Module, OptimConfig]] = {"policy": (model.lm, policy_config)}
        if model.score_head is not None:
            if score_config is None:
                raise ValueError("the model has a score head, and no score.optim was given for it")
            parts["score"] = (model.score_head, score_config)
        super().__init__(parts, total_steps, max_nonfinite)
