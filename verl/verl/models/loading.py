"""Loading a model folder as the trainer's joint model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from verl.models.fsdp import decoder_layers
from verl.models.joint_model import JointModel
from verl.models.liger import apply_liger
from verl.models.lora import add_adapters
from xbai import model_folder
from xbai.engine import files
from xbai.engine.packed_attention import PACKED_ATTENTION, why_not_packed
from xbai.engine.weight_files import load_pretrained
from xbai.errors import UserError
from xbai.model_files import stored_dtypes
from xbai.sprm import ScoreHead, SPRMConfig, load_score_head
from xbai.sprm.head import SCORE_MODULE_FILE

if TYPE_CHECKING:
    from peft import LoraConfig

HEAD_SEED = 0
DTYPES = files.DTYPES | {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a configuration value; a `UserError` where it is none of `DTYPES`."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown, use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The configuration value of a dtype."""
    return str(dtype).removeprefix("torch.")


def trained_dtype(name: str, key: str) -> torch.dtype:
    """`torch_dtype` of a model that is trained.

    Raises:
        UserError: an unknown name, or float16, in which small gradients are 0 (a loss is a mean over all tokens of a
            batch, and there is no loss scaling) and weights that Adam keeps in it become nan (its epsilon is 0).
    """
    if (dtype := torch_dtype(name)) != torch.float16:
        return dtype
    raise UserError(
        f"{key}={name} cannot train: small gradients, and Adam's epsilon, are 0 in float16; use bfloat16 or float32"
    )


def fast_dtype(device: torch.device) -> torch.dtype:
    """What a device multiplies fastest in, of bfloat16 and float32: a CPU whose oneDNN has no bfloat16 (one without
    AVX-512) takes ten times as long with it.
    """
    has_bfloat16 = device.type == "cuda" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if has_bfloat16 else torch.float32


def loading_dtype(path: str | Path, dtype: torch.dtype) -> torch.dtype:
    """What to load a model in that is to be kept in `dtype`: in 16 bits where its files hold nothing else.

    Weights that are loaded as they are stored stay mapped files, which all processes of a machine share until
    `shard_model` has cut them up; only each one's part is then widened to `dtype`.
    """
    stored = stored_dtypes(path)
    halves = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return halves.get(stored.pop(), dtype) if len(stored) == 1 and dtype == torch.float32 else dtype


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token; a `UserError` where the folder has none."""
    tokenizer = model_folder.load_tokenizer(path, trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class TransformerOptions(TypedDict, total=False):
    """See `load_transformer`."""

    packed: bool
    trust_remote_code: bool
    gradient_checkpointing: bool
    compute_dtype: torch.dtype | None
    compile_layers: bool


def build_joint_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    sprm_config: SPRMConfig | None = None,
    score_model_path: str | Path | None = None,
    channel: int | None = None,
    use_liger: bool = False,
    fused_kernels: bool = False,
    logits_dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
    lora_dtype: torch.dtype = torch.float32,
    **options: Unpack[TransformerOptions],
) -> JointModel:
    """Load the LM of a Hugging Face folder and, when `sprm_config` is given, a score head, on the CPU.

    Args:
        path: model folder.
        dtype: of the LM's weights; the head is float32.
        sprm_config: from `load_sprm_config`; None builds a model without a head.
        score_model_path: `score_module.pt` or its folder; None takes the model folder's, and where that has none a
            fresh head, initialised alike on every rank.
        channel: the hidden size that the configuration expects, checked against the model's.
        use_liger: see `apply_liger`.
        fused_kernels, logits_dtype: see `JointModel`.
        lora, lora_dtype: freeze the LM and train adapters on it, see `add_adapters`; None: all of it is trained.
        options: see `load_transformer`.

    Raises:
        UserError: no such folder, no model in it, a head that does not fit, a model that cannot be packed or that Liger
            has no kernels for.
    """
    lm = load_transformer(AutoModelForCausalLM, path, dtype, **options)
    if use_liger:
        apply_liger(lm)
    if lora is not None:
        add_adapters(lm, lora, lora_dtype)
    hidden_size = lm.config.hidden_size
    if channel is not None and channel != hidden_size:
        raise UserError(f"actor_rollout_ref.score.channel={channel}, but the hidden size of {path} is {hidden_size}")
    if sprm_config is None:
        head = None
    elif has_score_head(path, score_model_path):
        head = load_score_head(score_model_path or path, hidden_size, sprm_config)
    else:
        head = _fresh_head(hidden_size, sprm_config)
    return JointModel(lm, head, fused_kernels=fused_kernels, logits_dtype=logits_dtype)


def has_score_head(path: str | Path, score_model_path: str | Path | None) -> bool:
    """Whether there is a head to load, be it the model folder's own; otherwise a fresh one is made."""
    return score_model_path is not None or (Path(path) / SCORE_MODULE_FILE).exists()


def load_transformer(
    auto_class: type[AutoModel | AutoModelForCausalLM],
    path: str | Path,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    compute_dtype: torch.dtype | None = None,
    compile_layers: bool = False,
) -> PreTrainedModel:
    """Load a Hugging Face folder for training, on the CPU.

    Args:
        auto_class: with the LM head or without.
        path, dtype: of the weights.
        packed: for packed sequences (`model.use_remove_padding`), and for them alone.
        gradient_checkpointing: recompute each decoder layer in the backward pass.
        compute_dtype: what FSDP2 will cast the weights to (None: `dtype`); flash attention works in 16 bits only.
        compile_layers: have torch.compile make kernels of each decoder layer, when it first runs; all share them.

    Raises:
        UserError: no such folder, no model in it, or one that cannot compute packed sequences.
    """
    model = load_pretrained(
        auto_class,
        path,
        dtype=dtype,
        attn_implementation=attention_for(compute_dtype or dtype, packed),
        trust_remote_code=trust_remote_code,
    )
    # Where padding is a token that texts hold, the end of a turn say, that one's row is trained like any other; padding
    # itself is masked.
    embeddings: Any = model.get_input_embeddings()
    embeddings.padding_idx = None
    if packed:
        check_packable(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(model) if compile_layers else ():
        # Before FSDP2 wraps the layer, whose hooks stay outside.
        layer.compile(dynamic=True)
    return model


def attention_for(compute_dtype: torch.dtype, packed: bool = False) -> str:
    """The `attn_implementation` for padded or for packed sequences."""
    if packed:
        return PACKED_ATTENTION
    return "flash_attention_2" if is_flash_attn_2_available() and compute_dtype != torch.float32 else "sdpa"


def check_packable(lm: PreTrainedModel) -> None:
    """Raise a `UserError` where a token would see the sequences packed before its own, see `why_not_packed`."""
    if reason := why_not_packed(lm):
        raise UserError(
            f"{type(lm).__name__} cannot compute packed sequences ({reason}): set "
            "actor_rollout_ref.model.use_remove_padding=false"
        )


def _fresh_head(hidden_size: int, config: SPRMConfig) -> ScoreHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        return ScoreHead(hidden_size, config.dropout, config.normalize_features)
