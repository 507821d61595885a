"""Rollout engines on devices of their own, from the driver's side: they start with the policy and get its weights."""

from __future__ import annotations

from verl.single_controller import get_together
from verl.trainer.ppo.metrics import timed
from verl.workers.fsdp_workers import PolicyWorkers
from verl.workers.rollout_worker import RolloutWorkers


class SeparateEngines:
    """Two groups of processes, whose models are loaded and connected here.

    Args:
        policy: the processes that train.
        workers: those with the engines (`trainer.rollout_gpus`).

    Raises:
        WorkerLostError: a process of either group died.
    """

    def __init__(self, policy: PolicyWorkers, workers: RolloutWorkers) -> None:
        self.policy, self.workers = policy, workers
        get_together(policy.init_model.remote(), workers.init_model.remote())
        address, port = policy.processes.infos[0].address, policy.listen()[0]
        get_together(policy.connect.remote(workers.world_size), workers.connect.remote(address, port))

    def update(self, metrics: dict[str, float]) -> None:
        """Bring the policy's weights to the engines, between two batches of theirs, if they have changed; adds
        `timing_s/weight_sync` and `perf/weight_sync_gib` to `metrics`."""
        if all(self.policy.weights_are_sent()):
            return
        with timed("weight_sync", metrics):
            _, received = get_together(self.policy.send_weights.remote(), self.workers.receive_weights.remote())
        metrics |= received[0]
