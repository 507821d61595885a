"""Several ranks: an update on two is the one on one, and ranks that share an engine stay together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from verl.bringup.generation import token_ids
from verl.bringup.step import Context, require, step
from verl.bringup.workload import Sizes, build_actor, build_policy, fsdp_section, model_folder, model_folder_made_apart
from verl.models.fsdp import init_distributed, named_full_tensors
from verl.models.loading import load_tokenizer
from verl.models.ulysses import sequence_parallel_group
from xbai.engine import SamplingParams, load_engine
from xbai.sprm import load_sprm_config

SIZES = Sizes(prompts=4, samples=8, prompt_tokens=32, response_tokens=128, tokens_per_micro_batch=640)
LOSS_ERROR = 1e-3
LOSSES = ("actor/pg_loss", "actor/entropy_loss", "score/loss", "actor/loss", "actor/grad_norm", "score/grad_norm")
CYCLES = 3
MEANS = (
    "The GPUs of this machine do not work together: NCCL (run again with NCCL_DEBUG=INFO), their links "
    "(`nvidia-smi topo -m`), /dev/shm of a container (at least 1 GiB), or FSDP2 on this torch. "
)
MEANS_ROLLOUT = (
    "Ranks with vLLM engines part ways, or engines lose the weights that they are sent while they sleep: see "
    "executor.py and weights.py of xbai/engine/vllm; rollout.tensor_model_parallel_size=1 avoids shared engines. "
)


@step(means=MEANS, needs=["2 devices"])
def ranks_fsdp(context: Context) -> str:
    """FSDP2 over all GPUs: losses and gradients of a single one, in float32."""
    return _compare(context)


@step(means=MEANS + "Here HSDP, sharded in pairs or alone and replicated (fsdp_size).", needs=["2 devices"])
def ranks_hsdp(context: Context) -> str:
    """Two replicas."""
    return _compare(context, fsdp_size=context.process_count // 2)


@step(means=MEANS + "Here sequence parallelism (all-to-all).", needs=["2 devices"])
def ranks_sequence_parallel(context: Context) -> str:
    """Pairs of ranks share the tokens of their rows."""
    return _compare(context, sp_size=2)


@step(means=MEANS_ROLLOUT, needs=["vllm"], limit_s=600)
def rollout_of_single_ranks(context: Context) -> str:
    """An engine a rank: three times asleep, sent the weights, checked, and the same greedy responses."""
    return _rollout(context, 1)


@step(means=MEANS_ROLLOUT, needs=["vllm", "2 devices"], limit_s=600)
def rollout_of_pairs(context: Context) -> str:
    """The same with two ranks an engine (tensor parallelism)."""
    return _rollout(context, 2)


@step(means=MEANS_ROLLOUT, needs=["vllm", "8 devices"], limit_s=900)
def rollout_of_eight(context: Context) -> str:
    """The same with the 32B recipe's eight, whose key heads the ranks share."""
    return _rollout(context, 8)


def run_ranks(context: Context, count: int, rank: Callable[..., None], *arguments: Any) -> None:
    """Run `rank(context, *arguments)` in so many processes, with the variables of a launcher; raise what one raises."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_processes(_be_rank, (rank, context, arguments), nprocs=count, start_method=context.start_method)


def _be_rank(number: int, rank: Callable[..., None], context: Context, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    rank(context, *arguments)


def _compare(context: Context, fsdp_size: int = -1, sp_size: int = 1) -> str:
    model_folder_made_apart(context)
    file, ranks = context.work / "metrics.pt", context.process_count
    run_ranks(context, 1, _update, file, -1, 1)
    alone = torch.load(file)
    run_ranks(context, ranks, _update, file, fsdp_size, sp_size)
    together = torch.load(file)
    off = {name: abs(together[name] / alone[name] - 1) for name in LOSSES}
    name = max(off, key=lambda name: off[name])
    require(off[name] < LOSS_ERROR, f"{name} {together[name]:.6g} on {ranks} ranks, {alone[name]:.6g} on one")
    return f"{ranks} ranks: losses and gradient norms within {off[name]:.1e} of one rank's"


def _update(context: Context, file: Path, fsdp_size: int, sp_size: int) -> None:
    """Be a rank of one update in float32; the first one saves the metrics."""
    init_distributed()
    folder = model_folder(context)
    policy = build_policy(folder, fsdp_section(compute_dtype="float32", fsdp_size=fsdp_size), packed=True)
    sp_group = sequence_parallel_group(sp_size)
    actor, whole = build_actor(policy, folder, SIZES, sp_group=sp_group, entropy_coeff=0.01, kl_loss_coef=0.1)
    share, groups = dist.get_rank() // sp_size, dist.get_world_size() // sp_size
    batch = {name: column.chunk(groups)[share] for name, column in whole.items()}
    columns = actor.compute_log_prob(batch)
    batch |= columns | {"ref_log_prob": columns["old_log_probs"] - 0.1}
    batch["advantages"] = batch["advantages"] + 1
    metrics = actor.update_policy(batch)
    if dist.get_rank() == 0:
        torch.save(metrics, file)
    dist.barrier()
    dist.destroy_process_group()


def _rollout(context: Context, tensor_parallel: int) -> str:
    model_folder_made_apart(context)
    ranks = context.process_count
    run_ranks(context, ranks, _generate, tensor_parallel)
    return (
        f"{ranks} ranks, {ranks // tensor_parallel} engines: {CYCLES} cycles of sleep, sync and check, the same tokens"
    )


def _generate(context: Context, tensor_parallel: int) -> None:
    """Be a rank whose engine sleeps and takes the policy's weights, as in training."""
    if context.on_gpu:
        _see_one_gpu()
    init_distributed()
    folder = model_folder(context)
    sprm_config = load_sprm_config(folder, load_tokenizer(folder))
    policy = build_policy(folder, fsdp_section(param_offload=True, compute_dtype="bfloat16"))
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "tensor_parallel_size": tensor_parallel}
    options |= {"max_num_seqs": 64, "gpu_memory_utilization": 0.5} if context.on_gpu else {"max_num_seqs": 8}
    engine = load_engine("vllm", folder, with_scores=False, sprm_config=sprm_config, **options)
    length, prompts = (256, 64) if context.on_gpu else (24, 4)
    asked = [[55 + i, 59, 62 + i % 30] for i in range(prompts)]
    greedy = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
    sampled = SamplingParams(n=2, max_tokens=length, seed=5, ignore_eos=True)
    first: list[list[int]] | None = None
    for cycle in range(CYCLES):
        engine.sleep(2)
        engine.wake_up(["weights"])
        with policy.on_device():
            engine.update_weights(named_full_tensors(policy.model, torch.bfloat16), check=True)
        engine.wake_up(["kv_cache"])
        tokens = [one.token_ids for (one,) in engine.generate(asked, greedy, return_scores=True)]
        first = first or tokens
        require(tokens == first, f"cycle {cycle}: greedy responses are not those of the first cycle")
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, token_ids(engine, asked, sampled))
        begin = dist.get_rank() // tensor_parallel * tensor_parallel
        same = all(one == everyone[begin] for one in everyone[begin : begin + tensor_parallel])
        require(same, f"cycle {cycle}: ranks of one engine sampled different tokens")
    dist.barrier()
    engine.close()


def _see_one_gpu() -> None:
    """As Ray's actors do."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = int(os.environ["LOCAL_RANK"])
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number) if visible is None else visible.split(",")[number]
