"""FSDP2 in its four placements: weights arrive whole, and leave the GPU where they are to wait elsewhere."""

from __future__ import annotations

import torch

from verl.bringup.step import GIB, Context, require, step
from verl.bringup.workload import Sizes, build_actor, build_policy, fsdp_section, model_folder, process_group
from verl.models.fsdp import local_device, named_full_tensors
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.placed_model import PlacedModel

LEFT_BEHIND = 0.05
MEANS = (
    "FSDP2 on this torch does not do what verl/verl/workers/placed_model.py expects of it: weights gathered for the "
    "rollout are not those of the model, or memory that was to be given to the engine stays taken. Where another one "
    "than the plain placement fails, train with that (all *_offload and offload_policy false). "
)
SIZES = Sizes(prompts=2, samples=2, prompt_tokens=16, response_tokens=64, tokens_per_micro_batch=256)


@step(means=MEANS + "See verl/verl/models/fsdp.py `named_full_tensors` (NCCL).", quick=True)
def placement_plain(context: Context) -> str:
    """Everything on the GPU."""
    return _figure(context)


@step(means=MEANS + "See `PlacedModel.on_device`.", quick=True)
def placement_param_offload(context: Context) -> str:
    """Weights in CPU memory between uses."""
    return _figure(context, "param_offload")


@step(means=MEANS + "See verl/verl/models/fsdp.py `move_optimizer`.", quick=True)
def placement_optimizer_offload(context: Context) -> str:
    """The optimiser's state in CPU memory between uses."""
    return _figure(context, "optimizer_offload")


@step(means=MEANS + "See `CPUOffloadPolicy` in verl/verl/models/fsdp.py.", needs=["gpu"], quick=True)
def placement_offload_policy(context: Context) -> str:
    """FSDP2 fetches each layer when it is needed."""
    return _figure(context, "offload_policy")


def _figure(context: Context, placement: str | None = None) -> str:
    """Train one update, gather every weight, update again, and see what is left on the GPU between uses."""
    folder, changes = model_folder(context), {} if placement is None else {placement: True}
    with process_group():
        policy = build_policy(folder, fsdp_section(**changes), lr=1e-3, packed=True)
        actor, batch = build_actor(policy, folder, SIZES)
        with policy.on_device():
            batch |= actor.compute_log_prob(batch)
        batch["ref_log_prob"] = batch["old_log_probs"] - 0.1
        _update(policy, actor, batch)
        count = _check_weights_are_whole(policy)
        _update(policy, actor, batch)
        return f"{count} weights whole; {_memory(policy, placement)}"


def _update(policy: PlacedModel, actor: DataParallelPPOActor, batch: dict[str, torch.Tensor]) -> None:
    with policy.on_device(with_optimizer=True):
        metrics = actor.update_policy(batch)
    require(metrics["actor/skipped_updates"] == 0, "a gradient of the update is not finite")


def _check_weights_are_whole(policy: PlacedModel) -> int:
    """How many weights the rollout would get, each compared with its own shard."""
    count = 0
    with policy.on_device():
        shards = {name.removeprefix("lm."): value for name, value in policy.model.named_parameters()}
        for name, tensor in named_full_tensors(policy.model, torch.bfloat16):
            wanted = shards[name].to_local().detach()
            same = torch.equal(tensor.cpu(), wanted.cpu().to(tensor.dtype))
            require(same, f"{name} is gathered with other values than it has")
            require(tensor.device == local_device(), f"{name} is gathered on {tensor.device}, not {local_device()}")
            count += 1
    return count


def _memory(policy: PlacedModel, placement: str | None) -> str:
    """What is left on the GPU between uses, beside what the placement should leave there."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.model.parameters())
    # Gradients are freed; AdamW keeps two moments.
    expected = {None: 3, "param_offload": 2, "optimizer_offload": 1, "offload_policy": 0}[placement] * weights
    if not torch.cuda.is_available():
        return f"{weights / 2**20:.1f} MiB of weights"
    found = torch.cuda.memory_allocated()
    figure = f"{found / GIB:.2f} GiB between uses, {expected / GIB:.2f} of weights and moments"
    require(found < expected + LEFT_BEHIND * 3 * weights, figure)
    return figure
