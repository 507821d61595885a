"""Decoder layers that torch.compile makes kernels of train as they do without; also the program of the ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from tiny import PROMPT, padded_rows, tiny_lm
from torch import Tensor

from verl.models.fsdp import create_mesh, init_distributed, named_full_tensors, shard_model
from verl.models.joint_model import JointModel
from verl.models.loading import build_joint_model
from verl.models.packing import layout_maker
from verl.models.ulysses import sequence_parallel_group
from xbai.engine.packed_attention import PACKED_ATTENTION
from xbai.sprm import ScoreHead

RANKS, UPDATES, TOKENS = 2, 3, 20
# Whether sequences are packed, ranks that share a sequence, and whether layers are computed again.
WAYS = {"padded": (False, 1, False), "packed": (True, 1, True), "shared": (True, 2, True)}


def test_layers_are_compiled_where_it_is_asked_for(tiny_model_dir: Path) -> None:
    for compiled in (False, True):
        layers = build_joint_model(tiny_model_dir, compile_layers=compiled).lm.model.layers
        assert {layer._compiled_call_impl is not None for layer in layers} == {compiled}


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_updates_are_the_same(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(RANKS), __file__, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt")
    for way in WAYS:
        plain, compiled = found[way, False], found[way, True]
        assert compiled["graphs"] > 0 == plain["graphs"]
        torch.testing.assert_close(compiled["losses"], plain["losses"], rtol=1e-5, atol=1e-6)
        assert len(plain["losses"].unique()) == UPDATES and plain["losses"].abs().max() < 1000
        torch.testing.assert_close(compiled["weights"], plain["weights"], rtol=1e-4, atol=1e-5)


def train(way: str, compiled: bool) -> dict[str, Tensor | dict[str, Tensor] | int]:
    """Losses and weights of some updates on micro-batches of several sizes, each after a forward pass in evaluation."""
    packed, sharers, checkpointing = WAYS[way]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lm = tiny_lm(tie_word_embeddings=False)
    if packed:
        lm.set_attn_implementation(PACKED_ATTENTION)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in lm.model.layers if compiled else ():
        layer.compile(dynamic=True)
    torch.manual_seed(1)
    model = shard_model(JointModel(lm, ScoreHead(32, dropout=0.0)), create_mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_layout = layout_maker(packed, torch.device("cpu"), sequence_parallel_group(sharers))
    losses = []
    for update in range(UPDATES):
        layout = make_layout(rows_of_rank(update, sharers))
        with torch.no_grad():
            model.eval()(layout)
        output = model.train()(layout, compute_entropy=True)
        # Sums, which a rank without a token of its own has too, of about as many tokens.
        loss = 0.1 * output.entropy.sum() - output.log_probs.sum() + output.step_logits.square().sum()
        (loss / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = {name: tensor.clone() for name, tensor in named_full_tensors(model)}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"losses": torch.stack(losses), "weights": weights, "graphs": graphs}


def rows_of_rank(update: int, sharers: int) -> dict[str, Tensor]:
    """Fewer with every update; the same ones for ranks that share them."""
    rows = padded_rows(torch.Generator().manual_seed(update))
    rows["step_feature_mask"] = (rows["input_ids"] % 3 == 0) & rows["attention_mask"].bool()
    rows["step_feature_mask"][:, :PROMPT] = False
    groups = RANKS // sharers
    return {name: column.chunk(groups)[dist.get_rank() // sharers][update:] for name, column in rows.items()}


if __name__ == "__main__":
    init_distributed()
    results = {(way, compiled): train(way, compiled) for way in WAYS for compiled in (False, True)}
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "found.pt")
    dist.destroy_process_group()
