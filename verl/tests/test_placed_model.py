"""Every key of `fsdp_config` on four real ranks (gloo): what it changes, and what it must not change.

This file is also the program that the ranks run (see `updates`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import VOCABULARY, adam, fsdp_section, policy_section, tiny_lm
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from verl.checkpoints.state import load_checkpoint, save_checkpoint
from verl.models.fsdp import init_distributed, named_full_tensors, shard_model
from verl.models.joint_model import JointModel
from verl.optim.optimizers import JointOptimizer
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.placed_model import PlacedModel
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import ScoreHead

RANKS, ROWS, PROMPT, RESPONSE = 4, 8, 4, 12
LAYERS = 4
OPTIM = adam()
CONFIG = policy_section(
    {
        "actor.ppo_mini_batch_size": 2,
        "actor.ppo_micro_batch_size_per_gpu": 1,
        # Below the norms that come up, so that clipping acts.
        "actor.grad_clip": 0.1,
        "rollout.n": 4,
        "rollout.log_prob_micro_batch_size_per_gpu": 2,
        "score.backbone_grad_scale": 0.5,
        "score.agreement_weighting": False,
    }
)
PLACEMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hybrid": {"fsdp_size": 2},
    "kept_whole": {"reshard_after_forward": False},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "checkpointed": {},
}


def make_model(gradient_checkpointing: bool = False) -> JointModel:
    """A random model without dropout."""
    lm = tiny_lm(num_hidden_layers=LAYERS, tie_word_embeddings=False)
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return JointModel(lm, ScoreHead(32, dropout=0.0))


def make_batch(seed: int) -> dict[str, Tensor]:
    """This rank's rows of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, PROMPT + RESPONSE)
    input_ids = torch.randint(1, VOCABULARY, shape, generator=generator)
    attention_mask = torch.ones(shape, dtype=torch.long)
    attention_mask[::2, -3:] = 0
    features = (torch.rand(shape, generator=generator) < 0.4) & attention_mask.bool()
    features[:, : PROMPT - 1] = False
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": torch.arange(PROMPT + RESPONSE).expand(shape),
        "responses": input_ids[:, PROMPT:],
        "response_mask": attention_mask[:, PROMPT:].bool(),
        "step_feature_mask": features,
        "correct": torch.tensor([1.0, 0.0] * (ROWS // 2)),
        "graded": torch.ones(ROWS, dtype=torch.bool),
        "advantages": torch.randn(ROWS, 1, generator=generator).expand(-1, RESPONSE),
    }
    return {name: column.chunk(dist.get_world_size())[dist.get_rank()] for name, column in batch.items()}


def place(name: str, **changes: Any) -> tuple[PlacedModel[JointModel, JointOptimizer], DataParallelPPOActor]:
    def build_optimizer(model: JointModel) -> JointOptimizer:
        return JointOptimizer(model, OPTIM, OPTIM, max_nonfinite=2)

    placed = PlacedModel(make_model(name == "checkpointed"), fsdp_section(**changes), build_optimizer)
    return placed, DataParallelPPOActor(CONFIG, placed.model, placed.optimizer)


def update(actor: DataParallelPPOActor, seed: int, poison: Callable[[dict[str, Tensor]], None] | None = None) -> dict:
    batch = make_batch(seed)
    batch = {**batch, **actor.compute_log_prob(batch)}
    if poison is not None:
        poison(batch)
    return actor.update_policy(batch)


def weights_of(placed: PlacedModel[JointModel, JointOptimizer]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named_full_tensors(placed.model)}


@contextmanager
def watched(model: JointModel, optimizer: JointOptimizer) -> Iterator[dict[str, Any]]:
    """What goes on inside an update: the dtypes in use, the layers that are whole after a forward pass, and the bytes
    that autograd keeps for the backward pass, and how often gradients are added up over groups of ranks."""
    seen: dict[str, Any] = {"saved_bytes": 0, "all_reduces": 0, "gradient_dtypes": set(), "stored_dtypes": set()}
    layers = model.lm.model.layers

    def after_forward(module: JointModel, args: tuple, output: Any) -> None:
        seen["whole_layers"] = sum(not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in layers)

    def in_layer(module: torch.nn.Module, args: tuple) -> None:
        seen["layer_dtypes"] = (args[0].dtype, module.mlp.up_proj.weight.dtype)

    def in_head(module: ScoreHead, args: tuple, output: Tensor) -> None:
        seen["head_dtypes"] = (next(module.parameters()).dtype, output.dtype)

    def before_step(stepped: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for parameter in stepped.param_groups[0]["params"]:
            seen["gradient_dtypes"].add(parameter.grad.dtype)
            seen["stored_dtypes"].add(parameter.dtype)

    def pack(tensor: Tensor) -> Tensor:
        seen["saved_bytes"] += tensor.nbytes
        return tensor

    all_reduce = dist.all_reduce

    def counted_all_reduce(*args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
        seen["all_reduces"] += group is not None
        return all_reduce(*args, group=group, **kwargs)

    handles = [
        model.register_forward_hook(after_forward),
        layers[-1].register_forward_pre_hook(in_layer),
        model.score_head.register_forward_hook(in_head),
        *(part.register_step_pre_hook(before_step) for part in optimizer.optimizers.values()),
    ]
    dist.all_reduce = counted_all_reduce
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
    dist.all_reduce = all_reduce
    for handle in handles:
        handle.remove()


def run_updates(name: str) -> tuple[dict[str, Any], PlacedModel[JointModel, JointOptimizer], DataParallelPPOActor]:
    placed, actor = place(name, **PLACEMENTS[name])
    with placed.on_device(with_optimizer=True), watched(placed.model, placed.optimizer) as seen:
        metrics = [update(actor, seed=1), update(actor, seed=2)]
    rows = len(placed.model.lm.lm_head.weight.to_local())
    seen["sharded_modules"] = sum(isinstance(module, FSDPModule) for module in placed.model.modules())
    return {"metrics": metrics, "weights": weights_of(placed), "rows_of_rank": rows, **seen}, placed, actor


def run_checkpoint(placed: PlacedModel, actor: DataParallelPPOActor, model_folder: Path, folder: Path) -> dict:
    """Save what is sharded in groups of two, and go on with all four ranks as one group."""
    save_checkpoint(folder, placed.model, placed.optimizer, ModelFiles.read(model_folder))
    other, other_actor = place("plain")
    load_checkpoint(folder, other.model, other.optimizer)
    loaded = weights_of(other)
    update(actor, seed=3), update(other_actor, seed=3)
    return {"loaded": loaded, "next": weights_of(placed), "next_of_loaded": weights_of(other)}


def run_nonfinite() -> dict[str, Any]:
    """Only the last rank ever sees something that is not finite."""
    is_last = dist.get_rank() == RANKS - 1

    def poison(batch: dict[str, Tensor]) -> None:
        if is_last:
            batch["advantages"] = batch["advantages"] * torch.inf

    placed, actor = place("plain")
    before = weights_of(placed)
    found = {"before": before, "first": update(actor, 1, poison), "after_first": weights_of(placed)}
    found["good"] = update(actor, 2)
    found["good_weights"] = weights_of(placed)
    update(actor, 3, poison)
    try:
        update(actor, 4, poison)
    except UserError as error:
        said = [""] * RANKS
        dist.all_gather_object(said, str(error))
        found["said"] = said
    found["at_the_end"] = weights_of(placed)

    # A gradient alone, of one rank's shard of the head.
    placed, actor = place("plain")
    for parameter in placed.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if is_last:
        placed.model.score_head[0].weight.grad.to_local()[0] = torch.nan
    found["gradient_alone"] = placed.optimizer.step(1.0)
    found["after_gradient_alone"] = weights_of(placed)
    return found


def main(model_folder: Path, folder: Path) -> None:
    """What each rank does; the first one writes what came out."""
    init_distributed()
    results: dict[str, Any] = {}
    for name in PLACEMENTS:
        results[name], placed, actor = run_updates(name)
        if name == "hybrid":
            results["checkpoint"] = run_checkpoint(placed, actor, model_folder, folder / "actor")
    results["nonfinite"] = run_nonfinite()
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def updates(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `main` found on four ranks."""
    folder = tmp_path_factory.mktemp("placed")
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(RANKS), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tiny_model_dir, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Adam's first steps are nearly signs: elements whose gradient is rounding noise may differ by a learning rate."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.isclose(found[name], tensor, atol=1e-5).float().mean() > 0.99, name
        assert (found[name] - tensor).abs().max() <= 4.2 * OPTIM.lr, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "kept_whole", "checkpointed"])
def test_placement_changes_no_number(updates: dict[str, Any], name: str) -> None:
    for found, expected in zip(updates[name]["metrics"], updates["plain"]["metrics"]):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected["actor/grad_norm"] > CONFIG.actor.grad_clip < expected["score/grad_norm"]
    assert_close(updates[name]["weights"], updates["plain"]["weights"])


@pytest.mark.slow
def test_fsdp_size_is_the_number_of_shards(updates: dict[str, Any]) -> None:
    assert updates["plain"]["rows_of_rank"] == VOCABULARY // RANKS
    assert updates["hybrid"]["rows_of_rank"] == VOCABULARY // 2


@pytest.mark.slow
def test_replicas_add_their_gradients_up_once_an_optimiser_step(updates: dict[str, Any]) -> None:
    found = updates["hybrid"]
    assert all(metrics["perf/micro_batches"] == 2 for metrics in found["metrics"])
    assert found["all_reduces"] == len(found["metrics"]) * found["sharded_modules"]


@pytest.mark.slow
def test_reshard_after_forward_decides_what_stays_whole(updates: dict[str, Any]) -> None:
    assert updates["plain"]["whole_layers"] == 0
    assert updates["kept_whole"]["whole_layers"] == LAYERS


@pytest.mark.slow
def test_gradient_checkpointing_keeps_fewer_activations(updates: dict[str, Any]) -> None:
    assert updates["checkpointed"]["saved_bytes"] < updates["plain"]["saved_bytes"] / 2


@pytest.mark.slow
def test_bfloat16_is_for_multiplying_only(updates: dict[str, Any]) -> None:
    found, plain = updates["bfloat16"], updates["plain"]
    assert found["layer_dtypes"] == (torch.bfloat16, torch.bfloat16)
    assert plain["layer_dtypes"] == (torch.float32, torch.float32)
    assert found["head_dtypes"] == (torch.float32, torch.float32)
    assert found["stored_dtypes"] == found["gradient_dtypes"] == {torch.float32}
    for metrics, expected in zip(found["metrics"], plain["metrics"]):
        assert metrics != expected
        for name in ("actor/loss", "score/loss", "actor/grad_norm", "score/grad_norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=0.05, abs=0.01), name


@pytest.mark.slow
def test_a_checkpoint_of_shard_groups_goes_on_without_them(updates: dict[str, Any]) -> None:
    found = updates["checkpoint"]
    assert all(torch.equal(found["loaded"][name], tensor) for name, tensor in updates["hybrid"]["weights"].items())
    assert_close(found["next_of_loaded"], found["next"])
    assert not torch.equal(found["next"]["lm_head.weight"], found["loaded"]["lm_head.weight"])


@pytest.mark.slow
def test_what_is_not_finite_changes_nothing_and_stops_the_run_after_the_second_in_a_row(
    updates: dict[str, Any],
) -> None:
    found = updates["nonfinite"]
    assert found["first"]["actor/skipped_updates"] == found["gradient_alone"]["skipped"] == 1
    assert found["good"]["actor/skipped_updates"] == 0
    for name, tensor in found["before"].items():
        assert torch.equal(found["after_first"][name], tensor), name
        assert torch.equal(found["after_gradient_alone"][name], tensor), name
        assert torch.equal(found["at_the_end"][name], found["good_weights"][name]), name
    assert not torch.equal(found["good_weights"]["lm_head.weight"], found["before"]["lm_head.weight"])
    assert len(set(found["said"])) == 1
    assert found["said"][0].startswith("2 updates in a row were not finite (last: loss ")


def test_without_a_gpu_there_is_nothing_to_offload_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="offload_policy=true needs a GPU"):
        shard_model(make_model(), None, offload=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
