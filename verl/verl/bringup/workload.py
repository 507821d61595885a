"""What a training step works on, made on the spot: models of random weights, rows, configuration and policy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl.bringup.step import Context, require
from verl.models.fsdp import init_distributed
from verl.models.joint_model import JointModel
from verl.models.loading import build_joint_model, load_tokenizer, loading_dtype
from verl.models.reference import ReferencePolicy
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.defaults import plain_defaults
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import TrainedPlacement
from verl.trainer.planning.model_shapes import known_config
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.placed_model import Dtypes, PlacedModel
from xbai.benchmarks.tiny_model import make_tokenizer, write_tiny_model
from xbai.engine.files import quiet_transformers, read_config, resolve_head_dtype
from xbai.files import atomic_directory
from xbai.model_files import ModelFiles
from xbai.sprm import ScoreHead, SPRMConfig, StepRule, load_sprm_config, save_score_head

SHAPE = "DeepSeek-R1-Distill-Qwen-1.5B"
CUT_LAYERS = 4
SCORE_SCALE = 2.0
"""So that scores of random texts are further apart than any rounding moves them."""
TOKENS_PER_STEP = 16
STEP_IDS = tuple(range(40, 48))
NO_TAG = -1
"""No token: random texts do not end their thinking."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a batch, their lengths, and how many tokens go through the model at once."""

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    tokens_per_micro_batch: int

    @property
    def rows(self) -> int:
        """Responses of the batch."""
        return self.prompts * self.samples


def model_folder(context: Context, layers: int | None = CUT_LAYERS, shape: str = SHAPE) -> Path:
    """A reflective model with tokenizer and score head, made when it is first asked for.

    On a GPU it has a shape of `KNOWN_CONFIGS`, cut to some decoder layers (None: all), in bfloat16. In a rehearsal it
    is the tiny model of the quickstart, whatever is asked for.
    """
    folder = context.work / (f"{shape}_{layers or 'all'}" if context.on_gpu else "tiny")
    if not folder.exists():
        with atomic_directory(folder) as temporary:
            write_model(temporary / "model", shape, layers) if context.on_gpu else write_tiny_model(temporary / "model")
            _add_head(temporary / "model")
    return folder / "model"


def plain_model(context: Context, folder: Path) -> PreTrainedModel:
    """transformers' own model of a folder, in float32: what everything else is compared with."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(context.device).eval()  # type: ignore[arg-type]  # Its decorator hides that `to` is a method.


def model_folder_made_apart(context: Context, layers: int | None = CUT_LAYERS, shape: str = SHAPE) -> Path:
    """`model_folder`, made by another process, so that this one has not used CUDA and holds nothing on the GPU."""
    process = context.processes.Process(target=model_folder, args=(context, layers, shape))
    process.start()
    process.join()
    require(process.exitcode == 0, f"the model could not be written (exit status {process.exitcode})")
    return model_folder(context, layers, shape)


def write_model(folder: Path, shape: str, layers: int | None) -> None:
    """A known shape cut to some layers, with a tokenizer whose ids are all within the vocabulary."""
    tokenizer = make_tokenizer()
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = known_config(shape, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16", **changes)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ModelFiles.read(folder).write(folder)
    del model
    torch.cuda.empty_cache()


def _add_head(folder: Path) -> None:
    torch.manual_seed(1)
    # Without dropout an update is the same in every mode.
    config = SPRMConfig(StepRule("en", STEP_IDS, think_open_id=NO_TAG, think_close_id=NO_TAG), dropout=0.0)
    head = ScoreHead(read_config(folder).hidden_size)
    with torch.no_grad():
        head.get_parameter("3.weight").mul_(SCORE_SCALE)
    save_score_head(folder, head.state_dict(), config)


def make_batch(sizes: Sizes, folder: Path) -> dict[str, Tensor]:
    """Rows as a rollout leaves them, of random tokens of a folder's model; half of the answers are right."""
    vocabulary, generator = read_config(folder).vocab_size, torch.Generator().manual_seed(0)
    shape = (sizes.rows, sizes.prompt_tokens + sizes.response_tokens)
    lengths = torch.randint(sizes.response_tokens // 4, sizes.response_tokens + 1, (sizes.rows,), generator=generator)
    lengths[0] = sizes.response_tokens
    response_mask = torch.arange(sizes.response_tokens) < lengths[:, None]
    attended = torch.cat([torch.ones(sizes.rows, sizes.prompt_tokens, dtype=torch.bool), response_mask], dim=1)
    is_step = torch.arange(shape[1]) % TOKENS_PER_STEP == TOKENS_PER_STEP - 1
    in_response = torch.arange(shape[1]) >= sizes.prompt_tokens
    advantages = torch.randn(sizes.rows, 1, generator=generator)
    return {
        "input_ids": torch.randint(vocabulary, shape, generator=generator),
        "attention_mask": attended.long(),
        "position_ids": (attended.long().cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
        "step_feature_mask": attended & in_response & is_step,
        "advantages": advantages.expand(-1, sizes.response_tokens).contiguous(),
        "graded": torch.ones(sizes.rows, dtype=torch.bool),
        "correct": (advantages[:, 0] > 0).float(),
    }


def fsdp_section(**changes: Any) -> TrainedPlacement:
    """The policy's `fsdp_config`, as the trainer's defaults have it but for `changes`."""
    return with_values(plain_defaults().actor_rollout_ref.actor.fsdp_config, changes)


class Modes(TypedDict, total=False):
    """How `build_joint_model` makes the model compute."""

    packed: bool
    gradient_checkpointing: bool
    fused_kernels: bool
    use_liger: bool


def build_policy(
    folder: Path, fsdp_config: TrainedPlacement, lr: float = 1e-6, with_head: bool = True, **modes: Unpack[Modes]
) -> PlacedModel[JointModel, JointOptimizer]:
    """The model of a folder as a policy with optimisers, both at `lr`, sharded as in training."""
    dtypes = Dtypes.from_config(fsdp_config)
    joint = build_joint_model(
        folder,
        loading_dtype(folder, dtypes.stored),
        sprm_config=load_sprm_config(folder, load_tokenizer(folder)) if with_head else None,
        compute_dtype=dtypes.compute,
        logits_dtype=resolve_head_dtype(None, dtypes.compute),
        **modes,
    )
    optim = with_values(plain_defaults().actor_rollout_ref.actor.optim, {"lr": lr})
    return PlacedModel(joint, fsdp_config, lambda sharded: JointOptimizer(sharded, optim, optim))


def build_actor(
    policy: PlacedModel[JointModel, JointOptimizer],
    folder: Path,
    sizes: Sizes,
    packed: bool = True,
    *,
    sp_group: dist.ProcessGroup | None = None,
    reference: ReferencePolicy | None = None,
    **loss: Any,
) -> tuple[DataParallelPPOActor, dict[str, Tensor]]:
    """What trains the policy of a folder, and a batch for it.

    The configuration is that of the trainer's defaults but for sizes, `packed` and what `loss` names in `actor`.
    """
    changes = {
        "model.use_remove_padding": packed,
        "rollout.n": sizes.samples,
        "rollout.log_prob_use_dynamic_bsz": True,
        "rollout.log_prob_max_token_len_per_gpu": 2 * sizes.tokens_per_micro_batch,
        "actor.ppo_mini_batch_size": sizes.prompts,
        "actor.use_dynamic_bsz": True,
        "actor.ppo_max_token_len_per_gpu": sizes.tokens_per_micro_batch,
        "score.agreement_weighting": False,
        **{f"actor.{key}": value for key, value in loss.items()},
    }
    config = with_values(plain_defaults().actor_rollout_ref, changes)
    actor = DataParallelPPOActor(config, policy.model, policy.optimizer, sp_group, reference)
    return actor, make_batch(sizes, folder)


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
    init_distributed()
    try:
        yield
    finally:
        dist.destroy_process_group()
