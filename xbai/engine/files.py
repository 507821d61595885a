"""What torch and transformers make of a model folder, with clear errors where something is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xbai.errors import UserError, one_line
from xbai.model_folder import check_model_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ModelOptions:
    """What every engine is asked to load.

    Attributes:
        model_path: a Hugging Face model folder.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        head_dtype: of the logits, see `resolve_head_dtype`.
        max_model_len: most tokens of prompt plus response; the model's context by default.
        lang: step rule; None takes the one that travels with the head (`en` where none does).
        with_scores: load the folder's score head.
        trust_remote_code: run the Python code that comes with the folder.
        seed: of the random streams of requests without a seed.
    """

    model_path: str | Path
    dtype: str = "auto"
    head_dtype: str | None = None
    max_model_len: int | None = None
    lang: str | None = None
    with_scores: bool = False
    trust_remote_code: bool = False
    seed: int | None = None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and its notes on weights that are left out on purpose."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def read_config(model_path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: not a folder with a readable `config.json`, or one that transformers does not know.
    """
    from transformers import AutoConfig

    check_model_folder(model_path)
    try:
        return AutoConfig.from_pretrained(str(model_path), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Values of the wrong kind make the model's own class fail by whatever it did not expect.
        why = one_line(error)
        if not trust_remote_code and "trust_remote_code" in why:
            why = "it needs Python code that comes with the folder, which runs only with trust_remote_code"
        raise UserError(f"{Path(model_path) / 'config.json'}: no model's ({why[:300]})") from error


def resolve_dtype(dtype: str, config: PretrainedConfig) -> torch.dtype:
    """A torch dtype from its name; `auto` is the checkpoint's.

    Raises:
        UserError: any other name.
    """
    if dtype == "auto":
        stored = config.dtype or torch.float32
        return getattr(torch, stored) if isinstance(stored, str) else stored
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown, use auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def resolve_head_dtype(name: str | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a model's logits: `float32`, `model` (`dtype`, its weights'), or None for what suits the device.

    Logits in bfloat16 part the log-probs of two engines (an actor and its rollout) further than all that comes before
    them. Float32 ones cost a GPU next to nothing, but a CPU a copy of the LM head for each product.

    Raises:
        UserError: any other name.
    """
    if name is None:
        return torch.float32 if torch.cuda.is_available() else dtype
    if name not in ("float32", "model"):
        raise UserError(f"head_dtype={name!r} is unknown, use float32 or model")
    return torch.float32 if name == "float32" else dtype


def resolve_max_model_len(requested: int | None, config: PretrainedConfig) -> int:
    """The context to serve: what was asked for, at most what the model was made for.

    Raises:
        UserError: a context the model does not have.
    """
    longest = config.max_position_embeddings
    if requested is None:
        return longest
    if not 2 <= requested <= longest:
        raise UserError(f"max_model_len={requested}: between 2 and the model's {longest} (max_position_embeddings)")
    return requested


def meta_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM without weights, which takes no memory.

    Raises:
        UserError: transformers has none for this configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Sizes that do not go together fail in the model's own class, by whatever it did not expect.
        raise UserError(f"config.json: no causal LM can be made from it ({one_line(error)[:300]})") from error


def weight_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of every parameter, a tied LM head included."""
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
