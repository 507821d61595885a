"""Adapters on a frozen base: what is trained, what the reference and the engine see, what is kept and written.

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_joint_update
import test_resume
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import adam, fsdp_section, ppo_config, tiny_lm
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from verl.checkpoints import adapters
from verl.checkpoints.state import HUGGINGFACE_FOLDER, load_checkpoint, save_checkpoint
from verl.checkpoints.storage import read_metadata
from verl.models.fsdp import init_distributed, named_full_tensors
from verl.models.joint_model import JointModel
from verl.models.loading import attention_for
from verl.models.lora import adapters_off, add_adapters, is_adapter, lora_config, merged_weight
from verl.models.packing import padded_layout
from verl.models.reference import ReferencePolicy
from verl.models.ulysses import sequence_parallel_group
from verl.optim.optimizers import JointOptimizer
from verl.trainer.config.check import check_config
from verl.trainer.config.compose import compose_config
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.planning.host_memory import host_memory
from verl.trainer.planning.memory_estimate import GIB
from verl.trainer.planning.memory_phases import GPUS_GIB, PhaseMemory, changes_to_fit
from verl.trainer.planning.model_shapes import ModelShape, known_config
from verl.workers.actor.dp_actor import DataParallelPPOActor, PolicyLogProbs
from verl.workers.placed_model import PlacedModel
from xbai.engine import SamplingParams, load_engine
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import ScoreHead

SCRIPTS = Path(__file__).parents[1] / "scripts"
IDS = torch.arange(1, 13)[None]
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "full KL": {"kl": "full"},
    "packed, checkpointed": {"packed": True, "checkpointing": True, "kl": "full"},
    "hybrid": {"fsdp_config": {"fsdp_size": 1}},
    "bfloat16": {"dtype": "bfloat16"},
    "sequence parallel": {"packed": True, "kl": "full", "sp_size": 2},
}
LOSSES = ("actor/pg_loss", "actor/kl_loss", "actor/entropy_loss", "actor/grad_norm", "score/loss", "score/grad_norm")


def lora(base: str | Path = "base", **changes: Any) -> LoraConfig:
    config = ppo_config(["data.train_files=none", f"actor_rollout_ref.model.path={base}"]).actor_rollout_ref.model
    made = lora_config(with_values(config, {"lora_rank": 4, **changes}))
    assert made is not None
    return made


def adapted(lm: Qwen3ForCausalLM, config: LoraConfig | None = None, *, moved: bool = True) -> JointModel:
    """A policy whose adapters add something, where they have `moved`, and its score head without dropout."""
    add_adapters(lm, config or lora())
    generator = torch.Generator().manual_seed(7)
    for name, parameter in lm.named_parameters():
        if moved and ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(1)
    return JointModel(lm, ScoreHead(lm.config.hidden_size, dropout=0.0))


def placed(model: JointModel, **fsdp_config: Any) -> PlacedModel[JointModel, JointOptimizer]:
    optim = adam(lr=1e-2)
    return PlacedModel(model, fsdp_section(**fsdp_config), lambda model: JointOptimizer(model, optim, optim))


def log_probs(model: JointModel) -> Tensor:
    """[T - 1] of the tokens after the first one of `IDS`, with the steps at each token."""
    ones = torch.ones_like(IDS)
    rows = {"input_ids": IDS, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1}
    masks = {"response_mask": ones[:, 1:].bool(), "step_feature_mask": ones.bool()}
    with torch.no_grad():
        return model.eval()(padded_layout(rows | masks)).log_probs


def plain_log_probs(lm: Any) -> Tensor:
    with torch.no_grad():
        return lm.eval()(IDS).logits[0, :-1].log_softmax(-1).gather(-1, IDS[0, 1:, None]).squeeze(-1)


@given(
    sizes=st.tuples(*(st.integers(1, 9) for _ in range(3))),
    scaling=st.floats(0.1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=20)
def test_a_merged_weight_is_the_sum_in_float32(sizes: tuple[int, int, int], scaling: float, dtype: torch.dtype) -> None:
    rows, rank, columns = sizes
    weight, b, a = torch.randn(rows, columns).to(dtype), torch.randn(rows, rank), torch.randn(rank, columns)
    merged = merged_weight(weight, a, b, scaling)
    assert merged.dtype == torch.float32
    assert_close(merged.double(), weight.double() + scaling * b.double() @ a.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_begins_as_its_base_which_stays_as_it_is_stored(process_group: None, dtype: torch.dtype) -> None:
    compute = {"compute_dtype": str(dtype).removeprefix("torch.")}
    base = placed(JointModel(tiny_lm().to(dtype), ScoreHead(32, dropout=0.0)), **compute).model
    policy = placed(adapted(tiny_lm().to(dtype), moved=False), **compute)
    assert torch.equal(log_probs(policy.model), log_probs(base))
    for name, parameter in policy.model.named_parameters():
        is_trained = is_adapter(name) or name.startswith("score_head.")
        assert parameter.requires_grad == is_trained, name
        assert parameter.dtype == (torch.float32 if is_trained else dtype), name
    trained = [
        p for part in policy.optimizer.optimizers.values() for group in part.param_groups for p in group["params"]
    ]
    assert len(trained) == sum(parameter.requires_grad for parameter in policy.model.parameters())
    begun = dict(synced(base))
    assert all(torch.equal(w, begun[name]) for name, w in synced(policy.model) if not name.startswith("score_head."))


def synced(model: JointModel, dtype: torch.dtype | None = None) -> list[tuple[str, Tensor]]:
    return [(name, weight.clone()) for name, weight in named_full_tensors(model, dtype)]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_an_engine_gets_computes_the_same(process_group: None, tied: bool, targets: Any) -> None:
    shape = {"tie_word_embeddings": tied, "attention_bias": True}
    policy = placed(adapted(tiny_lm(**shape), lora(target_modules=targets, lora_alpha=32))).model
    expected, engine = log_probs(policy), tiny_lm(seed=3, **shape)
    sent = {name: weight for name, weight in synced(policy) if not name.startswith("score_head.")}
    assert sent.keys() == dict(engine.named_parameters()).keys()
    engine.load_state_dict(sent, strict=False)
    assert_close(plain_log_probs(engine), expected, rtol=1e-5, atol=1e-5)
    assert (plain_log_probs(tiny_lm(**shape)) - expected).abs().max() > 0.01
    # Rounded once, from float32.
    rounded = dict(synced(policy, torch.bfloat16))
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in sent.items())


def test_without_its_adapters_it_is_the_base(process_group: None) -> None:
    policy, base = placed(adapted(tiny_lm())).model, placed(JointModel(tiny_lm(), ScoreHead(32))).model
    with adapters_off(policy):
        assert torch.equal(log_probs(policy), log_probs(base))
    assert not torch.equal(log_probs(policy), log_probs(base))


def update(
    packed: bool = False,
    kl: str = "low_var_kl",
    checkpointing: bool = False,
    sp_size: int = 1,
    dtype: str = "float32",
    fsdp_config: dict[str, Any] | None = None,
    reference: JointModel | None = None,
) -> dict[str, Any]:
    """Log-probs of policy and reference and an update, as the workers make them.

    `reference` takes the place of the policy's own base.
    """
    config = test_joint_update.make_config(packed, kl_loss_type=kl, ppo_micro_batch_size_per_gpu=3)
    lm = tiny_lm().to(getattr(torch, dtype))
    lm.set_attn_implementation(attention_for(torch.float32, packed))
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy, group = placed(adapted(lm), compute_dtype=dtype, **fsdp_config or {}), sequence_parallel_group(sp_size)
    other = policy.model if reference is None else PlacedModel(reference, fsdp_section()).model
    reference_policy = ReferencePolicy(other)
    actor = DataParallelPPOActor(config, policy.model, policy.optimizer, sp_group=group, reference=reference_policy)
    shares, share = dist.get_world_size() // sp_size, dist.get_rank() // sp_size
    batch = {name: column.chunk(shares)[share] for name, column in test_joint_update.make_batch("mixed").items()}
    # The reference comes first: FSDP2 makes the whole weights of the policy while its adapters are off.
    with adapters_off(other):
        ref_log_probs = PolicyLogProbs(config, other, config.ref, group).compute_log_prob(batch, False)["old_log_probs"]
    before = actor.compute_log_prob(batch, reference=reference_policy)
    old = before["old_log_probs"] + batch["noise"]
    frozen = {name: w.full_tensor() for name, w in policy.model.named_parameters() if not w.requires_grad}
    metrics = actor.update_policy({**batch, **before, "old_log_probs": old, "ref_log_prob": ref_log_probs})
    for name, weight in policy.model.named_parameters():
        assert name not in frozen or (weight.grad is None and torch.equal(weight.full_tensor(), frozen[name])), name
    return {
        "ref_log_probs": ref_log_probs,
        "ref_kl": before["ref_kl"],
        "metrics": {name: metrics[name] for name in LOSSES},
        "weights": dict(synced(policy.model)),
    }


@pytest.mark.parametrize("kl", ["low_var_kl", "full"])
def test_its_base_is_a_reference_like_any_other(process_group: None, kl: str) -> None:
    own, other = update(kl=kl), update(kl=kl, reference=JointModel(tiny_lm()).requires_grad_(False))
    assert own["metrics"]["actor/kl_loss"] > 0 and own["metrics"]["actor/grad_norm"] > 0
    assert own["ref_kl"].max() > 0.01
    assert_close(own, other, rtol=1e-5, atol=1e-6)


def run_rank(output: Path) -> None:
    """What each rank does: every variant that has room on so many ranks; rank 0 writes what came out."""
    init_distributed()
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {name: update(**keys) for name, keys in VARIANTS.items() if keys.get("sp_size", 1) <= size}
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


def launch(ranks: int, output: Path) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks), __file__, str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=False)


@pytest.mark.slow
def test_two_ranks_train_what_one_does(process_group: None, tmp_path: Path) -> None:
    for name, found in launch(2, tmp_path / "two.pt").items():
        keys = {key: value for key, value in VARIANTS[name].items() if key in ("kl", "dtype")}
        expected, (rel, share) = update(**keys), (0.02, 0.8) if "dtype" in keys else (1e-4, 0.98)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=rel, abs=1e-6), name
        rows = len(found["ref_kl"])
        assert_close(found["ref_kl"], expected["ref_kl"][:rows], rtol=rel, atol=rel / 10)
        for key, weight in expected["weights"].items():
            # Adam's first step is nearly the sign of the gradient, which of rounding noise may be another.
            assert torch.isclose(found["weights"][key], weight, atol=1e-4).float().mean() > share, (name, key)


class Checkpoint:
    """A LoRA run's after a step, its base, and the policy that it is of."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.actor = base, folder / "global_step_1" / "actor"
        self.policy = self.start()
        self.train()
        files, extra = ModelFiles.read(base), adapters.adapter_files(lora(base), base)
        files = ModelFiles(files.contents | extra, files.dtype)
        save_checkpoint(self.actor, self.policy.model, self.policy.optimizer, files)

    def start(self) -> PlacedModel[JointModel, JointOptimizer]:
        return placed(adapted(AutoModelForCausalLM.from_pretrained(self.base), lora(self.base), moved=False))

    def train(self) -> None:
        rows = test_joint_update.make_batch("mixed")
        config = test_joint_update.make_config(use_kl_loss=False)
        actor = DataParallelPPOActor(config, self.policy.model, self.policy.optimizer)
        actor.update_policy(rows.update(actor.compute_log_prob(rows)))


@pytest.fixture(scope="module")
def checkpoint(
    process_group: None, make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return Checkpoint(make_tiny_model(tied=True), tmp_path_factory.mktemp("run"))


def test_a_checkpoint_has_no_base_and_going_on_is_exact(checkpoint: Checkpoint) -> None:
    saved = {key for key in read_metadata(checkpoint.actor).state_dict_metadata if key.startswith("model.")}
    trained = {f"model.{name}" for name, p in checkpoint.policy.model.named_parameters() if p.requires_grad}
    assert saved == trained
    uninterrupted = checkpoint.policy
    checkpoint.train()
    expected = synced(uninterrupted.model)
    checkpoint.policy = checkpoint.start()
    load_checkpoint(checkpoint.actor, checkpoint.policy.model, checkpoint.policy.optimizer)
    checkpoint.train()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected, synced(checkpoint.policy.model), strict=True))


@pytest.fixture(scope="module")
def merger() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS / "model_merger.py"))


def test_merged_and_adapter_are_the_same_model(
    checkpoint: Checkpoint, merger: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    merger["merge"](checkpoint.actor, tmp_path / "merged")
    merger["export_adapter"](checkpoint.actor, tmp_path / "adapter")
    policy = checkpoint.start()
    load_checkpoint(checkpoint.actor, policy.model, policy.optimizer)
    sent = {name: weight for name, weight in synced(policy.model) if not name.startswith("score_head.")}
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == sent.keys()
    assert all(torch.equal(written[name], weight) for name, weight in sent.items())
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "score_module.pt",
    }
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint.base), tmp_path / "adapter")
    assert_close(plain_log_probs(by_peft), log_probs(policy.model), rtol=1e-5, atol=1e-5)
    prompt = tiny_tokenizer.encode("Make 10 from 1 2 3 4")
    engine = load_engine("hf", tmp_path / "merged", dtype="float32", with_scores=False)
    served = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24))[0][0].token_ids
    expected = by_peft.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
    assert served == expected[0, len(prompt) :].tolist()


def test_another_base_is_refused(
    checkpoint: Checkpoint, merger: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_tiny_model(tied=True, seed=5)
    with pytest.raises(UserError, match=rf"{other} is not the model that the adapters in .* its model.safetensors is"):
        merger["merge"](checkpoint.actor, tmp_path / "merged", hf_model_path=other)
    with pytest.raises(UserError, match=r"the base of its adapters, .*nowhere, is not there; name it with --hf_model_"):
        merger["open_model"](checkpoint.actor, Path("nowhere"), False)


class AdaptedWorkers(test_resume.Workers):
    """Those of a run with adapters."""

    def __init__(self, model: Path, config: LoraConfig) -> None:
        super().__init__(model)
        self._config = config

    def save_checkpoint(self, folder: str, background: bool = False) -> None:
        super().save_checkpoint(folder, background)
        files = Path(folder) / HUGGINGFACE_FOLDER
        for name, content in adapters.adapter_files(self._config, self._model).items():
            (files / name).parent.mkdir(exist_ok=True)
            (files / name).write_bytes(content)


def test_a_run_goes_on_with_its_own_adapters_alone(small_run: list[str], make_tiny_model: Any, tmp_path: Path) -> None:
    base = make_tiny_model()
    places = [f"actor_rollout_ref.model.path={base}", f"trainer.default_local_dir={tmp_path}"]

    def config(**model: Any) -> PPOConfig:
        return with_values(
            ppo_config([*small_run, *places]), {f"actor_rollout_ref.model.{key}": value for key, value in model.items()}
        )

    def refused(**model: Any) -> str:
        with pytest.raises(UserError) as error:
            test_resume.start(config(**model))
        return str(error.value)

    state = test_resume.start(config(lora_rank=4))
    state.save(1, {"actor": AdaptedWorkers(base, lora(base))})
    state.finish()
    assert test_resume.start(config(lora_rank=4, target_modules="all-linear")).step == 1
    assert "model.lora_rank=4, and this run has 8; put that back" in refused(lora_rank=8)
    assert "model.lora_rank=4, and this run has 0; put that back" in refused()
    assert "model.lora_alpha=16, and this run has 32" in refused(lora_rank=4, lora_alpha=32)
    assert "model.target_modules=all-linear, and" in refused(lora_rank=4, target_modules=["q_proj"])
    weights = AutoModelForCausalLM.from_pretrained(base)
    weights.model.norm.weight.data *= 2
    weights.save_pretrained(base)
    assert "its model.safetensors is another (by SHA-256)" in refused(lora_rank=4)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["lora_rank=-1"], "model.lora_rank=-1 must be at least 0"),
        (["lora_alpha=8"], "model.lora_alpha=8 acts only with actor_rollout_ref.model.lora_rank above 0"),
        (["target_modules=[q_proj]"], "model.target_modules=['q_proj'] acts only with"),
        (
            ["lora_rank=4", "target_modules=[q_pro,v_proj]"],
            "no linear layer 'q_pro', only down_proj, gate_proj,",
        ),
        (["lora_rank=4", "target_modules=lm_head"], "no linear layer 'lm_head', only"),
        (["lora_rank=4", "use_torch_compile=true"], "lora_rank and use_torch_compile exclude each other"),
        (
            ["lora_rank=4", "ref.fsdp_config.fsdp_size=1"],
            "ref.fsdp_config.fsdp_size=1 cannot act with",
        ),
    ],
)
def test_what_does_not_go_together_is_said(overrides: list[str], line: str, small_run: list[str]) -> None:
    keys = [f"actor_rollout_ref.{'' if key.startswith('ref') else 'model.'}{key}" for key in overrides]
    with pytest.raises(UserError) as error:
        check_config(compose_config(YAML, [*small_run, *keys]))
    assert line in str(error.value)


def memory(model: str, *overrides: str) -> PhaseMemory:
    """Of one 24 GB card."""
    one_gpu = ["trainer.device=cuda", "trainer.n_gpus_per_node=1", "data.train_files=none"]
    shape, gib = ModelShape.from_config(known_config(model)), next(iter(GPUS_GIB.values()))
    config = ppo_config([*one_gpu, f"actor_rollout_ref.model.path={model}", *overrides])
    return PhaseMemory(config, shape, shape, gib * GIB)


@pytest.mark.parametrize("size", ["1.5B", "7B"])
def test_one_small_card_trains_adapters_where_it_cannot_train_the_model(size: str) -> None:
    share = "actor_rollout_ref.rollout.gpu_memory_utilization=0.85"
    full, adapted = (
        memory(f"DeepSeek-R1-Distill-Qwen-{size}", f"actor_rollout_ref.model.lora_rank={rank}", share)
        for rank in (0, 16)
    )
    assert changes_to_fit(full) is None
    changes = changes_to_fit(adapted)
    assert changes is not None
    changed = replace(adapted, config=with_values(adapted.config, changes))
    assert changed.excess <= 0
    # On the machine the base alone, as its checkpoint is, and next to nothing more while it is saved.
    assert max(sum(moment.values()) for moment in host_memory(changed).values()) < 2.2 * 2 * full.shape.parameters


def test_the_estimate_knows_what_is_there(process_group: None) -> None:
    base, lora_rank = memory("Qwen2.5-1.5B"), "actor_rollout_ref.model.lora_rank=16"
    found = memory("Qwen2.5-1.5B", lora_rank)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(known_config("Qwen2.5-1.5B"))
    add_adapters(lm, lora(lora_rank=16))
    adapters_of_lm = sum(parameter.numel() for name, parameter in lm.named_parameters() if is_adapter(name))
    assert found.adapter_parameters == adapters_of_lm
    policy = found.models["policy"]
    assert policy.weights == 2 * policy.parameters + 4 * adapters_of_lm
    assert policy.trained_weights == 4 * adapters_of_lm and policy.optimizer == 8 * adapters_of_lm
    assert "reference" in base.models and "reference" not in found.models
    assert found.phases["reference"]["policy weights"] == policy.weights
    some = memory("Qwen2.5-1.5B", lora_rank, "actor_rollout_ref.model.target_modules=[q_proj]")
    assert some.adapter_parameters == 28 * 16 * 2 * 1536


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
