"""Checkpoint to model: a Hugging Face safetensors folder with tokenizer and score head from sharded training state.

    python verl/scripts/model_merger.py --local_dir checkpoints/PROJECT/EXPERIMENT/global_step_N/actor --target_dir OUT

`--local_dir` may also be the step's folder, or the experiment's, whose latest checkpoint is then taken. The output
folder appears only when it is complete. Needs no GPU and no process group, and holds one output file in memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from rich.logging import RichHandler
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl.trainer.ppo.checkpoint_folder import LATEST_FILE
from verl.utils.checkpoint import HUGGINGFACE_FOLDER
from verl.utils.model import load_tokenizer, torch_dtype
from xbai.engine.files import read_config
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_directory
from xbai.sprm import ScoreHead, load_sprm_config, save_score_head
from xbai.sprm.head import SPRM_CONFIG_FILE

logger = logging.getLogger("model_merger")

LM_PREFIX, HEAD_PREFIX = "model.lm.", "model.score_head."


def find_actor_folder(path: Path) -> Path:
    """The `actor` folder that `path` is, holds, or (an experiment's folder) has as its latest.

    Raises:
        UserError: there is no checkpoint.
    """
    candidates = [path, path / "actor"]
    if (path / LATEST_FILE).is_file():
        candidates = [path / f"global_step_{(path / LATEST_FILE).read_text().strip()}" / "actor"]
    for folder in candidates:
        if (folder / ".metadata").is_file() and (folder / HUGGINGFACE_FOLDER / "config.json").is_file():
            return folder
    raise UserError(
        f"{candidates[0]}: not a checkpoint: expected a folder .../global_step_N/actor with .metadata and "
        f"{HUGGINGFACE_FOLDER}/config.json, or an experiment's folder with {LATEST_FILE}"
    )


def expected_tensors(config: PretrainedConfig, with_head: bool, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """Names and shapes (on the meta device) that a checkpoint of this configuration holds."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        tensors = {f"{LM_PREFIX}{name}": tensor for name, tensor in lm.state_dict().items()}
        if with_head:
            tensors |= {f"{HEAD_PREFIX}{k}": v for k, v in ScoreHead(config.hidden_size).state_dict().items()}
    return tensors


def stored_tensors(actor_folder: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes (on the meta device) of the model's tensors in a checkpoint."""
    metadata = dcp.FileSystemReader(actor_folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.items()
        if name.startswith((LM_PREFIX, HEAD_PREFIX)) and isinstance(entry, TensorStorageMetadata)
    }


def check_tensors(actor_folder: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a UserError when names or shapes differ."""
    problems = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name} belongs to no part of the model" for name in stored.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, the configuration says {list(expected[name].shape)}"
        for name in expected.keys() & stored.keys()
        if stored[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(
            f"{actor_folder}: {len(problems)} tensors do not fit {HUGGINGFACE_FOLDER}/config.json: "
            + "; ".join(sorted(problems)[:3])
        )


def read_tensors(actor_folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read whole tensors, assembled from the ranks' shards.

    Raises:
        UserError: a file of the checkpoint is damaged or missing.
    """
    tensors = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in wanted.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(actor_folder), no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{actor_folder}: the checkpoint cannot be read ({type(reason).__name__}: {reason})") from None
    return tensors


def merge(local_dir: Path, target_dir: Path, dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Write the model of a checkpoint.

    Args:
        local_dir: see `find_actor_folder`.
        target_dir: must not exist.
        dtype: of the language model's weights; `auto` keeps what the checkpoint has. The head stays float32.
        trust_remote_code: run the Python code of the model that was trained.

    Raises:
        UserError: no checkpoint, one that does not fit its configuration, or an output folder that exists.
    """
    actor_folder = find_actor_folder(local_dir)
    if target_dir.exists():
        raise UserError(f"{target_dir} exists already; remove it or choose another --target_dir")
    source = actor_folder / HUGGINGFACE_FOLDER
    config = read_config(source, trust_remote_code)
    with_head = (source / SPRM_CONFIG_FILE).is_file()
    stored = stored_tensors(actor_folder)
    check_tensors(actor_folder, stored, expected_tensors(config, with_head, trust_remote_code))
    logger.info("%s: %d tensors, as the configuration says", actor_folder, len(stored))
    lm = {name: tensor for name, tensor in stored.items() if name.startswith(LM_PREFIX)}
    config.dtype = next(iter(lm.values())).dtype if dtype == "auto" else torch_dtype(dtype)
    with atomic_directory(target_dir) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        config.save_pretrained(folder)
        if config.tie_word_embeddings:
            lm.pop(f"{LM_PREFIX}lm_head.weight", None)
        _write_language_model(actor_folder, folder, lm, config.dtype)
        if with_head:
            head = read_tensors(actor_folder, {k: v for k, v in stored.items() if k.startswith(HEAD_PREFIX)})
            sprm_config = load_sprm_config(source, load_tokenizer(source, trust_remote_code))
            save_score_head(folder, {k.removeprefix(HEAD_PREFIX): v for k, v in head.items()}, sprm_config)
    logger.info("%s: written", target_dir)


def _write_language_model(actor_folder: Path, folder: Path, lm: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    planned = {name.removeprefix(LM_PREFIX): torch.empty_like(like, dtype=dtype) for name, like in lm.items()}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size="5GB")
    for filename, names in track(plan.filename_to_tensors.items(), description="writing weights", transient=True):
        tensors = read_tensors(actor_folder, {f"{LM_PREFIX}{name}": lm[f"{LM_PREFIX}{name}"] for name in names})
        converted = {name.removeprefix(LM_PREFIX): tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(converted, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@exit_on_user_error
def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dir", type=Path, required=True, help="checkpoint: actor, step or experiment folder")
    parser.add_argument("--target_dir", type=Path, required=True, help="output folder, which must not exist")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code that the model needs")
    arguments = parser.parse_args()
    merge(**vars(arguments))


if __name__ == "__main__":
    main()
