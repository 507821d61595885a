"""What a decoder's configuration alone says of its size: parameters, cache and floating-point operations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbai.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from verl.trainer.config.schema import CriticModel, ModelConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders with grouped-query attention and a gated MLP, whose parameters `ModelShape` can count."""


def _qwen2(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, **other: Any) -> dict:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    } | other


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool = False) -> dict:
    other = {"head_dim": 128, "tie_word_embeddings": tied, "max_position_embeddings": 40960}
    return _qwen2(hidden, layers, heads, kv_heads, mlp, 151936, model_type="qwen3", **other)


_QWEN2_1_5B = _qwen2(1536, 28, 12, 2, 8960, 151936)
_QWEN2_7B = _qwen2(3584, 28, 28, 4, 18944, 152064)
_QWEN2_14B = _qwen2(5120, 48, 40, 8, 13824, 152064)
_QWEN2_32B = _qwen2(5120, 64, 40, 8, 27648, 152064)

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "DeepScaleR-1.5B-Preview": _QWEN2_1_5B,
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2_1_5B,
    "DeepSeek-R1-Distill-Qwen-7B": _QWEN2_7B,
    "DeepSeek-R1-Distill-Qwen-14B": _QWEN2_14B,
    "DeepSeek-R1-Distill-Qwen-32B": _QWEN2_32B,
    "Qwen2.5-1.5B": _QWEN2_1_5B | {"tie_word_embeddings": True},
    "Qwen2.5-7B": _QWEN2_7B,
    "Qwen2.5-14B": _QWEN2_14B,
    "Qwen2.5-32B": _QWEN2_32B,
    "QwQ-32B": _QWEN2_32B | {"max_position_embeddings": 40960},
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600),
}
"""Published configurations by the name of the model's folder, for estimates where the folder itself is not at hand."""


def known_config(name: str, **changes: Any) -> PretrainedConfig:
    """The transformers configuration of a model of `KNOWN_CONFIGS`, with some values changed.

    Raises:
        UserError: an unknown name.
    """
    from transformers import AutoConfig

    if name not in KNOWN_CONFIGS:
        raise UserError(f"model {name!r} is unknown, use one of {', '.join(KNOWN_CONFIGS)}")
    return AutoConfig.for_model(**KNOWN_CONFIGS[name] | changes)


def config_of(folder: str | Path, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """A model folder's configuration; without the folder the published one of its name, or None.

    Raises:
        UserError: a configuration that cannot be read.
    """
    from xbai.engine.files import read_config

    if (Path(folder) / "config.json").is_file():
        return read_config(folder, trust_remote_code)
    name = Path(folder).name
    return known_config(name) if name in KNOWN_CONFIGS else None


def shape_of(model: ModelConfig | CriticModel) -> ModelShape | None:
    """Of the model that a section names; None where it is not known, or its kind is not counted."""
    config = config_of(model.path, model.trust_remote_code)
    return ModelShape.from_config(config) if config is not None and config.model_type in MODEL_TYPES else None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal LM of `MODEL_TYPES`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelShape:
        """Read a transformers configuration.

        Raises:
            UserError: a model type that is not counted here.
        """
        kind = config.model_type
        if kind not in MODEL_TYPES:
            raise UserError(f"no estimate for model_type={kind}, only for {', '.join(MODEL_TYPES)}")
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of one decoder layer's linear layers, by their names."""
        hidden, query, kv, mlp = self.hidden, self.query_size, self.kv_size, self.mlp
        attention = {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
        }
        return attention | {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}

    @property
    def layer_matrices(self) -> int:
        """Elements of one decoder layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.layer_linears.values())

    def adapter_parameters(self, rank: int, names: Collection[str] | None = None) -> int:
        """Parameters of adapters on the linear layers of these names (None: on all) of all decoder layers."""
        sizes = (sizes for name, sizes in self.layer_linears.items() if names is None or name in names)
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in sizes)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biases = (self.query_size + 2 * self.kv_size) * self.qkv_bias + self.hidden * self.output_bias
        return self.layer_matrices + norms + biases + (2 * self.mlp + self.hidden) * self.mlp_bias

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, which an untied LM head has as many of."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the causal LM: layers, embedding, LM head unless tied, final norm."""
        outer = self.embedding_parameters * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + outer

    @property
    def score_head_parameters(self) -> int:
        """Parameters of the score head: Linear(c, 2c) and Linear(2c, 1)."""
        return 2 * self.hidden * self.hidden + 2 * self.hidden + 2 * self.hidden + 1

    @property
    def cache_per_token(self) -> int:
        """Elements of the KV cache for one token."""
        return 2 * self.layers * self.kv_size

    def forward_flops(self, tokens: int, context: float, predicted: int) -> float:
        """Floating-point operations of a forward pass: 2 a matrix element and token, and attention's two products.

        Args:
            tokens: through the decoder layers.
            context: positions that a token attends to, on average ((length + 1) / 2 of causal sequences).
            predicted: tokens through the LM head.
        """
        attention = 4 * self.query_size * context
        return tokens * self.layers * (2 * self.layer_matrices + attention) + 2 * predicted * self.embedding_parameters

    def sequence_flops(self, lengths: Sequence[int], predicted: int) -> float:
        """Those of causal sequences of these lengths, of which so many tokens go through the LM head."""
        tokens = sum(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return self.forward_flops(tokens, pairs / max(1, tokens), predicted)
