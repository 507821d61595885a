"""An engine a rank beside an FSDP2 actor, in a process group of two that the trainer made (run by torchrun)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from xbai.engine import SamplingParams, load_engine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "vllm"])
def test_each_rank_has_an_engine_of_its_own(name: str, make_tiny_model: Callable[..., Path]) -> None:
    if importlib.util.find_spec(name if name == "vllm" else "transformers") is None:
        pytest.skip("vLLM is not installed")
    folders = [str(make_tiny_model(tied=True, seed=seed)) for seed in (0, 1)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, name, *folders], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split()) == ["rank0-done", "rank1-done"]


def run_rank(name: str, folder: str, actor_folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    actor = AutoModelForCausalLM.from_pretrained(actor_folder, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for layer in actor.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(actor, mesh=mesh)
    reference = AutoModelForCausalLM.from_pretrained(actor_folder, dtype=torch.float32)
    random_state = torch.get_rng_state()
    engine = load_engine(name, folder, dtype="float32", max_model_len=64)
    assert torch.equal(torch.get_rng_state(), random_state)

    for _ in range(2):
        engine.update_weights((name, weight.full_tensor()) for name, weight in actor.state_dict().items())
        # Ranks with unequal work must not wait for each other inside an engine.
        prompts = [[1, 2, 3 + rank]] * (1 + 3 * rank)
        params = SamplingParams(max_tokens=8 + 20 * rank, seed=1, log_probs=True)
        for prompt, [completion] in zip(prompts, engine.generate(prompts, params), strict=True):
            logits = reference(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert (expected - torch.tensor(completion.log_probs)).abs().max() < 1e-4
        actor(torch.tensor([[1, 2, 3, 4]])).logits.logsumexp(-1).mean().backward()

    engine.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    sys.stdout.write(f"rank{rank}-done\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
