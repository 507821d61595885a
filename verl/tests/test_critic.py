"""The critic against plain transformers, token by token, on one and on two real FSDP2 ranks (gloo).

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import RESPONSE, ROWS, adam, fsdp_section, padded_rows, ppo_defaults, tiny_lm
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.models.fsdp import init_distributed, named_full_tensors
from verl.models.ulysses import sequence_parallel_group
from verl.models.value_model import ValueModel, build_value_model
from verl.optim.optimizers import Optimizers
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import CriticConfig
from verl.workers.critic import DataParallelPPOCritic
from verl.workers.placed_model import PlacedModel

VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "by_three": {"ppo_micro_batch_size_per_gpu": 3, "forward_micro_batch_size_per_gpu": 2},
    "by_tokens": {"use_dynamic_bsz": True},
    "packed_by_tokens": {"use_dynamic_bsz": True, "model.use_remove_padding": True},
    "two_mini_batches": {"ppo_mini_batch_size": 1, "ppo_epochs": 2},
}
SEQUENCE_PARALLEL = {"model.use_remove_padding": True, "ulysses_sequence_parallel_size": 2}
OPTIM, SAMPLES = adam(), 4
CLIP = 0.2


def make_config(changes: Mapping[str, Any]) -> CriticConfig:
    """A `critic` section."""
    small = {
        "ppo_mini_batch_size": 2,
        "ppo_micro_batch_size_per_gpu": 8,
        "forward_micro_batch_size_per_gpu": 8,
        "ppo_max_token_len_per_gpu": 20,
        "forward_max_token_len_per_gpu": 30,
        "cliprange_value": CLIP,
    }
    return with_values(ppo_defaults().critic, small | dict(changes))


def make_folder(folder: Path) -> Path:
    """A random causal LM."""
    tiny_lm().save_pretrained(folder)
    return folder


def make_model(folder: Path, packed: bool = False) -> ValueModel:
    """Its backbone under a head whose values are about as large as rewards."""
    model = build_value_model(folder, packed=packed)
    with torch.no_grad():
        model.value_head.weight.mul_(4)
    return model


def make_batch() -> dict[str, Tensor]:
    """The global batch, without the values that the critic itself computes first."""
    generator = torch.Generator().manual_seed(1)
    rows = padded_rows(generator)
    graded = torch.ones(ROWS, dtype=torch.bool)
    graded[[1, 4]] = False
    return {
        **rows,
        "graded": graded,
        "returns": torch.randn(ROWS, RESPONSE, generator=generator) * rows["response_mask"] * graded[:, None],
        "noise": 0.4 * torch.randn(ROWS, RESPONSE, generator=generator),
    }


def with_old_values(batch: dict[str, Tensor], values: Tensor) -> dict[str, Tensor]:
    """Pretend that the critic has moved since the values were computed, so that clipping acts."""
    return batch | {"values": values + batch["noise"]}


def make_critic(folder: Path, **changes: object) -> tuple[PlacedModel[ValueModel, Optimizers], DataParallelPPOCritic]:
    config = make_config(changes)
    placed = PlacedModel(
        make_model(folder, packed=config.model.use_remove_padding),
        fsdp_section(),
        lambda model: Optimizers({"critic": (model, OPTIM)}),
    )
    group = sequence_parallel_group(config.ulysses_sequence_parallel_size)
    return placed, DataParallelPPOCritic(config, SAMPLES, placed.model, placed.optimizer, group)


def run_rank(model_folder: Path, output: Path) -> None:
    """What each rank does: every variant from the same start; rank 0 writes what came out."""
    init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for variant, changes in (VARIANTS | ({"sequence_parallel": SEQUENCE_PARALLEL} if world_size == 2 else {})).items():
        placed, critic = make_critic(model_folder, **changes)
        shares = world_size // changes.get("ulysses_sequence_parallel_size", 1)
        rows = slice((rank * shares // world_size) * ROWS // shares, None)
        batch = {name: column[rows][: ROWS // shares] for name, column in make_batch().items()}
        if variant == "two_mini_batches":
            # Each rank's first rows are its share of the first mini-batch.
            order = torch.arange(ROWS).view(2, world_size, -1)[:, rank].flatten()
            batch = {name: column[order] for name, column in make_batch().items()}
        values = critic.compute_values(batch)
        metrics = critic.update_critic(with_old_values(batch, values))
        weights = {name: tensor.clone() for name, tensor in named_full_tensors(placed.model)}
        results[variant] = {"values": values, "metrics": metrics, "weights": weights}
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


def launch(ranks: int, folder: Path) -> dict[str, dict]:
    """Run this file on `ranks` processes and read what rank 0 wrote."""
    output = folder / f"{ranks}.pt"
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [__file__, str(make_folder(folder / "model")), str(output)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return launch(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return launch(2, tmp_path_factory.mktemp("two"))


def plain_values(model: ValueModel, batch: dict[str, Tensor], row: int) -> Tensor:
    """Values of one row, computed alone and without padding."""
    kept = batch["attention_mask"][row].bool()
    hidden = model.backbone(batch["input_ids"][row][kept][None]).last_hidden_state[0]
    tokens = int(batch["response_mask"][row].sum())
    return (hidden @ model.value_head.weight[0] + model.value_head.bias)[-tokens - 1 : -1]


def plain_update(folder: Path) -> dict[str, float]:
    model, batch = make_model(folder), make_batch()
    losses, clipped, predicted = [], [], []
    for row in range(ROWS):
        if not batch["graded"][row]:
            continue
        values = plain_values(model, batch, row)
        for t, value in enumerate(values):
            target, old = batch["returns"][row, t], value.detach() + batch["noise"][row, t]
            held = value.clamp(old - CLIP, old + CLIP)
            losses.append(0.5 * max((value - target) ** 2, (held - target) ** 2))
            clipped.append(float((held - target) ** 2 > (value - target) ** 2))
            predicted.append(value.item())
    loss = sum(losses) / len(losses)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    return {
        "critic/vf_loss": loss.item(),
        "critic/vf_clipfrac": sum(clipped) / len(clipped),
        "critic/vpred_mean": sum(predicted) / len(predicted),
        "critic/grad_norm": norm.item(),
    }


@pytest.mark.slow
def test_any_split_over_micro_batches_and_ranks_is_the_plain_update(
    one_rank: dict, two_ranks: dict, tmp_path: Path
) -> None:
    expected = plain_update(make_folder(tmp_path))
    assert 0 < expected["critic/vf_clipfrac"] < 1
    for results in (one_rank, two_ranks):
        for variant in results.keys() - {"two_mini_batches"}:
            metrics = results[variant]["metrics"]
            assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6), variant
            assert metrics["critic/skipped_updates"] == 0
            assert metrics["critic/lr"] == OPTIM.lr


@pytest.mark.slow
def test_values_are_those_of_rows_computed_alone(one_rank: dict, two_ranks: dict, tmp_path: Path) -> None:
    model, batch = make_model(make_folder(tmp_path)), make_batch()
    with torch.no_grad():
        rows = [plain_values(model, batch, row) for row in range(ROWS)]
    expected = torch.zeros(ROWS, RESPONSE)
    for row, values in enumerate(rows):
        expected[row, : len(values)] = values
    assert expected.std() > 0.05
    whole = ("padded", "by_three", "by_tokens", "packed_by_tokens")
    found = [one_rank[variant]["values"] for variant in whole] + [two_ranks["sequence_parallel"]["values"]]
    for values in found:
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    for variant in whole:
        torch.testing.assert_close(two_ranks[variant]["values"], expected[: ROWS // 2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_weights_after_the_updates_agree(one_rank: dict, two_ranks: dict) -> None:
    for variant, updates in {"padded": 1, "two_mini_batches": 4}.items():
        one, two = one_rank[variant]["weights"], two_ranks[variant]["weights"]
        assert one.keys() == two.keys() >= {"value_head.weight", "backbone.embed_tokens.weight"}
        # Adam's first step is nearly the sign of the gradient: elements whose gradient is rounding noise may differ.
        for name, tensor in one.items():
            close = torch.isclose(tensor, two[name], atol=1e-5 * updates)
            assert close.float().mean() > 0.98, (variant, name)


def run_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)


def test_the_backbone_is_the_lms_without_its_head(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    model = build_value_model(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    expected = {f"backbone.{name}" for name, _ in lm.model.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == expected | {"value_head.weight", "value_head.bias"}
    for name, weight in lm.model.named_parameters():
        assert torch.equal(model.backbone.get_parameter(name), weight)
    again = build_value_model(folder)
    assert torch.equal(model.value_head.weight, again.value_head.weight)
    assert model.value_head.weight.std().item() == pytest.approx(1 / 33, rel=0.5)


def test_a_token_that_pads_is_trained_as_any_other(tmp_path: Path) -> None:
    folder, rows, gradients = make_folder(tmp_path), torch.tensor([[5, 9, 2, 7, 2]]), []
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for pad in (2, 11):
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}), encoding="utf-8")
        backbone = build_value_model(folder).backbone
        backbone(input_ids=rows).last_hidden_state[..., 0].sum().backward()
        gradients.append(backbone.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients) and gradients[0][2].norm() > 1e-3


def test_it_learns_the_returns(tmp_path: Path) -> None:
    run_alone(tmp_path)
    try:
        _, critic = make_critic(make_folder(tmp_path / "model"), cliprange_value=10.0)
        batch = make_batch()
        losses = []
        for _ in range(40):
            metrics = critic.update_critic(batch | {"values": critic.compute_values(batch)})
            losses.append(metrics["critic/vf_loss"])
        assert losses[-1] < 0.1 * losses[0]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]))
