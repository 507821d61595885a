"""The passes of a training step over its responses, cut into micro-batches by what the workers cut them with."""

from __future__ import annotations

from typing import NamedTuple

from verl.trainer.config.schema import PPOConfig
from verl.workers.batching.micro_batches import MicroBatching, RowSizes


class Pass(NamedTuple):
    """Of one model."""

    batching: MicroBatching
    """The micro-batches of a process."""
    packed: bool
    """Whether rows are computed without their padding."""
    sp_size: int
    """Processes that share the tokens of the same rows."""
    rows: int
    """Responses that a process goes through at once."""
    per_step: int
    """How often a training step does that; 0 where the configuration leaves the pass out."""

    def most_tokens(self, longest: int) -> int:
        """Of one GPU in the largest micro-batch, where rows are as long as they can be."""
        return -(-self.batching.most_tokens(longest) // self.sp_size)

    def micro_batches(self, prompt: int, response: int) -> int:
        """Of a process, where every prompt and response has so many tokens."""
        return self.batching.fewest(RowSizes([prompt] * self.rows, [response] * self.rows))


def passes(config: PPOConfig) -> dict[str, Pass]:
    """All of them, by phase."""
    root, critic, world = config.actor_rollout_ref, config.critic, config.trainer.processes
    prompts, mini = config.data.train_batch_size, root.actor.ppo_mini_batch_size
    of_policy = root.model.use_remove_padding, root.actor.ulysses_sequence_parallel_size
    of_reference = root.model.use_remove_padding, root.ref.ulysses_sequence_parallel_size
    of_critic = critic.model.use_remove_padding, critic.ulysses_sequence_parallel_size

    def cut(batching: MicroBatching, packed: bool, sp_size: int, prompts: int, per_step: int) -> Pass:
        return Pass(batching, packed, sp_size, prompts * root.rollout.n * sp_size // world, per_step)

    log_prob = MicroBatching.for_log_prob(root.rollout, *of_policy)
    reference = MicroBatching.for_log_prob(root.ref, *of_reference)
    update = MicroBatching.for_update(root.actor, *of_policy, world)
    values = MicroBatching.for_values(critic, *of_critic)
    critic_update = MicroBatching.for_update(critic, *of_critic, world)
    critic_updates = config.has_critic * (prompts // critic.ppo_mini_batch_size) * critic.ppo_epochs
    return {
        "log-prob": cut(log_prob, *of_policy, prompts, int(config.needs_old_log_probs)),
        "reference": cut(reference, *of_reference, prompts, int(config.reference_use.log_probs)),
        "update": cut(update, *of_policy, mini, prompts // mini * root.actor.ppo_epochs),
        "values": cut(values, *of_critic, prompts, int(config.has_critic)),
        "critic update": cut(critic_update, *of_critic, critic.ppo_mini_batch_size, critic_updates),
    }
