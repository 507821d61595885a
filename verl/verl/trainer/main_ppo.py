"""Reinforcement learning of a reflective generative model: `python -m verl.trainer.main_ppo key=value ...`.

The command line is Hydra's override grammar over `config/ppo_trainer.yaml`; `--cfg` prints the composed configuration
and ends, `--dry-run` also checks it, says what the run would take (`verl.trainer.planning.report`), and ends with the
line and status of the run where that would not start.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import datasets
from omegaconf import DictConfig, OmegaConf

from verl.distribution import check_distribution
from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config
from verl.trainer.config.fields import value_at, with_values
from verl.trainer.config.machine import resolve_auto, smallest_gpu
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.planning.report import dry_run
from verl.utils.console import log_to_console
from xbai.errors import UserError, exit_on_user_error

logger = logging.getLogger(__name__)


def run(composed: DictConfig) -> None:
    """Check, load the data, start the workers and train; a worker that died is one line and exit status 1."""
    config = check_config(composed)
    config, lines = resolve_auto(config, smallest_gpu() if config.trainer.device == "cuda" else None)
    for line in lines:
        logger.info(line)

    # Ray and transformers take seconds to import, which a mistake in the configuration should not cost.
    from verl.single_controller import WorkerLostError
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = RayPPOTrainer(_with_absolute_paths(config))
    try:
        if trainer.is_done:
            trainer.end_without_training()
            return
        trainer.init_workers()
        trainer.fit()
    except WorkerLostError as error:
        sys.stderr.write(f"error: {error}; {trainer.how_to_go_on()}\n")
        raise SystemExit(1) from None
    finally:
        trainer.close()


def _with_absolute_paths(config: PPOConfig) -> PPOConfig:
    """Workers on other nodes start in other folders."""
    keys = ("actor_rollout_ref.model.path", "actor_rollout_ref.score.model_path", "critic.model.path")
    paths = {key: value_at(config, key) for key in keys}
    return with_values(config, {key: str(Path(path).absolute()) for key, path in paths.items() if path is not None})


@exit_on_user_error
def main() -> None:
    """Entry point."""
    check_distribution()
    log_to_console()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    arguments = sys.argv[1:]
    overrides = [argument for argument in arguments if argument not in ("--cfg", "--dry-run")]
    config = compose_config(YAML, overrides)
    if "--cfg" in arguments:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    if "--dry-run" in arguments:
        report, missing = dry_run(config)
        sys.stdout.write(report)
        sys.stdout.flush()
        if missing:
            raise UserError(missing[0])
        return
    run(config)


if __name__ == "__main__":
    main()
