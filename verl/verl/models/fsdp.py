"""FSDP2 on NCCL or gloo: process groups, sharding, gradient norms, whole tensors for weight sync, offloading."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.models.lora import merged_parameters
from xbai.errors import UserError

Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")
ItemOut = TypeVar("ItemOut", covariant=True)

# A warning about in-place changes of a module's output, which nothing here makes.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def local_device() -> torch.device:
    """The device of this rank: its GPU (by `LOCAL_RANK`, else the first visible one), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def init_distributed(timeout_s: float = 1800.0) -> torch.device:
    """Join the process group that the usual variables (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) describe.

    CPU tensors travel by gloo and GPU tensors by NCCL. A rank that waits `timeout_s` for the others in one collective
    fails; for groups that are made later, see `adopt_timeout`. Returns this rank's device, made the current one.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


def adopt_timeout(group: dist.ProcessGroup) -> None:
    """Give a group the time-out of `init_distributed`; torch gives each new one its default."""
    world = dist.distributed_c10d._get_default_group()._get_backend(local_device())
    dist.distributed_c10d._set_pg_timeout(world.options._timeout, group)


def create_mesh(fsdp_size: int = -1) -> DeviceMesh:
    """The data-parallel mesh over all ranks; `fsdp_size` of them share one sharded copy of the model.

    -1 stands for all of them (plain FSDP). A smaller number gives HSDP: sharded in a group, replicated over groups.

    Raises:
        UserError: `fsdp_size` does not divide the number of ranks.
    """
    world, device_type = dist.get_world_size(), local_device().type
    if fsdp_size <= 0 or fsdp_size == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("fsdp",))
    if world % fsdp_size:
        raise UserError(f"fsdp_config.fsdp_size={fsdp_size} must divide the number of ranks, {world}")
    mesh = init_device_mesh(device_type, (world // fsdp_size, fsdp_size), mesh_dim_names=("ddp", "fsdp"))
    for group in mesh.get_all_groups():
        adopt_timeout(group)
    return mesh


def shard_model(
    model: Model,
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None = None,
    stored_dtype: torch.dtype | None = None,
    *,
    reshards: bool = True,
    offload: bool = False,
) -> Model:
    """Shard in place: one group for each decoder layer, each head, untied embeddings, and one for the rest.

    Args:
        model: whole on every rank, with the same weights; its children are one transformers model and heads on it.
        mesh: from `create_mesh`.
        param_dtype: what the transformers model computes in (None: the dtype it is stored in). Gradients are reduced,
            outputs given and heads computed in float32 whatever it is.
        stored_dtype: what weights are kept in (None: as they are); a rank widens its own shards only.
        reshards: after a forward pass give a layer's weights back until its backward pass.
        offload: keep weights and gradients in CPU memory (`fsdp_config.offload_policy`).

    Raises:
        UserError: `offload_policy` without a GPU to offload from.
    """
    if offload and local_device().type == "cpu":
        raise UserError("fsdp_config.offload_policy=true needs a GPU to offload from; set it to false on CPU")
    offload_policy = CPUOffloadPolicy() if offload else OffloadPolicy()

    def shard(module: nn.Module, policy: MixedPrecisionPolicy, reshards: bool = reshards) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards, offload_policy=offload_policy)

    backbone = next(child for child in model.children() if isinstance(child, PreTrainedModel))
    compute = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(backbone):
        shard(layer, compute)
    full_precision = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for head in model.children():
        if head is not backbone:
            shard(head, full_precision)
    if not backbone.config.tie_word_embeddings:
        shard(backbone.get_input_embeddings(), compute)
    # The LM head stays with the root, gathered once for a whole forward and backward pass: it runs once for every
    # chunk of tokens, and how many chunks there are differs from rank to rank.
    outermost = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    shard(model, outermost, reshards=False)
    if stored_dtype == torch.float32 and backbone.dtype != stored_dtype:
        model.float()
        backbone.config.dtype = stored_dtype
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """In their order."""
    return list(model.base_model.get_submodule("layers").children())


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass left gathered, so that parameters are their shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Countable(Protocol[ItemOut]):
    """What can be counted, and gone through."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ItemOut]: ...


def all_reduce_last(model: nn.Module, batches: Countable[Item]) -> Iterator[Item]:
    """`batches` of one optimiser step, for the backward passes of a sharded model.

    Under HSDP each of them scatters gradients inside the groups of ranks that share a copy, and only the last one adds
    them up over the groups; before it every rank keeps its shard of the sum, in float32.

    Raises:
        TypeError: `shard_model` has not sharded the model.
    """
    if not isinstance(model, FSDPModule):
        raise TypeError(f"{type(model).__name__} is not sharded")
    for number, batch in enumerate(batches, start=1):
        model.set_requires_all_reduce(number == len(batches))
        yield batch


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients over all ranks, the same scalar on each; 0 without gradients. A collective."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def named_full_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Gather the weights one parameter at a time, for weight sync: never more than one of them is whole.

    A collective: every rank must run the iterator to its end. The policy's weights are cast to `dtype` on the way (the
    head stays float32). Names are those of the Hugging Face checkpoint, and `score_head.*`. A tied `lm_head.weight` is
    left out, as in that checkpoint. What adapters add is in the weights, rounded to `dtype` but once.
    """
    reshard(model)
    for name, parameter in merged_parameters(model, local_device()):
        # Before the gathering, which then moves no more bytes than are wanted, and over the GPUs' network also what
        # `offload_policy` keeps in CPU memory.
        wanted = dtype if dtype is not None and name.startswith("lm.") else parameter.dtype
        tensor = parameter.to(local_device(), wanted)
        yield name.removeprefix("lm."), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def move_optimizer(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Move an optimiser's moments to `device`; step counters stay where the optimiser put them."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[key] = value.to(device)
