"""What workers with a rollout engine do, and those that hold nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from verl import DataProto
from verl.models.fsdp import init_distributed, local_device
from verl.models.loading import load_tokenizer
from verl.single_controller import RayWorkerGroup, Worker, dealt, each, joined
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.phase_metrics import measure_phase
from verl.workers.rollout import EngineRollout
from verl.workers.rollout.engine_rollout import Weights
from verl.workers.weight_transfer import WeightReceiver
from xbai.sprm import load_sprm_config


class SamplingWorker(Worker):
    """A worker with an engine, which a subclass makes: `self._rollout`."""

    _rollout: EngineRollout

    def device_name(self) -> str | None:
        """Of this rank's GPU, as torch names it."""
        return torch.cuda.get_device_name() if local_device().type == "cuda" else None

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Sample responses with the weights of `_wake_up`; see `EngineRollout.generate`.

        `meta_info["stay_awake"]=True` leaves the engine awake, for another call that follows at once.
        """
        waking = self._wake_up()
        with measure_phase("generate") as metrics:
            output = self._rollout.generate(prompts)
            metrics["tokens"] = float(output.batch["response_mask"].sum())
        if not prompts.meta_info.get("stay_awake", False):
            self._rollout.sleep()
        output.meta_info["metrics"] |= waking | metrics
        return output

    def proceed(self, unfinished: DataProto, wanted: int) -> DataProto:
        """Go on with responses with the weights of `_wake_up`; see `EngineRollout.proceed`. The engine stays awake, for
        another call, until `end_rollout`."""
        waking = self._wake_up()
        with measure_phase("generate") as metrics:
            output = self._rollout.proceed(unfinished, wanted)
            metrics["tokens"] = float(sum(map(len, output.non_tensor_batch["token_ids"])))
        output.meta_info["metrics"] |= waking | metrics
        return output

    def end_rollout(self) -> None:
        """Let the engine sleep."""
        self._rollout.sleep()

    def _wake_up(self) -> dict[str, float]:
        """Make the engine ready to sample; what that cost."""
        return {}


class SamplingWorkers(RayWorkerGroup):
    """A group of such workers, as the driver calls it."""

    device_name = each(SamplingWorker.device_name)
    generate_sequences = joined(SamplingWorker.generate_sequences, group="rollout")
    proceed = dealt(SamplingWorker.proceed, group="rollout")
    end_rollout = each(SamplingWorker.end_rollout)


class RolloutWorker(SamplingWorker):
    """A rollout engine on a device of its own (`trainer.rollout_gpus`); it has the weights that came last.

    Args:
        config: the `actor_rollout_ref` section.
    """

    def __init__(self, config: ActorRolloutRefConfig) -> None:
        self.config = config

    def init_model(self) -> None:
        """Join the process group of the rollout workers and load the engine.

        Raises:
            UserError: a model folder, score head or configuration that does not fit.
        """
        init_distributed(self.config.nccl_timeout)
        model, score = self.config.model, self.config.score
        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        sprm_config = load_sprm_config(model.path, tokenizer, score.lang) if self.config.use_score else None
        # Nothing else wants the memory.
        awake = with_values(self.config.rollout, {"free_cache_engine": False})
        self._rollout = EngineRollout(awake, model, tokenizer.pad_token_id, sprm_config)

    def connect(self, address: str, port: int) -> None:
        """Meet the policy, whose store listens there; see `ActorRolloutRefWorker.connect`."""
        timeout_s, receivers = self.config.nccl_timeout, dist.get_world_size()
        store = dist.TCPStore(address, port, is_master=False)
        self._receiver = WeightReceiver(store, 1 + self.rank, 1 + receivers, timeout_s)

    def receive_weights(self) -> dict[str, float]:
        """Take what `ActorRolloutRefWorker.send_weights` sends meanwhile; the metrics of `EngineRollout.wake_up`.

        Raises:
            UserError: with `check_weight_sync`, the first weight that did not arrive as it was sent.
        """
        self._rollout.mark_stale()
        return self._rollout.wake_up(self._coming_weights)

    def _coming_weights(self) -> AbstractContextManager[Weights]:
        return nullcontext(self._receiver.receive())


class RolloutWorkers(SamplingWorkers):
    """The `RolloutWorker`s of all ranks, as the driver calls them."""

    init_model = each(RolloutWorker.init_model)
    connect = each(RolloutWorker.connect)
    receive_weights = each(RolloutWorker.receive_weights)
