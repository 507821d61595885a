"""Reinforcement learning of a reflective generative model: `python -m verl.trainer.main_ppo key=value ...`.

The command line is Hydra's override grammar over `config/ppo_trainer.yaml`; `--cfg` prints the composed configuration
and ends, `--dry-run` also checks it, says what the run would take (`verl.trainer.dry_run`), and ends with the line and
status of the run where that would not start.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import datasets
from omegaconf import DictConfig, OmegaConf

from verl.trainer.auto_config import resolve_auto, smallest_gpu
from verl.trainer.compose import compose_config
from verl.trainer.config_check import DEFAULTS_FILE, check_config
from verl.trainer.dry_run import dry_run
from verl.utils.console import log_to_console
from xbai.errors import UserError, exit_on_user_error

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Check, load the data, start the workers and train; a worker that died is one line and exit status 1."""
    check_config(config)
    for line in resolve_auto(config, smallest_gpu() if config.trainer.device == "cuda" else None):
        logger.info(line)
    _make_paths_absolute(config)

    # Ray and transformers take seconds to import, which a mistake in the configuration should not cost.
    from verl.single_controller import WorkerLostError
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = RayPPOTrainer(config)
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


def _make_paths_absolute(config: DictConfig) -> None:
    """Workers on other nodes start in other folders."""
    for key in ("actor_rollout_ref.model.path", "actor_rollout_ref.score.model_path", "critic.model.path"):
        if (path := OmegaConf.select(config, key)) is not None:
            OmegaConf.update(config, key, str(Path(path).absolute()))


def _set_up_console() -> None:
    log_to_console()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


@exit_on_user_error
def main() -> None:
    """Entry point."""
    _set_up_console()
    arguments = sys.argv[1:]
    overrides = [argument for argument in arguments if argument not in ("--cfg", "--dry-run")]
    config = compose_config(DEFAULTS_FILE.stem, overrides)
    if "--cfg" in arguments:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    if "--dry-run" in arguments:
        found = dry_run(config)
        sys.stdout.write(found.report)
        sys.stdout.flush()
        if found.missing:
            raise UserError(found.missing[0])
        return
    run(config)


if __name__ == "__main__":
    main()
