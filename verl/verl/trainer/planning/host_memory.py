"""What a configuration will take of a machine's CPU memory, from sizes alone."""

from __future__ import annotations

from verl.trainer.config.schema import TrainedPlacement
from verl.trainer.planning.memory_estimate import CHECKPOINT_BYTES, Components
from verl.trainer.planning.memory_phases import PhaseMemory


def host_memory(memory: PhaseMemory) -> dict[str, Components]:
    """Bytes on one machine while models load, during training, and while a checkpoint is written, by component.

    Not counted is what a process takes without any model. The files of a model in 16 bits are mapped once for all
    processes of a machine; the system drops them from memory when it needs room.
    """
    waiting, copies = _waiting(memory), _copies(memory)
    training = waiting | ({} if saves_anew(memory) else copies)
    weights = {name: size for name, size in waiting.items() if name.endswith(" weights")}
    return {"loading": _files(memory) | weights, "training": training, "saving": training | copies}


def saves_anew(memory: PhaseMemory) -> bool:
    """Whether each save in the background allocates its copies again: they are kept for weights and states that stay in
    place from one save to the next."""
    trained = (model.config for model in memory.models.values() if isinstance(model.config, TrainedPlacement))
    return bool(_copies(memory)) and any(config.param_offload or config.optimizer_offload for config in trained)


def _waiting(memory: PhaseMemory) -> Components:
    """What waits in CPU memory for its next use."""
    found: Components = {}
    for name, model in memory.models.items():
        weights, states = model.resident(in_use=False)
        found |= {f"{name} weights": model.weights - weights, f"{name} optimiser": model.optimizer - states}
        if model.states and model.config.offload_policy:
            found[f"{name} gradients"] = model.trained_weights
    found["engine weights"] = memory.sleeping_weights
    return _of_machine(memory, found)


def _copies(memory: PhaseMemory) -> Components:
    """What a save in the background writes from."""
    trainer = memory.config.trainer
    if not trainer.async_save or trainer.save_freq <= 0:
        return {}
    trained = [model for model in memory.models.values() if model.states]
    return _of_machine(
        memory, {"copies for async_save": sum(model.trained_weights + model.optimizer for model in trained)}
    )


def _files(memory: PhaseMemory) -> Components:
    files = CHECKPOINT_BYTES * memory.shape.parameters
    if memory.config.has_critic and memory.critic_shape != memory.shape:
        files += CHECKPOINT_BYTES * memory.critic_shape.parameters
    return {"model files": float(files)}


def _of_machine(memory: PhaseMemory, of_process: Components) -> Components:
    processes = memory.config.trainer.n_gpus_per_node
    return {name: size * processes for name, size in of_process.items() if size}
