"""Checkpoint to model: a Hugging Face safetensors folder with tokenizer and score head from sharded training state.

    python verl/scripts/model_merger.py --local_dir checkpoints/PROJECT/EXPERIMENT/global_step_N/actor --target_dir OUT

verl's own command line, `model_merger.py merge --backend fsdp [--use_score] ...`, is understood too.
`--adapter_only` writes a LoRA run's adapter alone, as peft reads it, in place of its base with the adapter merged in.
`--local_dir` may also be the step's folder, or the experiment's, whose latest checkpoint is then taken. Besides this
trainer's checkpoints it reads those of verl 0.3 (`model_world_size_N_rank_R.pt`, DTensor or ShardedTensor, with
`score_module.pt` beside them). The output folder appears only when it is complete. Needs no GPU and no process group,
and holds one output file in memory.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from rich.logging import RichHandler
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl.checkpoints.adapters import AdaptedModel, check_base, read_adapter_config, write_adapter
from verl.checkpoints.checksums import CHECKSUM_FILE, check_files, read_checksums
from verl.checkpoints.folder import LATEST_FILE, CheckpointFolder
from verl.checkpoints.state import HUGGINGFACE_FOLDER
from verl.checkpoints.stored_model import StoredModel, is_checkpoint, open_stored_model
from verl.checkpoints.verl_shards import has_verl_shards
from verl.checkpoints.weight_files import write_weights
from verl.models.loading import dtype_name, load_tokenizer, torch_dtype
from verl.models.lora import is_adapter
from xbai.engine.files import read_config
from xbai.engine.scorer import HEAD_PREFIX
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_directory, check_directory, not_written
from xbai.model_files import ModelFiles
from xbai.sprm import ScoreHead, SPRMConfig, load_score_head, load_sprm_config, save_score_head
from xbai.sprm.head import SCORE_MODULE_FILE, SPRM_CONFIG_FILE

logger = logging.getLogger("model_merger")


def find_actor_folder(path: Path) -> Path:
    """The `actor` folder that `path` is, holds, or (an experiment's folder) has as its latest; a `UserError` where
    there is no checkpoint, or the file that names the latest is damaged."""
    candidates = [path, path / "actor"]
    checkpoints = CheckpointFolder(path)
    if (latest := checkpoints.latest()) is not None:
        candidates = [checkpoints.step_folder(latest) / "actor"]
    for folder in candidates:
        if is_checkpoint(folder):
            return folder
    raise UserError(
        f"{candidates[0]}: not a checkpoint: expected a folder .../global_step_N/actor with .metadata (or with verl "
        f"0.3's model_world_size_N_rank_R.pt), or an experiment's folder with {LATEST_FILE}"
    )


def check_sums(actor_folder: Path) -> None:
    """Raise a `UserError` where a file of a checkpoint of this trainer is not as it was written."""
    if sums := read_checksums(actor_folder):
        logger.info("%s: checking the sums of %d files", actor_folder, len(sums))
        check_files(actor_folder, sums)
    elif not has_verl_shards(actor_folder):
        logger.warning("%s is of an earlier version, without %s: not checked", actor_folder, CHECKSUM_FILE)


def find_model_files(actor_folder: Path, hf_model_path: Path | None) -> Path:
    """The folder with the model's configuration and tokenizer; a `UserError` where there is none."""
    candidates = [hf_model_path] if hf_model_path else [actor_folder / HUGGINGFACE_FOLDER, actor_folder]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{candidates[0]}: no config.json; name the model that was trained with --hf_model_path")


def expected_tensors(config: PretrainedConfig, with_head: bool, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """Names and shapes (on the meta device) that a checkpoint of this configuration holds."""
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).state_dict()
        if with_head:
            tensors |= {f"{HEAD_PREFIX}{k}": v for k, v in ScoreHead(config.hidden_size).state_dict().items()}
    return tensors


def check_tensors(where: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` when names or shapes differ."""
    problems = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name} belongs to no part of the model" for name in stored.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, the configuration says {list(expected[name].shape)}"
        for name in expected.keys() & stored.keys()
        if stored[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(
            f"{where}: {len(problems)} tensors do not fit the model's config.json: " + "; ".join(sorted(problems)[:3])
        )


def merge(
    local_dir: Path,
    target_dir: Path,
    dtype: str = "auto",
    hf_model_path: Path | None = None,
    trust_remote_code: bool = False,
    lang: str | None = None,
    use_score: bool = False,
) -> None:
    """Write the model of a checkpoint, see the options of `main`; adapters are merged into their base.

    Args:
        dtype: of the language model's weights; `auto` is what the model that was trained had, where its configuration
            says so (training keeps a bfloat16 model's weights in float32), else what the checkpoint has. The head stays
            float32.
        lang: None writes the step rule in the checkpoint, and where there is none leaves it to whoever loads the model.

    Raises:
        UserError: no checkpoint, one that is damaged or does not fit its configuration, adapters whose base is another
            or not there, or an output folder that exists.
    """
    actor_folder = _checked_folder(local_dir, target_dir)
    source = find_model_files(actor_folder, hf_model_path)
    config = read_config(source, trust_remote_code)
    files = ModelFiles.read(source)
    model = open_model(actor_folder, hf_model_path, trust_remote_code)
    with_head = any(name.startswith(HEAD_PREFIX) for name in model.tensors)
    stored, expected = dict(model.tensors), expected_tensors(config, with_head, trust_remote_code)
    if config.tie_word_embeddings:
        # One and the same as the embedding, whether or not it was stored twice.
        stored.pop("lm_head.weight", None), expected.pop("lm_head.weight", None)
    check_tensors(actor_folder, stored, expected)
    logger.info("%s: %d tensors, as the configuration says", actor_folder, len(stored))
    lm = {name: tensor for name, tensor in stored.items() if not name.startswith(HEAD_PREFIX)}
    stored_dtype = dtype_name(next(iter(lm.values())).dtype)
    written_dtype = (files.dtype or stored_dtype) if dtype == "auto" else dtype_name(torch_dtype(dtype))
    head = _score_head(model, actor_folder, source, config, trust_remote_code, lang, use_score)
    with _output(target_dir, head) as folder:
        files.write(folder, written_dtype)
        write_weights(folder, lm, torch_dtype(written_dtype), partial(read_finite, actor_folder, model))
    logger.info("%s: written in %s (trained in %s; --dtype writes another)", target_dir, written_dtype, stored_dtype)


def export_adapter(
    local_dir: Path,
    target_dir: Path,
    dtype: str = "auto",
    hf_model_path: Path | None = None,
    trust_remote_code: bool = False,
    lang: str | None = None,
    use_score: bool = False,
) -> None:
    """Write the adapter of a checkpoint as peft reads it, and the score head; arguments and errors as of `merge`."""
    actor_folder = _checked_folder(local_dir, target_dir)
    adapter, model = read_adapter_config(actor_folder / HUGGINGFACE_FOLDER), open_stored_model(actor_folder)
    if adapter is None:
        raise UserError(f"{actor_folder}: a checkpoint of a whole model, without adapters; leave --adapter_only out")
    source = find_model_files(actor_folder, hf_model_path)
    config = read_config(source, trust_remote_code)
    head = _score_head(model, actor_folder, source, config, trust_remote_code, lang, use_score)
    names = [name for name in model.tensors if is_adapter(name)]
    tensors = read_finite(actor_folder, model, names)
    if dtype != "auto":
        tensors = {name: tensor.to(torch_dtype(dtype)) for name, tensor in tensors.items()}
    with _output(target_dir, head) as folder:
        write_adapter(folder, adapter, tensors)
    logger.info("%s: %d tensors of the adapter, on %s", target_dir, len(tensors), adapter["base_model_name_or_path"])


def open_model(actor_folder: Path, hf_model_path: Path | None, trust_remote_code: bool) -> StoredModel | AdaptedModel:
    """The whole model of a checkpoint; of adapters with their base."""
    stored, huggingface = open_stored_model(actor_folder), actor_folder / HUGGINGFACE_FOLDER
    if (adapter := read_adapter_config(huggingface)) is None:
        return stored
    base = hf_model_path or Path(adapter["base_model_name_or_path"])
    if not base.is_dir():
        raise UserError(f"{actor_folder}: the base of its adapters, {base}, is not there; name it with --hf_model_path")
    check_base(huggingface, base)
    return AdaptedModel(stored, adapter["lora_alpha"] / adapter["r"], base, trust_remote_code)


def read_finite(actor_folder: Path, model: StoredModel | AdaptedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint; a `UserError` where training has broken them, so that not all values are finite."""
    tensors = model.read(names)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{actor_folder}: {name} holds values that are not finite: merge an earlier checkpoint")
    return tensors


def upload(folder: Path, repo_id: str, private: bool) -> None:
    """Push a merged folder to the Hub, as one commit; a `UserError` where it cannot be reached, or refuses."""
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Merged checkpoint")
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{folder} is written, but could not be pushed to {repo_id}: {str(error).splitlines()[0]} (log in with "
            "`hf auth login` and repeat with `hf upload`)"
        ) from error
    logger.info("pushed to %s", commit.repo_url)


HeadAndRule = tuple[dict[str, Tensor], SPRMConfig | None]


def _checked_folder(local_dir: Path, target_dir: Path) -> Path:
    """The checkpoint's `actor` folder, whole."""
    actor_folder = find_actor_folder(local_dir)
    if target_dir.exists():
        raise UserError(f"{target_dir} exists already; remove it or choose another --target_dir")
    check_directory(target_dir)
    check_sums(actor_folder)
    return actor_folder


@contextmanager
def _output(target_dir: Path, head: HeadAndRule | None) -> Iterator[Path]:
    """A folder to fill, which becomes `target_dir` with the score head."""
    try:
        with atomic_directory(target_dir) as folder:
            yield folder
            if head is not None:
                save_score_head(folder, *head)
    except OSError as error:
        raise not_written(target_dir, error) from error
    if head is not None and head[1] is None:
        logger.info("no step rule beside the score head: its services take --lang en (the default) or zh")


def _score_head(
    model: StoredModel | AdaptedModel,
    actor_folder: Path,
    source: Path,
    config: PretrainedConfig,
    trust_remote_code: bool,
    lang: str | None,
    use_score: bool,
) -> HeadAndRule | None:
    """The head, which fits the `config` of the model's files `source`, and its step rule; None where there is none."""
    if (head := _read_score_head(model, actor_folder, config.hidden_size)) is not None:
        return head, _sprm_config(actor_folder, source, lang, trust_remote_code)
    if use_score or lang is not None:
        option = "--use_score" if use_score else f"--lang {lang}"
        raise UserError(f"{actor_folder}: no score head in this checkpoint; leave {option} out")
    return None


def _read_score_head(
    model: StoredModel | AdaptedModel, actor_folder: Path, hidden_size: int
) -> dict[str, Tensor] | None:
    """From among the model's tensors, or (verl) the file beside them; None where there is neither."""
    if names := [name for name in model.tensors if name.startswith(HEAD_PREFIX)]:
        tensors = read_finite(actor_folder, model, names)
        return {name.removeprefix(HEAD_PREFIX): tensor for name, tensor in tensors.items()}
    if (actor_folder / SCORE_MODULE_FILE).is_file():
        return load_score_head(actor_folder, hidden_size).state_dict()
    return None


def _sprm_config(actor_folder: Path, source: Path, lang: str | None, trust_remote_code: bool) -> SPRMConfig | None:
    folders = [actor_folder / HUGGINGFACE_FOLDER, source]
    having = [folder for folder in folders if (folder / SPRM_CONFIG_FILE).is_file()]
    if lang is None and not having:
        return None
    return load_sprm_config((having or [source])[0], load_tokenizer(source, trust_remote_code), lang)


@exit_on_user_error
def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dir", type=Path, required=True, help="checkpoint: actor, step or experiment folder")
    parser.add_argument("--target_dir", type=Path, required=True, help="output folder, which must not exist")
    parser.add_argument("--dtype", default="auto", help="auto (the trained model's own), float32, bfloat16 or float16")
    parser.add_argument(
        "--hf_model_path",
        type=Path,
        help="the model that was trained, where the checkpoint has no configuration or its base moved",
    )
    parser.add_argument("--adapter_only", action="store_true", help="write a LoRA run's adapter alone, for peft")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code that the model needs")
    parser.add_argument("--hf_upload_path", help="push the result to this repository of the Hub, OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    parser.add_argument("--lang", help="step rule to write beside the score head, where it has none: en or zh")
    parser.add_argument("--use_score", action="store_true", help="(verl) have no checkpoint without a score head")
    parser.add_argument("--backend", default="fsdp", help="(verl) fsdp, which is all that can be read")
    parser.add_argument("command", nargs="?", default="merge", help="(verl) merge, which is all that it does")
    arguments = vars(parser.parse_args())
    for name, known in (("command", "merge"), ("--backend", "fsdp")):
        if (value := arguments.pop(name.removeprefix("--"))) != known:
            raise UserError(f"{name} {value}: only {known} is supported here")
    repo_id, private = arguments.pop("hf_upload_path"), arguments.pop("private")
    write = export_adapter if arguments.pop("adapter_only") else merge
    write(**arguments)
    if repo_id is not None:
        upload(arguments["target_dir"], repo_id, private)


if __name__ == "__main__":
    main()
