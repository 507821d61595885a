"""One update in every mode that a recipe can ask for, computed in bfloat16, against float32 without any of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from verl.bringup.step import Context, require, step
from verl.bringup.workload import (
    Modes,
    Sizes,
    build_actor,
    build_policy,
    fsdp_section,
    make_batch,
    model_folder,
    process_group,
)
from verl.models.loading import build_joint_model, torch_dtype
from verl.models.reference import ReferencePolicy
from verl.models.value_model import build_value_model
from verl.optim.optimizers import Optimizers
from verl.trainer.config.defaults import plain_defaults
from verl.trainer.config.fields import with_values
from verl.workers.critic import DataParallelPPOCritic
from verl.workers.placed_model import Dtypes, PlacedModel
from xbai.engine.files import resolve_head_dtype

SIZES = Sizes(prompts=4, samples=4, prompt_tokens=32, response_tokens=128, tokens_per_micro_batch=640)
LOSS_ERROR, NORM_ERROR, LOG_PROB_ERROR = 0.01, 0.05, 0.03
LOSSES = ("actor/pg_loss", "actor/entropy_loss", "actor/kl_loss", "score/loss", "actor/loss")
REFERENCE_SCALE, EARLIER = 0.875, 0.5
"""What the policy's weights are multiplied by to get a reference's (a number that bfloat16 has), and how far log-probs
of a few updates ago are from its own."""
EXACT = "float32"
MEANS = "An update in bfloat16 has another loss or gradient than the same one in float32, by more than rounding. "

Figures = dict[str, Any]


@step(means="Training in float32, padded and without any kernels, fails: look at torch and FSDP2 first.", quick=True)
def training_float32(context: Context) -> str:
    """What all others are compared with."""
    figures = _exact(context)
    return ", ".join(f"{name.split('/')[-1]} {figures[name]:.4g}" for name in LOSSES)


@step(means=MEANS + "The plain mode: transformers' SDPA attention on padded rows.", quick=True)
def training_padded(context: Context) -> str:
    """Rows with their padding, with checkpointing."""
    return _compare(context, gradient_checkpointing=True)


@step(means=MEANS + "Look at the attention steps; use_remove_padding=false avoids it.", quick=True)
def training_packed(context: Context) -> str:
    """Padding-free rows, with checkpointing."""
    return _compare(context, packed=True, gradient_checkpointing=True)


@step(means=MEANS + "Only checkpointing is off here, in which case activations of all layers are kept.", quick=True)
def training_without_checkpointing(context: Context) -> str:
    """Padding-free rows, no layer computed again."""
    return _compare(context, packed=True)


@step(
    means=MEANS + "torch.compile's kernel after the LM head (verl/verl/models/log_probs.py); "
    "use_fused_kernels=false avoids it.",
    needs=["compiler"],
    quick=True,
)
def training_fused_kernels(context: Context) -> str:
    """Log-probs and entropies by a compiled kernel."""
    return _compare(context, packed=True, fused_kernels=True)


@step(
    means=MEANS + "Liger's kernels for norms and MLPs (verl/verl/models/liger.py); use_liger=false avoids it.",
    needs=["gpu", "liger_kernel"],
    quick=True,
)
def training_liger(context: Context) -> str:
    """Norms and MLPs by Liger."""
    return _compare(context, packed=True, use_liger=True, gradient_checkpointing=True)


@step(
    means=MEANS + "The KL over the whole vocabulary, with a reference policy beside the policy "
    "(verl/verl/models/reference.py); kl_loss_type=low_var_kl avoids it.",
    quick=True,
)
def training_full_kl(context: Context) -> str:
    """The loss has the KL to a reference, summed over the vocabulary."""
    return _compare(context, full_kl=True, packed=True, gradient_checkpointing=True)


@step(means=MEANS + "The critic of PPO with GAE (verl/verl/workers/critic).", quick=True)
def training_critic(context: Context) -> str:
    """Values and the critic's update."""
    folder = model_folder(context)
    with process_group():
        exact, found = (_critic(folder, dtype) for dtype in (EXACT, "bfloat16"))
    worst = abs(found / exact - 1)
    require(worst < LOSS_ERROR, f"loss {found:.5g}, in float32 {exact:.5g}")
    return f"loss within {worst:.2%} of float32"


def _exact(context: Context, full_kl: bool = False) -> Figures:
    """The update in float32, computed by the first step that asks for it."""
    file = context.work / f"exact_{'full_kl' if full_kl else 'sampled_kl'}.pt"
    if not file.exists():
        torch.save(_update(context, EXACT, full_kl), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return torch.load(file)


def _compare(context: Context, full_kl: bool = False, **modes: Unpack[Modes]) -> str:
    exact = _exact(context, full_kl)
    found = _update(context, "bfloat16", full_kl, exact["earlier"], **modes)
    losses = {name: abs(found[name] / exact[name] - 1) for name in LOSSES}
    name = max(losses, key=lambda name: losses[name])
    require(losses[name] < LOSS_ERROR, f"{name} {found[name]:.5g}, in float32 {exact[name]:.5g}")
    norms = {name: abs(found[name] / exact[name] - 1) for name in ("actor/grad_norm", "score/grad_norm")}
    norm = max(norms, key=lambda name: norms[name])
    require(norms[norm] < NORM_ERROR, f"{norm} {found[norm]:.5g}, in float32 {exact[norm]:.5g}")
    mask = exact["mask"]
    log_probs = float((found["log_probs"] - exact["log_probs"]).abs()[mask].mean())
    require(log_probs < LOG_PROB_ERROR, f"log-probs are {log_probs:.3g} off on average; at most {LOG_PROB_ERROR}")
    return f"losses within {losses[name]:.2%}, gradient norms within {norms[norm]:.2%}, log-probs {log_probs:.2g} off"


def _update(
    context: Context, dtype: str, full_kl: bool, earlier: dict[str, Tensor] | None = None, **modes: Unpack[Modes]
) -> Figures:
    """Log-probs, then the metrics of one update, whose losses depend on how good the log-probs are.

    The log-probs that the update is relative to are `earlier` (None: some are drawn), the same in every mode.
    """
    folder = model_folder(context)
    kind = "full" if full_kl else "low_var_kl"
    loss: dict[str, Any] = {"kl_loss_type": kind, "entropy_coeff": 0.01, "kl_loss_coef": 0.1}
    packed = modes.get("packed", False)
    with process_group():
        policy = build_policy(folder, fsdp_section(compute_dtype=dtype), **modes)
        reference = _reference(folder, dtype, packed) if full_kl else None
        actor, batch = build_actor(policy, folder, SIZES, packed, reference=reference, **loss)
        columns = actor.compute_log_prob(batch)
        earlier = earlier or _earlier(columns["old_log_probs"])
        batch |= {"old_step_logits": columns["old_step_logits"], **earlier}
        # Not 0 on average, so that an error of one in a hundred is one of the loss.
        batch["advantages"] = batch["advantages"] + 1
        metrics = actor.update_policy(batch)
    require(metrics["actor/skipped_updates"] == 0, "a gradient is not finite")
    require(all(map(math.isfinite, metrics.values())), "a metric is not finite")
    return metrics | {"log_probs": columns["old_log_probs"], "mask": batch["response_mask"], "earlier": earlier}


def _earlier(log_probs: Tensor) -> dict[str, Tensor]:
    """Log-probs of a policy and a reference some updates ago, which are not what the policy has."""
    generator = torch.Generator().manual_seed(1)
    names = ("old_log_probs", "ref_log_prob")
    return {name: log_probs + EARLIER * torch.randn(log_probs.shape, generator=generator) for name in names}


def _reference(folder: Path, dtype: str, packed: bool) -> ReferencePolicy:
    compute = torch_dtype(dtype)
    logits_dtype = resolve_head_dtype(None, compute)
    model = build_joint_model(folder, compute, compute_dtype=compute, logits_dtype=logits_dtype, packed=packed)
    for parameter in model.requires_grad_(False).parameters():
        parameter.mul_(REFERENCE_SCALE)
    return ReferencePolicy(PlacedModel(model, fsdp_section(compute_dtype=dtype)).model)


def _critic(folder: Path, dtype: str) -> float:
    """The loss of one update of a critic."""
    fsdp_config = fsdp_section(compute_dtype=dtype)
    dtypes = Dtypes.from_config(fsdp_config)
    packed = dtype != EXACT
    model = build_value_model(folder, dtypes.stored, packed=packed, compute_dtype=dtypes.compute)
    changes = {
        "model.use_remove_padding": packed,
        "ppo_mini_batch_size": SIZES.prompts,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": SIZES.tokens_per_micro_batch,
    }
    config = with_values(plain_defaults().critic, changes)
    placed = PlacedModel(model, fsdp_config, lambda sharded: Optimizers({"critic": (sharded, config.optim)}))
    critic = DataParallelPPOCritic(config, SIZES.samples, placed.model, placed.optimizer)
    batch = make_batch(SIZES, folder)
    batch["values"] = critic.compute_values(batch)
    batch["returns"] = batch["advantages"]
    metrics = critic.update_critic(batch)
    require(metrics["critic/skipped_updates"] == 0, "a gradient of the critic is not finite")
    return metrics["critic/vf_loss"]
