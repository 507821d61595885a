"""What a training run would be, on a machine that cannot run it: `main_ppo --dry-run [key=value ...]`.

Checks the configuration for the machines it names (not for this one) and prints it resolved, the numbers of
micro-batches and optimiser steps, and a memory estimate for each phase on one GPU. It needs no weights, only the
model's `config.json`; of well-known models (`KNOWN_CONFIGS` of model_shapes.py) the folder's name is enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl.trainer.config.check import check_config
from verl.trainer.config.machine import KERNELS, resolve, resolve_auto
from verl.trainer.config.schema import PPOConfig
from verl.trainer.planning.host_memory import host_memory, saves_anew
from verl.trainer.planning.memory_estimate import GIB, LOGIT_BACKWARD, LOGIT_FORWARD, Components, saved_activations
from verl.trainer.planning.memory_phases import COMMON_GPU, GPUS_GIB, PhaseMemory, changes_to_fit
from verl.trainer.planning.model_shapes import config_of
from verl.trainer.planning.passes import passes


def dry_run(composed: DictConfig) -> tuple[str, list[str]]:
    """Check everything that a run checks before it starts Ray, but what GPUs this machine has; estimate the rest.

    Returns:
        What the run would be, in words, and what it would end with on this machine: the files and packages that are not
        here, a line each.

    Raises:
        UserError: a configuration that could not run on the machines it is for, or data and checkpoint that do not
            fit it; these are looked into where model and data are here.
    """
    missing: list[str] = []
    config = check_config(composed, missing.append)
    missing = list(dict.fromkeys(missing))
    if not missing:
        # Ray takes seconds to import.
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer

        # Reads the model's tokenizer, the data, and the checkpoint that a run goes on from.
        RayPPOTrainer(config, fetches=False).close()
    on_cpu = config.trainer.device == "cpu"
    # Whether checkpointing is left out depends on the GPU, and the estimate is for several.
    config, choices = resolve_auto(config, None) if on_cpu else resolve(config, KERNELS)
    what = "processes on CPU" if on_cpu else "GPUs"
    trainer = config.trainer
    for_rollouts = f" for training and {trainer.rollout_gpus} for rollouts" if trainer.rollout_gpus else ""
    sections = [
        f"Dry run: {trainer.nnodes} x {trainer.n_gpus_per_node} {what}{for_rollouts}; nothing is started.",
        "The resolved configuration:\n\n" + OmegaConf.to_yaml(OmegaConf.merge(composed, asdict(config))).rstrip(),
        "\n".join(f"not found here: {line}" for line in missing),
        "\n".join(choices),
        _steps(config),
        _memory(config),
    ]
    return "\n\n".join(filter(None, sections)) + "\n", missing


def _steps(config: PPOConfig) -> str:
    root, data = config.actor_rollout_ref, config.data
    responses = data.train_batch_size * root.rollout.n
    updates = data.train_batch_size // root.actor.ppo_mini_batch_size * root.actor.ppo_epochs
    lines = [
        f"A training step: {data.train_batch_size} prompts x {root.rollout.n} responses = {responses:,} responses, of "
        f"at most {data.longest:,} tokens with their prompts: up to {responses * data.longest:,} tokens, "
        f"{responses * data.longest // config.trainer.processes:,} a process.",
        f"Optimiser steps in it: {updates} ({data.train_batch_size // root.actor.ppo_mini_batch_size} mini-batches x "
        f"{root.actor.ppo_epochs} epochs).",
        "Micro-batches of a process:",
    ]
    header = ["", "responses", "micro-batches", "of full length", "in a step", "of full length"]
    rows = []
    for phase, one in passes(config).items():
        if one.per_step:
            # Where all responses are as short as can be, and where all are as long as they may be.
            few, full = one.micro_batches(1, 1), one.micro_batches(data.max_prompt_length, data.max_response_length)
            name = f"{phase}, a mini-batch" if "update" in phase else phase
            each = f"{few} to {full}" if few != full else str(few)
            together = [f"{few * one.per_step} to {full * one.per_step}", str(full * one.per_step)]
            rows.append([name, str(one.rows), each, str(full), *together])
    return "\n".join(lines) + "\n\n" + table(header, rows)


def _memory(config: PPOConfig) -> str:
    model, memory = config.actor_rollout_ref.model, PhaseMemory.from_config(config, math.inf)
    if memory is None:
        found = config_of(model.path, model.trust_remote_code)
        reason = "its config.json is not here" if found is None else f"model_type={found.model_type} is not counted"
        return f"No memory estimate for {model.path}: {reason}."
    shape = memory.shape
    head = f" and the score head {shape.score_head_parameters:,}" if config.actor_rollout_ref.use_score else ""
    size = f"The model has {shape.parameters:,} parameters{head}."
    if adapters := memory.adapter_parameters:
        size += f" Of it {adapters:,} parameters of adapters{' and the head' if head else ''} are trained."
    if config.trainer.device == "cpu":
        caption, verdict = "Memory of one process", _highest(memory)
    else:
        sizes = {name: replace(memory, gpu_bytes=gib * GIB) for name, gib in GPUS_GIB.items()}
        shown = next((name for name, memory in sizes.items() if memory.excess <= 0), COMMON_GPU)
        memory = sizes[shown]
        caption, verdict = f"Memory of one GPU with {shown}", f"{_highest(memory)}\n{_verdict(sizes)}"
    caption += ", in GiB; each phase at its highest"
    caption += " (rollout: of one for rollouts, which holds the engine alone):" if memory.is_separate else ":"
    tables = [caption, _table_of(memory.phases, "with CUDA, NCCL, fragments", memory.peaks), _micro_batch(memory)]
    return "\n\n".join([size, *tables, _host_memory(memory), verdict])


def _host_memory(memory: PhaseMemory) -> str:
    moments = host_memory(memory)
    sums = {moment: sum(components.values()) for moment, components in moments.items()}
    text = "Host memory of one machine, in GiB, without what its processes take for themselves:\n\n"
    text += _table_of(moments, "together", sums)
    if saves_anew(memory):
        text += (
            "\n\nWhat is offloaded lies elsewhere in each save: its copies are pinned anew, and freed when they are "
            "written; trainer.async_save=false makes none."
        )
    return text


def _table_of(columns: Mapping[str, Components], last: str, sums: Mapping[str, float]) -> str:
    """Components by phase, and a last row."""
    names = dict.fromkeys(name for components in columns.values() for name, size in components.items() if size)
    rows = [[name, *(_gib(components.get(name, 0.0)) for components in columns.values())] for name in names]
    return table(["", *columns], [*rows, [last, *(_gib(sums[column]) for column in columns)]])


def _micro_batch(memory: PhaseMemory) -> str:
    shape, width, tokens = memory.shape, memory.models["policy"].compute, memory.tokens("update")
    kept, whole = (saved_activations(shape, tokens, width, checkpointing) / GIB for checkpointing in (True, False))
    chunk = memory.chunk("update")
    chosen = "with" if memory.checkpointing else "without"
    return (
        f"A micro-batch of the update has up to {tokens:,} tokens on a GPU. Its activations take {kept:.1f} GiB with "
        f"checkpointing and {whole:.1f} without (here: {chosen}); a chunk of logits takes "
        f"{LOGIT_FORWARD * chunk / GIB:.1f} GiB, and {LOGIT_BACKWARD * chunk / GIB:.1f} in the backward pass."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def _highest(memory: PhaseMemory) -> str:
    phase, peak = max(memory.peaks.items(), key=lambda item: item[1])
    return (
        f"Highest: {phase}, {peak / GIB:.1f} GiB. An engine's KV cache holds {memory.cached_sequences:.1f} "
        "sequences of full length."
    )


def _verdict(sizes: Mapping[str, PhaseMemory]) -> str:
    fitting = [name for name, memory in sizes.items() if memory.excess <= 0]
    lines = [f"It fits GPUs with: {', '.join(fitting)}." if fitting else "It fits no GPU with up to 180 GB as it is."]
    # Smaller GPUs than the common one only where it is not far from fitting them.
    too_small = [name for name in sizes if name not in fitting][: list(sizes).index(COMMON_GPU) + 1]
    for name in too_small[-2:]:
        changes = changes_to_fit(sizes[name])
        if changes is None:
            lines.append(f"It does not fit {name}, whatever is changed but the number of GPUs.")
        else:
            lines.append(f"To fit {name}: " + " ".join(f"{key}={_value(value)}" for key, value in changes.items()))
    if sizes[COMMON_GPU].config.actor_rollout_ref.model.enable_gradient_checkpointing == "auto":
        without = [name for name, memory in sizes.items() if not memory.checkpointing]
        meaning = f"false on {', '.join(without)}, else true" if without else "true on all of them"
        lines.append(f"actor_rollout_ref.model.enable_gradient_checkpointing=auto: {meaning}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns under their heads: the first one to the left, numbers to the right."""
    first, *others = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)
