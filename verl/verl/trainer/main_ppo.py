"""Reinforcement learning of a reflective generative model: `python -m verl.trainer.main_ppo key=value ...`.

The command line is Hydra's override grammar over `config/ppo_trainer.yaml`; `--cfg` prints the composed configuration
and ends. Unlike a `@hydra.main` application it composes only, so that it leaves no working folders behind and a
mistake is one line.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.logging import RichHandler

from verl.trainer.config_check import DEFAULTS_FILE, check_config, leaves
from xbai.errors import UserError, exit_on_user_error

logger = logging.getLogger(__name__)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration with its overrides.

    Raises:
        UserError: an unknown key or an override that does not parse.
    """
    try:
        with initialize_config_dir(str(DEFAULTS_FILE.parent), version_base="1.3"):
            config = compose(DEFAULTS_FILE.stem, overrides=list(overrides))
        OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    return config


def _one_line(error: Exception) -> str:
    """Hydra's message, with the nearest key where one is unknown."""
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        return " ".join(str(error).split())
    known = [key for key, _ in leaves(OmegaConf.load(DEFAULTS_FILE))]
    near = difflib.get_close_matches(unknown[1], known, n=1)
    return f"unknown configuration key {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")


def run(config: DictConfig) -> None:
    """Check, load the data, start the workers and train."""
    check_config(config)

    # Ray and transformers take seconds to import, which a mistake in the configuration should not cost.
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = RayPPOTrainer(config)
    if trainer.is_done:
        logger.info("nothing left to do: step %d of %d is done", trainer.step, trainer.total_steps)
        return
    try:
        trainer.init_workers()
        trainer.fit()
    finally:
        trainer.close()


def _log_to_console() -> None:
    """Through rich on a terminal, where records must not tear the progress bar; plain lines in a file or pipe."""
    if sys.stdout.isatty():
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    else:
        logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", force=True)
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


@exit_on_user_error
def main() -> None:
    """Entry point."""
    _log_to_console()
    arguments = sys.argv[1:]
    config = compose_config([argument for argument in arguments if argument != "--cfg"])
    if "--cfg" in arguments:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    run(config)


if __name__ == "__main__":
    main()
