"""8-bit Adam on two real ranks (gloo): it updates like Adam, in a fraction of the memory, and its state can be loaded.

This file is also the program that the ranks run (see `launch`).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import adam
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from verl.models.fsdp import create_mesh, init_distributed
from verl.optim.eight_bit_adam import check_eight_bit
from verl.optim.optimizers import build_optimizer
from xbai.errors import UserError

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install 'torchao>=0.18,<0.19'"
)
CONFIG = {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95]}
STEPS = 3


def make_model(seed: int) -> nn.Module:
    """129 rows on two ranks: shards of 65 and 64 rows, of which torchao keeps only the second in 8 bits; and a bias
    that only one rank has."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 129), nn.ReLU(), nn.Linear(129, 1), nn.Linear(1, 128))
    return fully_shard(model, mesh=create_mesh())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        model(torch.randn(16, 128, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = get_optimizer_state_dict(model, optimizer)["state"]
    return {
        f"{name}.{key}": (value if key == "step" else value.full_tensor()).clone()
        for name, values in state.items()
        for key, value in values.items()
    }


def run_training(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("AdamW", "AdamW8bit", "Adam8bit"):
        model = make_model(seed=0)
        optimizer = build_optimizer(model.named_parameters(), adam(**CONFIG, name=name))
        found[name] = {"weights": steps(model, optimizer), "state": state_of(model, optimizer)}
        if name == "AdamW8bit":
            found["kinds"] = [type(state["exp_avg"]).__name__ for state in optimizer.state.values()]
            dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "optimizer")
    kinds: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(kinds, found["kinds"])
    return found | {"kinds": kinds, "loaded": run_loading(folder)}


def run_loading(folder: Path) -> dict[str, Any]:
    """On however many ranks, into either optimiser."""
    found: dict[str, Any] = {}
    for name in ("AdamW", "AdamW8bit"):
        model = make_model(seed=1)
        optimizer = build_optimizer(model.named_parameters(), adam(**CONFIG, name=name))
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / "optimizer")
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
        found[name] = {"state": state_of(model, optimizer), "weights": steps(model, optimizer, count=1)}
    return found


def launch(mode: str, ranks: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, mode, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{mode}.pt", weights_only=False)


@needs_torchao
@pytest.mark.slow
def test_eight_bits_update_like_adam_and_go_through_a_checkpoint(tmp_path: Path) -> None:
    trained = launch("train", 2, tmp_path)
    assert "OptimState8bit" in trained["kinds"][1] and trained["kinds"][0] != trained["kinds"][1]
    start = trained["AdamW"]["weights"]
    for small, plain in zip(trained["AdamW8bit"]["weights"], start, strict=True):
        assert (small - plain).abs().max() < 0.2 * STEPS * CONFIG["lr"]
    assert not torch.equal(trained["AdamW8bit"]["weights"][0], trained["Adam8bit"]["weights"][0])
    for name, plain in trained["AdamW"]["state"].items():
        small = trained["AdamW8bit"]["state"][name]
        assert (small - plain).norm() <= 0.1 * plain.norm(), name

    for loaded in (trained["loaded"], launch("load", 1, tmp_path)):
        for optimizer in ("AdamW", "AdamW8bit"):
            for name, saved in trained["AdamW8bit"]["state"].items():
                found = loaded[optimizer]["state"][name]
                assert (found - saved).norm() <= 0.02 * saved.norm(), (optimizer, name)
        for small, plain in zip(loaded["AdamW8bit"]["weights"], loaded["AdamW"]["weights"], strict=True):
            assert (small - plain).abs().max() < 0.1 * CONFIG["lr"]


def test_without_torchao_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"^optim\.name=AdamW8bit needs torchao \(pip install .*; or use AdamW$"):
        check_eight_bit("AdamW8bit", "cpu")


if __name__ == "__main__":
    init_distributed()
    run = {"train": run_training, "load": run_loading}[sys.argv[1]]
    result = run(Path(sys.argv[2]))
    if dist.get_rank() == 0:
        torch.save(result, Path(sys.argv[2]) / f"{sys.argv[1]}.pt")
    dist.destroy_process_group()
