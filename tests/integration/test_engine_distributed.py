"""Engines beside an FSDP2 actor, in a process group of two that the trainer made (run by torchrun)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from xbai.engine import SamplingParams, Scorer, load_engine
from xbai.errors import UserError
from xbai.sprm import SPRMConfig, StepRule, save_score_head


def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


def run_two_ranks(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=480, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split()) == ["rank0-done", "rank1-done"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("hf", marks=pytest.mark.long), "vllm"])
def test_each_rank_has_an_engine_of_its_own(name: str, make_tiny_model: Callable[..., Path]) -> None:
    if name == "vllm":
        needs_vllm()
    run_two_ranks("own", name, *(str(make_tiny_model(tied=True, seed=seed)) for seed in (0, 1)))


@pytest.mark.parametrize(
    "tied", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.long)]
)
def test_two_ranks_share_an_engine(tied: bool, make_tiny_model: Callable[..., Path]) -> None:
    needs_vllm()
    folder = make_tiny_model(tied=tied)
    every_other_token = SPRMConfig(StepRule("en", step_ids=tuple(range(0, 262, 2))))
    save_score_head(folder, torch.load(folder / "score_module.pt", weights_only=True), every_other_token)
    run_two_ranks("shared", str(folder))


def use_own_engine(name: str, folder: str, actor_folder: str) -> None:
    rank = dist.get_rank()
    actor = AutoModelForCausalLM.from_pretrained(actor_folder, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for layer in actor.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(actor, mesh=mesh)
    reference = reference_model(actor_folder)
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


def use_shared_engine(folder: str) -> None:
    """Ranks agree on what they sample without a seed, score it as a whole model would, and each notices a weight of its
    own part that is wrong."""
    rank = dist.get_rank()
    fused = {"pass_config": {"fuse_allreduce_rms": True}}
    options = {"tensor_parallel_size": 2, "compilation_config": fused}
    engine = load_engine("vllm", folder, dtype="float32", max_model_len=64, **options)
    assert not engine._llm.vllm_config.compilation_config.pass_config.fuse_allreduce_rms
    torch.manual_seed(rank)
    [completions] = engine.generate([[1, 2, 3]], SamplingParams(n=3, max_tokens=20), return_scores=True)
    sampled = [one.token_ids for one in completions]
    everyones: list[list[list[int]]] = [[], []]
    dist.all_gather_object(everyones, sampled)
    assert everyones[0] == everyones[1]
    expected = Scorer.from_folder(folder, dtype="float32").score([[1, 2, 3, *ids] for ids in sampled], [3] * 3)
    assert any(len(scored.step_scores) > 3 for scored in expected)
    for one, scored in zip(completions, expected, strict=True):
        assert one.step_scores == pytest.approx(scored.step_scores, abs=1e-4)

    weights = {name: weight.detach() for name, weight in reference_model(folder).named_parameters()}
    head = torch.load(f"{folder}/score_module.pt", weights_only=True)
    weights |= {f"score_head.{name}": weight for name, weight in head.items()}
    load = engine._load_weights
    for victim in weights:
        engine._load_weights = lambda given, victim=victim: load(first_value_changed(given, victim, rank == 0))
        if rank == 0:
            with pytest.raises(UserError, match=f"^weight sync: {victim} is not in the engine as it was sent"):
                engine.update_weights(weights.items(), check=True)
        else:
            engine.update_weights(weights.items(), check=True)
    # A scorer has all of the model, and a rank now only a part of what is new.
    with pytest.raises(UserError, match="score once before the first update"):
        engine.score([[1, 2, 3, 4]], [0])
    engine.close()
    check_float32_logits(folder)


def check_float32_logits(folder: str) -> None:
    """Of another engine of these ranks, in bfloat16, of whose LM head each holds a part."""
    engine = load_engine(
        "vllm", folder, dtype="bfloat16", head_dtype="float32", max_model_len=64, tensor_parallel_size=2
    )
    model = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    states: list[torch.Tensor] = []
    model.logits_processor.register_forward_pre_hook(lambda _, arguments: states.append(arguments[1][-1:].clone()))
    params = SamplingParams(max_tokens=20, temperature=0, log_probs=True, ignore_eos=True)
    [[completion]] = engine.generate([[1, 2, 3]], params)
    head = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).lm_head.weight.detach()
    exact, tokens = (torch.cat(states).float() @ head.float().T).log_softmax(-1).max(-1)
    assert tokens.tolist() == completion.token_ids
    assert completion.log_probs == pytest.approx(exact.tolist(), abs=1e-5)
    engine.close()


def first_value_changed(
    weights: Iterable[tuple[str, torch.Tensor]], victim: str, here: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in weights:
        if name == victim and here:
            weight = weight.clone()
            weight.view(-1)[0] += 0.25
        yield name, weight


def reference_model(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run_rank(kind: str, *arguments: str) -> None:
    dist.init_process_group("gloo")
    {"own": use_own_engine, "shared": use_shared_engine}[kind](*arguments)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    sys.stdout.write(f"rank{dist.get_rank()}-done\n")
    sys.stdout.flush()
    # torch's threads are not waited for: their end at exit has aborted a process that had done all of the above.
    os._exit(0)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
