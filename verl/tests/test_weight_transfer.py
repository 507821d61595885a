"""Weights that go from one process to others arrive as they were, whatever the size of a bucket.

This file is also the program of the ranks (see `ranks.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fsdp_section, tiny_lm
from torch import Tensor

from verl.models.fsdp import named_full_tensors
from verl.models.joint_model import JointModel
from verl.workers.placed_model import PlacedModel
from verl.workers.weight_transfer import WeightReceiver, WeightSender
from xbai.errors import UserError
from xbai.sprm import ScoreHead

TIMEOUT_S = 60.0

Named = list[tuple[str, Tensor]]


def connected(receivers: int, bucket_bytes: int) -> tuple[WeightSender, list[WeightReceiver]]:
    """Both ends in this process."""
    store, ends = dist.HashStore(), 1 + receivers
    with ThreadPoolExecutor(ends) as threads:
        sender = threads.submit(WeightSender, store, ends, TIMEOUT_S, bucket_bytes)
        others = [threads.submit(WeightReceiver, store, rank, ends, TIMEOUT_S, bucket_bytes) for rank in range(1, ends)]
        return sender.result(), [other.result() for other in others]


def are_same(found: Named, expected: Named) -> bool:
    return [name for name, _ in found] == [name for name, _ in expected] and all(
        one.dtype == other.dtype and torch.equal(one, other)
        for (_, one), (_, other) in zip(found, expected, strict=True)
    )


tensors = st.tuples(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(tensors, min_size=1, max_size=6),
    bucket_bytes=st.integers(1, 300),
    receivers=st.integers(1, 2),
    check=st.booleans(),
)
def test_what_is_sent_arrives(
    sizes: list[tuple[list[int], torch.dtype, bool]], bucket_bytes: int, receivers: int, check: bool
) -> None:
    check = check and all(all(shape) for shape, _, _ in sizes)
    generator = torch.Generator().manual_seed(0)
    sender, others = connected(receivers, bucket_bytes)
    for _ in range(2):
        weights = [
            (f"weight {number}", turned(torch.randn(shape, generator=generator).to(dtype), is_turned))
            for number, (shape, dtype, is_turned) in enumerate(sizes)
        ]
        with ThreadPoolExecutor(receivers) as threads:
            arriving: list[Future[Named]] = [threads.submit(lambda one=one: list(one.receive())) for one in others]
            sender.send(weights, check)
            assert all(are_same(found.result(), weights) for found in arriving)


def turned(tensor: Tensor, is_turned: bool) -> Tensor:
    """The same values in another order in memory, if `is_turned`."""
    return tensor.T.contiguous().T if is_turned and tensor.dim() == 2 else tensor


def test_what_changes_on_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, (receiver,) = connected(1, 8)
    broadcast = receiver._broadcast

    def damaged(data: Tensor) -> None:
        broadcast(data)
        data[0] ^= 1

    monkeypatch.setattr(receiver, "_broadcast", damaged)
    with ThreadPoolExecutor(1) as threads:
        arriving = threads.submit(lambda: next(receiver.receive()))
        sender.send([("lm_head.weight", torch.ones(1, 2))], check=True)
        with pytest.raises(UserError, match=r"weight sync: lm_head\.weight did not arrive as it was sent"):
            arriving.result()


def run_rank() -> None:
    """Ranks 0 and 1 are a policy, sharded over both, 2 and 3 its rollout workers, each two with default groups of their
    own; all weights must arrive at both, twice."""
    rank, side = int(os.environ["RANK"]), "policy" if int(os.environ["RANK"]) < 2 else "rollout"
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(side, store), rank=rank % 2, world_size=2)
    lm = tiny_lm()
    model = JointModel(lm, ScoreHead(lm.config.hidden_size))
    expected = [(name.removeprefix("lm."), weight.detach().clone()) for name, weight in model.named_parameters()]
    placed = PlacedModel(model, fsdp_section()).model if side == "policy" else None
    sender = WeightSender(store, 3, TIMEOUT_S, bucket_bytes=1000) if rank == 0 else None
    receiver = WeightReceiver(store, rank - 1, 3, TIMEOUT_S, bucket_bytes=1000) if side == "rollout" else None
    for number in range(2):
        if receiver is not None:
            assert are_same(list(receiver.receive()), expected)
            store.set(f"{number} has arrived at {rank}", "")
        elif placed is not None and sender is not None:
            sender.send(named_full_tensors(placed), check=True)
        elif placed is not None:
            deque(named_full_tensors(placed), maxlen=0)
        store.wait([f"{number} has arrived at {receiver}" for receiver in (2, 3)])
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_policy_ranks_feed_two_rollout_ranks() -> None:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), "4", __file__]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    run_rank()
