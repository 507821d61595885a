"""Step scores that come with the generated tokens: which models can, with which head, and what vLLM is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbai.sprm import ScoreHead, SPRMConfig, load_score_head

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STEP_LOGIT, LOG_PROB = 0, 1
"""The columns that come instead of vLLM's log-probs (see vllm/sampler.py); a request gets the first `logprobs + 1`."""

_FUSED_CLASSES = {
    "LlamaForCausalLM": "FusedLlamaForCausalLM",
    "Qwen2ForCausalLM": "FusedQwen2ForCausalLM",
    "Qwen3ForCausalLM": "FusedQwen3ForCausalLM",
}
# Of vLLM's arguments those that run other code than `fused_models`, and with which values they do not.
_FORWARD_PASS = {
    "speculative_config": (None,),
    "pipeline_parallel_size": (1,),
    "model_impl": ("auto", "vllm"),
    "enable_lora": (False,),
}


def register_models() -> None:
    """Make the models known to vLLM, in each process that is to run one (its plugin `xbai`, see pyproject.toml)."""
    from vllm import ModelRegistry

    for name in _FUSED_CLASSES.values():
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"xbai.engine.vllm.fused_models:{name}")


def obstacle(config: PretrainedConfig, options: Mapping[str, Any]) -> str | None:
    """Why vLLM, with these of its `EngineArgs`, cannot score in the forward pass that generates; None where it can."""
    architecture = _architecture(config)
    if architecture not in _FUSED_CLASSES:
        return f"{architecture} is none of {', '.join(_FUSED_CLASSES)}"
    if config.num_hidden_layers < 2:
        return "the model has only one layer"
    changed = (name for name, usual in _FORWARD_PASS.items() if options.get(name, usual[0]) not in usual)
    return next((f"{name} changes the forward pass" for name in changed), None)


@dataclass(frozen=True)
class FusedHead:
    """The score head inside vLLM's model.

    Attributes:
        sprm_config: its form and step rule.
        folder: where its weights are; None for a head whose weights are yet to be brought.
    """

    sprm_config: SPRMConfig
    folder: str | None

    def engine_arguments(self, config: PretrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of vLLM's `EngineArgs` that put it there, beside what `options` say in them."""
        architecture = _FUSED_CLASSES[_architecture(config)]
        return {
            "hf_overrides": {**options.get("hf_overrides", {}), "architectures": [architecture]},
            "additional_config": {
                **options.get("additional_config", {}),
                "score_head": {"sprm_config": self.sprm_config.to_dict(), "folder": self.folder},
            },
        }

    @classmethod
    def from_additional_config(cls, value: Mapping[str, Any]) -> FusedHead:
        """The inverse of `engine_arguments`, inside vLLM."""
        fields = value["score_head"]
        return cls(SPRMConfig.from_dict(fields["sprm_config"]), fields["folder"])

    def build(self, hidden_size: int) -> ScoreHead:
        """The head in float32, with weights of no meaning where there is no folder.

        Raises:
            UserError: the folder holds no head of this form.
        """
        if self.folder is not None:
            return load_score_head(Path(self.folder), hidden_size, self.sprm_config)
        return ScoreHead(hidden_size, self.sprm_config.dropout, self.sprm_config.normalize_features).eval()


def _architecture(config: PretrainedConfig) -> str:
    return next(iter(config.architectures or ()), "an architecture without a name")
