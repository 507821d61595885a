"""A dry run says without GPUs what a run would be; its formulas are those of torch, measured here on small models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from tiny import adam, ppo_config
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from verl.checkpoints.folder import LATEST_FILE
from verl.checkpoints.remote import COMPLETE_FILE
from verl.models.fsdp import create_mesh, shard_model
from verl.models.joint_model import JointModel
from verl.models.log_probs import LMHead, token_log_probs
from verl.optim import optimizers as optim
from verl.optim.optimizers import build_optimizer
from verl.trainer import main_ppo
from verl.trainer.config.compose import compose_config
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.planning.host_memory import host_memory, saves_anew
from verl.trainer.planning.memory_estimate import (
    EIGHT_BIT_STATE,
    GIB,
    LOGIT_BACKWARD,
    LOGIT_FORWARD,
    Placement,
    backward_work,
    forward_work,
    saved_activations,
    training_peak,
)
from verl.trainer.planning.memory_phases import GPUS_GIB, PhaseMemory, changes_to_fit
from verl.trainer.planning.model_shapes import KNOWN_CONFIGS, ModelShape, known_config
from verl.trainer.planning.passes import Pass, passes
from verl.trainer.planning.report import dry_run
from xbai.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VARIANTS = [
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen2", "tie_word_embeddings": False},
    {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 32},
    {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "tie_word_embeddings": False, "head_dim": 16},
]


BASE = ["actor_rollout_ref.model.path=DeepSeek-R1-Distill-Qwen-1.5B", "data.train_files=nowhere.parquet"]


def _composed(*overrides: str) -> DictConfig:
    return compose_config(YAML, [*BASE, *overrides])


def _config(*overrides: str) -> PPOConfig:
    return ppo_config([*BASE, *overrides])


def _passes(*overrides: str) -> dict[str, Pass]:
    """Those that a training step makes."""
    return {phase: one for phase, one in passes(_config(*overrides)).items() if one.per_step}


def _placement(shape: ModelShape, world: int, on_gpu: bool, **changes: object) -> Placement:
    """Of a policy."""
    actor = _config().actor_rollout_ref.actor
    return Placement.from_config(shape, with_values(actor.fsdp_config, changes), actor.optim, world, on_gpu)


def _memory(gib: float, *overrides: str, model: str = "DeepSeek-R1-Distill-Qwen-1.5B") -> PhaseMemory:
    shape = ModelShape.from_config(known_config(model))
    base = ["trainer.device=cuda", "actor_rollout_ref.model.enable_gradient_checkpointing=true"]
    return PhaseMemory(_config(*base, *overrides), shape, shape, gib * GIB)


def _meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that torch had allocated at once, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_known_models_are_counted_exactly(name: str) -> None:
    config = known_config(name)
    counted = sum(parameter.numel() for parameter in _meta_model(config).parameters())
    assert ModelShape.from_config(config).parameters == counted


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["model_type"])
def test_every_kind_of_model_is_counted_exactly(variant: dict) -> None:
    config = AutoConfig.for_model(**SMALL | variant)
    model, shape = _meta_model(config), ModelShape.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.layer_parameters == sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def test_another_kind_is_not_guessed() -> None:
    with pytest.raises(UserError, match="no estimate for model_type=gpt2"):
        ModelShape.from_config(AutoConfig.for_model("gpt2"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Attention on CPU takes a work space for each thread, which no GPU does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS[1:3], ids=lambda variant: variant["model_type"])
def test_activations_are_what_torch_allocates(variant: dict, dtype: torch.dtype) -> None:
    tokens, width = 1024, dtype.itemsize
    config = AutoConfig.for_model(**SMALL | variant)
    shape = ModelShape.from_config(config)
    ids = torch.randint(config.vocab_size, (1, tokens))
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train().model
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        def train(model=model) -> None:
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))

        # Gradients of the weights are there from the first time on.
        train()
        estimate = saved_activations(shape, tokens, width, checkpointing)
        estimate += backward_work(shape, tokens, width, checkpointing)
        assert _peak_bytes(train) == pytest.approx(estimate, rel=0.1)

    @torch.no_grad()
    def score() -> None:
        model(input_ids=ids, use_cache=False)

    assert _peak_bytes(score) == pytest.approx(forward_work(shape, tokens, width), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_of_logits_takes_what_is_estimated(dtype: torch.dtype) -> None:
    vocabulary, chunk, width = 8000, 800_000, 8
    hidden = torch.randn(250, width, dtype=dtype, requires_grad=True)
    lm_head = LMHead.of(torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype))
    labels = torch.randint(vocabulary, (250,))

    def run() -> torch.Tensor:
        parts = token_log_probs(hidden, lm_head, labels, compute_entropy=True, logits_per_chunk=chunk)
        return parts[0].sum() + parts[1].sum()

    with torch.no_grad():
        assert _peak_bytes(run) == pytest.approx(LOGIT_FORWARD * chunk, rel=0.1)
    run().backward()
    assert _peak_bytes(lambda: run().backward()) == pytest.approx(LOGIT_BACKWARD * chunk, rel=0.1)


@pytest.mark.slow
def test_two_ranks_hold_what_is_estimated(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), "2", __file__, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    shape = ModelShape.from_config(AutoConfig.for_model(**SMALL | VARIANTS[1]))
    placed = _placement(shape, world=2, on_gpu=False)
    for rank in range(2):
        held = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert held["weights"] == held["gradients"] == placed.weights
        assert held["states"] == placed.optimizer
        assert held["copies"] == placed.weights + placed.optimizer


def measure_two_ranks(folder: Path) -> None:
    """Of `test_two_ranks_hold_what_is_estimated`: what each of them holds after an update."""
    dist.init_process_group("gloo")
    config = AutoConfig.for_model(**SMALL | VARIANTS[1])
    model = shard_model(JointModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32)), create_mesh())
    optimizer = build_optimizer(model.named_parameters(), adam())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = {
        "weights": list(model.parameters()),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "states": [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0],
    }
    sizes = {name: sum(tensor.to_local().nbytes for tensor in tensors) for name, tensors in held.items()}
    state = [get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)["state"]]
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copies = [value for value in tree_leaves(stager.stage(state)) if value.dim() > 0]
    sizes["copies"] = sum(copy.to_local().nbytes for copy in copies)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(sizes), encoding="utf-8")
    dist.destroy_process_group()


def test_the_optimiser_of_a_gpu_makes_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms also run on CPU: `foreach`, which torch takes by itself on a GPU, and ours."""
    shapes = [(256, 256), (256, 64), (64,)]

    def weights() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for weight in made:
            weight.grad = torch.randn_like(weight)
        return made

    monkeypatch.setattr(optim, "local_device", lambda: torch.device("cuda"))
    ours, theirs = weights(), weights()
    named = [(str(number), weight) for number, weight in enumerate(ours)]
    steps = (
        build_optimizer(named, adam(lr=1e-2)).step,
        torch.optim.AdamW(theirs, lr=1e-2, foreach=True).step,
    )
    for step in steps:
        step()
    size = sum(weight.nbytes for weight in ours)
    in_place, copied = map(_peak_bytes, steps)
    assert copied == pytest.approx(size, rel=0.05)
    assert in_place < 0.01 * size
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "counted"), [("bfloat16", 4), ("float32", 0)])
def test_the_lm_heads_gradient_is_summed_in_float32(dtype: str, counted: int) -> None:
    shape = ModelShape.from_config(known_config("Qwen2.5-7B"))
    placed = _placement(shape, world=8, on_gpu=True, compute_dtype=dtype)
    moment = training_peak(placed, 64, 64, checkpointing=True, packed=True, logits=2**30)
    assert moment["logits chunk"] == LOGIT_BACKWARD * 2**30
    assert moment.get("LM head's gradient", 0) == counted * shape.embedding_parameters


def test_host_memory_holds_what_waits_and_what_is_written() -> None:
    def together(*overrides: str) -> dict[str, float]:
        memory = _memory(80, *overrides, model="QwQ-32B")
        return {moment: sum(sizes.values()) for moment, sizes in host_memory(memory).items()}

    root, parameters = "actor_rollout_ref", ModelShape.from_config(known_config("QwQ-32B")).parameters
    actor = f"{root}.actor.fsdp_config"
    offloads = [f"{actor}.param_offload=true", f"{actor}.optimizer_offload=true"]
    files = 2 * parameters
    # Weights and two moments in float32; the copies stay where nothing is offloaded.
    assert together() == pytest.approx({"loading": files, "training": 12 * parameters, "saving": 12 * parameters})
    assert together("trainer.async_save=false")["saving"] == together("trainer.save_freq=-1")["saving"] == 0
    offloaded = {"loading": files + 4 * parameters, "training": 12 * parameters, "saving": 24 * parameters}
    assert together(*offloads) == pytest.approx(offloaded)
    # Half on each of two machines, and a whole copy on each where they shard on their own.
    halved = {name: size / 2 for name, size in offloaded.items()} | {"loading": files + 2 * parameters}
    assert together(*offloads, "trainer.nnodes=2") == pytest.approx(halved)
    assert together(*offloads, "trainer.nnodes=2", f"{actor}.fsdp_size=8") == pytest.approx(offloaded)
    gradients = 4 * parameters
    assert together(f"{actor}.offload_policy=true")["training"] == pytest.approx(24 * parameters + gradients)
    # Eight engines of a whole model each, or one of eight parts.
    asleep = ["trainer.async_save=false", f"{root}.rollout.sleep_level=1"]
    assert together(*asleep)["training"] == pytest.approx(8 * 2 * parameters)
    assert together(*asleep, f"{root}.rollout.tensor_model_parallel_size=8")["training"] == pytest.approx(
        2 * parameters
    )
    assert saves_anew(_memory(80, *offloads)) and not saves_anew(_memory(80))


def test_eight_bit_states_take_what_is_estimated() -> None:
    pytest.importorskip("torchao.optim")
    from torchao.optim.subclass_8bit import OptimState8bit

    elements = 2**16
    state = OptimState8bit.zeros((elements,))
    held = sum(getattr(state, name).nbytes for name in ("codes", "scale", "qmap"))
    assert held == pytest.approx(EIGHT_BIT_STATE * elements, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "weights", "states"),
    [
        ({}, 4 / 64, 8 / 64),
        ({"fsdp_size": 8}, 4 / 8, 8 / 8),
        ({"model_dtype": "bfloat16"}, 2 / 64, 4 / 64),
        ({"param_offload": True}, 0, 8 / 64),
        ({"optimizer_offload": True}, 4 / 64, 0),
        ({"offload_policy": True}, 0, 0),
    ],
    ids=str,
)
def test_placement_outside_its_phases(changes: dict, weights: float, states: float) -> None:
    shape = ModelShape.from_config(known_config("Qwen2.5-7B"))
    placed = _placement(shape, world=64, on_gpu=True, **changes)
    resident = (weights * shape.parameters, states * shape.parameters)
    assert placed.resident(in_use=False) == pytest.approx(resident)
    if not changes.get("offload_policy"):
        assert min(placed.resident(in_use=True, with_optimizer=True)) > 0


@pytest.mark.parametrize(
    ("override", "phase"),
    [
        ("actor_rollout_ref.model.enable_gradient_checkpointing=false", "update"),
        ("actor_rollout_ref.actor.fsdp_config.reshard_after_forward=false", "update"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "update"),
        ("actor_rollout_ref.actor.fsdp_config.fsdp_size=2", "log-prob"),
        ("actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16", "log-prob"),
        ("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16", "reference"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization=0.7", "rollout"),
        ("actor_rollout_ref.rollout.free_cache_engine=false", "update"),
        ("algorithm.adv_estimator=gae", "rollout"),
    ],
)
def test_what_takes_more_memory(override: str, phase: str) -> None:
    assert _memory(80, override).peaks[phase] > _memory(80).peaks[phase]


@pytest.mark.parametrize(
    ("override", "phase"),
    [
        ("actor_rollout_ref.actor.optim.name=AdamW8bit", "update"),
        ("+actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16", "update"),
        ("actor_rollout_ref.actor.fsdp_config.optimizer_offload=true", "rollout"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload=true", "update"),
        ("actor_rollout_ref.model.use_remove_padding=true", "update"),
        ("actor_rollout_ref.rollout.enforce_eager=true", "update"),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "update"),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size=2", "weight sync"),
        ("actor_rollout_ref.actor.use_kl_loss=false", "rollout"),
    ],
)
def test_what_takes_less_memory(override: str, phase: str) -> None:
    assert _memory(80, override).peaks[phase] < _memory(80).peaks[phase]


@pytest.mark.parametrize(
    ("overrides", "phase"),
    [
        (["actor_rollout_ref.actor.kl_loss_type=full"], "update"),
        (
            [
                "actor_rollout_ref.actor.use_kl_loss=false",
                "algorithm.use_kl_in_reward=true",
                "algorithm.kl_penalty=full",
            ],
            "log-prob",
        ),
    ],
)
def test_with_the_full_kl_the_reference_works_beside_the_policy(overrides: list[str], phase: str) -> None:
    away = "actor_rollout_ref.ref.fsdp_config.param_offload=true"
    alone, beside = _memory(80, away), _memory(80, *overrides, away)
    added = {name: size for name, size in beside.phases[phase].items() if alone.phases[phase].get(name) != size}
    tokens = beside.tokens("update") if phase == "update" else 8 * 9216
    assert added == {
        "reference weights": beside.models["reference"].weights,
        "reference's LM head": 2 * beside.shape.embedding_parameters,
        "reference's states": 4 * tokens * beside.shape.hidden,
    }
    assert "reference" in alone.phases and "reference" not in beside.phases
    assert "reference" not in _passes(*overrides)


def test_rollouts_have_the_engine_and_training_the_rest() -> None:
    shared, separate = _memory(80), _memory(80, "trainer.rollout_gpus=4", "actor_rollout_ref.rollout.max_staleness=0")
    of_engine = {"engine weights", "engine work space", "KV cache", "CUDA graphs"}
    on_the_way = {"tensor on its way", "bucket"}
    assert separate.phases["rollout"].keys() == of_engine | on_the_way
    assert separate.phases.keys() == shared.phases.keys()
    for phase in separate.phases.keys() - {"rollout", "weight sync"}:
        assert separate.phases[phase] == {
            name: size for name, size in shared.phases[phase].items() if name not in of_engine
        }
    assert separate.sleeping_weights == 0 and separate.cached_sequences > shared.cached_sequences * 0.99


def test_the_advice_makes_it_fit() -> None:
    large = ["trainer.nnodes=8", "data.max_response_length=32768"]
    memory = _memory(39.4, *large, "actor_rollout_ref.rollout.tensor_model_parallel_size=4", model="QwQ-32B")
    assert memory.excess > 0
    changes = changes_to_fit(memory)
    assert changes
    changed = with_values(memory.config, changes)
    assert PhaseMemory(changed, memory.shape, memory.shape, memory.gpu_bytes).excess <= 0
    assert changes_to_fit(_memory(23.5, "trainer.n_gpus_per_node=1", model="QwQ-32B")) is None


def test_micro_batches_follow_from_the_configuration() -> None:
    def plan(*overrides: str) -> dict[str, tuple]:
        root = "actor_rollout_ref"
        found = _passes("data.max_response_length=3072", "trainer.nnodes=2", *(f"{root}.{key}" for key in overrides))
        return {
            phase: (one.rows, one.micro_batches(1, 1), one.micro_batches(1024, 3072), one.per_step)
            for phase, one in found.items()
        }

    # 128 prompts x 8 responses over 16 processes, in 2 mini-batches; 8 and 1 at a time.
    assert plan()["log-prob"] == (64, 8, 8, 1)
    assert plan()["update"] == (32, 32, 32, 2)
    # Two responses of 4096 tokens with their prompts fit 9000.
    by_tokens = ["actor.use_dynamic_bsz=true", "actor.ppo_max_token_len_per_gpu=9000"]
    assert plan(*by_tokens)["update"] == (32, 1, 16, 2)
    # Half as many groups with twice the budget each: 64 rows, four at a time.
    shared = ["model.use_remove_padding=true", "actor.ulysses_sequence_parallel_size=2"]
    assert plan(*by_tokens, *shared)["update"] == (64, 1, 16, 2)
    # Two ranks have the rows of both, of the whole job's 64 at a time.
    assert plan("actor.ppo_micro_batch_size=64", *shared)["update"] == (64, 8, 8, 2)
    # The reference shares rows as it is told, not as the policy does.
    assert plan(*shared, "ref.ulysses_sequence_parallel_size=1")["reference"] == (64, 8, 8, 1)


def test_a_pass_that_is_left_out_is_in_neither_plan() -> None:
    one_update = ["data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=64"]
    for score, phases in ((True, {"log-prob"}), (False, set())):
        overrides = [*one_update, f"actor_rollout_ref.use_score={str(score).lower()}"]
        assert _passes(*overrides).keys() & {"log-prob"} == phases
        assert _memory(80, *overrides).phases.keys() & {"log-prob"} == phases


def test_tokens_of_sharers_are_shared() -> None:
    root, packed = "actor_rollout_ref", "actor_rollout_ref.model.use_remove_padding=true"
    sizes = [f"{root}.actor.ulysses_sequence_parallel_size=2", f"{root}.ref.ulysses_sequence_parallel_size=1"]
    alone, shared = _memory(80, packed), _memory(80, packed, *sizes)
    assert shared.peaks["reference"] == alone.peaks["reference"]
    assert shared.peaks["log-prob"] < alone.peaks["log-prob"]
    # 16 rows of the whole job are 2 of each of 8 ranks, or 4 of each two: as many tokens on a GPU.
    whole_job = f"{root}.actor.ppo_micro_batch_size=16"
    shared = _memory(80, packed, whole_job, sizes[0])
    assert shared.tokens("update") == _memory(80, packed, whole_job).tokens("update")


def test_a_reference_is_kept_as_its_checkpoint_is() -> None:
    memory = _memory(80)
    assert memory.models["reference"].weights == memory.models["policy"].weights / 2


@pytest.mark.parametrize(
    ("script", "gpus", "rows", "parameters"),
    [("single", "1 x 8 GPUs", 8 * 8 // 4, "1,777,088,000"), ("multi", "16 x 8 GPUs", 128 * 8 // 16, "32,763,876,352")],
)
def test_scripts_print_everything_without_gpus(
    script: str, gpus: str, rows: int, parameters: str, tmp_path: Path
) -> None:
    ours = ("MODEL", "TRAIN_FILES", "VAL_FILES", "NNODES")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(SCRIPTS / f"run_{script}_node.sh"), "--dry-run", "data.train_batch_size=256"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert re.fullmatch(r"error: actor_rollout_ref\.model\.path: .*: no such file; .*\n", done.stderr), done.stderr
    assert f"Dry run: {gpus}" in done.stdout
    assert "train_batch_size: 256" in done.stdout
    assert f"update, a mini-batch {rows:>10}" in done.stdout
    assert f"The model has {parameters} parameters" in done.stdout
    assert "It fits GPUs with: " in done.stdout


def test_a_model_folder_that_is_here(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, small_run: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["main_ppo", *small_run, "--dry-run"])
    main_ppo.main()
    printed = capsys.readouterr().out
    assert "not found here" not in printed
    assert "Dry run: 1 x 2 processes on CPU" in printed
    assert "Memory of one process" in printed


@pytest.mark.parametrize(
    "override",
    [
        "data.train_files=nowhere.parquet",
        "data.val_files=nowhere.parquet",
        "data.train_files={folder}/empty.parquet",
        "data.train_files={folder}/no_answer.parquet",
        "data.max_prompt_length=2",
        "data={{filter_overlong_prompts: false, max_prompt_length: 2}}",
        "data={{train_batch_size: 64}}",
        "actor_rollout_ref.model.path=nowhere",
        "actor_rollout_ref.model.path={folder}",
        "custom_reward_function={{path: {folder}/none.py}}",
        "custom_reward_function={{name: nothing}}",
        "trainer={{resume_mode: resume_path, resume_from_path: {folder}/global_step_3}}",
        "trainer={{resume_mode: resume_path, resume_from_path: 'file://{folder}/global_step_3'}}",
        "trainer={{default_local_dir: '{folder}/half'}}",
        "trainer={{default_local_dir: '{folder}/empty.parquet'}}",
        "trainer={{default_hdfs_dir: 's3://bucket/run'}}",
        "trainer={{default_hdfs_dir: '{folder}/bad'}}",
        "trainer={{logger: [neptune]}}",
        "reward_model={{reward_manager: dapo}}",
        "actor_rollout_ref.score.model_path=nowhere.pt",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
    ],
)
def test_a_dry_run_ends_as_the_run_would(
    override: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, small_run: list[str], tmp_path: Path
) -> None:
    row = {"data_source": "make10", "prompt": [{"role": "user", "content": "x"}], "reward_model": {"ground_truth": "1"}}
    rows = datasets.Dataset.from_list([row])
    rows.select([]).to_parquet(tmp_path / "empty.parquet")
    datasets.Dataset.from_list([row | {"reward_model": "1"}]).to_parquet(tmp_path / "no_answer.parquet")
    for folder in ("half", "bad"):
        (tmp_path / folder).mkdir()
    (tmp_path / "half" / LATEST_FILE).write_text("3", encoding="utf-8")
    (tmp_path / "bad" / LATEST_FILE).write_text("nonsense", encoding="utf-8")
    command = [*small_run, f"trainer.default_local_dir={tmp_path}/run", override.format(folder=tmp_path)]

    def ending(*further: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["main_ppo", *command, *further])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main_ppo.main()
        return ended.value.code, capsys.readouterr().err

    code, line = ending("--dry-run")
    assert (code, line) == ending()
    assert code == 2 and line.startswith("error: ") and line.count("\n") == 1


def test_a_dry_run_fetches_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, small_run: list[str], tmp_path: Path
) -> None:
    whole = tmp_path / "remote/global_step_3"
    whole.mkdir(parents=True)
    (whole / COMPLETE_FILE).write_text("{}", encoding="utf-8")
    (whole.parent / LATEST_FILE).write_text("3", encoding="utf-8")
    folders = [f"trainer.default_local_dir={tmp_path}/run", f"trainer.default_hdfs_dir={tmp_path}/remote"]
    monkeypatch.setattr(sys, "argv", ["main_ppo", *small_run, *folders, "--dry-run"])
    main_ppo.main()
    assert "Dry run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_mistakes_stay_errors() -> None:
    with pytest.raises(UserError, match="must be a multiple of"):
        dry_run(_composed("trainer.n_gpus_per_node=7"))
    report, _ = dry_run(_composed("actor_rollout_ref.model.path=nowhere"))
    assert "No memory estimate for nowhere: its config.json is not here" in report


def test_the_smallest_gpu_that_fits_is_shown() -> None:
    report, _ = dry_run(_composed("trainer.nnodes=8", "data.max_response_length=1024"))
    assert f"Memory of one GPU with {next(iter(GPUS_GIB))}" in report


if __name__ == "__main__":
    measure_two_ranks(Path(sys.argv[1]))
