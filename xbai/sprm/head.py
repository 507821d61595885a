"""The score head (SPRM) and its files beside a model."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xbai.errors import UserError
from xbai.files import atomic_write
from xbai.sprm.step_rule import StepRule

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from transformers import PreTrainedTokenizerBase

SCORE_MODULE_FILE = "score_module.pt"
SPRM_CONFIG_FILE = "sprm_config.json"


@dataclass(frozen=True)
class SPRMConfig:
    """Everything besides the weights that decides a score; defaults are the published form (section 3.2)."""

    step_rule: StepRule
    dropout: float = 0.5
    normalize_features: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, read back by `from_dict`."""
        return vars(self) | {"step_rule": self.step_rule.to_dict()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> SPRMConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError, KeyError, TypeError: it is no such form.
        """
        config = cls(**{**value, "step_rule": StepRule.from_dict(value["step_rule"])})
        if isinstance(config.dropout, bool) or not 0 <= config.dropout < 1:
            raise ValueError(f"dropout={config.dropout!r}, not from 0 to below 1")
        if not isinstance(config.normalize_features, bool):
            raise TypeError(f"normalize_features={config.normalize_features!r}, neither true nor false")
        return config


class Standardization(NamedTuple):
    """What makes features standardised: less `mean`, over `deviation`."""

    mean: Float64[Tensor, "c"]
    deviation: Float64[Tensor, "c"]


class ScoreHead(nn.Sequential):
    """Linear(c, 2c), ReLU, Dropout, Linear(2c, 1), in float32; state-dict keys `0.*` and `3.*` as published.

    Attributes:
        standardization: folded into the first layer, which optimisers see without it; no part of the state dict.
    """

    def __init__(self, hidden_size: int, dropout: float = 0.5, normalize_features: bool = False) -> None:
        super().__init__(
            nn.Linear(hidden_size, 2 * hidden_size, dtype=torch.float32),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden_size, 1, dtype=torch.float32),
        )
        self.hidden_size = hidden_size
        self.normalize_features = normalize_features
        self.standardization: Standardization | None = None

    def forward(self, features: Float[Tensor, "*steps c"]) -> Float[Tensor, "*steps"]:
        """Features to step logits, whose sigmoid is the step score."""
        features = features.to(self.get_parameter("0.weight").dtype)
        if self.normalize_features:
            features = F.rms_norm(features, (self.hidden_size,), eps=1e-6)
        logits: Tensor = super().forward(features)
        return logits.squeeze(-1)


def save_score_head(folder: str | Path, state_dict: dict[str, Tensor], config: SPRMConfig | None) -> None:
    """Write `score_module.pt` and, unless it is to stay open which rule the head knows, `sprm_config.json`."""
    folder = Path(folder)
    # By way of memory: torch's own writing hides why it failed.
    content = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}, content)
    with atomic_write(folder / SCORE_MODULE_FILE) as stream:
        stream.write(content.getbuffer())
    if config is not None:
        save_sprm_config(folder, config)


def save_sprm_config(folder: str | Path, config: SPRMConfig) -> None:
    """Write `sprm_config.json` into a model folder."""
    with atomic_write(Path(folder) / SPRM_CONFIG_FILE, "w") as stream:
        json.dump(config.to_dict(), stream, indent=2)


def load_sprm_config(folder: str | Path, tokenizer: PreTrainedTokenizerBase, lang: str | None = None) -> SPRMConfig:
    """Read `sprm_config.json`; without one, the published form with the rule of `lang` (default `en`).

    A `lang` given explicitly must match the rule that travels with the model.
    """
    path = Path(folder) / SPRM_CONFIG_FILE
    if not path.exists():
        return SPRMConfig(StepRule.from_tokenizer(tokenizer, lang or "en"))
    try:
        config = SPRMConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a valid SPRM configuration ({error!r:.300}); copy it again") from error
    if lang is not None and lang != config.step_rule.lang:
        raise UserError(f"{path}: the head was trained with lang={config.step_rule.lang}, not lang={lang}")
    return replace(config, step_rule=config.step_rule.with_tag_pieces(tokenizer))


def load_score_head(path: str | Path, hidden_size: int, config: SPRMConfig | None = None) -> ScoreHead:
    """Load `score_module.pt` (given itself or by its folder) as a head in evaluation mode, without `config` one of the
    published form.

    Raises:
        UserError: the file is missing or damaged, has other keys, belongs to a model of another hidden size, or holds
            weights that are not finite.
    """
    path = Path(path)
    path = path / SCORE_MODULE_FILE if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file; a reflective model folder holds {SCORE_MODULE_FILE} (see model_merger)")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if tensor.is_floating_point()}
    except (OSError, EOFError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cut off, or no state dict of torch.save ({type(error).__name__})") from error
    form = () if config is None else (config.dropout, config.normalize_features)
    head = ScoreHead(hidden_size, *form)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if found != expected:
        raise UserError(f"{path}: expected a score head of shapes {expected}, found {found}")
    head.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
    for name, weight in head.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f"{path}: {name} holds weights that are not finite; take the head of an earlier checkpoint")
    return head.eval()
