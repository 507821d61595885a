"""How much of what a GPU can compute log-probs and update use, at the shape of 1.5B, and the memory they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Unpack

import torch

from verl.bringup.step import GIB, Context, require, seconds, step
from verl.bringup.workload import Modes, Sizes, build_actor, build_policy, fsdp_section, model_folder, process_group
from verl.models.log_probs import LOGITS_PER_CHUNK
from verl.trainer.config.defaults import plain_defaults
from verl.trainer.planning.memory_estimate import Placement, training_peak
from verl.trainer.planning.model_shapes import ModelShape
from verl.utils.device_peaks import peak_tflops
from verl.workers.actor.dp_actor import DataParallelPPOActor
from xbai.engine.files import read_config

REPEATS = 3
LEAST_MFU = {True: 0.30, False: 0.25}
LEAST_MFU_FROM = 700.0
"""GPUs with a peak of as many TFLOP/s must reach `LEAST_MFU`, with Liger's kernels and without; of others it is only
reported."""
MEMORY_ERROR = 0.15
MEANS = (
    "Training is slower than this GPU allows. Other processes on it (`nvidia-smi`), its clocks or power limit, then "
    "`torch.profiler` around `update_policy`: with bench/train_step.py the same phases can be measured alone. "
)


def _sizes(context: Context) -> Sizes:
    if context.on_gpu:
        return Sizes(prompts=8, samples=4, prompt_tokens=256, response_tokens=2048, tokens_per_micro_batch=8192)
    return Sizes(prompts=2, samples=2, prompt_tokens=16, response_tokens=64, tokens_per_micro_batch=256)


@step(means=MEANS, needs=["38 GiB"], limit_s=240, quick=True)
def throughput_packed(context: Context) -> str:
    """Padding-free rows with checkpointing, without compiled kernels; reported, whatever it is."""
    return _figure(_measure(context, packed=True, gradient_checkpointing=True), context)


@step(
    means=MEANS + "These are the kernels that recipes use where they can; see also the step without them.",
    needs=["compiler", "62 GiB"],
    limit_s=240,
    quick=True,
)
def throughput_fastest(context: Context) -> str:
    """Compiled kernels, Liger's where installed, all activations kept: 30 % MFU on an H100, 25 % without Liger."""
    use_liger = context.on_gpu and find_spec("liger_kernel") is not None
    found = _measure(context, packed=True, fused_kernels=True, use_liger=use_liger)
    peak = _peak(context)
    figure = _figure(found, context)
    if peak is not None and peak >= LEAST_MFU_FROM:
        least = LEAST_MFU[use_liger]
        require(min(found.values()) >= least * peak, f"{figure}; at least {least:.0%} is expected of this GPU")
    return figure


@step(
    means="An update takes another amount of GPU memory than the dry run says (trainer/planning/memory_estimate.py): "
    "its advice, and README's table of GPUs, are wrong on this torch.",
    needs=["gpu"],
    quick=True,
)
def memory_of_an_update(context: Context) -> str:
    """The peak of an update within 15 % of the dry run's estimate."""
    sizes = _sizes(context)
    with process_group():
        actor, batch, shape = _training(context, sizes, layers=8, packed=True, gradient_checkpointing=True)
        actor.update_policy(batch)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        actor.update_policy(batch)
        found = torch.cuda.max_memory_allocated()
    expected = _expected_memory(shape, sizes)
    figure = f"{found / GIB:.2f} GiB at the peak, {expected / GIB:.2f} by the dry run's formulas"
    require(abs(found / expected - 1) < MEMORY_ERROR, figure)
    return figure


def _expected_memory(shape: ModelShape, sizes: Sizes) -> float:
    """Weights, gradients, moments, the score head's, and what an update has on top at its highest."""
    optim = plain_defaults().actor_rollout_ref.actor.optim
    placed = Placement.from_config(shape, fsdp_section(), optim, world=1, on_gpu=True)
    tokens = sizes.tokens_per_micro_batch
    logits = min(LOGITS_PER_CHUNK, tokens * shape.vocabulary)
    peak = training_peak(placed, tokens, 0, checkpointing=True, packed=True, logits=logits)
    return 2 * placed.weights + placed.optimizer + 4 * 7 * shape.score_head_parameters + sum(peak.values())


def _training(
    context: Context, sizes: Sizes, layers: int | None, **modes: Unpack[Modes]
) -> tuple[DataParallelPPOActor, dict[str, torch.Tensor], ModelShape]:
    folder = model_folder(context, layers)
    shape = ModelShape.from_config(read_config(folder))
    policy = build_policy(folder, fsdp_section(compute_dtype="bfloat16"), **modes)
    actor, batch = build_actor(policy, folder, sizes)
    batch |= actor.compute_log_prob(batch)
    batch["ref_log_prob"] = batch["old_log_probs"]
    return actor, batch, shape


def _measure(context: Context, **modes: Unpack[Modes]) -> dict[str, float]:
    """TFLOP/s of each phase, of the operations that the model asks for."""
    sizes = _sizes(context)
    with process_group():
        actor, batch, shape = _training(context, sizes, layers=None, **modes)
        forward = shape.sequence_flops(batch["attention_mask"].sum(1).tolist(), int(batch["response_mask"].sum()))
        return {
            "log-prob": forward / _median_seconds(lambda: actor.compute_log_prob(batch)) / 1e12,
            "update": 3 * forward / _median_seconds(lambda: actor.update_policy(batch)) / 1e12,
        }


def _peak(context: Context) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(), torch.bfloat16) if context.on_gpu else None


def _figure(found: dict[str, float], context: Context) -> str:
    if (peak := _peak(context)) is None:
        return ", ".join(f"{phase} {tflops:.3g} TFLOP/s" for phase, tflops in found.items())
    return ", ".join(f"{phase} {tflops / peak:.1%} MFU ({tflops:.0f} TFLOP/s)" for phase, tflops in found.items())


def _median_seconds(run: Callable[[], Any]) -> float:
    run()
    return statistics.median(seconds(run) for _ in range(REPEATS))
